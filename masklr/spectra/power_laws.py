"""Exponents of a spectrum that decays as a power."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from masklr.spectra.checks import relative_above

# Equal eigenvalues differ by rounding, from which Hill's estimate would read an exponent of 1e15.
EQUAL = 1e-9


def alpha_req(
    eigenvalues: Float[Tensor, " r"], first: int = 1, last: int | None = None, rtol: float = 1e-12
) -> Float64[Tensor, ""]:
    r"""Exponent of the decay of the eigenvalues, by least squares on logarithms.

    .. math:: \lambda_j \sim j^{-\alpha}, \qquad \log \lambda_j = c - \alpha \log j

    Positive if the spectrum decays, 0 if it is flat; unchanged if the data are scaled. The samples bend the tail, so
    the range of the fit matters.

    Args:
        eigenvalues: Eigenvalues of the covariance, non-negative, in any order.
        first: First eigenvalue of the fit, counted from 1 at the largest.
        last: Last eigenvalue of the fit; the last one above `rtol` when None.
        rtol: Fraction of the largest eigenvalue up to which eigenvalues are left out, in [0, 1): singular values of a
            millionth of the first, which rounding in a second moment does not yet spoil.

    Returns:
        A scalar, without unit.

    Raises:
        ValueError: Fewer than two eigenvalues above `rtol` are in the range.

    Example:
        >>> alpha_req(torch.arange(1.0, 101.0) ** -1.5)
        tensor(1.5000, dtype=torch.float64)

    Reference:
        Agrawal et al., "alpha-ReQ: assessing representation quality in self-supervised learning by measuring
        eigenspectrum decay", NeurIPS 2022.
    """
    relative = relative_above(eigenvalues, rtol)
    last = len(relative) if last is None else min(last, len(relative))
    if first < 1 or last - first < 1:
        raise ValueError(f"Expected two eigenvalues above `rtol` between `first` and `last`, got {first} and {last}.")
    x = torch.arange(first, last + 1, dtype=torch.float64, device=relative.device).log()
    y = relative[first - 1 : last].log()
    x = x - x.mean()
    return -(x * y).sum() / x.square().sum()


def hill_alpha(eigenvalues: Float[Tensor, " n"], k: int | None = None, rtol: float = 1e-12) -> Float64[Tensor, ""]:
    r"""Hill's estimate of the exponent of the density of the eigenvalues.

    .. math:: 1 + k \Big/ \sum_{i \le k} \log \frac{\lambda_{(i)}}{\lambda_{(k+1)}}

    Above 1; unchanged if the matrix is scaled. A density exponent: eigenvalues that decay as j^-a have 1 + 1/a. It
    needs some 50 eigenvalues.

    Args:
        eigenvalues: Eigenvalues (squared singular values of a weight), non-negative, in any order.
        k: Number of largest eigenvalues in the tail; half of those above `rtol` when None.
        rtol: Fraction of the largest eigenvalue up to which eigenvalues are left out, in [0, 1), as in `alpha_req`.

    Returns:
        A scalar, without unit.

    Raises:
        ValueError: `k` is not below the number of eigenvalues above `rtol`, or the k + 1 largest are equal up to
            rounding.

    Example:
        >>> hill_alpha(torch.arange(1.0, 101.0) ** -1.5)
        tensor(1.6928, dtype=torch.float64)

    Reference:
        Hill, "A simple general approach to inference about the tail of a distribution", Annals of Statistics 1975;
        Martin and Mahoney, "Implicit self-regularization in deep neural networks", JMLR 2021.
    """
    relative = relative_above(eigenvalues, rtol)
    tail = len(relative) // 2 if k is None else k
    if not 0 < tail < len(relative):
        raise ValueError(
            f"Expected `k` from 1 to {len(relative) - 1}, one less than the eigenvalues above `rtol`, got {tail}."
        )
    log_ratio = (relative[:tail] / relative[tail]).log().sum()
    if log_ratio <= EQUAL * tail:
        raise ValueError(f"Expected eigenvalues that differ, got {tail + 1} equal ones.")
    return 1 + tail / log_ratio
