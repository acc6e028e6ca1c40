"""Matrices to singular values: exact, by the fastest way that is exact for the shape; Gram matrices; the null."""

import math
import warnings
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor


def float64(x: Tensor) -> Tensor:
    """A detached copy in float64, on the CPU where the device has none."""
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()


def singular_values(matrix: Float[Tensor, "rows cols"]) -> Float64[Tensor, " r"]:
    r"""Exact singular values, by the fastest way that its shape and spectrum allow.

    .. math:: \sigma_i(M) = \lambda_i(M^T M)^{1/2}

    A Gram matrix in float64 takes a quarter of the time of an SVD of 768 x 3072, but squares the condition number: it
    cannot see below some 1e-8 of the largest value. Its eigenvalues are taken only where that bounds the error of the
    spectral entropy by 1e-10, and that of power laws of the values above 1e-6 of the first by 1e-6; otherwise (a
    rank-one matrix, a tail of zeros) there follows an SVD in float64.

    Args:
        matrix: Any real floating type; bfloat16 and float16 are cast first.

    Returns:
        min(rows, cols) values, descending, on the matrix's device (on the CPU where that has no float64).

    Raises:
        ValueError: The matrix is empty, or an entry is not finite.

    Example:
        >>> singular_values(torch.tensor([[0.0, 3.0], [4.0, 0.0]]))
        tensor([4., 3.], dtype=torch.float64)

    Reference:
        Golub and Van Loan, "Matrix Computations", 4th edition, section 8.6.
    """
    return singular_values_and_gram(matrix)[0]


def singular_values_and_gram(
    matrix: Float[Tensor, "rows cols"],
) -> tuple[Float64[Tensor, " r"], Float64[Tensor, "r r"]]:
    """Singular values as `singular_values` gives them, and the Gram matrix of the smaller side that they came from.

    Args:
        matrix: Any real floating type; bfloat16 and float16 are cast first.

    Returns:
        min(rows, cols) values, descending; and M M^T or M^T M, whichever is smaller, up to a factor.

    Raises:
        ValueError: The matrix is empty, or an entry is not finite.

    Example:
        >>> singular_values_and_gram(torch.tensor([[0.0, 3.0], [4.0, 0.0]]))[1]
        tensor([[16.,  0.],
                [ 0.,  9.]], dtype=torch.float64)
    """
    matrix = float64(matrix)
    if not matrix.numel():
        raise ValueError(f"Expected a matrix with entries, got the shape {tuple(matrix.shape)}.")
    smallest, largest = (extreme.item() for extreme in matrix.aminmax())
    largest = max(-smallest, largest) if math.isfinite(smallest) else abs(smallest)
    if not math.isfinite(largest):
        raise ValueError(f"Expected finite entries of `matrix`, got the largest magnitude {largest}.")
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    # Squares of values near the ends of float64 would overflow or vanish; a power of two rounds nothing.
    scale = 1.0 if largest == 0 or 1e-100 < largest < 1e100 else 2.0 ** math.floor(math.log2(largest))
    if scale != 1:
        tall = tall / scale
    squares = gram(tall)
    if largest == 0 or len(squares) == 1:
        return torch.linalg.vector_norm(tall, dim=0) * scale, squares
    try:
        eigenvalues = torch.linalg.eigvalsh(squares).flip(0)
        if _resolved(eigenvalues):
            return eigenvalues.sqrt() * scale, squares
    except torch.linalg.LinAlgError:
        pass
    return _svdvals(tall) * scale, squares


def gram(x: Float[Tensor, "n d"]) -> Float64[Tensor, "d d"]:
    r"""Gram matrix in float64, whatever the type of the input.

    .. math:: X^T X

    Rows are cast a chunk at a time, so memory beyond the input is of order d^2; blocks below the diagonal are copied
    from those above.

    Args:
        x: One sample a row.

    Returns:
        A symmetric d x d matrix, on the input's device (on the CPU where that has no float64).

    Example:
        >>> gram(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.],
                [2., 4.]], dtype=torch.float64)
    """
    dim = x.shape[1]
    width = dim if dim < 256 else -(-dim // 4)
    starts = range(0, dim, width)
    result: Tensor | None = None
    for rows in x.detach().split(4096):
        block = float64(rows)
        if result is None:
            result = block.new_zeros(dim, dim)
        for start in starts:
            columns = block[:, start : start + width]
            result[start : start + width, start:].addmm_(columns.T, block[:, start:])
    if result is None:
        return float64(x).new_zeros(dim, dim)
    for start in starts:
        result[start + width :, start : start + width] = result[start : start + width, start + width :].T
    return result


@lru_cache(maxsize=256)
def _null_singular_values(rows: int, cols: int, centered: bool, seed: int) -> Tensor:
    degrees = rows - centered
    size = min(degrees, cols)
    draw = np.random.default_rng((seed, rows, cols))
    factor = np.triu(draw.standard_normal((size, size)), 1)
    np.fill_diagonal(factor, np.sqrt(draw.chisquare(max(degrees, cols) - np.arange(size))))
    sigma = singular_values(torch.from_numpy(factor))
    return torch.cat([sigma, sigma.new_zeros(min(rows, cols) - size)])


def null_singular_values(rows: int, cols: int, *, centered: bool = False, seed: int = 0) -> Float64[Tensor, " r"]:
    r"""Singular values of a matrix of independent standard Gaussian entries: what a rank means if nothing was learned.

    Drawn as those of the triangular factor of its QR decomposition, whose entries are independent:

    .. math:: R_{ii} \sim \chi_{n - i + 1}, \qquad R_{ij} \sim N(0, 1) \text{ for } i < j

    so that a million samples cost as much as a hundred. Values are kept: a second call is free.

    Args:
        rows: Rows of the matrix, or number of samples.
        cols: Columns of the matrix, or number of features.
        centered: Whether the mean row is subtracted first, which takes one degree of freedom.
        seed: Seed of a generator of its own; global generators are not touched.

    Returns:
        min(rows, cols) values, descending, on the CPU.

    Raises:
        ValueError: `rows` or `cols` is below 1, or `rows` below 2 for centered samples.

    Example:
        >>> null_singular_values(100, 3).shape
        torch.Size([3])

    Reference:
        Bartlett, "On the theory of statistical regression", Proc. Royal Society of Edinburgh 1933.
    """
    if cols < 1 or rows < 1 + centered:
        raise ValueError(f"Expected `rows` of at least {1 + centered} and `cols` of at least 1, got {rows} and {cols}.")
    return _null_singular_values(rows, cols, centered, seed).clone()


def _resolved(eigenvalues: Tensor) -> bool:
    """Whether a Gram matrix's eigenvalues give the spectrum's entropy to 1e-10, and power laws of its tail to 1e-6.

    An eigenvalue is off by up to some 8 units of rounding of the largest (seen: 7.4 at size 768, over random
    orthogonal factors), its root by that over twice the root, or by the root of the rounding at zero.
    """
    if not eigenvalues[0] > 0:
        return False
    relative = (eigenvalues / eigenvalues[0]).clamp(min=0)
    rounding = 8 * torch.finfo(torch.float64).eps
    sigma = relative.sqrt()
    total = sigma.sum()
    error = (rounding / (2 * sigma)).clamp(max=math.sqrt(rounding)) / total
    p = sigma / total
    # The entropy moves by |log p| for each unit of p, and by 1 for normalizing.
    entropy_error = (error * (1 - torch.maximum(p, error).log())).sum()
    entropy = torch.special.entr(p).sum()
    # Power laws are fitted to logarithms of eigenvalues, all alike: what counts is the mean of their relative errors.
    power_law_error = (rounding / relative[relative > 1e-12]).mean()
    # Far stricter than a measure needs: two processes, whose sums differ in the last digit, are to agree to 1e-9. A
    # matrix that is not close to singular passes all the same.
    return bool(entropy_error <= 1e-10 * entropy) and bool(power_law_error <= 1e-7) and bool(eigenvalues[-1] >= 0)


def _svdvals(matrix: Tensor) -> Tensor:
    """SVD by divide and conquer, or by the slower QR iteration where that does not converge."""
    try:
        sigma = torch.linalg.svdvals(matrix)
    except torch.linalg.LinAlgError:
        sigma = None
    if sigma is None or not sigma.isfinite().all():
        from scipy.linalg import svd  # slow to import; needed in this rare case alone

        warnings.warn("SVD by divide and conquer did not converge; took QR iteration.", stacklevel=2)
        values = svd(matrix.cpu().numpy(), compute_uv=False, lapack_driver="gesvd")
        sigma = torch.from_numpy(values).to(matrix.device)
    return sigma
