"""Singular values of products of matrices, without the products: what several layers do together.

A product through a narrow layer (the queries and keys of a head) is a large matrix of small rank. Its singular values
are those of a matrix of the size of that rank, made from the triangular factors of its two halves.
"""

from collections.abc import Sequence
from functools import lru_cache, reduce
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from masklr.spectra.decompositions import float64, singular_values


def product_core(factors: Sequence[Float[Tensor, "_ _"]]) -> Float64[Tensor, "rows cols"]:
    r"""A small matrix with the singular values of a product.

    .. math:: W_L \cdots W_1 = Q_a R_a R_b^T Q_b^T, \qquad \text{core} = R_a R_b^T

    The product is cut at its narrowest layer of width w into two halves, and a half longer than w is replaced by its
    triangular factor. What is left out are zeros and rotations, so this is exact: nothing is squared.

    Args:
        factors: Matrices (out, in), the first one applied first; each has as many columns as the one before has rows.

    Returns:
        The core, with at most w rows or w columns; its singular values are the product's, less zeros.

    Raises:
        ValueError: No factor, or factors whose sizes do not fit.

    Example:
        >>> core = product_core([torch.ones(1, 300), torch.ones(200, 1)])
        >>> core.shape, round(float(core.abs()), 6)  # of (200, 300), rank 1
        (torch.Size([1, 1]), 244.948974)

    Reference:
        Golub and Van Loan, "Matrix Computations", 4th edition, section 8.6.
    """
    widths = product_widths([(factor.shape[0], factor.shape[1]) for factor in factors])
    waist = widths.index(min(widths))
    first, last = ([float64(factor) for factor in half] for half in (factors[:waist], factors[waist:]))
    if not first or not last:
        return _chain(first or last)
    return _triangle(_chain(last)) @ _triangle(_chain(first).T).T


def product_widths(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Widths of a chain of layers, its input's first.

    Args:
        shapes: (out, in) of each factor, the first one applied first.

    Raises:
        ValueError: No factor, or factors whose sizes do not fit.

    Example:
        >>> product_widths([(3072, 768), (10, 3072)])
        [768, 3072, 10]
    """
    if not shapes:
        raise ValueError("Expected `factors` with at least one matrix, got none.")
    for (rows, _), (_, cols) in pairwise(shapes):
        if rows != cols:
            raise ValueError(f"Expected `factors` that fit, got {cols} columns after {rows} rows.")
    return [shapes[0][1], *(rows for rows, _ in shapes)]


def null_product_singular_values(widths: Sequence[int], *, seed: int = 0) -> Float64[Tensor, " r"]:
    """Singular values of a product of independent standard Gaussian matrices: what a rank means if nothing was learned.

    A product of random matrices is far from flat, so a product is not to be compared with one random matrix. Values are
    kept: a second call is free.

    Args:
        widths: Widths of the layers, the input's first: factor i is a matrix (widths[i + 1], widths[i]).
        seed: Seed of a generator of its own; global generators are not touched.

    Returns:
        min(widths) values, descending, on the CPU.

    Raises:
        ValueError: Fewer than two widths, or one below 1.

    Example:
        >>> null_product_singular_values([768, 64, 768]).shape
        torch.Size([64])
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"Expected two or more `widths` of at least 1, got {list(widths)}.")
    return _null_product_singular_values(tuple(widths), seed).clone()


@lru_cache(maxsize=64)
def _null_product_singular_values(widths: tuple[int, ...], seed: int) -> Tensor:
    return singular_values(product_core(null_factors(widths, seed)))


def null_factors(widths: Sequence[int], seed: int = 0) -> list[Float64[Tensor, "_ _"]]:
    """Independent standard Gaussian matrices (widths[i + 1], widths[i]), on the CPU.

    Args:
        widths: Widths of the layers, the input's first.
        seed: Seed of a generator of its own.
    """
    draw = np.random.default_rng((seed, *widths))
    return [torch.from_numpy(draw.standard_normal((rows, cols))) for cols, rows in pairwise(widths)]


def _chain(factors: list[Tensor]) -> Tensor:
    return reduce(lambda product, factor: factor @ product, factors)


def _triangle(half: Tensor) -> Tensor:
    """The triangular factor of a tall matrix; a square one as it is."""
    return torch.linalg.qr(half, mode="r").R if half.shape[0] > half.shape[1] else half
