import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masklr.masks import block_keep, unit_keep
from tests.masks.splits import seeded


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


def test_block_size_that_does_not_divide_raises():
    with pytest.raises(ValueError, match="`block_size` to divide the last size"):
        block_keep((2, 7), 0.5, 3)
