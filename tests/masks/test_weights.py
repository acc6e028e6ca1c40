import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masklr.masks import kept_share, weight_keep
from masklr.masks.weights import LONG_MASK, _torch_int16


@pytest.fixture(params=["numpy", "torch"])
def integers(request, monkeypatch):
    """Both sources of `weight_keep`: the CPU's, and that of other devices on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr("masklr.masks.weights._uniform_int16", _torch_int16)


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
