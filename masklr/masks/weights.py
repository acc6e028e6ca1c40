"""Masks of weights: one entry for each, or for each and each sample, so many that a faster generator draws them."""

import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Int16, Shaped
from torch import Tensor

from masklr.masks.units import check_probability

# 64-bit words of random numbers, above which two threads draw a mask: a quarter of a millisecond of one.
LONG_MASK = 2**16


def kept_share(p: float) -> float:
    """Probability with which `weight_keep` keeps an entry: 1 - p, with p rounded to a multiple of 2^-16.

    Never 0. Divide by it for a mask of mean one.

    Args:
        p: Probability that an entry is dropped, in [0, 1).

    Raises:
        ValueError: `p` is outside [0, 1).

    Example:
        >>> kept_share(0.75), round(1 - kept_share(0.1), 6)
        (0.25, 0.100006)
    """
    return 1 - _num_dropped_draws(p) / 2**16


def weight_keep(
    shape: Sequence[int],
    p: float,
    *,
    seed: int,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Shaped[Tensor, "..."]:
    """Independent Bernoulli mask as a function of a seed: for masks too many to keep, which are made again instead.

    Each entry is kept with probability `kept_share(p)`. Several times faster than `unit_keep` on CPU: drawing masks is
    what DropConnect costs. The masks of one seed differ between kinds of devices.

    Args:
        shape: Shape of the mask.
        p: Probability that an entry is dropped, in [0, 1).
        seed: From 0 to 2^63 - 1; other seeds, neighbours included, give independent masks.
        device: Where the mask is made; the CPU when None.
        out: A tensor of that shape, on that device, to write to: 1 where kept, 0 where dropped.

    Returns:
        `out`, or a boolean tensor, True where kept.

    Raises:
        ValueError: `p` is outside [0, 1).

    Example:
        >>> torch.equal(weight_keep((8, 9), 0.5, seed=3), weight_keep((8, 9), 0.5, seed=3))
        True

    Reference:
        Wan et al., "Regularization of neural networks using DropConnect", ICML 2013.
    """
    first_kept = _num_dropped_draws(p) - 2**15
    draws = _uniform_int16(math.prod(shape), seed, torch.device(device or "cpu")).view(*shape)
    return draws >= first_kept if out is None else torch.ge(draws, first_kept, out=out)


def _num_dropped_draws(p: float) -> int:
    """How many of the 2^16 values of a draw mean dropped."""
    check_probability(p)
    return min(round(p * 2**16), 2**16 - 1)


def _uniform_int16(count: int, seed: int, device: torch.device) -> Int16[Tensor, " count"]:
    if device.type == "cpu":
        return _numpy_int16(count, seed)
    return _torch_int16(count, seed, device)


def _numpy_int16(count: int, seed: int) -> Int16[Tensor, " count"]:
    # Four draws from each 64-bit word: eight times as fast as torch's own generator.
    num_words = -(-count // 4)
    if num_words < LONG_MASK:
        words = np.random.SFC64(seed).random_raw(num_words)
        return torch.from_numpy(words.view(np.int16))[:count]
    # Two halves, by two threads where there are two; the mask is the same either way.
    half = num_words // 2
    words = np.empty(num_words, np.uint64)

    def fill(part: int) -> None:
        rows = slice(half, None) if part else slice(half)
        words[rows] = np.random.SFC64([seed, part]).random_raw(num_words - half if part else half)

    if torch.get_num_threads() > 1:
        other = _second_thread(os.getpid()).submit(fill, 1)
        fill(0)
        other.result()
    else:
        fill(0)
        fill(1)
    return torch.from_numpy(words.view(np.int16))[:count]


@functools.cache
def _second_thread(process: int) -> ThreadPoolExecutor:
    """A thread of this process: one that was made before a fork does not live in the child."""
    return ThreadPoolExecutor(1, thread_name_prefix="masklr-masks")


def _torch_int16(count: int, seed: int, device: torch.device) -> Int16[Tensor, " count"]:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(-(2**15), 2**15, (count,), generator=generator, device=device, dtype=torch.int16)
