import pytest
import torch

from masklr.masks import patch_split
from masklr.masks.patterns import NUM_BLOCKS, first_cover
from tests.masks.splits import assert_partition, indicator, seeded


@pytest.mark.parametrize(("grid", "mask_ratio", "side"), [((8, 8), 0.75, 2), ((6, 9), 8 / 9, 3), ((4, 8), 15 / 16, 4)])
def test_grid_split_shows_one_patch_a_cell_at_every_phase(grid, mask_ratio, side):
    visible, masked = patch_split(2000, grid, mask_ratio, strategy="grid", generator=seeded())
    num_patches = grid[0] * grid[1]
    assert_partition(visible, masked, num_patches, num_patches - num_patches // side**2)
    row, column = visible // grid[1], visible % grid[1]
    phase = row[:, 0] % side * side + column[:, 0] % side
    assert torch.equal(row % side * side + column % side, phase[:, None].expand_as(row))
    assert phase.unique().tolist() == list(range(side**2))


def test_grid_split_of_half_the_patches_is_a_checkerboard():
    visible, masked = patch_split(50, (4, 6), 0.5, strategy="grid", generator=seeded())
    assert_partition(visible, masked, 24, 12)
    parity = (visible // 6 + visible % 6) % 2
    assert (parity == parity[:, :1]).all()


@pytest.mark.parametrize(("grid", "mask_ratio"), [((8, 8), 0.6), ((7, 7), 0.75), ((8, 8), 0.25), ((2, 18), 0.8889)])
def test_grid_split_of_an_irregular_ratio_raises(grid, mask_ratio):
    with pytest.raises(ValueError, match="for strategy grid, got"):
        patch_split(1, grid, mask_ratio, strategy="grid")


def test_block_split_masks_connected_areas_far_more_than_a_random_one():
    def neighbours(strategy: str) -> float:
        masked = patch_split(500, (14, 14), 0.4, strategy=strategy, generator=seeded())[1]
        image = indicator(masked, 196).view(-1, 14, 14)
        return (image[:, :, 1:] * image[:, :, :-1]).mean().item()

    assert neighbours("random") == pytest.approx(0.4 * 77 / 195, abs=0.005)
    assert neighbours("block") > 0.29


def test_block_split_starts_with_a_rectangle_of_the_published_size_and_aspect():
    noise = torch.rand(300, 4 * NUM_BLOCKS, generator=seeded())
    first = (first_cover(noise, (14, 14), 80) == 0).view(-1, 14, 14)
    height, width = first.any(2).sum(1), first.any(1).sum(1)
    assert torch.equal(first.sum((1, 2)), height * width)
    assert (height * width).min() >= 12  # 16, up to rounding of the sides
    assert (height * width).max() <= 92  # 80
    ratio = height / width
    assert ratio.min() < 0.5
    assert ratio.max() > 2
