"""Monte Carlo: the loss that each layer's masks add on average is the closed-form penalty of theory."""

import math

import pytest
import torch
from torch import nn

from masklr.layers import DropConnectConv2d, DropConnectLinear, Dropout, DropPath, GroupDropout
from masklr.theory import dropblock_penalty, dropconnect_penalty, dropout_penalty, mask_variance

MASKS = 100_000
SAMPLES, INPUTS, HIDDEN, OUTPUTS = 3, 4, 4, 3

torch.manual_seed(0)
X = torch.randn(SAMPLES, INPUTS)
Y = torch.randn(SAMPLES, OUTPUTS)
U, V = torch.randn(OUTPUTS, HIDDEN), torch.randn(INPUTS, HIDDEN)
C = (X.T @ X / SAMPLES).double()


def assert_penalty(outputs, plain, targets, closed_form):
    """Outputs (masks, samples, ...) of independent masks, against the loss without: within 4 standard errors."""
    losses = (outputs.detach() - targets).double().square().flatten(2).sum(2).mean(1)
    assert len(losses) == MASKS
    penalty = losses - (plain - targets).double().square().flatten(1).sum(1).mean()
    error = penalty.std().item() / math.sqrt(MASKS)
    assert error < 0.01 * closed_form  # precise enough to tell a wrong constant
    assert abs(penalty.mean().item() - closed_form) < 4 * error


def replicas(layer_class, weight, p, per, **options):
    """A layer of one mask a batch as many layers with a mask each: its weight is repeated along the outputs."""
    repeats = MASKS if per == "batch" else 1
    layer = layer_class(weight.shape[1], repeats * weight.shape[0], bias=False, p=p, per=per, **options)
    layer.weight = nn.Parameter(weight.repeat(repeats, *[1] * (weight.ndim - 1)))
    return layer


def with_masks(layer, x, per):
    """Outputs (masks, samples, ...) of a linear layer for inputs (samples, in)."""
    if per == "sample":  # every mask sees the samples as the tokens of one sample
        return layer(x.expand(MASKS, *x.shape))
    return layer(x).unflatten(-1, (MASKS, -1)).movedim(1, 0)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_by_a_hook(p):
    torch.manual_seed(1)
    hidden = Dropout(p)(nn.Linear(INPUTS, HIDDEN, bias=False))
    hidden.weight.data = V.T.clone()
    outputs = hidden(X.expand(MASKS, *X.shape)) @ U.T
    assert_penalty(outputs, X @ V @ U.T, Y, dropout_penalty(U, V, p, C).item())


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_groups(p):
    torch.manual_seed(1)
    outputs = GroupDropout(p, group_size=2)((X @ V).expand(MASKS, -1, -1)) @ U.T
    assert_penalty(outputs, X @ V @ U.T, Y, dropblock_penalty(U, V, p, 2, C).item())


def test_drop_path_by_a_hook():
    torch.manual_seed(1)
    layer = DropPath(0.3)(nn.Linear(INPUTS, OUTPUTS, bias=False))
    layer.weight.data = U @ V.T
    closed_form = mask_variance(0.3) * (layer.weight.double() @ C @ layer.weight.T.double()).trace().item()
    assert_penalty(layer(X.expand(MASKS, *X.shape)), layer.eval()(X), Y, closed_form)


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropconnect_on_the_last_layer(per, p):
    torch.manual_seed(1)
    outputs = with_masks(replicas(DropConnectLinear, U, p, per), X @ V, per)
    closed_form = dropconnect_penalty([V.T, U], [0.0, p], C).item()
    assert closed_form == pytest.approx(dropout_penalty(U, V, p, C).item())
    assert_penalty(outputs, X @ V @ U.T, Y, closed_form)


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropconnect_on_the_first_layer(per, p):
    torch.manual_seed(1)
    outputs = with_masks(replicas(DropConnectLinear, V.T, p, per), X, per) @ U.T
    by_hand = mask_variance(p) * (U.double().square().sum(0) * (V.double().square().T @ C.diag())).sum().item()
    assert dropconnect_penalty([V.T, U], [p, 0.0], C).item() == pytest.approx(by_hand)
    assert_penalty(outputs, X @ V @ U.T, Y, by_hand)


def test_dropconnect_on_both_layers():
    torch.manual_seed(1)
    layers = [replicas(DropConnectLinear, weight, 0.3, "sample") for weight in (V.T, U)]
    outputs = layers[1](layers[0](X.expand(MASKS, *X.shape)))
    assert_penalty(outputs, X @ V @ U.T, Y, dropconnect_penalty([V.T, U], 0.3, C).item())


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("groups", [1, 2])
def test_dropconnect_on_a_convolution(per, groups):
    torch.manual_seed(1)
    p, images, weight = 0.4, torch.randn(2, 2, 3, 3), torch.randn(2, 2 // groups, 2, 2)
    plain = nn.functional.conv2d(images, weight, stride=1, padding=0, groups=groups)
    # Every output is a linear map of one patch: its variance is the mask's, times the squares of weights and inputs.
    squares = nn.functional.conv2d(images.double().square(), weight.double().square(), groups=groups)
    closed_form = mask_variance(p) * squares.flatten(1).sum(1).mean().item()
    targets = torch.randn_like(plain)
    if per == "sample":
        layer = DropConnectConv2d(2, 2, 2, groups=groups, bias=False, p=p, per=per)
        layer.weight.data = weight
        outputs = torch.stack([layer(image.expand(MASKS, -1, -1, -1)) for image in images], dim=1)
        losses = (outputs - targets).square().flatten(2).sum(2)
        assert abs(torch.corrcoef(losses.T)[0, 1]) < 5 / math.sqrt(MASKS)  # images have masks of their own
    else:
        layer = DropConnectConv2d(2, 2 * MASKS, 2, groups=groups, bias=False, p=p, per=per)
        layer.weight.data = weight.unflatten(0, (groups, -1)).repeat(1, MASKS, 1, 1, 1).flatten(0, 1)
        outputs = layer(images).unflatten(1, (groups, MASKS, -1)).permute(2, 0, 1, 3, 4, 5).flatten(2, 3)
    assert_penalty(outputs, plain, targets, closed_form)
