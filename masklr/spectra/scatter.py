"""The rank of classes against the scatter within them."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from masklr.spectra.decompositions import float64
from masklr.spectra.ranks import effective_rank


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
