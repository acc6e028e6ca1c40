"""Masks of units and of groups of them."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from masklr.masks.random_numbers import uniform


def check_probability(p: float) -> None:
    """Raise unless p is a number in [0, 1), a probability of being dropped.

    Example:
        >>> check_probability(0.5)
    """
    if not isinstance(p, int | float) or not 0 <= p < 1:
        raise ValueError(f"Expected `p` in [0, 1), got {p!r}.")


def unit_keep(
    shape: Sequence[int],
    p: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "..."]:
    """Independent Bernoulli mask, True where kept.

    Each entry is True with probability 1 - p. Nothing is rescaled: divide by 1 - p for a mask of mean one.

    Args:
        shape: Shape of the mask.
        p: Probability that an entry is dropped, in [0, 1).
        generator: Source of the draws; the default generator of the device when None.
        device: Where the mask is made; the generator's device when None.

    Returns:
        A boolean tensor of that shape.

    Raises:
        ValueError: `p` is outside [0, 1).

    Example:
        >>> unit_keep((2, 3), 0.0)
        tensor([[True, True, True],
                [True, True, True]])

    Reference:
        Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 2014.
    """
    check_probability(p)
    return uniform(tuple(shape), generator, device) >= p


def block_keep(
    shape: Sequence[int],
    p: float,
    block_size: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "..."]:
    """Mask of disjoint groups along the last axis, each kept or dropped as a whole.

    Entries `b * block_size` to `(b + 1) * block_size - 1` share one draw of probability 1 - p.

    Args:
        shape: Shape of the mask; its last size is a multiple of `block_size`.
        p: Probability that a group is dropped, in [0, 1).
        block_size: Entries in a group, at least 1; 1 is `unit_keep`.
        generator: Source of the draws; the default generator of the device when None.
        device: Where the mask is made; the generator's device when None.

    Returns:
        A boolean tensor of that shape, True where kept.

    Raises:
        ValueError: `p` is outside [0, 1), or `block_size` does not divide the last size.

    Example:
        >>> block_keep((1, 4), 0.0, 2)
        tensor([[True, True, True, True]])

    Reference:
        Pal, Lane, Vidal, Haeffele, "On the regularization properties of structured dropout", CVPR 2020.
    """
    shape = tuple(shape)
    if not shape or block_size < 1 or shape[-1] % block_size:
        raise ValueError(f"Expected `block_size` to divide the last size of `shape` {shape}, got {block_size}.")
    blocks = unit_keep((*shape[:-1], shape[-1] // block_size), p, generator=generator, device=device)
    return blocks.unsqueeze(-1).expand(*blocks.shape, block_size).reshape(shape)
