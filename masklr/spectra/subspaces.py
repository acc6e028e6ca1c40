"""The leading singular subspace of a matrix, and how two subspaces lie to each other."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from masklr.spectra.decompositions import float64, singular_values_and_gram

Side = Literal["left", "right"]


class Leading(NamedTuple):
    """A spectrum and the subspace of its largest values.

    Attributes:
        sigma: All singular values, descending.
        basis: Orthonormal columns, the leading singular vectors of one side, on the CPU.
    """

    sigma: Float64[Tensor, " r"]
    basis: Float64[Tensor, "n k"]


def leading_subspace(matrix: Float[Tensor, "rows cols"], rank: int, side: Side = "left") -> Leading:
    r"""All singular values, and the singular vectors of the largest ones.

    .. math:: M = U \Sigma V^T, \qquad \text{basis} = U_{:, :k} \text{ or } V_{:, :k}

    Exact: eigenvectors of the Gram matrix of the smaller side, in float64; those of the other side from them. A Gram
    matrix squares the condition number, so that directions below 1e-6 of the largest value are rounding; they are left
    out, and so are those of a matrix of zeros.

    Args:
        matrix: Any real floating type; bfloat16 and float16 are cast first.
        rank: Largest number of vectors, k, at least 1.
        side: Left vectors, of `rows` entries (directions of a layer's outputs), or right ones, of `cols` (of inputs).

    Returns:
        The spectrum, on the matrix's device, and min(rank, directions there are) columns, in float64.

    Raises:
        ValueError: `rank` is below 1, the matrix is empty, or an entry is not finite.

    Example:
        >>> leading_subspace(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 1).basis.abs()
        tensor([[0.],
                [1.],
                [0.]], dtype=torch.float64)

    Reference:
        Golub and Van Loan, "Matrix Computations", 4th edition, section 8.6.
    """
    if rank < 1:
        raise ValueError(f"Expected `rank` of at least 1, got {rank}.")
    sigma, squares = singular_values_and_gram(matrix)
    count = min(rank, int((sigma > 1e-6 * sigma[0]).sum()))
    columns = matrix.T if side == "left" else matrix  # whose right vectors are asked for
    if count == 0:
        return Leading(sigma, torch.zeros(columns.shape[1], 0, dtype=torch.float64))
    vectors = _leading_eigenvectors(squares, count)
    if (side == "right") == (matrix.shape[0] >= matrix.shape[1]):  # the side of which the Gram matrix is
        return Leading(sigma, vectors)
    # M times a vector of one side is sigma_i times that of the other; QR takes out the lengths, and what rounding left.
    rows = float64(columns.T)
    images = (rows @ vectors.to(rows.device)).cpu()
    return Leading(sigma, torch.linalg.qr(images / sigma[0].item()).Q)


def _leading_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, largest first, by LAPACK's solver for a part of the spectrum."""
    from scipy.linalg import eigh  # slow to import

    size = len(symmetric)
    vectors = eigh(symmetric.cpu().numpy(), subset_by_index=(size - count, size - 1), check_finite=False)[1]
    return torch.from_numpy(vectors.copy()).flip(1)


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


def _orthonormal(Q: Tensor, name: str) -> Tensor:
    Q = float64(Q)
    error = (Q.T @ Q - torch.eye(Q.shape[1], dtype=torch.float64, device=Q.device)).abs().max().item()
    if not error < 1e-3:
        raise ValueError(f"Expected orthonormal columns of `{name}`, got an error of {error:.3g}.")
    return Q
