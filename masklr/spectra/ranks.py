"""Ranks of a spectrum: how many directions count."""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from masklr.spectra.checks import normalized, relative_to_largest


def effective_rank(sigma: Float[Tensor, " r"]) -> Float64[Tensor, ""]:
    r"""Exponential of the entropy of the normalized singular values.

    .. math:: \exp\bigl(-\sum_i p_i \log p_i\bigr), \qquad p_i = \sigma_i / \sum_j \sigma_j

    Between 1 (one direction) and r (flat spectrum); unchanged if the matrix is scaled.
    Zero singular values add nothing, so no epsilon is needed.

    Args:
        sigma: Singular values, non-negative, in any order.

    Returns:
        A scalar, in directions (a real-valued count).

    Raises:
        ValueError: All singular values are zero.

    Example:
        >>> effective_rank(torch.tensor([1.0, 1.0, 1.0, 1.0]))
        tensor(4., dtype=torch.float64)

    Reference:
        Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    # entr(0) is 0, its limit. Adding an epsilon instead would give a flat spectrum of
    # 2048 values an effective rank above 2048.
    return torch.special.entr(normalized(sigma)).sum().exp()


def spectral_entropy(sigma: Float[Tensor, " r"], normalized: bool = True) -> Float64[Tensor, ""]:
    r"""Entropy of the normalized singular values, as a fraction of its maximum.

    .. math:: -\sum_i p_i \log p_i \,/ \log r, \qquad p_i = \sigma_i / \sum_j \sigma_j

    Between 0 (one direction) and 1 (flat spectrum); for comparing shapes. A spectrum of one value is flat: 1.

    Args:
        sigma: Singular values, non-negative, in any order.
        normalized: Whether to divide by log r; otherwise the entropy in nats, the logarithm of the effective rank.

    Returns:
        A scalar, a fraction or in nats.

    Raises:
        ValueError: All singular values are zero.

    Example:
        >>> spectral_entropy(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        tensor(0.9232, dtype=torch.float64)

    Reference:
        Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    entropy = effective_rank(sigma).log()
    if not normalized:
        return entropy
    return entropy / math.log(len(sigma)) if len(sigma) > 1 else torch.ones_like(entropy)


def stable_rank(sigma: Float[Tensor, " r"]) -> Float64[Tensor, ""]:
    r"""Squared Frobenius norm over squared spectral norm.

    .. math:: \sum_i \sigma_i^2 / \sigma_1^2

    Between 1 and r; unchanged if the matrix is scaled; governed by the largest value and blind to the tail.

    Args:
        sigma: Singular values, non-negative, in any order.

    Returns:
        A scalar, in directions (a real-valued count).

    Raises:
        ValueError: All singular values are zero.

    Example:
        >>> stable_rank(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        tensor(1.8750, dtype=torch.float64)

    Reference:
        Rudelson and Vershynin, "Sampling from large matrices", JACM 2007.
    """
    relative = relative_to_largest(sigma, "sigma")
    return relative.square().sum()


def nuclear_rank(sigma: Float[Tensor, " r"]) -> Float64[Tensor, ""]:
    r"""Squared nuclear norm over squared Frobenius norm.

    .. math:: (\sum_i \sigma_i)^2 / \sum_i \sigma_i^2

    Between 1 and r; unchanged if the matrix is scaled. It relates the penalty that dropout induces, a squared nuclear
    norm, to that of weight decay on the product.

    Args:
        sigma: Singular values, non-negative, in any order.

    Returns:
        A scalar, in directions (a real-valued count).

    Raises:
        ValueError: All singular values are zero.

    Example:
        >>> nuclear_rank(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        tensor(3.3333, dtype=torch.float64)

    Reference:
        Cavazza et al., "Dropout as a low-rank regularizer for matrix factorization", AISTATS 2018.
    """
    relative = relative_to_largest(sigma, "sigma")
    return relative.sum().square() / relative.square().sum()


def numerical_rank(sigma: Float[Tensor, " r"], rtol: float = 1e-3) -> Float64[Tensor, ""]:
    r"""Number of singular values above a fraction of the largest.

    .. math:: \#\{i : \sigma_i > \mathrm{rtol}\, \sigma_1\}

    Between 1 and r. Training never leaves exact zeros, so the tolerance is far above rounding.

    Args:
        sigma: Singular values, non-negative, in any order.
        rtol: Fraction of the largest singular value, in [0, 1).

    Returns:
        A scalar, in directions (a whole number).

    Raises:
        ValueError: All singular values are zero, or `rtol` is outside [0, 1).

    Example:
        >>> numerical_rank(torch.tensor([1.0, 0.5, 1e-4]))
        tensor(2., dtype=torch.float64)

    Reference:
        Golub and Van Loan, "Matrix Computations", 4th edition, section 5.4.
    """
    if not 0 <= rtol < 1:
        raise ValueError(f"Expected `rtol` in [0, 1), got {rtol}.")
    return (relative_to_largest(sigma, "sigma") > rtol).double().sum()


def energy_rank(sigma: Float[Tensor, " r"], fraction: float) -> Float64[Tensor, ""]:
    r"""Smallest number of directions that hold a fraction of the energy, the sum of squared singular values.

    .. math:: \min\{k : \sum_{i \le k} \sigma_i^2 \ge \mathrm{fraction} \sum_i \sigma_i^2\}

    Between 1 and r, in whole steps: the rank at which truncation leaves a squared error of 1 - fraction.

    Args:
        sigma: Singular values, non-negative, in any order.
        fraction: Share of the energy, in (0, 1].

    Returns:
        A scalar, in directions (a whole number).

    Raises:
        ValueError: All singular values are zero, or `fraction` is outside (0, 1].

    Example:
        >>> energy_rank(torch.tensor([4.0, 3.0, 2.0, 1.0]), 0.9)
        tensor(3., dtype=torch.float64)

    Reference:
        Jolliffe, "Principal Component Analysis", 2nd edition, section 6.1.1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"Expected `fraction` in (0, 1], got {fraction}.")
    energy = relative_to_largest(sigma, "sigma").square().sort(descending=True).values.cumsum(0)
    # 90 of 100 equal values hold 0.9 of the energy, whichever way the sum was rounded.
    rounding = len(energy) * torch.finfo(torch.float64).eps
    return (energy < fraction * energy[-1] * (1 - rounding)).double().sum() + 1


def participation_ratio(eigenvalues: Float[Tensor, " r"]) -> Float64[Tensor, ""]:
    r"""Squared sum of the eigenvalues of a covariance over the sum of their squares.

    .. math:: (\sum_i \lambda_i)^2 / \sum_i \lambda_i^2

    Between 1 and r; unchanged if the data are scaled. N samples of white D-dimensional data give D / (1 + (D + 1) / N).

    Args:
        eigenvalues: Eigenvalues of the covariance (squared singular values of the centered features, up to a factor),
            non-negative, in any order.

    Returns:
        A scalar, in directions (a real-valued count).

    Raises:
        ValueError: All eigenvalues are zero.

    Example:
        >>> participation_ratio(torch.tensor([4.0, 3.0, 2.0, 1.0]) ** 2)
        tensor(2.5424, dtype=torch.float64)

    Reference:
        Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement", bioRxiv 214262, 2017.
    """
    relative = relative_to_largest(eigenvalues, "eigenvalues")
    return relative.sum().square() / relative.square().sum()


def rankme(sigma: Float[Tensor, " r"], eps: float = 1e-7) -> Float64[Tensor, ""]:
    r"""RankMe, the effective rank with an epsilon added after normalizing.

    .. math:: \exp\bigl(-\sum_i q_i \log q_i\bigr), \qquad q_i = \sigma_i / \sum_j \sigma_j + \epsilon

    For comparison with published numbers. Defined on singular values of features that are not centered. The epsilon
    moves it: 512 values read 1.0008 instead of 1 if one is not zero, and 512.14 instead of 512 if all are equal.

    Args:
        sigma: Singular values, non-negative, in any order.
        eps: Added to each normalized value; 1e-7 in the paper.

    Returns:
        A scalar, in directions (a real-valued count).

    Raises:
        ValueError: All singular values are zero.

    Example:
        >>> rankme(torch.ones(512))
        tensor(512.1373, dtype=torch.float64)

    Reference:
        Garrido et al., "RankMe: assessing the downstream performance of pretrained self-supervised representations by
        their rank", ICML 2023.
    """
    return torch.special.entr(normalized(sigma) + eps).sum().exp()
