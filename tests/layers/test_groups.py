import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masklr.layers import GroupDropout
from masklr.layers.groups import drop_path


@given(groups=st.integers(1, 5), group_size=st.integers(1, 4), p=st.floats(0, 0.95), dim=st.sampled_from([-1, 1, 0, 2]))
@settings(max_examples=40, deadline=None)
def test_every_group_is_zero_or_divided_by_the_keep_probability(groups, group_size, p, dim):
    shape = [3, 2, 4]
    shape[dim] = groups * group_size
    x = torch.rand(shape) + 1
    y = GroupDropout(p, group_size, dim)(x)
    kept = (y != 0).movedim(dim, -1).unflatten(-1, (groups, group_size))
    assert (kept == kept[..., :1]).all()
    assert torch.allclose(y[y != 0], (x / (1 - p))[y != 0])


def test_groups_and_positions_are_drawn_independently():
    torch.manual_seed(0)
    draws, p = 20_000, 0.3
    kept = (GroupDropout(p, 3)(torch.ones(draws, 2, 6)) != 0)[..., ::3].flatten(1).double()
    centered = (kept - (1 - p)) / math.sqrt(p * (1 - p))
    assert centered.mean(0).abs().max() < 5 / math.sqrt(draws)
    correlation = centered.T @ centered / draws - torch.eye(4)
    assert correlation.fill_diagonal_(0).abs().max() < 5 / math.sqrt(draws)


def test_evaluation_and_p_of_zero_return_the_input_itself():
    x = torch.rand(2, 6)
    layer = GroupDropout(0.5, 2)
    assert layer.eval()(x) is x
    layer.train().p = 0.0
    assert layer(x) is x


def test_bfloat16_keeps_the_mean():
    torch.manual_seed(0)
    y = GroupDropout(0.3, 1)(torch.ones(100_000, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).bfloat16().item()}


def test_copies_and_pickles_draw_the_same_and_compiled_graphs_run(compilable):
    layer, x = GroupDropout(0.5, 2), torch.rand(3, 6)
    torch.manual_seed(1)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(1)
        assert torch.equal(other(x), y)
    z = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(z[z != 0], (2 * x)[z != 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 2), r"Expected `p` in \[0, 1\), got 1.0"),
        ((math.nan, 2), r"Expected `p` in \[0, 1\), got nan"),
        ((0.5, 0), "Expected `group_size` of at least 1, got 0"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupDropout(*arguments)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_width_that_is_no_multiple_raises(p):
    with pytest.raises(ValueError, match=r"to divide the size 7 of axis -1 of an input \(3, 7\), got 2"):
        GroupDropout(p, 2)(torch.rand(3, 7))


def test_drop_path_drops_whole_samples():
    torch.manual_seed(0)
    y = drop_path(torch.ones(10_000, 2, 2), 0.3).flatten(1)
    assert (y == y[:, :1]).all()
    assert abs((y[:, 0] != 0).double().mean() - 0.7) < 5 * math.sqrt(0.21 / 10_000)
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.7))
