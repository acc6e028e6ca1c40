import copy
import math
import pickle

import jaxtyping
import pytest
import timm
import torch
from timm.layers import DropPath as TimmDropPath
from torch import nn

from masklr.layers import (
    DropConnect,
    DropConnectConv2d,
    DropConnectLinear,
    Dropout,
    DropPath,
    GroupDropout,
    Groups,
    LowRank,
    LowRankLinear,
    check_optimizer,
    insert,
    masking,
    remove,
)
from masklr.models.attention import accelerate

VIT = ("vit_tiny_patch16_224", {"depth": 2, "img_size": 32, "num_classes": 5})
CONVNEXT = ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64), "num_classes": 5})
RESNET = ("resnet10t", {"num_classes": 5})


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Identity(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(144, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 2),
    )


def images(batch=4):
    torch.manual_seed(1)
    return torch.randn(batch, 1, 8, 8)


def description(model):
    """Everything that may not change when insertion fails, or that removal brings back."""
    return [
        (name, type(layer), {k: v for k, v in vars(layer).items() if not k.startswith("_")}, len(layer._forward_hooks))
        for name, layer in model.named_modules()
    ]


@pytest.mark.parametrize(
    ("architecture", "masks"),
    [
        (VIT, {"blocks.*.attn.qkv": DropConnect(0.3), "blocks.*.mlp.fc?": DropConnect(0.3, per="sample")}),
        (VIT, {"**.drop_path?": DropPath(0.3), "**.attn_drop": Dropout(0.2), "**.mlp.drop1": Groups(0.3, 4)}),
        (VIT, {"blocks.*": Dropout(0.1), "patch_embed.proj": DropConnect(0.2, per="sample")}),
        (CONVNEXT, {"stages.**.fc1": DropConnect(0.3), "stages.**.conv_dw": DropConnect(0.3, per="sample")}),
        (CONVNEXT, {"stages.*.blocks.*.drop_path": DropPath(0.2), "stages.**.fc1": Groups(0.2, 4, dim=1)}),
        (RESNET, {"layer*.*.conv?": DropConnect(0.3), "fc": DropConnect(0.3, per="sample")}),
        (RESNET, {"layer*.*.bn2": Groups(0.2, 4, dim=1), "fc": Dropout(0.2)}),
    ],
)  # fmt: skip
def test_keys_and_evaluation_stay_bitwise_and_removal_gives_the_plain_classes_back(architecture, masks):
    name, options = architecture
    model = timm.create_model(name, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    plain, keys, before = model(x), list(model.state_dict()), description(model)
    parameters = {id(parameter) for parameter in model.parameters()}
    names = insert(model, masks)
    assert len(names) >= len(masks)
    assert torch.equal(model(x), plain)
    assert list(model.state_dict()) == keys
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert set(masking(model)) == set(names)
    assert not torch.equal(model.train()(x), model(x))
    model(x).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    model.eval()  # batch norms have new statistics
    trained = model(x)
    assert remove(model) == names
    assert torch.equal(model(x), trained)
    assert description(model) == before
    assert masking(model) == {}
    assert remove(model) == []


@pytest.mark.parametrize(
    ("factory", "layer", "new_class", "p"),
    [
        (DropConnect(0.2), nn.Linear(4, 4), DropConnectLinear, 0.2),
        (DropConnect(0.2), nn.Conv2d(4, 8, 1), DropConnectConv2d, 0.2),
        (Dropout(0.2), nn.Identity(), nn.Dropout, 0.2),
        (Dropout(0.2), nn.Dropout(0.5, inplace=True), nn.Dropout, 0.2),
        (Dropout(0.2), TimmDropPath(0.5), nn.Dropout, 0.2),
        (DropPath(0.2), nn.Identity(), TimmDropPath, 0.2),
        (DropPath(0.2), nn.Dropout(0.5), TimmDropPath, 0.2),
        (Groups(0.2, 2), nn.Dropout(0.5), GroupDropout, 0.2),
        (Groups(0.2, 2), GroupDropout(0.5, 4), GroupDropout, 0.2),
        (Groups(0.2, 2), nn.GELU(), nn.GELU, 0.2),
    ],
)
def test_masks_change_the_layer_itself_and_removal_brings_its_own_values_back(factory, layer, new_class, p):
    model = nn.Sequential(copy.deepcopy(layer))
    layer, before = model[0], description(model)
    assert insert(model, {"0": factory}) == ["0"]
    assert model[0] is layer
    assert type(layer) is new_class
    mask = masking(model)["0"]
    assert mask.p == p
    x = torch.ones(500, 4, 1, 1) if isinstance(layer, nn.Conv2d) else torch.ones(500, 4)
    assert not torch.equal(layer(x), layer(x))
    mask.p = 0.0
    assert masking(model)["0"].p == 0.0  # still there: it was inserted
    assert torch.equal(layer(x), layer(x))
    remove(model)
    assert description(model) == before


def test_hooks_mask_outputs_in_training_with_mean_one():
    layer = insert_into_relu(Dropout(0.3))
    x = torch.ones(1000, 100)
    y = layer(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs((y != 0).double().mean() - 0.7) < 5 * math.sqrt(0.21 / y.numel())
    assert torch.equal(layer.eval()(x), x)
    rows = insert_into_relu(DropPath(0.3))(x)
    assert (rows == rows[:, :1]).all()
    groups = insert_into_relu(Groups(0.3, 5))(x).unflatten(1, (20, 5))
    assert (groups == groups[..., :1]).all()
    assert not (groups == groups[:, :1]).all()


def insert_into_relu(factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU())
    insert(model, {"0": factory})
    return model


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_keep_their_masks_apart(duplicate):
    model = network()
    before = description(model)
    insert(
        model, {"0": DropConnect(0.5), "1": Dropout(0.5), "2": Groups(0.5, 2), "4": Dropout(0.5), "6": DropPath(0.5)}
    )
    other = duplicate(model)
    torch.manual_seed(2)
    y = model(images())
    torch.manual_seed(2)
    assert torch.equal(other(images()), y)
    for mask in masking(model).values():
        mask.p = 0.0
    assert {mask.p for mask in masking(other).values()} == {0.5}
    assert remove(other) == ["0", "1", "2", "4", "6"]
    assert description(other) == before
    assert len(masking(model)) == 5


def test_compiled_models_mask_by_hooks_and_layers(compilable):
    model = network()
    insert(model, {"4": Dropout(0.5), "6": DropConnect(0.5), "1": Groups(0.5, 2)})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images()
    assert not torch.allclose(compiled(x), compiled(x))
    assert torch.allclose(compiled.eval()(x), model.eval()(x), atol=1e-6)
    assert set(masking(compiled)) == {"1", "2", "4", "6"}
    assert remove(compiled) == ["1", "4", "6"]


def test_layers_with_several_names_change_under_all_of_them():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared)})
    assert insert(model, {"b.1": LowRank(2)}) == ["a", "b.1"]
    assert model["a"] is model["b"][1]
    assert isinstance(model["a"], LowRankLinear)
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared)})
    assert insert(model, {"b.*": Dropout(0.2)}) == ["a", "b.0", "b.1"]
    assert len(shared._forward_hooks) == 1
    assert remove(model) == ["a", "b.0", "b.1"]


def test_weights_and_outputs_may_both_be_masked_in_two_steps():
    model = network()
    insert(model, {"4": DropConnect(0.2)})
    insert(model, {"4": Dropout(0.3)})
    assert {name: mask.p for name, mask in masking(model).items()} == {"2": 0.1, "4": 0.2, "4.output": 0.3}
    assert remove(model) == ["4"]


def test_masking_leaves_out_dropouts_that_do_nothing_and_the_model_itself_may_be_a_mask():
    assert masking(nn.Sequential(nn.Dropout(0.0), TimmDropPath(0.0), nn.Linear(2, 2))) == {}
    assert {name: mask.p for name, mask in masking(GroupDropout(0.3, 2)).items()} == {"": 0.3}
    assert {name: mask.p for name, mask in masking(DropConnectLinear(2, 2, p=0.0)).items()} == {"": 0.0}


@pytest.mark.parametrize("layer", [DropConnectLinear(3, 2), DropConnectConv2d(3, 2, 1)])
def test_dropconnect_layers_built_as_such_become_plain(layer):
    model = nn.Sequential(layer)
    weight = layer.weight
    assert remove(model) == ["0"]
    assert type(model[0]) in (nn.Linear, nn.Conv2d)
    assert model[0].weight is weight
    assert str(model[0]) == str(nn.Linear(3, 2) if type(model[0]) is nn.Linear else nn.Conv2d(3, 2, 1))


def test_attention_dropout_of_fast_and_fused_attention_follows_the_inserted_p():
    model = timm.create_model(VIT[0], **VIT[1])
    accelerate(model)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), model(x))
    insert(model, {"blocks.*.attn.attn_drop": Dropout(0.5)})
    assert not torch.equal(model(x), model(x))
    remove(model)
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"4": DropConnect(0.5), "blocks.*": DropConnect(0.5)}, "Expected `masks` to match something, got 'blocks.*'"),
        ({"4": DropConnect(0.5), "5": DropConnect(0.5)}, "that DropConnect can replace, got '5', a LayerNorm"),
        ({"4": DropConnect(0.5), "3": LowRank(1)}, "that LowRank can replace, got '3', a Flatten"),
        ({"4": DropConnect(0.5), "6": LowRank(3)}, "got '6', whose matrix has rank 2 at most, below `rank` 3"),
        ({"4": DropConnect(0.5), "6": Groups(0.5, 3)}, "got '6', whose 2 channels `group_size` 3 does not divide"),
        ({"4": DropConnect(0.5), "0": Groups(0.5, 3, dim=1)}, "got '0', whose 4 channels `group_size` 3"),
        (
            {"4": DropConnect(0.5), "[46]": Dropout(0.5)},
            r"to match each layer once, got '4' and '\[46\]', which match '4'",
        ),
    ],
)
def test_wrong_insertions_say_why_and_change_nothing(masks, message):
    model = network()
    before = description(model)
    with pytest.raises(ValueError, match=message):
        insert(model, masks)
    assert description(model) == before


@pytest.mark.parametrize("first", [DropConnect(0.5), DropConnect(0.5, per="sample")])
def test_a_second_mask_of_the_same_kind_is_refused(first):
    model = network()
    insert(model, {"4": first, "1": Dropout(0.2), "5": Groups(0.5, 2)})
    before = description(model)
    for pattern, factory in {"4": DropConnect(0.2), "1": DropPath(0.2), "5": Dropout(0.2)}.items():
        with pytest.raises(ValueError, match=f"got '{pattern}', which .* call `remove` first"):
            insert(model, {pattern: factory})
    with pytest.raises(ValueError, match="got '4', a DropConnectLinear"):
        insert(model, {"4": LowRank(1)})
    assert description(model) == before


def test_layers_that_are_never_called_are_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "layers": nn.ModuleList([nn.ReLU()])})
    for pattern in ("attention.out_proj", "layers"):
        with pytest.raises(ValueError, match=rf"got '{pattern}', a .*, which is never called"):
            insert(model, {pattern: Dropout(0.5)})
    with pytest.raises(ValueError, match=r"got 'attention.out_proj', a NonDynamicallyQuantizableLinear"):
        insert(model, {"attention.out_proj": DropConnect(0.5)})
    with pytest.raises(ValueError, match=r"Expected Dropout for 'blocks.0.attn.attn_drop', got Groups"):
        insert(timm.create_model(VIT[0], **VIT[1]), {"**.attn_drop": Groups(0.5, 2)})


def test_a_layer_that_gives_no_tensor_raises_when_it_is_masked():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 3)})
    insert(model, {"lstm": Dropout(0.5)})
    with pytest.raises(ValueError, match=r"Expected a layer that gives a tensor for Dropout\(p=0.5\), got LSTM"):
        model["lstm"](torch.randn(2, 1, 3))


def test_a_factory_called_by_hand_refuses_by_the_name_of_the_class():
    with pytest.raises(ValueError, match="that DropConnect can replace, got LayerNorm, a LayerNorm"):
        DropConnect(0.5)(nn.LayerNorm(3))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: DropConnect(1.0), r"Expected `p` in \[0, 1\), got 1.0"),
        (lambda: DropConnect(0.5, per="token"), "Expected `per` to be batch or sample"),
        (lambda: Dropout(1.2), r"Expected `p` in \[0, 1\), got 1.2"),
        (lambda: DropPath(-0.1), r"Expected `p` in \[0, 1\), got -0.1"),
        (lambda: Groups(math.nan, 2), r"Expected `p` in \[0, 1\), got nan"),
        (lambda: Groups(0.5, 0), "Expected `group_size` of at least 1, got 0"),
        (lambda: LowRank(0), "Expected `rank` of at least 1, got 0"),
    ],
)
def test_wrong_arguments_of_factories_raise(factory, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the factory itself is to refuse a wrong `per`
    with pytest.raises(ValueError, match=message):
        factory()


def test_an_optimizer_that_holds_what_low_rank_replaces_is_an_error():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = description(model)
    with pytest.raises(ValueError, match="Expected `optimizer` to hold no parameter that is replaced, got one of '4'"):
        insert(model, {"0": DropConnect(0.5), "4": LowRank(2)}, optimizer=optimizer)
    assert description(model) == before
    insert(model, {"0": DropConnect(0.5), "1": Dropout(0.5)}, optimizer=optimizer)  # masks keep all parameters
    check_optimizer(model, optimizer)
    bias = model[4].bias
    insert(model, {"4": LowRank(2)})
    with pytest.raises(ValueError, match=r"got 1 that it no longer has, the first of shape \(6, 144\); make the optim"):
        check_optimizer(model, optimizer)
    assert model[4].up.bias is bias
    check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_weight_without_a_decomposition_leaves_the_model_as_it_was():
    model = network()
    model[6].weight.data.fill_(math.nan)
    before = description(model)
    with pytest.raises(torch.linalg.LinAlgError):
        insert(model, {"0": DropConnect(0.5), "6": LowRank(1)})
    assert description(model) == before
