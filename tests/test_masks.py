import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masklr.masks import (
    LONG_MASK,
    NUM_BLOCKS,
    _first_cover,
    _torch_int16,
    block_keep,
    fixed_patch_split,
    kept_share,
    num_masked,
    patch_split,
    unit_keep,
    weight_keep,
)

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda grid: grid[0] * grid[1] > 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_partition(visible: torch.Tensor, masked: torch.Tensor, num_patches: int, count: int) -> None:
    assert visible.dtype == masked.dtype == torch.int64
    assert masked.shape[1] == count
    everything = torch.arange(num_patches).expand(len(visible), -1)
    assert torch.equal(torch.cat([visible, masked], 1).sort(1).values, everything)
    assert (visible.diff(dim=1) > 0).all()
    assert (masked.diff(dim=1) > 0).all()


def indicator(masked: torch.Tensor, num_patches: int) -> torch.Tensor:
    return torch.zeros(len(masked), num_patches, dtype=torch.float64).scatter_(1, masked, 1.0)


@pytest.mark.parametrize("p", [0.001, 0.3, 0.5, 0.9])
def test_unit_keep_frequency_is_within_five_standard_errors(p):
    keep = unit_keep((400, 500), p, generator=seeded())
    assert keep.dtype == torch.bool
    error = keep.double().mean() - (1 - p)
    assert abs(error) < 5 * math.sqrt(p * (1 - p) / keep.numel())


def test_unit_keep_without_dropping_keeps_all():
    assert unit_keep((3, 5), 0.0).all()


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.2, math.nan])
def test_drop_probability_outside_the_unit_interval_raises(p):
    with pytest.raises(ValueError, match=r"Expected `p` in \[0, 1\), got"):
        unit_keep((2,), p)
    with pytest.raises(ValueError, match=r"Expected `p` in \[0, 1\), got"):
        block_keep((2,), p, 2)


@given(blocks=st.integers(1, 5), block_size=st.integers(1, 5), p=st.floats(0, 0.99))
@settings(max_examples=30, deadline=None)
def test_block_keep_is_constant_on_blocks_and_equals_units_on_them(blocks, block_size, p):
    keep = block_keep((3, blocks * block_size), p, block_size, generator=seeded())
    units = unit_keep((3, blocks), p, generator=seeded())
    assert torch.equal(keep, units.repeat_interleave(block_size, dim=1))


@pytest.fixture(params=["numpy", "torch"])
def integers(request, monkeypatch):
    """Both sources of `weight_keep`: the CPU's, and that of other devices on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr("masklr.masks._uniform_int16", _torch_int16)


@pytest.mark.parametrize("p", [0.001, 0.3, 0.5, 0.9])
def test_weight_keep_frequency_is_within_five_standard_errors(p, integers):
    keep = weight_keep((401, 499), p, seed=3)
    assert keep.dtype == torch.bool
    assert abs(keep.double().mean() - kept_share(p)) < 5 * math.sqrt(p * (1 - p) / keep.numel())
    for axis in (0, 1):  # no row and no column is special
        share = keep.double().mean(axis)
        assert (share - kept_share(p)).abs().max() < 5 * math.sqrt(p * (1 - p) / keep.shape[axis]) + 0.01


@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    p=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=60, deadline=None)
def test_weight_keep_is_a_function_of_the_seed_and_writes_where_told(shape, p, seed):
    keep = weight_keep(shape, p, seed=seed)
    out = torch.full(shape, torch.nan)
    assert weight_keep(shape, p, seed=seed, out=out) is out
    assert torch.equal(out, keep.float())
    assert list(keep.shape) == shape
    assert 0 < kept_share(p) <= 1
    assert abs(kept_share(p) - (1 - p)) <= 2**-16


def test_weight_keep_of_neighbouring_seeds_are_independent(integers):
    first, second = (weight_keep((100, 1000), 0.5, seed=seed).double() * 2 - 1 for seed in (8, 9))
    assert abs((first * second).mean()) < 5 / math.sqrt(first.numel())


def test_weight_keep_at_the_ends_of_its_grid(integers):
    assert weight_keep((2**20,), 0.0, seed=0).all()
    count = weight_keep((2**20,), 1 - 2**-17, seed=0).sum().item()
    assert 0 < count < 40  # 16 on average: one value in 2^16 is left
    assert kept_share(1 - 2**-17) == 2**-16


def test_weight_keep_leaves_the_global_generators_alone(integers):
    state = torch.get_rng_state()
    assert weight_keep((3, 5), 0.0, seed=2**63 - 1).all()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
def test_weight_keep_of_a_wrong_probability_raises(p):
    with pytest.raises(ValueError, match=r"Expected `p` in \[0, 1\), got"):
        weight_keep((2,), p, seed=0)
    with pytest.raises(ValueError, match=r"Expected `p` in \[0, 1\), got"):
        kept_share(p)


def test_block_size_that_does_not_divide_raises():
    with pytest.raises(ValueError, match="`block_size` to divide the last size"):
        block_keep((2, 7), 0.5, 3)


@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "count"),
    [(100, 0.9, 90), (100, 0.8, 80), (200, 0.9, 180), (196, 0.75, 147), (64, 0.75, 48), (3, 0.5, 2), (5, 0.5, 2)],
)
def test_num_masked_is_exact_where_the_usual_code_loses_a_patch(num_patches, mask_ratio, count):
    assert num_masked(num_patches, mask_ratio) == count


def test_num_masked_of_whole_percentages_is_the_integer_result():
    for num_patches, percent in itertools.product([64, 100, 196, 200, 256], range(1, 100)):
        if num_patches * percent % 100 == 0:
            assert num_masked(num_patches, percent / 100) == num_patches * percent // 100


@pytest.mark.parametrize("mask_ratio", [0.0, 1.0, 1.2, -0.5, math.nan])
def test_mask_ratio_outside_the_open_unit_interval_raises(mask_ratio):
    with pytest.raises(ValueError, match=r"Expected `mask_ratio` in \(0, 1\), got"):
        patch_split(1, (4, 4), mask_ratio)


@pytest.mark.parametrize(("mask_ratio", "left"), [(0.99, "no visible patch of 16"), (0.01, "no masked patch of 16")])
def test_mask_ratio_that_leaves_nothing_raises(mask_ratio, left):
    with pytest.raises(ValueError, match=left):
        fixed_patch_split(torch.arange(2), (4, 4), mask_ratio, seed=0)


@pytest.mark.parametrize("grid", [(0, 4), (4, -1)])
def test_empty_grid_raises(grid):
    with pytest.raises(ValueError, match="Expected `grid`"):
        patch_split(1, grid, 0.5)


@pytest.mark.parametrize("strategy", ["random", "block"])
@given(batch=st.integers(0, 5), grid=SIZES, mask_ratio=st.floats(0.02, 0.98), seed=st.integers(-(2**70), 2**70))
@settings(max_examples=60, deadline=None)
def test_split_is_a_sorted_partition_with_the_exact_count(strategy, batch, grid, mask_ratio, seed):
    num_patches = grid[0] * grid[1]
    count = round(num_patches * mask_ratio)
    if not 0 < count < num_patches:
        return
    assert_partition(*patch_split(batch, grid, mask_ratio, strategy=strategy), num_patches, count)
    positions = torch.arange(batch) + 2**40
    split = fixed_patch_split(positions, grid, mask_ratio, seed=seed, strategy=strategy)
    assert_partition(*split, num_patches, count)


@pytest.mark.parametrize("strategy", ["random", "block", "grid"])
def test_split_is_a_function_of_the_generator(strategy):
    first, second, other = (patch_split(64, (8, 8), 0.75, strategy=strategy, generator=seeded(s))[1] for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_split_without_a_generator_follows_the_global_seed():
    torch.manual_seed(5)
    first = patch_split(8, (8, 8), 0.5)[0]
    torch.manual_seed(5)
    assert torch.equal(first, patch_split(8, (8, 8), 0.5)[0])


def test_random_split_draws_every_subset_alike():
    draws = 21_000
    masked = patch_split(draws, (1, 7), 3 / 7, generator=seeded())[1]
    code = indicator(masked, 7) @ (2.0 ** torch.arange(7, dtype=torch.float64))
    counts = code.long().unique(return_counts=True)[1].double()
    assert len(counts) == 35
    expected = draws / 35
    assert ((counts - expected).abs() < 5 * math.sqrt(expected * (1 - 1 / 35))).all()


@pytest.mark.parametrize("draw", ["generator", "positions", "seeds"])
def test_patches_are_masked_equally_often_and_in_pairs_as_a_random_subset(draw):
    n, num_patches, ratio = 20_000, 16, 0.75
    if draw == "generator":
        masked = patch_split(n, (4, 4), ratio, generator=seeded())[1]
    elif draw == "positions":
        masked = fixed_patch_split(torch.arange(n), (4, 4), ratio, seed=3)[1]
    else:
        masked = torch.cat([fixed_patch_split(torch.arange(10), (4, 4), ratio, seed=s)[1] for s in range(n // 10)])
    chosen = indicator(masked, num_patches)
    assert ((chosen.mean(0) - ratio).abs() < 5 * math.sqrt(ratio * (1 - ratio) / n)).all()
    pair = ratio * (12 - 1) / (num_patches - 1)
    together = (chosen.T @ chosen / n)[~torch.eye(num_patches, dtype=torch.bool)]
    assert ((together - pair).abs() < 5 * math.sqrt(pair * (1 - pair) / n)).all()


def test_fixed_splits_of_neighbouring_positions_and_seeds_are_independent():
    n, num_patches, ratio = 20_000, 16, 0.5
    positions = torch.arange(n)
    here = indicator(fixed_patch_split(positions, (4, 4), ratio, seed=0)[1], num_patches) - ratio
    others = [(positions + 1, 0), (positions + 64, 0), (positions + 4096, 0), (positions, 1), (positions, 2**32)]
    for other, seed in others:
        there = indicator(fixed_patch_split(other, (4, 4), ratio, seed=seed)[1], num_patches) - ratio
        covariance = here.T @ there / n
        assert (covariance.abs() < 5 * 0.25 / math.sqrt(n)).all()


def test_fixed_split_depends_on_neither_batch_nor_order():
    positions = torch.randperm(1000, generator=seeded())
    for strategy in ("random", "block", "grid"):
        whole = fixed_patch_split(positions, (6, 4), 0.75, seed=9, strategy=strategy)[0]
        parts = [fixed_patch_split(p, (6, 4), 0.75, seed=9, strategy=strategy)[0] for p in positions.split(7)]
        assert torch.equal(whole, torch.cat(parts))
    narrow = fixed_patch_split(positions.int(), (6, 4), 0.75, seed=9, strategy="grid")[0]
    assert torch.equal(whole, narrow)


def test_fixed_split_uses_the_published_splitmix64():
    # The generator with state 1234567 (its reference implementation prints these first outputs).
    from masklr.masks import GOLDEN, _mixed, _signed

    states = torch.tensor([_signed(1234567 + GOLDEN * k) for k in range(1, 4)])
    assert [x % 2**64 for x in _mixed(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_fixed_split_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    fixed_patch_split(torch.arange(4), (4, 4), 0.5, seed=0, strategy="block")
    assert torch.equal(before, torch.get_rng_state())


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
    first = (_first_cover(noise, (14, 14), 80) == 0).view(-1, 14, 14)
    height, width = first.any(2).sum(1), first.any(1).sum(1)
    assert torch.equal(first.sum((1, 2)), height * width)
    assert (height * width).min() >= 12  # 16, up to rounding of the sides
    assert (height * width).max() <= 92  # 80
    ratio = height / width
    assert ratio.min() < 0.5
    assert ratio.max() > 2


@pytest.mark.parametrize("strategy", ["random", "block", "grid"])
def test_a_split_never_waits_for_a_value_from_the_device(strategy):
    # Tensors on the meta device have no values, so reading one would raise.
    visible, masked = patch_split(5, (8, 8), 0.75, strategy=strategy, device="meta")
    assert (visible.shape, masked.shape) == ((5, 16), (5, 48))
    positions = torch.arange(5, device="meta")
    assert fixed_patch_split(positions, (8, 8), 0.75, seed=0, strategy=strategy)[1].shape == (5, 48)


def test_unknown_strategy_raises():
    with pytest.raises(Exception, match="strategy"):
        patch_split(1, (4, 4), 0.5, strategy="diagonal")


@pytest.mark.parametrize("count", [4 * LONG_MASK - 5, 4 * LONG_MASK, 8 * LONG_MASK + 3])
def test_long_masks_do_not_depend_on_the_number_of_threads_and_their_halves_differ(count):
    one = weight_keep((count,), 0.3, seed=5)
    torch.set_num_threads(2)
    try:
        two = weight_keep((count,), 0.3, seed=5)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, two)
    assert abs(one.double().mean() - kept_share(0.3)) < 5 * (0.21 / count) ** 0.5
    first, second = one[: count // 2].double(), one[-(count // 2) :].double()
    covariance = ((first - first.mean()) * (second - second.mean())).mean()
    assert abs(covariance) < 5 * 0.21 / (count // 2) ** 0.5
