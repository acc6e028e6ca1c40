"""Which patches of an image are visible and which are masked."""

from typing import Literal

import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

from masklr.masks.patterns import NUM_BLOCKS, first_cover, grid_cell, grid_masked
from masklr.masks.random_numbers import hashed_uniform, uniform

Strategy = Literal["random", "block", "grid"]


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
    return _split(uniform((batch, _num_draws(grid, strategy)), generator, device), grid, count, strategy)


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
    return _split(hashed_uniform(positions, seed, _num_draws(grid, strategy)), grid, count, strategy)


def _num_masked_on(grid: tuple[int, int], mask_ratio: float, strategy: Strategy) -> int:
    height, width = grid
    if height < 1 or width < 1:
        raise ValueError(f"Expected `grid` of at least (1, 1), got {grid}.")
    if strategy not in ("random", "block", "grid"):
        raise ValueError(f"Expected `strategy` to be random, block or grid, got {strategy}.")
    count = num_masked(height * width, mask_ratio)
    if strategy == "grid" and grid_cell(grid, count) is None:
        raise ValueError(
            f"Expected `mask_ratio` to be 1/2 or 1 - 1/s^2 with s dividing the grid {grid} for strategy grid, "
            f"got {mask_ratio}."
        )
    return count


def _num_draws(grid: tuple[int, int], strategy: Strategy) -> int:
    num_patches = grid[0] * grid[1]
    return {"random": num_patches, "block": num_patches + 4 * NUM_BLOCKS, "grid": 1}[strategy]


def _split(
    noise: Float32[Tensor, "batch draws"], grid: tuple[int, int], count: int, strategy: Strategy
) -> tuple[Int64[Tensor, "batch visible"], Int64[Tensor, "batch masked"]]:
    """The split as a pure function of uniform numbers."""
    num_patches = grid[0] * grid[1]
    if strategy == "grid":
        masked = grid_masked(noise[:, 0], grid, count)
    else:
        score = noise[:, :num_patches]
        if strategy == "block":
            score = score + first_cover(noise[:, num_patches:], grid, count)
        lowest = score.topk(count, dim=1, largest=False, sorted=False).indices
        masked = torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)
    # Each patch moves to its place among the visible or, after them, the masked: the order within both stays
    # ascending, and unlike `nonzero` it needs no wait for a count.
    order = masked.cumsum(1)
    patch = torch.arange(num_patches, device=noise.device)
    place = torch.where(masked, order + (num_patches - count - 1), patch - order)
    split = torch.empty_like(place).scatter_(1, place, patch.expand_as(place))
    return split[:, : num_patches - count], split[:, num_patches - count :]
