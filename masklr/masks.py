"""Draw what is kept (units, weights, blocks) and what is visible (patches).

Every function is pure in its random numbers: a `torch.Generator`, for `weight_keep` a seed, for `fixed_patch_split` a
seed and the position of the sample. Draws are in float32 or 16-bit integers, since a bfloat16 draw has a grid of 2^-8
and so a wrong probability.
"""

import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int16, Int64, Shaped
from torch import Tensor

Strategy = Literal["random", "block", "grid"]

# BEiT masks rectangles of at least 16 of 14 x 14 patches, with aspect ratios from 0.3 to 1 / 0.3.
MIN_BLOCK_SHARE = 16 / 196
MIN_BLOCK_ASPECT = 0.3
# 64-bit words of random numbers, above which two threads draw a mask: a quarter of a millisecond of one.
LONG_MASK = 2**16
# Each rectangle takes on average half of what is missing, so after 12 the rest is below one patch of 64 x 64.
NUM_BLOCKS = 12


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
    return _uniform(tuple(shape), generator, device) >= p


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


def num_masked(num_patches: int, mask_ratio: float) -> int:
    """Exact number of patches that a mask ratio removes: `round(num_patches * mask_ratio)`.

    `num_patches - int(num_patches * (1 - mask_ratio))`, the usual code, removes one too many of 100 at 0.9.

    Args:
        num_patches: Patches of an image, N.
        mask_ratio: Fraction removed, in (0, 1).

    Returns:
        A count from 1 to N - 1.

    Raises:
        ValueError: `mask_ratio` is outside (0, 1), or leaves no visible or no masked patch.

    Example:
        >>> num_masked(100, 0.9)
        90
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(f"Expected `mask_ratio` in (0, 1), got {mask_ratio}.")
    count = round(num_patches * mask_ratio)
    if not 0 < count < num_patches:
        left = "visible" if count else "masked"
        raise ValueError(
            f"Expected `mask_ratio` to leave visible and masked patches, got {mask_ratio}, "
            f"which leaves no {left} patch of {num_patches}."
        )
    return count


def patch_split(
    batch: int,
    grid: tuple[int, int],
    mask_ratio: float,
    *,
    strategy: Strategy = "random",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Int64[Tensor, "batch visible"], Int64[Tensor, "batch masked"]]:
    """Split of each image's patches into visible and masked ones, drawn anew for each image.

    Exactly `round(N * mask_ratio)` of the N = H * W patches are masked, and each patch with the same probability under
    `random` and `grid`. `random`: all subsets alike. `block`: rectangles as in BEiT, trimmed or filled at random to the
    exact count. `grid`: one visible patch in each s x s cell (mask ratio 1 - 1/s^2), or a checkerboard (1/2), with a
    random phase. Nothing waits for the device.

    Args:
        batch: Number of images, B.
        grid: Patches in height and width, (H, W).
        mask_ratio: Fraction of patches removed, in (0, 1).
        strategy: Which subsets are drawn.
        generator: Source of the draws; the default generator of the device when None.
        device: Where the split is made; the generator's device when None.

    Returns:
        Indices of the visible patches (B, N - M) and of the masked ones (B, M), row-major, each row ascending.

    Raises:
        ValueError: `mask_ratio` leaves no visible or no masked patch, or is no regular pattern of a `grid`.

    Example:
        >>> visible, masked = patch_split(2, (4, 4), 0.75)
        >>> visible.shape, masked.shape
        (torch.Size([2, 4]), torch.Size([2, 12]))

    Reference:
        He et al., "Masked autoencoders are scalable vision learners", CVPR 2022; Bao et al., "BEiT: BERT pre-training
        of image transformers", ICLR 2022, Algorithm 1.
    """
    count = _num_masked_on(grid, mask_ratio, strategy)
    return _split(_uniform((batch, _num_draws(grid, strategy)), generator, device), grid, count, strategy)


def fixed_patch_split(
    positions: Int[Tensor, " batch"],
    grid: tuple[int, int],
    mask_ratio: float,
    *,
    seed: int,
    strategy: Strategy = "random",
) -> tuple[Int64[Tensor, "batch visible"], Int64[Tensor, "batch masked"]]:
    """Split that depends only on the seed and the sample's position in its data set.

    The same as `patch_split`, with a hash of (seed, position, draw) for a generator: the mask of a validation sample,
    and with it the loss, does not move with batch size, order, number of ranks or a resume. Nothing waits for the
    device.

    Args:
        positions: Position of each sample in the data set.
        grid: Patches in height and width, (H, W).
        mask_ratio: Fraction of patches removed, in (0, 1).
        seed: Any integer; another seed gives independent masks.
        strategy: Which subsets are drawn, as in `patch_split`.

    Returns:
        Indices of the visible patches (B, N - M) and of the masked ones (B, M), row-major, each row ascending.

    Raises:
        ValueError: As in `patch_split`.

    Example:
        >>> both, _ = fixed_patch_split(torch.tensor([7, 8]), (4, 4), 0.75, seed=0)
        >>> alone, _ = fixed_patch_split(torch.tensor([8]), (4, 4), 0.75, seed=0)
        >>> torch.equal(both[1:], alone)
        True

    Reference:
        Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64).
    """
    count = _num_masked_on(grid, mask_ratio, strategy)
    return _split(_hashed_uniform(positions, seed, _num_draws(grid, strategy)), grid, count, strategy)


def _uniform(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str | None
) -> Float32[Tensor, "..."]:
    if device is None and generator is not None:
        device = generator.device
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float32)


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


GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of SplitMix64


def _signed(x: int) -> int:
    """The int64 with the bits of x modulo 2^64."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def _mixed(z: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Output function of SplitMix64. Multiplication of int64 wraps; `>>` copies the sign bit, which is masked off."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _hashed_uniform(positions: Int[Tensor, " batch"], seed: int, num_draws: int) -> Float32[Tensor, "batch draws"]:
    """Uniform numbers in [0, 1) with 24 bits, a function of (seed, position, index of the draw)."""
    # One round of mixing for each of the three, so that neighbouring seeds and positions share no stream.
    positions = positions.long()
    start = _mixed(torch.full_like(positions, _signed(seed * GOLDEN + GOLDEN)))
    streams = _mixed(start + positions * _signed(GOLDEN))
    steps = torch.arange(1, num_draws + 1, device=positions.device) * _signed(GOLDEN)
    bits = (_mixed(streams[:, None] + steps) >> 40) & ((1 << 24) - 1)
    return bits.float() * 2.0**-24


def _num_masked_on(grid: tuple[int, int], mask_ratio: float, strategy: Strategy) -> int:
    height, width = grid
    if height < 1 or width < 1:
        raise ValueError(f"Expected `grid` of at least (1, 1), got {grid}.")
    if strategy not in ("random", "block", "grid"):
        raise ValueError(f"Expected `strategy` to be random, block or grid, got {strategy}.")
    count = num_masked(height * width, mask_ratio)
    if strategy == "grid" and _cell(grid, count) is None:
        raise ValueError(
            f"Expected `mask_ratio` to be 1/2 or 1 - 1/s^2 with s dividing the grid {grid} for strategy grid, "
            f"got {mask_ratio}."
        )
    return count


def _cell(grid: tuple[int, int], count: int) -> int | None:
    """Side of the cells of a `grid` split with one visible patch each; 0: a checkerboard; None: no regular pattern."""
    height, width = grid
    num_visible = height * width - count
    if num_visible == count:
        return 0
    side = math.isqrt(height * width // num_visible)
    regular = side * side * num_visible == height * width and not height % side and not width % side
    return side if regular else None


def _num_draws(grid: tuple[int, int], strategy: Strategy) -> int:
    num_patches = grid[0] * grid[1]
    return {"random": num_patches, "block": num_patches + 4 * NUM_BLOCKS, "grid": 1}[strategy]


def _split(
    noise: Float32[Tensor, "batch draws"], grid: tuple[int, int], count: int, strategy: Strategy
) -> tuple[Int64[Tensor, "batch visible"], Int64[Tensor, "batch masked"]]:
    """The split as a pure function of uniform numbers."""
    num_patches = grid[0] * grid[1]
    if strategy == "grid":
        masked = _grid_masked(noise[:, 0], grid, count)
    else:
        score = noise[:, :num_patches]
        if strategy == "block":
            score = score + _first_cover(noise[:, num_patches:], grid, count)
        lowest = score.topk(count, dim=1, largest=False, sorted=False).indices
        masked = torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)
    # Each patch moves to its place among the visible or, after them, the masked: the order within both stays
    # ascending, and unlike `nonzero` it needs no wait for a count.
    order = masked.cumsum(1)
    patch = torch.arange(num_patches, device=noise.device)
    place = torch.where(masked, order + (num_patches - count - 1), patch - order)
    split = torch.empty_like(place).scatter_(1, place, patch.expand_as(place))
    return split[:, : num_patches - count], split[:, num_patches - count :]


def _grid_masked(noise: Float32[Tensor, " batch"], grid: tuple[int, int], count: int) -> Bool[Tensor, "batch patches"]:
    height, width = grid
    row = torch.arange(height, device=noise.device)[:, None]
    column = torch.arange(width, device=noise.device)
    side = _cell(grid, count)
    if not side:
        phase, cell = (noise * 2).long(), (row + column) % 2
    else:
        phase, cell = (noise * side * side).long(), row % side * side + column % side
    visible = cell.flatten() == phase[:, None]
    return ~visible


def _first_cover(
    noise: Float32[Tensor, "batch draws"], grid: tuple[int, int], count: int
) -> Float32[Tensor, "batch patches"]:
    """Which of NUM_BLOCKS random rectangles covers each patch first; NUM_BLOCKS where none does.

    Masking the lowest (this + a uniform number) trims the last rectangle at random, or fills with patches that no
    rectangle covers.
    """
    height, width = grid
    area_noise, aspect_noise, top_noise, left_noise = noise.unflatten(1, (NUM_BLOCKS, 4)).unbind(2)
    row, column = torch.arange(height, device=noise.device), torch.arange(width, device=noise.device)
    smallest = min(count, max(1, round(MIN_BLOCK_SHARE * height * width)))
    aspect = torch.exp((2 * aspect_noise - 1) * -math.log(MIN_BLOCK_ASPECT))
    cover = noise.new_full((noise.shape[0], height * width), NUM_BLOCKS)
    for block in range(NUM_BLOCKS):
        missing = count - (cover < NUM_BLOCKS).sum(1)
        area = smallest + area_noise[:, block] * (missing - smallest).clamp(min=0)
        tall = (area * aspect[:, block]).sqrt().round().clamp(1, height)
        wide = (area / tall).round().clamp(1, width)
        top = (top_noise[:, block] * (height - tall + 1)).floor()[:, None]
        left = (left_noise[:, block] * (width - wide + 1)).floor()[:, None]
        rows = (row >= top) & (row < top + tall[:, None])
        columns = (column >= left) & (column < left + wide[:, None])
        inside = (rows[:, :, None] & columns[:, None, :]).flatten(1)
        cover = torch.where(inside & (cover == NUM_BLOCKS), float(block), cover)
    return cover
