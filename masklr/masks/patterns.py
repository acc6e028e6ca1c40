"""Regular and rectangular patterns of masked patches, as functions of uniform numbers."""

import math

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

# BEiT masks rectangles of at least 16 of 14 x 14 patches, with aspect ratios from 0.3 to 1 / 0.3.
MIN_BLOCK_SHARE = 16 / 196
MIN_BLOCK_ASPECT = 0.3
# Each rectangle takes on average half of what is missing, so after 12 the rest is below one patch of 64 x 64.
NUM_BLOCKS = 12


def grid_cell(grid: tuple[int, int], count: int) -> int | None:
    """Side of the cells of a `grid` split with one visible patch each; 0: a checkerboard; None: no regular pattern."""
    height, width = grid
    num_visible = height * width - count
    if num_visible == count:
        return 0
    side = math.isqrt(height * width // num_visible)
    regular = side * side * num_visible == height * width and not height % side and not width % side
    return side if regular else None


def grid_masked(noise: Float32[Tensor, " batch"], grid: tuple[int, int], count: int) -> Bool[Tensor, "batch patches"]:
    """All but one patch of each cell, or every other patch: the same in all cells of an image, at random."""
    height, width = grid
    row = torch.arange(height, device=noise.device)[:, None]
    column = torch.arange(width, device=noise.device)
    side = grid_cell(grid, count)
    if not side:
        phase, cell = (noise * 2).long(), (row + column) % 2
    else:
        phase, cell = (noise * side * side).long(), row % side * side + column % side
    visible = cell.flatten() == phase[:, None]
    return ~visible


def first_cover(
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
