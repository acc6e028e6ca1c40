import pytest
import timm
import torch
from torch import nn

from masklr.matrices import measured_matrices


def vit(**overrides):
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **(options | overrides))


def test_matrices_of_a_vision_transformer_have_their_names_and_shapes():
    shapes = {name: tuple(matrix.shape) for name, matrix in measured_matrices(vit()).items()}
    block = {
        "attn.qkv.q": (24, 24),
        "attn.qkv.k": (24, 24),
        "attn.qkv.v": (24, 24),
        "attn.proj": (24, 24),
        "mlp.fc1": (96, 24),
        "mlp.fc2": (24, 96),
    }
    blocks = {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    assert shapes == {"patch_embed.proj": (24, 48), **blocks, "head": (5, 24)}


def test_parts_of_a_fused_projection_are_the_maps_that_attention_uses():
    model = vit().eval()
    attention = model.blocks[0].attn
    x = torch.randn(2, 5, 24)
    fused = attention.qkv(x) - attention.qkv.bias
    matrices = measured_matrices(model)
    parts = [x @ matrices[f"blocks.0.attn.qkv.{part}"].T for part in "qkv"]
    torch.testing.assert_close(torch.cat(parts, -1), fused)


@pytest.mark.parametrize(
    ("name", "some"), [("convnext_atto", "stages.0.blocks.0.conv_dw"), ("resnet18", "layer1.0.conv1")]
)
def test_every_linear_and_convolution_of_a_timm_model_is_measured_once(name, some):
    model = timm.create_model(name, num_classes=3)
    matrices = measured_matrices(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert list(matrices) == list(layers)
    assert some in matrices
    for layer_name, matrix in matrices.items():
        weight = layers[layer_name].weight
        assert matrix.shape == (weight.shape[0], weight[0].numel())
        assert torch.equal(matrix, weight.detach().reshape(matrix.shape))


def test_depthwise_convolution_is_the_matrix_of_its_filters():
    layer = nn.Conv2d(6, 6, 7, groups=6)
    assert measured_matrices(nn.Sequential(layer))["0"].shape == (6, 49)


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(3, 4, 5), nn.Conv3d(3, 4, 2), nn.ConvTranspose2d(3, 4, 2), nn.Linear(3, 4)]
)
def test_matrices_are_detached_views(layer):
    matrix = measured_matrices(nn.Sequential(layer))["0"]
    assert matrix.data_ptr() == layer.weight.data_ptr()
    assert not matrix.requires_grad
    assert matrix.shape == (layer.weight.shape[0], layer.weight[0].numel())


def test_views_of_a_fused_projection_share_its_memory():
    model = vit()
    weight = model.blocks[1].attn.qkv.weight
    v = measured_matrices(model)["blocks.1.attn.qkv.v"]
    assert v.data_ptr() == weight[48:].data_ptr()


def test_multihead_attention_of_torch_is_split():
    attention = nn.MultiheadAttention(8, 2)
    matrices = measured_matrices(nn.ModuleDict({"attn": attention}))
    assert list(matrices) == ["attn.in_proj.q", "attn.in_proj.k", "attn.in_proj.v", "attn.out_proj"]
    assert torch.equal(matrices["attn.in_proj.k"], attention.in_proj_weight[8:16])
    separate = nn.MultiheadAttention(8, 2, kdim=5, vdim=6)
    matrices = measured_matrices(nn.ModuleDict({"attn": separate}))
    assert [tuple(m.shape) for m in matrices.values()] == [(8, 8), (8, 5), (8, 6), (8, 8)]
    assert matrices["attn.in_proj.v"].data_ptr() == separate.v_proj_weight.data_ptr()


def test_a_layer_named_qkv_outside_an_attention_is_one_matrix():
    assert list(measured_matrices(nn.ModuleDict({"qkv": nn.Linear(4, 12)}))) == ["qkv"]


class LowRank(nn.Module):
    def __init__(self, out_features: int = 6) -> None:
        super().__init__()
        self.out_features = out_features
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, out_features)

    def effective_weight(self) -> torch.Tensor:
        return self.up.weight @ self.down.weight


def test_a_layer_with_an_effective_weight_is_measured_by_it_and_not_by_its_parts():
    layer = LowRank()
    matrices = measured_matrices(nn.Sequential(layer, nn.Linear(6, 2)))
    assert list(matrices) == ["0", "1"]
    torch.testing.assert_close(matrices["0"], (layer.up.weight @ layer.down.weight).detach())
    assert not matrices["0"].requires_grad


def test_a_fused_projection_with_an_effective_weight_is_split():
    model = vit(embed_dim=24)
    model.blocks[0].attn.qkv = LowRank(72)
    matrices = measured_matrices(model, include=["blocks.0.attn.qkv.*"])
    assert [tuple(m.shape) for m in matrices.values()] == [(24, 4)] * 3


def test_shared_weights_are_measured_once_under_the_first_name():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert list(measured_matrices(nn.Sequential(first, second, first, nn.Linear(4, 2)))) == ["0", "3"]
    once = LowRank()
    assert list(measured_matrices(nn.ModuleDict({"a": once, "b": once}))) == ["a"]


def test_a_parametrized_layer_is_measured_by_the_weight_it_uses():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    matrices = measured_matrices(nn.Sequential(layer))
    assert list(matrices) == ["0"]
    assert torch.equal(matrices["0"], layer.weight.detach())


def test_names_do_not_change_when_modules_are_compiled():
    model = vit()
    names = list(measured_matrices(model))
    assert list(measured_matrices(torch.compile(model))) == names
    model.blocks[0] = torch.compile(model.blocks[0])
    model.blocks[1].attn.qkv = torch.compile(model.blocks[1].attn.qkv)
    compiled = measured_matrices(model)
    assert list(compiled) == names
    assert compiled["blocks.1.attn.qkv.q"].data_ptr() == model.blocks[1].attn.qkv._orig_mod.weight.data_ptr()


def test_a_single_layer_is_named_weight():
    assert list(measured_matrices(nn.Linear(2, 3))) == ["weight"]


def test_globs_include_and_exclude():
    model = vit()
    assert list(measured_matrices(model, include=["blocks.*.mlp.fc?"], exclude=["blocks.0.**"])) == [
        "blocks.1.mlp.fc1",
        "blocks.1.mlp.fc2",
    ]
    assert list(measured_matrices(model, include=["head", "patch_embed.proj"])) == ["patch_embed.proj", "head"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_raises_with_the_nearest_names(argument):
    message = rf"`{argument}` to match something, got 'blocks.0.mlp.fc3'; did you mean blocks.0.mlp.fc"
    with pytest.raises(ValueError, match=message):
        measured_matrices(vit(), **{argument: ["head", "blocks.0.mlp.fc3"]})


def test_nothing_to_measure_raises():
    with pytest.raises(ValueError, match="Expected a matrix to measure"):
        measured_matrices(nn.ReLU())
    with pytest.raises(ValueError, match="Expected a matrix to measure"):
        measured_matrices(nn.Sequential(nn.Linear(2, 2)), exclude=["**"])
