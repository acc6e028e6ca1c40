import jaxtyping
import pytest
import torch
from torch import nn

from masklr.models import MLP


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_outputs_are_those_of_the_same_layers_in_sequence(activation):
    model = MLP([12, 7, 5, 3], activation=activation, p=0.4).eval()
    activations = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
    first, second, last = model.layers
    plain = nn.Sequential(first, activations[activation](), second, activations[activation](), last)
    x = torch.randn(6, 12)
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x.view(6, 3, 2, 2)), plain(x))


def test_hidden_units_are_dropped_in_training_and_outputs_are_not():
    model = MLP([3, 400, 2], p=0.75)
    assert [dropout.p for dropout in model.dropouts] == [0.75]
    assert len(model.dropouts) == len(model.layers) - 1
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.layers[0].bias.fill_(1)
        model.layers[1].weight.fill_(1)
        model.layers[1].bias.fill_(0.5)
    torch.manual_seed(0)
    outputs = model(torch.zeros(500, 3))
    kept = (outputs - 0.5) / 4
    assert torch.equal(outputs[:, 0], outputs[:, 1])
    assert torch.equal(kept, kept.round())
    assert abs(kept[:, 0].mean().item() - 100) < 5 * (400 * 0.25 * 0.75 / 500) ** 0.5
    assert (model.eval()(torch.zeros(1, 3)) == 400.5).all()


def test_a_single_layer_is_a_linear_classifier():
    model = MLP([4, 2], p=0.5)
    x = torch.randn(3, 4)
    assert torch.equal(model(x), model.layers[0](x))


def test_samples_of_another_size_raise():
    with pytest.raises(ValueError, match="Expected samples of 64 values, the first of `sizes`, got 3 x 8 x 8"):
        MLP([64, 10])(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sizes": [4]}, r"Expected `sizes` of at least two numbers of at least 1, inputs first, got \[4\]"),
        ({"sizes": [4, -1]}, r"Expected `sizes` .* got \[4, -1\]"),
        ({"p": 1.0}, r"Expected `p` in \[0, 1\), got 1\.0"),
        ({"activation": "elu"}, "Expected `activation` relu, gelu or tanh, got 'elu'"),
    ],
)
def test_bad_values_raise_one_sentence(options, sentence, monkeypatch):
    # Without the checks of annotations, which a user does not have.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=sentence):
        MLP(**{"sizes": [4, 3], **options})
