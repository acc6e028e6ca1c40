import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masklr.masks import fixed_patch_split, num_masked, patch_split
from tests.masks.splits import assert_partition, indicator, seeded

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda grid: grid[0] * grid[1] > 1)


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
    from masklr.masks.random_numbers import GOLDEN, _mixed, _signed

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
