import copy
import pickle

import pytest
import torch
from torch import nn

from masklr.layers import LowRankConv2d, LowRankLinear
from masklr.layers.low_rank import truncated_factors
from masklr.matrices import measured_matrices

LINEAR = (LowRankLinear, lambda: nn.Linear(7, 5), (3, 7))
CONV = (LowRankConv2d, lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="circular"), (2, 3, 6, 6))
KINDS = pytest.mark.parametrize(("cls", "plain", "shape"), [LINEAR, CONV], ids=["linear", "conv"])


def replaced(cls, layer, rank):
    return cls.from_linear(layer, rank) if cls is LowRankLinear else cls.from_conv(layer, rank)


@KINDS
def test_full_rank_computes_the_same_as_the_plain_layer(cls, plain, shape):
    layer, x = plain(), torch.randn(shape)
    new = replaced(cls, layer, 5)
    assert torch.allclose(new(x), layer(x), atol=1e-5)
    assert torch.allclose(new.effective_weight(), layer.weight, atol=1e-6)


@KINDS
def test_low_rank_is_the_truncated_decomposition_and_what_the_layer_computes_with(cls, plain, shape):
    layer, x = plain(), torch.randn(shape)
    new = replaced(cls, layer, 2)
    u, s, vh = torch.linalg.svd(layer.weight.detach().flatten(1))
    expected = (u[:, :2] * s[:2]) @ vh[:2]
    assert torch.allclose(new.effective_weight().flatten(1), expected, atol=1e-6)
    layer.weight.data = expected.view_as(layer.weight)
    assert torch.allclose(new(x), layer(x), atol=1e-5)


@KINDS
def test_the_bias_is_the_same_parameter_and_keys_are_those_of_two_layers(cls, plain, shape):
    layer = plain()
    new = replaced(cls, layer.eval(), 2)
    assert new.up.bias is layer.bias
    assert sorted(new.state_dict()) == ["down.weight", "up.bias", "up.weight"]
    assert not any(module.training for module in new.modules())


@KINDS
def test_what_is_measured_is_the_effective_weight_alone(cls, plain, shape):
    new = replaced(cls, plain(), 2)
    assert {n: m.shape for n, m in measured_matrices(nn.Sequential(new)).items()} == {
        "0": new.effective_weight().flatten(1).shape
    }


def test_factors_are_balanced():
    up, down = truncated_factors(torch.randn(6, 4, dtype=torch.float64), 3)
    assert torch.allclose(up.T @ up, down @ down.T)


def test_constructors_make_what_plain_layers_would_approximate():
    torch.manual_seed(0)
    linear, conv = LowRankLinear(7, 5, 2, bias=False), LowRankConv2d(3, 5, (1, 3), 2, padding="same")
    assert linear(torch.randn(2, 4, 7)).shape == (2, 4, 5)
    assert conv(torch.randn(2, 3, 6, 6)).shape == (2, 5, 6, 6)
    assert linear.up.bias is None
    torch.manual_seed(0)
    plain = nn.Linear(7, 5, bias=False)
    assert torch.allclose(linear.effective_weight(), LowRankLinear.from_linear(plain, 2).effective_weight())
    for layer in (linear, conv):
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other.effective_weight(), layer.effective_weight())


def test_gradients_reach_both_factors():
    layer = LowRankLinear(7, 5, 2)
    layer(torch.randn(3, 7)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


@pytest.mark.parametrize("rank", [0, 6])
def test_wrong_rank_raises(rank):
    with pytest.raises(ValueError, match=rf"Expected `rank` from 1 to 5 for a weight \(5, 7\), got {rank}"):
        LowRankLinear(7, 5, rank)
    with pytest.raises(ValueError, match=rf"Expected `rank` from 1 to 5 for a weight \(5, 27\), got {rank}"):
        LowRankConv2d(3, 5, 3, rank)


def test_convolution_of_several_groups_raises():
    with pytest.raises(ValueError, match="one group, got 2 groups"):
        LowRankConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2), 1)
