"""Singular values to ranks and norms; subspaces.

Measures are scalars in float64. They take singular values `sigma` (or, where said, eigenvalues: their squares, up to a
factor) in any order, and raise where the number does not exist: an empty, negative or non-finite spectrum always, one
that is zero for every measure but the norms.

The same words mean other numbers elsewhere. Here every measure has one definition:

===================  ===================================  ============================================================
here                 elsewhere                            difference
===================  ===================================  ============================================================
effective_rank       entropy of sigma^2 / sum sigma^2     smaller: 2.94 instead of 3.60 for 4, 3, 2, 1. It is
                     ("spectral", "von Neumann")          `effective_rank` of the squared values.
effective_rank       of features that are not centered    an offset hides the rest. Callbacks center;
                                                          `effective_rank_uncentered` does not.
rankme               of centered features                 published numbers are of uncentered ones, and so is ours.
rankme               of eigenvalues                       published numbers are of singular values.
rankme               epsilon of 1e-5 instead of 1e-7      4,096 values of which one is not zero read 1.60, and
                                                          decaying ones 1 to 9 % more.
rankme               of a queue of training batches       stale, with augmentation and masks. Callbacks take the
                                                          evaluation path over the whole validation split.
stable_rank          called numerical rank                the same number.
numerical_rank       `torch.linalg.matrix_rank`           counts above max(rows, cols) * eps(dtype) of the first:
                                                          4.9e-4 at 4096 x 4096 in float32. Here above 1e-3.
energy_rank          cumulative share of sigma            larger: here of sigma^2, which is the error of truncation.
nuclear_rank         participation ratio of sigma         the same number.
participation_ratio  of sigma                             here of eigenvalues, the squares of sigma.
alpha_req            fitted over a chosen range           here from the first to the last above 1e-6 of the first in
                                                          sigma; `first` and `last` choose.
hill_alpha           WeightWatcher's alpha                a maximum likelihood fit above a threshold that is fitted
                                                          too. Hill's takes the upper half. Both are density exponents.
hill_alpha           exponent of the decay over rank      a decay of j^-a has a density exponent of 1 + 1/a.
lidar                roots of the eigenvalues             here eigenvalues are normalized.
===================  ===================================  ============================================================
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from masklr.decompositions import float64
from masklr.decompositions import gram as gram
from masklr.decompositions import null_singular_values as null_singular_values
from masklr.decompositions import singular_values as singular_values

# ------------------------------------------------------------------------------------------------ ranks of a spectrum


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
    relative = _relative(sigma, "sigma")
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
    relative = _relative(sigma, "sigma")
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
    return (_relative(sigma, "sigma") > rtol).double().sum()


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
    energy = _relative(sigma, "sigma").square().sort(descending=True).values.cumsum(0)
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
    relative = _relative(eigenvalues, "eigenvalues")
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


# ------------------------------------------------------------------------------------------------ norms


def nuclear_norm(sigma: Float[Tensor, " r"]) -> Float64[Tensor, ""]:
    r"""Sum of the singular values.

    .. math:: \|M\|_* = \sum_i \sigma_i

    Args:
        sigma: Singular values, non-negative, in any order.

    Returns:
        A scalar, in the unit of the matrix.

    Raises:
        ValueError: A singular value is negative or not finite.

    Example:
        >>> nuclear_norm(torch.tensor([4.0, 3.0]))
        tensor(7., dtype=torch.float64)

    Reference:
        Fazel, "Matrix rank minimization with applications", PhD thesis, Stanford 2002.
    """
    return _checked(sigma, "sigma").sum()


def frobenius_norm(sigma: Float[Tensor, " r"]) -> Float64[Tensor, ""]:
    r"""Square root of the sum of the squared singular values, and so of the squared entries.

    .. math:: \|M\|_F = \bigl(\sum_i \sigma_i^2\bigr)^{1/2}

    Args:
        sigma: Singular values, non-negative, in any order.

    Returns:
        A scalar, in the unit of the matrix.

    Raises:
        ValueError: A singular value is negative or not finite.

    Example:
        >>> frobenius_norm(torch.tensor([4.0, 3.0]))
        tensor(5., dtype=torch.float64)

    Reference:
        Golub and Van Loan, "Matrix Computations", 4th edition, section 2.3.
    """
    return torch.linalg.vector_norm(_checked(sigma, "sigma"))


def spectral_norm(sigma: Float[Tensor, " r"]) -> Float64[Tensor, ""]:
    r"""Largest singular value.

    .. math:: \|M\|_2 = \max_i \sigma_i

    Args:
        sigma: Singular values, non-negative, in any order.

    Returns:
        A scalar, in the unit of the matrix.

    Raises:
        ValueError: A singular value is negative or not finite.

    Example:
        >>> spectral_norm(torch.tensor([3.0, 4.0]))
        tensor(4., dtype=torch.float64)

    Reference:
        Golub and Van Loan, "Matrix Computations", 4th edition, section 2.3.
    """
    return _checked(sigma, "sigma").max()


# ------------------------------------------------------------------------------------------------ power laws

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
    relative = _tail(eigenvalues, rtol)
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
    relative = _tail(eigenvalues, rtol)
    tail = len(relative) // 2 if k is None else k
    if not 0 < tail < len(relative):
        raise ValueError(
            f"Expected `k` from 1 to {len(relative) - 1}, one less than the eigenvalues above `rtol`, got {tail}."
        )
    log_ratio = (relative[:tail] / relative[tail]).log().sum()
    if log_ratio <= EQUAL * tail:
        raise ValueError(f"Expected eigenvalues that differ, got {tail + 1} equal ones.")
    return 1 + tail / log_ratio


# ------------------------------------------------------------------------------------------------ subspaces


def lidar(between: Float[Tensor, "d d"], within: Float[Tensor, "d d"], delta: float = 1e-6) -> Float64[Tensor, ""]:
    r"""Effective rank of the between-class scatter, whitened by the within-class scatter.

    .. math:: \exp\bigl(-\sum_i p_i \log p_i\bigr), \qquad
        p_i = \lambda_i / \sum_j \lambda_j, \quad \lambda = \mathrm{eig}(S_w^{-1/2} S_b S_w^{-1/2}), \quad
        S_w \leftarrow S_w + \delta I

    Between 1 and d, and at most one less than the number of classes; a class is one image, its samples are
    augmentations. Eigenvalues, not their roots, are normalized.

    Args:
        between: Covariance of the class means, symmetric.
        within: Mean covariance within a class, symmetric.
        delta: Ridge on `within`, in its unit.

    Returns:
        A scalar, in directions (a real-valued count).

    Raises:
        ValueError: `between` is zero, `within` plus the ridge is not positive definite, or one is not finite.

    Example:
        >>> lidar(torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])), torch.diag(torch.tensor([1.0, 1.0, 1.0, 4.0])))
        tensor(2.9234, dtype=torch.float64)

    Reference:
        Thilak et al., "LiDAR: sensing linear probing performance in joint embedding SSL architectures", ICLR 2024.
    """
    for name, scatter in (("between", between), ("within", within)):
        if not scatter.isfinite().all():
            raise ValueError(f"Expected finite `{name}`, got NaN or infinity.")
    within = float64(within)
    factor, info = torch.linalg.cholesky_ex(within + delta * torch.eye(len(within), dtype=torch.float64).to(within))
    if info != 0:
        raise ValueError(
            f"Expected `within` plus `delta` to be positive definite, got a singular one at delta {delta}."
        )
    half = torch.linalg.solve_triangular(factor, float64(between), upper=False)
    # L^-1 Sb L^-T has the eigenvalues of Sw^-1/2 Sb Sw^-1/2.
    eigenvalues = torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.T, upper=False)).clamp(min=0)
    return effective_rank(eigenvalues)


def subspace_overlap(Qa: Float[Tensor, "n a"], Qb: Float[Tensor, "n b"]) -> Float64[Tensor, ""]:
    r"""Share of the smaller subspace that lies in the larger one.

    .. math:: \|Q_a^T Q_b\|_F^2 / \min(a, b) = \mathrm{mean}_i \cos^2 \theta_i

    Between 0 (orthogonal) and 1 (contained); two random ones have max(a, b) / n on average.

    Args:
        Qa: Orthonormal columns that span the first subspace.
        Qb: Orthonormal columns that span the second.

    Returns:
        A scalar, a fraction.

    Raises:
        ValueError: The columns are not orthonormal.

    Example:
        >>> subspace_overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
        tensor(0.5000, dtype=torch.float64)

    Reference:
        Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022, section 7.2.
    """
    cosines = _orthonormal(Qa, "Qa").T @ _orthonormal(Qb, "Qb")
    return cosines.square().sum() / min(cosines.shape)


def principal_angles(Qa: Float[Tensor, "n a"], Qb: Float[Tensor, "n b"]) -> Float64[Tensor, " k"]:
    r"""Angles between two subspaces.

    .. math:: \cos \theta_i = \sigma_i(Q_a^T Q_b), \qquad i = 1, \dots, \min(a, b)

    Each between 0 (shared direction) and pi/2. Small angles come from sines, since a cosine loses half the digits.

    Args:
        Qa: Orthonormal columns that span the first subspace.
        Qb: Orthonormal columns that span the second.

    Returns:
        Angles in radians, ascending.

    Raises:
        ValueError: The columns are not orthonormal.

    Example:
        >>> principal_angles(torch.eye(3)[:, :2], torch.eye(3)[:, 1:])
        tensor([0.0000, 1.5708], dtype=torch.float64)

    Reference:
        Björck and Golub, "Numerical methods for computing angles between linear subspaces", Math. Comp. 1973.
    """
    large, small = _orthonormal(Qa, "Qa"), _orthonormal(Qb, "Qb")
    if large.shape[1] < small.shape[1]:
        large, small = small, large
    overlap = large.T @ small
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)
    sines = torch.linalg.svdvals(small - large @ overlap).flip(0).clamp(max=1)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


# ------------------------------------------------------------------------------------------------ measures by name

MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "stable_rank": stable_rank,
    "effective_rank": effective_rank,
    "nuclear_rank": nuclear_rank,
    "numerical_rank": numerical_rank,
    "spectral_entropy": spectral_entropy,
    "energy_rank_90": lambda sigma: energy_rank(sigma, 0.90),
    "energy_rank_95": lambda sigma: energy_rank(sigma, 0.95),
    "energy_rank_99": lambda sigma: energy_rank(sigma, 0.99),
    "participation_ratio": lambda sigma: participation_ratio(float64(sigma).square()),
    "rankme": rankme,
    "alpha_req": lambda sigma: alpha_req(float64(sigma).square()),
    "hill_alpha": lambda sigma: hill_alpha(float64(sigma).square()),
    "frobenius_norm": frobenius_norm,
    "nuclear_norm": nuclear_norm,
    "spectral_norm": spectral_norm,
}

POWER_LAWS = ("alpha_req", "hill_alpha")  # measures of the tail, on singular values above 1e-6 of the first


def check_measures(names: Iterable[str]) -> None:
    """Raise unless every name is one of `MEASURES` or `energy_rank_{percent}`.

    Args:
        names: Names as in logged keys.

    Raises:
        ValueError: A name is unknown; the message has the nearest valid one.

    Example:
        >>> check_measures(["stable_rank", "energy_rank_80"])
    """
    for name in names:
        if name not in MEASURES and _percent(name) is None:
            nearest = difflib.get_close_matches(name, MEASURES, n=1, cutoff=0.0)[0]
            raise ValueError(f"Expected the name of a measure, such as {nearest}, got {name!r}.")


def measures(sigma: Float[Tensor, " r"], names: Iterable[str]) -> dict[str, float]:
    """Several measures of one spectrum, by the names under which they are logged.

    Args:
        sigma: Singular values, non-negative, in any order. `participation_ratio`, `alpha_req` and `hill_alpha` take
            their squares; `rankme` expects those of features that are not centered.
        names: Names in `MEASURES`, or `energy_rank_{percent}`.

    Returns:
        A number for each name, in that order. Of an exactly zero spectrum only the norms that were asked for: it has no
        rank. Nor has a spectrum of one direction, or a flat one, the power law that `alpha_req` or `hill_alpha` fit.

    Raises:
        ValueError: A name is unknown, or the spectrum negative or not finite.

    Example:
        >>> measures(torch.tensor([2.0, 2.0]), ["effective_rank", "frobenius_norm"])
        {'effective_rank': 2.0, 'frobenius_norm': 2.8284271247461903}
        >>> measures(torch.zeros(2), ["effective_rank", "frobenius_norm"])
        {'frobenius_norm': 0.0}
    """
    names = list(names)
    check_measures(names)
    sigma = _checked(sigma, "sigma").cpu()  # one transfer, instead of one a measure
    if not sigma.any():
        return {name: 0.0 for name in names if name.endswith("_norm")}
    return {name: _measure(name)(sigma).item() for name in names if not _lacks_power_law(name, sigma)}


def _lacks_power_law(name: str, sigma: Tensor) -> bool:
    if name not in POWER_LAWS:
        return False
    tail = _tail(sigma.square(), 1e-12)
    k = len(tail) // 2
    return len(tail) < 2 or (name == "hill_alpha" and bool((tail[:k] / tail[k]).log().mean() <= EQUAL))


def _percent(name: str) -> int | None:
    found = re.fullmatch(r"energy_rank_([1-9]\d?|100)", name)
    return int(found[1]) if found else None


def _measure(name: str) -> Callable[[Tensor], Tensor]:
    percent = _percent(name)
    return MEASURES[name] if percent is None else lambda sigma: energy_rank(sigma, percent / 100)


# ------------------------------------------------------------------------------------------------ checks and solvers


def normalized(sigma: Float[Tensor, " r"]) -> Float64[Tensor, " r"]:
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
    relative = _relative(sigma, "sigma")
    return relative / relative.sum()


def _checked(values: Tensor, name: str) -> Tensor:
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


def _relative(values: Tensor, name: str) -> Tensor:
    """Values over the largest, so that squares and sums neither overflow nor vanish."""
    values = _checked(values, name)
    largest = values.max()
    if largest == 0:
        raise ValueError(f"Expected `{name}` with a value above zero, got {len(values)} zeros.")
    return values / largest


def _tail(eigenvalues: Tensor, rtol: float) -> Tensor:
    """Eigenvalues above a fraction of the largest, over the largest, descending."""
    if not 0 <= rtol < 1:
        raise ValueError(f"Expected `rtol` in [0, 1), got {rtol}.")
    relative = _relative(eigenvalues, "eigenvalues").sort(descending=True).values
    return relative[relative > rtol]


def _orthonormal(Q: Tensor, name: str) -> Tensor:
    Q = float64(Q)
    error = (Q.T @ Q - torch.eye(Q.shape[1], dtype=torch.float64, device=Q.device)).abs().max().item()
    if not error < 1e-3:
        raise ValueError(f"Expected orthonormal columns of `{name}`, got an error of {error:.3g}.")
    return Q
