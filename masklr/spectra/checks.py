"""What is a spectrum at all: checked, in float64, on a scale where squares neither overflow nor vanish."""

import math

import torch
from jaxtyping import Float, Float64

from masklr.spectra.decompositions import float64


def normalized(sigma: Float[torch.Tensor, " r"]) -> Float64[torch.Tensor, " r"]:
    """Singular values over their sum, in float64.

    Args:
        sigma: Singular values, non-negative, in any order.

    Returns:
        Non-negative values that sum to one.

    Raises:
        ValueError: All singular values are zero, or one is negative or not finite.

    Example:
        >>> normalized(torch.tensor([3.0, 1.0]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    relative = relative_to_largest(sigma, "sigma")
    return relative / relative.sum()


def checked(values: torch.Tensor, name: str) -> torch.Tensor:
    """Values in float64, if they are a spectrum at all."""
    values = float64(values)
    if not len(values):
        raise ValueError(f"Expected `{name}` with at least one value, got none.")
    smallest, largest = (v.item() for v in values.aminmax())
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise ValueError(f"Expected finite `{name}`, got values from {smallest} to {largest}.")
    if smallest < 0:
        raise ValueError(f"Expected non-negative `{name}`, got {smallest}.")
    return values


def relative_to_largest(values: torch.Tensor, name: str) -> torch.Tensor:
    """Values over the largest, so that squares and sums neither overflow nor vanish."""
    values = checked(values, name)
    largest = values.max()
    if largest == 0:
        raise ValueError(f"Expected `{name}` with a value above zero, got {len(values)} zeros.")
    return values / largest


def relative_above(eigenvalues: torch.Tensor, rtol: float) -> torch.Tensor:
    """Eigenvalues above a fraction of the largest, over the largest, descending."""
    if not 0 <= rtol < 1:
        raise ValueError(f"Expected `rtol` in [0, 1), got {rtol}.")
    relative = relative_to_largest(eigenvalues, "eigenvalues").sort(descending=True).values
    return relative[relative > rtol]
