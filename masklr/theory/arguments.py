"""What the functions of `masklr.theory` accept: casts to float64, and one sentence for everything else."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# A Gram matrix summed in float32 is symmetric, and has no eigenvalue below zero, up to some 1e-7 of the largest.
TOLERANCE = 1e-6

# Second moments found sound, with the count of in-place changes at which they were. A penalty is part of a training
# step, where looking at a matrix again would wait for the device each time.
_sound = WeakTensorKeyDictionary()


def float64(x: Float[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """A tensor in float64, differentiable; on the CPU where the device has no float64.

    Args:
        x: Any floating type.

    Returns:
        The same values.

    Example:
        >>> float64(torch.tensor([1.0]))
        tensor([1.], dtype=torch.float64)
    """
    return (x.cpu() if x.device.type == "mps" else x).double()


def check_tensor(x: Any, name: str, num_axes: int) -> None:
    """Raise unless a value is a tensor of real numbers with so many axes.

    Args:
        x: The value.
        name: The argument that it came by.
        num_axes: How many axes it must have.

    Raises:
        ValueError: It is no tensor, has another number of axes, or holds truth values or complex numbers.

    Example:
        >>> check_tensor(torch.ones(2), "s", 1)
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"Expected `{name}` to be a tensor, got a {type(x).__name__}.")
    if x.dtype == torch.bool or x.is_complex():
        raise ValueError(f"Expected `{name}` of real numbers, got {str(x.dtype).removeprefix('torch.')}.")
    if x.ndim != num_axes:
        raise ValueError(f"Expected `{name}` with {num_axes} ax{'i' if num_axes == 1 else 'e'}s, got {x.ndim}.")


def check_number(value: Any, name: str) -> None:
    """Raise unless a value is one real number.

    Args:
        value: The value.
        name: The argument that it came by.

    Raises:
        ValueError: It is of another type, or a truth value.

    Example:
        >>> check_number(2, "p")
    """
    is_number = isinstance(value, Tensor) and value.ndim == 0 and not (value.is_complex() or value.dtype == torch.bool)
    if isinstance(value, bool) or not (isinstance(value, Real) or is_number):
        raise ValueError(f"Expected `{name}` to be a number, got a {type(value).__name__}.")
    if isinstance(value, int) and abs(value) >= 2**63:  # torch computes with 64 bits
        raise ValueError(f"Expected `{name}` between -2^63 and 2^63, got an integer of {value.bit_length()} bits.")


def check_integer(value: Any, name: str) -> None:
    """Raise unless a value is one integer.

    Args:
        value: The value.
        name: The argument that it came by.

    Raises:
        ValueError: It is of another type, or has a fraction.

    Example:
        >>> check_integer(2, "block_size")
    """
    check_number(value, name)
    if not (math.isfinite(value) and value == int(value)):
        raise ValueError(f"Expected `{name}` to be an integer, got {value}.")


def check_probability(p: float, name: str = "p") -> None:
    """Raise unless a drop probability is in [0, 1).

    Args:
        p: The probability.
        name: The argument that it came by.

    Raises:
        ValueError: It is outside [0, 1) or not a number.

    Example:
        >>> check_probability(0.5)
    """
    check_number(p, name)
    if not 0 <= p < 1:
        raise ValueError(f"Expected `{name}` in [0, 1), got {p}.")


def check_non_negative(value: float, name: str) -> None:
    """Raise unless a number is finite and at least 0.

    Args:
        value: The number.
        name: The argument that it came by.

    Raises:
        ValueError: It is negative, infinite or not a number.

    Example:
        >>> check_non_negative(0.0, "kappa")
    """
    check_number(value, name)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"Expected finite `{name}` of at least 0, got {value}.")


def probabilities(p: float | Sequence[float], count: int, what: str) -> list[float]:
    """One drop probability a layer, checked.

    Args:
        p: One for all, or one each.
        count: Number of layers.
        what: Which layers, for the message.

    Returns:
        A list of `count` numbers in [0, 1).

    Raises:
        ValueError: One is outside [0, 1), or there is another number of them.

    Example:
        >>> probabilities(0.5, 2, "layer")
        [0.5, 0.5]
    """
    if isinstance(p, Real):
        check_probability(float(p))
        return [float(p)] * count
    if not isinstance(p, Sequence | Tensor) or isinstance(p, str) or getattr(p, "ndim", 1) != 1:
        raise ValueError(f"Expected `p` to be a number or one a {what}, got a {type(p).__name__}.")
    values = list(p)
    if len(values) != count:
        raise ValueError(f"Expected `p` with one probability a {what}, {count}, got {len(values)}.")
    for value in values:
        check_probability(value)
    return values


def check_second_moment(C: Float[Tensor, "rows cols"], size: int | None = None) -> None:
    """Raise unless a matrix can be a second moment: square, of the right size, finite and symmetric.

    A matrix is looked at once; after that, only if it was changed in place.

    Args:
        C: The matrix.
        size: Number of inputs; any when None.

    Raises:
        ValueError: It is not such a matrix.

    Example:
        >>> check_second_moment(torch.eye(3), 3)
    """
    check_tensor(C, "C", 2)
    rows, cols = C.shape
    if rows != cols or not rows:
        raise ValueError(f"Expected a square `C`, got the shape {(rows, cols)}.")
    if size not in (None, rows):
        raise ValueError(f"Expected `C` of the size of the input, {size}, got {rows}.")
    version = None if C.is_inference() else C._version
    if version is not None and _sound.get(C) == version:
        return
    scale = C.detach().abs().max().item()
    if not math.isfinite(scale):
        raise ValueError(f"Expected finite `C`, got the largest magnitude {scale}.")
    asymmetry = (C.detach() - C.detach().T).abs().max().item()
    if asymmetry > TOLERANCE * scale:
        raise ValueError(
            f"Expected symmetric `C`, got entries that differ by {asymmetry:.3g} from their mirror images."
        )
    if version is not None:
        _sound[C] = version


def semidefinite(C: Float[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """A second moment in float64, exactly symmetric, without the negative eigenvalues that sums in float32 left.

    Args:
        C: Symmetric and positive semi-definite up to rounding.

    Returns:
        A detached matrix.

    Raises:
        ValueError: It is not square, finite, symmetric and positive semi-definite.

    Example:
        >>> semidefinite(torch.eye(2))
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    check_second_moment(C)
    matrix = float64(C.detach())
    matrix = (matrix + matrix.T) / 2
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    smallest, largest = eigenvalues[0].item(), eigenvalues[-1].item()
    if smallest < -TOLERANCE * max(largest, 0.0):
        raise ValueError(f"Expected positive semi-definite `C`, got an eigenvalue of {smallest:.3g}.")
    if smallest >= -len(matrix) * torch.finfo(torch.float64).eps * largest:
        return matrix  # singular up to the rounding of this decomposition; another would turn exact zeros into noise
    clipped = (vectors * eigenvalues.clamp(min=0)) @ vectors.T
    return (clipped + clipped.T) / 2


def spectrum(s: Float[Tensor, " r"], name: str = "s") -> Float64[Tensor, " r"]:
    """Singular values in float64, checked.

    Args:
        s: Singular values, in any order.
        name: The argument that they came by.

    Returns:
        The same values, detached.

    Raises:
        ValueError: There is none, or one is negative or not finite.

    Example:
        >>> spectrum(torch.tensor([2.0, 1.0]))
        tensor([2., 1.], dtype=torch.float64)
    """
    check_tensor(s, name, 1)
    values = float64(s.detach())
    if not len(values):
        raise ValueError(f"Expected `{name}` with at least one value, got none.")
    smallest, largest = (value.item() for value in values.aminmax())
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise ValueError(f"Expected finite `{name}`, got values from {smallest} to {largest}.")
    if smallest < 0:
        raise ValueError(f"Expected non-negative `{name}`, got {smallest}.")
    return values
