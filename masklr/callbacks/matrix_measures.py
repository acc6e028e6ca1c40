"""What the callbacks that measure matrices during training have in common: cadence, null values, overlaps."""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from masklr.callbacks.recording import with_means
from masklr.matrices import Product, Weight
from masklr.products import null_product_singular_values
from masklr.spectra import effective_rank, measures, null_singular_values, subspace_overlap

NonFinite = Literal["raise", "skip"]


class Cadence:
    """Every so many optimizer steps, once a step; the step stands still while gradients accumulate.

    Args:
        every_n_steps: Optimizer steps between measurements.

    Raises:
        ValueError: `every_n_steps` is below 1.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected `every_n_steps` of at least 1, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.last_step: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether this step is to be measured and was not yet."""
        return step % self.every_n_steps == 0 and step != self.last_step


def is_finite(matrix: Tensor, what: str, name: str, step: int, on_nonfinite: NonFinite) -> bool:
    """Whether all entries are finite.

    Args:
        matrix: What is to be measured.
        what: What it is, for the error.
        name: Whose it is, for the error.
        step: When, for the error.
        on_nonfinite: Whether to raise if not.

    Raises:
        ValueError: An entry is not, and `on_nonfinite` is "raise".
    """
    if matrix.isfinite().all():
        return True
    if on_nonfinite == "raise":
        raise ValueError(
            f"Expected finite {what} of {name!r}, got NaN or infinity at step {step} "
            "(`on_nonfinite: skip` leaves such a matrix out)."
        )
    return False


def values_of(sigma: Tensor, names: Sequence[str], matrix: Weight | Product) -> dict[str, float]:
    """Measures of a spectrum, with the effective rank of a random matrix, or product, of the same sizes.

    Args:
        sigma: Singular values.
        names: Names of measures.
        matrix: The matrix whose sizes the random one has.
    """
    values = measures(sigma, names)
    if "effective_rank" in values:
        values["effective_rank_null"] = effective_rank(null_of(matrix)).item()
    return values


def null_of(matrix: Weight | Product) -> Tensor:
    """Singular values of a Gaussian matrix, or a product of Gaussian matrices, of the same sizes.

    Args:
        matrix: The matrix whose sizes are taken.
    """
    if isinstance(matrix, Product):
        return null_product_singular_values(matrix.widths)
    return null_singular_values(*matrix.shape)


def overlaps(basis: Tensor, others: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Overlaps of a subspace with others, and what two random subspaces of these sizes have on average.

    Args:
        basis: Orthonormal columns.
        others: Orthonormal columns by the name of the key; None or no columns where there is no subspace.

    Returns:
        `{name}` for each subspace there is, and `overlap_null`, the largest size over the dimension.
    """
    found = {name: other for name, other in others.items() if other is not None and other.shape[1] and basis.shape[1]}
    if not found:
        return {}
    null = max(columns.shape[1] for columns in (basis, *found.values())) / basis.shape[0]
    return {name: subspace_overlap(basis, other).item() for name, other in found.items()} | {"overlap_null": null}


def with_means_by_kind(
    what: str, values: Mapping[str, Mapping[str, float]], matrices: Mapping[str, Weight | Product]
) -> dict[str, float]:
    """Keys and means as `with_means` gives them, products averaged apart: `{what}/mean_qk/{measure}` and so on.

    Args:
        what: First part of the keys.
        values: Measures by the name of the matrix.
        matrices: The matrices.
    """
    keys: dict[str, float] = {}
    for kind in ("", "qk", "ov", "product"):
        of_kind = {name: found for name, found in values.items() if getattr(matrices[name], "kind", "") == kind}
        named = with_means(what, of_kind)
        if kind:
            mean = f"{what}/mean/"
            named = {
                key.replace(mean, f"{what}/mean_{kind}/") if key.startswith(mean) else key: v
                for key, v in named.items()
            }
        keys |= named
    return keys
