import copy
import itertools
import pickle

import jaxtyping
import pytest
import torch
from torch import nn

from masklr.layers import DropConnectLinear, GroupDropout, masking
from masklr.models import DeepLinear

MASKS = {
    "none": {},
    "dropout": {"p": 0.5},
    "groups": {"p": 0.5, "mask": "groups", "group_size": 2},
    "dropconnect": {"p": [0.5, 0.25], "mask": "dropconnect"},
    "dropconnect, each sample its own": {"p": 0.5, "mask": "dropconnect", "per": "sample"},
    "inputs": {"input_mask": "units", "input_p": 0.5},
    "patches, exact count, and dropout": {
        "p": 0.5,
        "input_mask": "patches",
        "input_p": 0.5,
        "patch_size": 3,
        "exact_count": True,
    },
}


def identity(size, depth=2, **options):
    """A network whose layers are the identity, so that its outputs are its masks."""
    model = DeepLinear([size] * (depth + 1), **options)
    with torch.no_grad():
        for weight in model.weights:
            weight.copy_(torch.eye(size))
    return model


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(share, expected, count):
    """Whether a frequency is within 5 of its standard errors."""
    return abs(share - expected) < 5 * (expected * (1 - expected) / count) ** 0.5


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_evaluation_is_the_product_of_the_layers_and_training_is_not(options):
    model = DeepLinear([6, 4, 5], init_seed=0, **options).double()
    x = normal(7, 6, dtype=torch.float64)
    first, second = model.weights
    assert torch.equal(model.product(), second @ first)
    assert torch.equal(model.eval()(x), x @ first.T @ second.T)
    torch.testing.assert_close(model(x), x @ model.product().T)
    torch.manual_seed(0)
    masked = model.train()(x)
    assert torch.equal(masked, model.eval()(x)) == (not options)


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_keys_are_those_of_plain_layers_whatever_the_mask(options):
    model = DeepLinear([6, 4, 5], **options)
    assert list(model.state_dict()) == ["layers.0.weight", "layers.1.weight"]
    assert all(isinstance(layer, nn.Linear) and layer.bias is None for layer in model.layers)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(1)
        outputs = twin(torch.ones(3, 6))
        torch.manual_seed(1)
        assert torch.equal(outputs, model(torch.ones(3, 6)))


def test_hidden_units_are_dropped_one_by_one_for_each_sample_and_scaled():
    torch.manual_seed(0)
    outputs = identity(4, p=0.75)(torch.ones(20_000, 4))
    assert set(outputs.unique().tolist()) == {0.0, 4.0}
    kept = outputs > 0
    assert near(kept.double().mean().item(), 0.25, kept.numel())
    assert near((kept[:, 0] & kept[:, 1]).double().mean().item(), 0.25**2, len(kept))
    assert near((kept[1:, 0] & kept[:-1, 0]).double().mean().item(), 0.25**2, len(kept))


def test_hidden_groups_are_dropped_together():
    torch.manual_seed(0)
    outputs = identity(6, p=0.5, mask="groups", group_size=3)(torch.ones(20_000, 6))
    assert set(outputs.unique().tolist()) == {0.0, 2.0}
    kept = (outputs > 0).view(-1, 2, 3)
    assert (kept == kept[..., :1]).all()
    assert near(kept[:, :, 0].double().mean().item(), 0.5, 2 * len(kept))
    assert near(kept[:, :, 0].all(1).double().mean().item(), 0.25, len(kept))


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_weights_are_dropped_in_the_layers_that_have_a_p(per):
    model = DeepLinear([5, 4, 4], p=[0.5, 0.0], mask="dropconnect", per=per, init_seed=0)
    with torch.no_grad():
        model.weights[1].copy_(torch.eye(4))
    torch.manual_seed(0)
    columns = model(torch.eye(5)).T  # the masked weight of the first layer
    entries = (columns == 0) | torch.isclose(columns, 2 * model.weights[0])
    assert entries.all()
    assert 0 < (columns == 0).sum() < 20
    same = model(torch.ones(2, 5))
    assert torch.equal(same[0], same[1]) == (per == "batch")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_hidden_layer_has_its_own_p(depth):
    p = [0.1, 0.3, 0.6][:depth]
    model = DeepLinear([4] * (depth + 2), p=p)
    assert model.drop_probabilities == p
    model.dropouts[0].p = 0.9
    assert model.drop_probabilities == [0.9, *p[1:]]
    assert list(masking(model)) == [f"dropouts.{i}" for i in range(depth)]
    connected = DeepLinear([4] * (depth + 1), p=p, mask="dropconnect")
    assert connected.drop_probabilities == p
    assert all(isinstance(layer, DropConnectLinear) for layer in connected.layers)
    groups = DeepLinear([4] * (depth + 2), p=p, mask="groups", group_size=2)
    assert [layer.p for layer in groups.dropouts] == p
    assert all(isinstance(layer, GroupDropout) for layer in groups.dropouts)


def test_a_single_layer_has_no_hidden_units_to_drop():
    model = DeepLinear([3, 2], p=0.5)
    assert torch.equal(model(torch.eye(3)), model.product().T)
    assert model.drop_probabilities == []


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("exact_count", [False, True])
def test_masked_inputs_have_the_share_and_the_count(patch_size, exact_count):
    kind = "units" if patch_size == 1 else "patches"
    model = DeepLinear([8, 8], input_mask=kind, input_p=0.25, patch_size=patch_size, exact_count=exact_count)
    keep = model.draw_input_keep(20_000, generator=torch.Generator().manual_seed(0))
    assert keep.shape == (20_000, 8)
    patches = keep.view(20_000, -1, patch_size)
    assert (patches == patches[..., :1]).all()
    shares = keep.double().mean(0)
    assert all(near(share, 0.75, 20_000) for share in shares.tolist())
    assert ((keep.sum(1) == 6).all().item()) == exact_count
    again = model.draw_input_keep(20_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep, again)


def test_exact_count_divides_by_the_share_that_is_kept():
    model = DeepLinear([10, 10], input_mask="units", input_p=0.33, exact_count=True)
    assert model.input_keep_probability == pytest.approx(0.7)  # 3 of 10 are masked
    assert DeepLinear([10, 10], input_mask="units", input_p=0.33).input_keep_probability == pytest.approx(0.67)


@pytest.mark.parametrize("training", [False, True])
def test_a_given_input_mask_is_used_in_training_and_evaluation(training):
    model = DeepLinear([6, 4], input_mask="units", input_p=0.5, init_seed=0).double().train(training)
    x, keep = normal(5, 6, dtype=torch.float64), model.draw_input_keep(5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(x, keep), (2 * x * keep) @ model.product().T)


def test_inputs_masked_in_training_are_zero_or_scaled():
    torch.manual_seed(0)
    model = identity(6, depth=1, input_mask="patches", input_p=0.5, patch_size=3, exact_count=True)
    outputs = model(torch.ones(50, 6))
    assert set(outputs.unique().tolist()) == {0.0, 2.0}
    assert (outputs.sum(1) == 6).all()


@pytest.mark.parametrize(
    ("kind", "patch_size", "exact_count"),
    [("units", 1, False), ("patches", 2, False), ("units", 1, True), ("patches", 2, True)],
)
def test_covariance_of_the_input_mask_is_that_of_all_masks_enumerated(kind, patch_size, exact_count):
    num_patches, p = 3, 1 / 3
    model = DeepLinear(
        [num_patches * patch_size, 2], input_mask=kind, input_p=p, patch_size=patch_size, exact_count=exact_count
    )
    second_moment, total = 0.0, 0.0
    for kept in itertools.product([0.0, 1.0], repeat=num_patches):
        count = int(sum(kept))
        if exact_count and count != 2:
            continue
        chance = 1 / 3 if exact_count else (1 - p) ** count * p ** (num_patches - count)
        factors = torch.tensor(kept, dtype=torch.float64).repeat_interleave(patch_size) / (1 - p)
        second_moment, total = second_moment + chance * torch.outer(factors, factors), total + chance
    assert total == pytest.approx(1)
    torch.testing.assert_close(model.input_mask_covariance(), second_moment - 1, rtol=1e-12, atol=1e-12)


def test_without_an_input_mask_its_covariance_is_zero():
    assert torch.equal(DeepLinear([3, 2]).input_mask_covariance(), torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [[6, 6], [6, 3], [3, 6]], ids=str)
def test_orthogonal_initialization_has_equal_singular_values(sizes):
    model = DeepLinear([*sizes, sizes[-1]], init="orthogonal", init_scale=0.1, init_seed=0)
    for weight in model.weights:
        sigma = torch.linalg.svdvals(weight.detach())
        torch.testing.assert_close(sigma, torch.full_like(sigma, 0.1), rtol=1e-5, atol=0.0)


def test_normal_initialization_has_the_scale_and_depends_on_its_seed_alone():
    torch.manual_seed(0)
    first = DeepLinear([400, 300], init_scale=0.5, init_seed=0)
    torch.manual_seed(1)
    second, other = DeepLinear([400, 300], init_scale=0.5, init_seed=0), DeepLinear([400, 300], init_seed=1)
    std = first.weights[0].std().item()
    assert abs(std - 0.5 / 20) < 5 * 0.5 / 20 / (2 * 400 * 300) ** 0.5
    assert torch.equal(first.weights[0], second.weights[0])
    assert not torch.equal(first.weights[0], 0.5 * other.weights[0])
    unseeded = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        unseeded.append(DeepLinear([40, 30]).weights[0])
    assert torch.equal(unseeded[0], unseeded[1])
    assert not torch.equal(unseeded[0], unseeded[2])


BAD = {
    "one size": ({"sizes": [4]}, r"Expected `sizes` of at least two numbers .* got \[4\]"),
    "size of zero": ({"sizes": [4, 0]}, r"Expected `sizes` .* got \[4, 0\]"),
    "p of one": ({"p": 1.0}, r"Expected `p` in \[0, 1\), got 1\.0"),
    "negative p": ({"p": -0.1}, r"Expected `p` in \[0, 1\), got -0\.1"),
    "one p too many": ({"p": [0.5, 0.5]}, r"Expected `p` of 1 values, got \[0\.5, 0\.5\]"),
    "a p for hidden layers of weights": (
        {"p": [0.5], "mask": "dropconnect"},
        r"Expected `p` of 2 values, got \[0\.5\]",
    ),
    "bad p in a list": ({"p": [1.5]}, r"Expected `p` in \[0, 1\), got \[1\.5\]"),
    "unknown mask": ({"mask": "drop"}, "Expected `mask` dropout, dropconnect or groups, got 'drop'"),
    "group that does not divide": ({"mask": "groups", "group_size": 3}, r"Expected `group_size` .* \[4\], got 3"),
    "group of none": ({"mask": "groups", "group_size": 0}, r"Expected `group_size` .* got 0"),
    "group of units": ({"group_size": 2}, "Expected `group_size` only beside `mask` groups, got 2 beside dropout"),
    "patch that does not divide": (
        {"input_mask": "patches", "input_p": 0.5, "patch_size": 4},
        "Expected `patch_size` to divide the 6 inputs, got 4",
    ),
    "patch of units": ({"input_mask": "units", "input_p": 0.5, "patch_size": 2}, "Expected `patch_size` only beside"),
    "share without a mask": ({"input_p": 0.5}, "Expected an `input_mask` beside `input_p`"),
    "count without a mask": ({"exact_count": True}, "Expected an `input_mask` beside `input_p` and `exact_count`"),
    "mask without a share": ({"input_mask": "units"}, r"Expected `input_p` in \(0, 1\) .* got 0\.0"),
    "share of one": ({"input_mask": "units", "input_p": 1.0}, r"Expected `input_p` in \(0, 1\) .* got 1\.0"),
    "nothing left": (
        {"input_mask": "units", "input_p": 0.95, "exact_count": True},
        r"Expected `input_p` to mask some and keep some of 6 exactly, got 0\.95",
    ),
    "unknown input mask": ({"input_mask": "all"}, "Expected `input_mask` none, units or patches, got 'all'"),
    "unknown init": ({"init": "zeros"}, "Expected `init` normal or orthogonal, got 'zeros'"),
    "scale of zero": ({"init_scale": 0.0}, r"Expected `init_scale` above 0, got 0\.0"),
    "per": ({"mask": "dropconnect", "per": "token"}, "`per`"),
}


@pytest.mark.parametrize(("options", "sentence"), BAD.values(), ids=BAD)
def test_bad_values_raise_one_sentence(options, sentence, monkeypatch):
    # Without the checks of annotations, which a user does not have.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=sentence) as error:
        DeepLinear(**{"sizes": [6, 4, 5], **options})
    assert "\n" not in str(error.value)
