"""Norms of a matrix, from its singular values."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from masklr.spectra.checks import checked


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
    return checked(sigma, "sigma").sum()


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
    return torch.linalg.vector_norm(checked(sigma, "sigma"))


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
    return checked(sigma, "sigma").max()
