r"""Spectra that masks leave: closed-form minimizers of the error of a product of matrices plus the induced penalty.

For a network x -> U V^T x of width d, dropout on the hidden units has an expected loss of

.. math:: \|Y - M\|_F^2 + \kappa \, \bigl(\|M\|^{sp}_{(r)}\bigr)^2, \qquad
    \kappa = \lambda r / d, \quad \lambda = p / (1 - p)

at the best factors of a product M, with groups of r units (r = 1: the squared nuclear norm). Y is the map of least loss
times C^(1/2), C the second moment of the inputs, M the network's map times C^(1/2), and s are the singular values of Y:
for an autoencoder the roots of the eigenvalues of C. At the minimum M has the singular vectors of Y.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from masklr.theory.arguments import check_integer, check_non_negative, spectrum


def shrunk_spectrum(
    s: Float[Tensor, " r"], kappa: float, block_size: int = 1, weight_decay: float = 0.0
) -> Float64[Tensor, " r"]:
    r"""Singular values of the best product under dropout or DropBlock.

    .. math:: \sigma_i = \frac{\eta_i}{\eta_i + \kappa} \, s_i, \qquad
        \eta_i = \mathrm{clip}(c \, s_i - \kappa, 0, 1), \quad \sum_i \eta_i = \mathrm{block\_size}

    Large values are divided by 1 + kappa, those below are lowered by one threshold, the smallest are zero; with groups
    of one (dropout) there is the threshold alone, kappa times the nuclear norm of the result. Scales with s. At least
    one value survives; a flat spectrum is shrunk but never cut, as is one of at most `block_size` values. Weight decay
    lowers s by itself first, as soft thresholding does.

    Args:
        s: Singular values of the target, non-negative, in any order. Of a network narrower than that pass the `width`
            largest.
        kappa: Coefficient of the squared norm, at least 0: `mask_variance(p) * block_size / width`.
        block_size: Units in a group, r, at least 1.
        weight_decay: Coefficient mu of `|U|^2 + |V|^2` beside the sum of squares, at least 0, in the unit of s; torch's
            `weight_decay` is 2 mu. Exact if C is the identity.

    Returns:
        Singular values of the minimizer, in the order of s.

    Raises:
        ValueError: `s` is negative or not finite, or a number is below its range.

    Example:
        >>> shrunk_spectrum(torch.tensor([4.0, 3.0, 2.0, 1.0]), kappa=3 / 4)
        tensor([1.9000, 0.9000, 0.0000, 0.0000], dtype=torch.float64)

    Reference:
        Cavazza et al., "Dropout as a low-rank regularizer for matrix factorization", AISTATS 2018; Pal, Lane, Vidal and
        Haeffele, "On the regularization properties of structured dropout", CVPR 2020.
    """
    check_non_negative(kappa, "kappa")
    check_non_negative(weight_decay, "weight_decay")
    _check_block_size(block_size)
    values = (spectrum(s) - weight_decay).clamp(min=0)
    if kappa == 0:
        return values
    if block_size >= int((values > 0).sum()):
        return values / (1 + kappa)
    full, threshold = _regimes(values, kappa, block_size)
    return torch.where(full, values / (1 + kappa), (values - threshold).clamp(min=0))


def shrunk_value(
    s: Float[Tensor, " r"], kappa: float, block_size: int = 1, weight_decay: float = 0.0, width: int | None = None
) -> Float64[Tensor, ""]:
    r"""Least expected loss under dropout or DropBlock: the objective at `shrunk_spectrum`.

    .. math:: \sum_i (s_i - \sigma_i)^2 + \kappa \, \|\sigma\|_{(r)}^2 + 2 \mu \sum_i \sigma_i

    with the squared r-support norm, which is the squared sum of sigma at r = 1. To compare with a measured loss add
    what no linear map can fit, and for C not the identity leave out weight decay.

    Args:
        s: Singular values of the target, non-negative, in any order.
        kappa: Coefficient of the squared norm, at least 0: `mask_variance(p) * block_size / width`.
        block_size: Units in a group, r, at least 1.
        weight_decay: Coefficient mu of `|U|^2 + |V|^2`, at least 0.
        width: Hidden units, which limit the rank: the values of s beyond are lost whole. No limit when None.

    Returns:
        A scalar, in the unit of s squared.

    Raises:
        ValueError: `s` is negative or not finite, or a number is below its range.

    Example:
        >>> shrunk_value(torch.tensor([4.0, 3.0, 2.0, 1.0]), kappa=3 / 4)
        tensor(19.7000, dtype=torch.float64)

    Reference:
        Cavazza et al., "Dropout as a low-rank regularizer for matrix factorization", AISTATS 2018.
    """
    if width is not None:
        check_integer(width, "width")
    if width is not None and width < 1:
        raise ValueError(f"Expected `width` of at least 1, got {width}.")
    values = spectrum(s).sort(descending=True).values
    reached, lost = values[:width], values[len(values) if width is None else width :]
    sigma = shrunk_spectrum(reached, kappa, block_size, weight_decay)
    penalty = kappa * k_support_norm(sigma, block_size).square() + 2 * weight_decay * sigma.sum()
    return (reached - sigma).square().sum() + penalty + lost.square().sum()


def k_support_norm(sigma: Float[Tensor, " r"], k: int) -> Float64[Tensor, ""]:
    r"""k-support norm of singular values: the norm of the matrix that dropping groups of k units penalizes.

    .. math:: \|\sigma\|_{(k)}^2 =
        \min\Bigl\{\sum_i \frac{\sigma_i^2}{\eta_i} : 0 \le \eta_i \le 1, \sum_i \eta_i \le k\Bigr\}

    Its unit ball is the convex hull of matrices of rank k and Frobenius norm 1. The nuclear norm at k = 1, the
    Frobenius norm, which lowers no rank, once k is at least the rank.

    Args:
        sigma: Singular values, non-negative, in any order.
        k: Number of directions, at least 1.

    Returns:
        A scalar, in the unit of the matrix.

    Raises:
        ValueError: `sigma` is negative or not finite, or `k` is below 1.

    Example:
        >>> k_support_norm(torch.tensor([3.0, 1.0, 1.0]), k=1)
        tensor(5., dtype=torch.float64)
        >>> k_support_norm(torch.tensor([3.0, 4.0]), k=2)
        tensor(5., dtype=torch.float64)

    Reference:
        Argyriou, Foygel and Srebro, "Sparse prediction with the k-support norm", NeurIPS 2012; McDonald, Pontil and
        Stamos, "Spectral k-support norm regularization", NeurIPS 2014.
    """
    check_integer(k, "k")
    if k < 1:
        raise ValueError(f"Expected `k` of at least 1, got {k}.")
    values = spectrum(sigma, "sigma").sort(descending=True).values
    if k >= len(values):
        return torch.linalg.vector_norm(values)
    # The `head` largest have eta = 1, the others share the rest in proportion; a split is possible if none of them
    # would exceed 1, and the best possible one is the minimum.
    head = torch.arange(k, device=values.device)
    rest = values.flip(0).cumsum(0).flip(0)[head]
    squares = torch.cat([values.new_zeros(1), values.square().cumsum(0)])[head]
    possible = values[head] * (k - head) <= rest
    return torch.where(possible, squares + rest.square() / (k - head), torch.inf).min().sqrt()


def critical_variances(s: Float[Tensor, " r"], width: int) -> Float64[Tensor, " r-1"]:
    r"""Mask variances at which the rank of the best product under dropout drops below 2, 3, ... r.

    .. math:: \lambda_k = \frac{d \, s_k}{\sum_{i < k} (s_i - s_k)}, \qquad k = 2, \dots, r

    The rank is at least k if and only if `mask_variance(p)` is below the entry of k; as a drop probability it is
    `lambda / (1 + lambda)`. Descending; infinite where the first k values are equal, since a flat spectrum is never
    cut; 0 where s_k is 0 or k is beyond the width. Rank one always survives.

    Args:
        s: Singular values of the target, non-negative, in any order.
        width: Hidden units, d, at least 1.

    Returns:
        One variance for each k from 2 to r, without unit.

    Raises:
        ValueError: `s` is negative or not finite, or `width` is below 1.

    Example:
        >>> critical_variances(torch.tensor([4.0, 3.0, 2.0, 1.0]), width=4)
        tensor([12.0000,  2.6667,  0.6667], dtype=torch.float64)

    Reference:
        Mianjy, Arora and Vidal, "On the implicit bias of dropout", ICML 2018; Cavazza et al., "Dropout as a low-rank
        regularizer for matrix factorization", AISTATS 2018.
    """
    check_integer(width, "width")
    if width < 1:
        raise ValueError(f"Expected `width` of at least 1, got {width}.")
    values = spectrum(s).sort(descending=True).values
    # The gaps to the values before, from the gaps between neighbors: equal values leave no rounding.
    count = torch.arange(1, len(values), device=values.device)
    gaps = ((values[:-1] - values[1:]) * count).cumsum(0)
    last = values[1:]
    critical = torch.where((last > 0) & (gaps == 0), torch.inf, width * last / torch.where(gaps > 0, gaps, 1))
    return torch.where((last > 0) & (count < width), critical, 0)


def _check_block_size(block_size: int) -> None:
    check_integer(block_size, "block_size")
    if block_size < 1:
        raise ValueError(f"Expected `block_size` of at least 1, got {block_size}.")


def _regimes(values: Tensor, kappa: float, block_size: int) -> tuple[Tensor, Tensor]:
    """Which values have eta = 1, and the threshold kappa / c that the others are lowered by.

    As a function of the threshold t, eta is clip(kappa (s - t) / t, 0, 1): its sum falls, from the number of positive
    values to 0, with corners where a value leaves one of the three regimes. A binary search among the corners finds the
    regimes; the threshold then solves a linear equation.
    """

    def eta(threshold: Tensor) -> Tensor:
        return (kappa * (values - threshold) / threshold).clamp(0, 1)

    positive = values[values > 0]
    corners = torch.cat([positive, positive * (kappa / (1 + kappa))]).sort().values
    low, high = 0, len(corners) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if eta(corners[middle]).sum() >= block_size else (low, middle)
    inside = (corners[low] + corners[high]) / 2
    full, shared = eta(inside) == 1, (eta(inside) > 0) & (eta(inside) < 1)
    if not shared.any():  # a gap in the spectrum: the block_size largest are kept, and any threshold in the gap will do
        return full, inside
    count = int(shared.sum())
    return full, kappa * values[shared].sum() / (block_size - int(full.sum()) + kappa * count)
