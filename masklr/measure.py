"""What `masklr measure` does: the spectra of a model's weights, without a trainer; a table, files and a picture."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from masklr.matrices import Product, named_matrices
from masklr.names import did_you_mean
from masklr.products import null_product_singular_values
from masklr.spectra import check_measures, effective_rank, null_singular_values, singular_values
from masklr.spectra import measures as measures_of
from masklr.state_dicts import state_dict_matrices

MEASURES = ("stable_rank", "effective_rank", "frobenius_norm")


class MatrixSpectrum(NamedTuple):
    """What was found of one matrix.

    Attributes:
        shape: Rows and columns.
        sigma: Singular values, descending, in float64, on the CPU.
        null: Those of a Gaussian matrix (of a product of Gaussian matrices) of that shape.
        values: Measures by name; with `effective_rank` comes `effective_rank_null`, that of `null`.
    """

    shape: tuple[int, int]
    sigma: Tensor
    null: Tensor
    values: dict[str, float]


def measure(
    model: nn.Module | Mapping[str, Tensor],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    measures: Sequence[str] = MEASURES,
    attention_products: bool = False,
    products: Sequence[Sequence[str]] = (),
) -> dict[str, MatrixSpectrum]:
    """Spectra of the weight matrices of a model, or of a state dict, by name.

    Args:
        model: Any module, or tensors by key, as `masklr.state_dicts.checkpoint_state_dict` reads them from a file.
            Which matrices these are is said in `masklr.matrices.measured_matrices` and
            `masklr.state_dicts.state_dict_matrices`.
        include: Patterns of matrices to measure (`*` does not cross a dot, `**` does); all if None.
        exclude: Patterns of matrices to leave out.
        measures: Names of functions in `masklr.spectra`.
        attention_products: Whether the products of each head of each attention are measured too; of a model only.
        products: Chains of patterns of layers whose product is measured too, the first layer first; of a model only.

    Returns:
        Spectra in the order of the model's layers.

    Raises:
        ValueError: A pattern matches nothing, a measure is unknown, a weight is not finite, or products are asked of a
            state dict.

    Example:
        >>> found = measure(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> {name: spectrum.shape for name, spectrum in found.items()}
        {'0': (4, 8), '2': (2, 4)}
        >>> list(found["0"].values)
        ['stable_rank', 'effective_rank', 'frobenius_norm', 'effective_rank_null']
    """
    check_measures(measures)
    if isinstance(model, nn.Module):
        named = named_matrices(
            model, include=include, exclude=exclude, attention_products=attention_products, products=products
        )
        return {
            name: _spectrum(
                name, matrix.value(), matrix.shape, measures, matrix if isinstance(matrix, Product) else None
            )
            for name, matrix in named.items()
        }
    if attention_products or products:
        raise ValueError(
            "Expected a model for `attention_products` and `products`: a state dict does not say how layers are joined."
        )
    matrices = state_dict_matrices(model, include=include, exclude=exclude)
    return {name: _spectrum(name, m, (len(m), m.shape[1]), measures) for name, m in matrices.items()}


def _spectrum(
    name: str, matrix: Tensor, shape: tuple[int, int], measures: Sequence[str], product: Product | None = None
) -> MatrixSpectrum:
    try:
        sigma = singular_values(matrix).cpu()
    except ValueError as error:
        raise ValueError(f"Matrix {name!r} cannot be measured: {error}") from error
    null = null_product_singular_values(product.widths) if product else null_singular_values(*shape)
    values = measures_of(sigma, measures)
    if "effective_rank" in values:
        values["effective_rank_null"] = effective_rank(null).item()
    return MatrixSpectrum(shape, sigma, null, values)


def timm_model(name: str, pretrained: bool = False) -> nn.Module:
    """A timm model with its pretrained weights, or with random ones, always the same.

    Args:
        name: Name in timm, with or without a tag of weights.
        pretrained: Whether to take the pretrained weights, which are downloaded if they are not there.

    Raises:
        ValueError: timm has no such model, or the weights cannot be had.
    """
    import timm

    if not timm.is_model(name) and not name.startswith(("hf-hub:", "hf_hub:")):
        near = did_you_mean(name, timm.list_models())
        raise ValueError(f"Expected a checkpoint file or the name of a timm model, got {name!r}{near}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return timm.create_model(name, pretrained=pretrained)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"Cannot make {name!r}{' with pretrained weights' * pretrained}: {reason}") from error


# ------------------------------------------------------------------------------------------------ table and files


def table(spectra: Mapping[str, MatrixSpectrum]) -> str:
    """A row for each matrix: shape and measures, an effective rank with that of a Gaussian matrix; then the means.

    Args:
        spectra: As `measure` returns them.
    """
    names = _columns(spectra)
    head = ["matrix", "shape", *(name.replace("effective_rank_null", "(null)").replace("_", " ") for name in names)]
    rows = [
        [name, f"{found.shape[0]} x {found.shape[1]}", *(_number(found.values.get(column)) for column in names)]
        for name, found in spectra.items()
    ]
    by_column = [[found.values[column] for found in spectra.values() if column in found.values] for column in names]
    means = ["mean", "", *(_number(sum(values) / len(values) if values else None) for values in by_column)]
    widths = [max(len(row[i]) for row in (head, *rows, means)) for i in range(len(head))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (head, *rows, means)]
    rule = "-" * len(lines[0])
    return "\n".join(line.rstrip() for line in (lines[0], rule, *lines[1:-1], rule, lines[-1]))


def _columns(spectra: Mapping[str, MatrixSpectrum]) -> list[str]:
    """Measures of any matrix, the null beside the effective rank."""
    names = list(dict.fromkeys(name for found in spectra.values() for name in found.values))
    if "effective_rank_null" in names:
        names.remove("effective_rank_null")
        names.insert(names.index("effective_rank") + 1, "effective_rank_null")
    return names


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:#.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def write(folder: Path, spectra: Mapping[str, MatrixSpectrum], title: str) -> list[Path]:
    """Write `spectra.csv` (the table), `spectra.npz` (all singular values by matrix) and `spectra.png`, all or none.

    Args:
        folder: Where to; made if it is not there. Files of these names are replaced.
        spectra: As `measure` returns them.
        title: Title of the picture: whose weights these are.

    Returns:
        The files.

    Raises:
        ValueError: The folder cannot be written to.
    """
    from masklr.spectra_figure import spectra_figure

    figure = spectra_figure(spectra, title)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        _write_csv(temporary / "spectra.csv", spectra)
        arrays: dict[str, Any] = {name: found.sigma.numpy() for name, found in spectra.items()}
        np.savez(temporary / "spectra.npz", **arrays)
        figure.savefig(temporary / "spectra.png", format="png")
        folder.mkdir(exist_ok=True)
        return [path.replace(folder / path.name) for path in sorted(temporary.iterdir())]
    except OSError as error:
        raise ValueError(f"Cannot write into {folder} (`out`): {error.strerror}.") from error
    finally:
        for path in temporary.glob("*") if temporary.is_dir() else ():
            path.unlink()
        if temporary.is_dir():
            temporary.rmdir()


def _write_csv(path: Path, spectra: Mapping[str, MatrixSpectrum]) -> None:
    names = _columns(spectra)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["matrix", "rows", "cols", *names])
        for name, found in spectra.items():
            writer.writerow([name, *found.shape, *(found.values.get(column, "") for column in names)])
