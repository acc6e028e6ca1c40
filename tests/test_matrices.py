from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

from masklr.matrices import measured_matrices, named_matrices


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


# ------------------------------------------------------------------------------------------------ embeddings


def test_an_embedding_is_its_table_and_shares_with_a_tied_head():
    model = nn.ModuleDict({"tokens": nn.Embedding(11, 4), "head": nn.Linear(4, 11, bias=False)})
    assert {name: tuple(m.shape) for name, m in measured_matrices(model).items()} == {
        "tokens": (11, 4),
        "head": (11, 4),
    }
    model["head"].weight = model["tokens"].weight
    assert list(measured_matrices(model)) == ["tokens"]


def test_a_position_embedding_is_measured_only_if_its_name_is_asked_for():
    model = vit()
    assert not {"pos_embed", "cls_token"} & set(measured_matrices(model, include=["**"]))
    matrices = measured_matrices(model, include=["head", "pos_embed"])
    assert list(matrices) == ["pos_embed", "head"]
    assert torch.equal(matrices["pos_embed"], model.pos_embed[0].detach())
    with pytest.raises(ValueError, match="cls_token"):  # a vector is no matrix
        measured_matrices(model, include=["cls_token"])


# ------------------------------------------------------------------------------------------------ products


def nonzero_singular_values(product):
    sigma = torch.linalg.svdvals(product.detach().double())
    return sigma[sigma > 1e-9 * sigma[0]]


def assert_same_spectrum(core, product):
    expected = nonzero_singular_values(product)
    sigma = torch.linalg.svdvals(core)
    torch.testing.assert_close(sigma[: len(expected)], expected, rtol=1e-9, atol=0)
    assert (sigma[len(expected) :] < 1e-9 * sigma[0]).all()


def attention_by_definition(attention, projections, output, num_heads, x):
    """Scores before scaling, and each head's part of the output, from the layers themselves."""
    q, k, v = (projection(x) for projection in projections)
    heads = [t.unflatten(-1, (num_heads, -1)).movedim(-2, 0) for t in (q, k, v)]
    parts = output.weight.unflatten(1, (num_heads, -1)).movedim(1, 0)
    return heads[0] @ heads[1].mT, [head @ part.T for head, part in zip(heads[2], parts, strict=True)]


def linear(weight):
    return lambda x: x @ weight.T


def test_products_of_heads_of_a_fused_projection_have_the_spectrum_of_scores_and_outputs():
    model = vit(embed_dim=24, num_heads=3).double()
    attention = model.blocks[1].attn
    matrices = measured_matrices(model, attention_products=True)
    names = [f"blocks.{i}.attn.{kind}.{head}" for i in range(2) for kind in ("qk", "ov") for head in range(3)]
    assert list(matrices)[-12:] == names
    assert all(matrices[name].shape == (8, 8) for name in names)
    weights = [linear(w) for w in attention.qkv.weight.detach().chunk(3)]
    # On the basis of all unit vectors, scores and outputs are the products themselves.
    scores, outputs = attention_by_definition(attention, weights, attention.proj, 3, torch.eye(24).double())
    for head in range(3):
        assert_same_spectrum(matrices[f"blocks.1.attn.qk.{head}"], scores[head])
        assert_same_spectrum(matrices[f"blocks.1.attn.ov.{head}"], outputs[head])


class SeparateAttention(nn.Module):
    """Separate projections; keys and values may be shared by groups of heads."""

    def __init__(self, names, output, num_heads=4, groups=4, head_dim=5, width=12):
        super().__init__()
        self.num_attention_heads = num_heads
        for name, heads in zip(names, (num_heads, groups, groups), strict=True):
            self.add_module(name, nn.Linear(width, heads * head_dim))
        self.add_module(output, nn.Linear(num_heads * head_dim, width))


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    ("names", "output"),
    [(("q_proj", "k_proj", "v_proj"), "o_proj"), (("query", "key", "value"), "out_proj"), (("q", "k", "v"), "proj")],
)
def test_products_of_separate_projections(names, output, groups):
    attention = SeparateAttention(names, output, groups=groups).double()
    matrices = measured_matrices(attention, include=["qk.*", "ov.*"], attention_products=True)
    assert list(matrices) == [f"{kind}.{head}" for kind in ("qk", "ov") for head in range(4)]
    q, k, v = (getattr(attention, name).weight.detach().unflatten(0, (-1, 5)) for name in names)
    out = getattr(attention, output).weight.detach().unflatten(1, (4, 5))
    for head in range(4):
        assert_same_spectrum(matrices[f"qk.{head}"], q[head].T @ k[head * groups // 4])
        assert_same_spectrum(matrices[f"ov.{head}"], out[:, head] @ v[head * groups // 4])


@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 6}])
def test_products_of_torch_multihead_attention(sizes):
    attention = nn.MultiheadAttention(8, 2, bias=False, **sizes).double()
    matrices = measured_matrices(nn.ModuleDict({"attn": attention}), attention_products=True)
    weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    q, k, v = attention.in_proj_weight.chunk(3) if not sizes else weights
    for head, rows in enumerate((slice(0, 4), slice(4, 8))):
        assert_same_spectrum(matrices[f"attn.qk.{head}"], q[rows].T @ k[rows])
        assert_same_spectrum(matrices[f"attn.ov.{head}"], attention.out_proj.weight[:, rows] @ v[rows])


def test_attention_products_are_selected_like_matrices_and_shared_attentions_come_once():
    model = vit()
    model.blocks[1].attn = model.blocks[0].attn
    names = list(measured_matrices(model, include=["**.qk.*"], attention_products=True))
    assert names == ["blocks.0.attn.qk.0", "blocks.0.attn.qk.1", "blocks.0.attn.qk.2"]
    with pytest.raises(ValueError, match="Expected `include` to keep a product that was asked for"):
        measured_matrices(model, include=["head"], attention_products=True)
    with pytest.raises(ValueError, match="Expected an attention for `attention_products`"):
        measured_matrices(nn.Sequential(nn.Linear(2, 2)), attention_products=True)


def test_an_attention_with_an_effective_weight_has_products_too():
    model = vit(embed_dim=24)
    model.blocks[0].attn.qkv = LowRank(72)  # 4 inputs, of rank 2
    core = measured_matrices(model, attention_products=True)["blocks.0.attn.qk.1"]
    assert torch.linalg.matrix_rank(core, rtol=1e-5) == 2


def test_product_maps_of_a_vision_transformer():
    model = vit()
    matrices = measured_matrices(model, products=[["blocks.*.mlp.fc1", "blocks.*.mlp.fc2"]])
    assert list(matrices)[-2:] == ["blocks.0.mlp.fc2*fc1", "blocks.1.mlp.fc2*fc1"]
    for i, block in enumerate(model.blocks):
        product = block.mlp.fc2.weight.double() @ block.mlp.fc1.weight.double()
        assert_same_spectrum(matrices[f"blocks.{i}.mlp.fc2*fc1"], product)


@pytest.mark.parametrize("widths", [(30, 20, 40), (30, 4, 40), (30, 20, 4, 9, 50), (3, 20, 40), (40, 20, 3), (7, 7, 7)])
def test_products_of_any_chain_are_exact_and_no_larger_than_their_rank(widths):
    layers = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))).double()
    names = [str(i) for i in range(len(layers))]
    core = measured_matrices(layers, products=[names])["*".join(reversed(names))]
    product = torch.eye(widths[0]).double()
    for layer in layers:
        product = layer.weight.detach() @ product
    assert min(core.shape) == min(widths)
    assert_same_spectrum(core, product)


def test_product_of_an_ill_conditioned_chain_keeps_the_small_singular_values():
    # 1e-9 of the first: lost if a Gram matrix were formed.
    s = torch.logspace(0, -4.5, 6, dtype=torch.float64)
    rotations = [torch.linalg.qr(torch.randn(50, 6, dtype=torch.float64))[0] for _ in range(2)]
    model = nn.Sequential(nn.Linear(50, 6), nn.Linear(6, 50)).double()
    model[0].weight.data, model[1].weight.data = s.diag() @ rotations[0].T, rotations[1] @ s.diag()
    core = measured_matrices(model, products=[["0", "1"]])["1*0"]
    torch.testing.assert_close(torch.linalg.svdvals(core), s.square(), rtol=1e-6, atol=0)


def test_a_wildcard_stands_for_the_same_in_all_patterns():
    model = nn.ModuleDict({f"{i}{j}": nn.Linear(3, 3) for i in "ab" for j in "xy"})
    names = list(measured_matrices(model, products=[["?x", "?y"]], include=["**x*", "*y*"]))
    assert names[-2:] == ["ay*ax", "by*bx"]
    assert list(measured_matrices(model, products=[["ax", "?y"]]))[-2:] == ["ay*ax", "by*ax"]
    del model["by"]
    with pytest.raises(ValueError, match=r"wildcards stand for the same, got '\?x' with 2 matches .* and '\?y' with 1"):
        measured_matrices(model, products=[["?x", "?y"]])


def test_products_of_one_by_one_convolutions_are_maps_and_of_larger_kernels_are_not():
    model = nn.Sequential(nn.Conv2d(6, 3, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 1, groups=5), nn.Conv2d(5, 4, 3))
    core = measured_matrices(model, products=[["0", "1"]])["1*0"]
    assert_same_spectrum(core, model[1].weight.double().flatten(1) @ model[0].weight.double().flatten(1))
    for chain in (["1", "2"], ["1", "3"]):
        with pytest.raises(ValueError, match="Expected `products` of linear layers or 1 x 1 convolutions, got"):
            measured_matrices(model, products=[chain])


@pytest.mark.parametrize(
    ("products", "sentence"),
    [
        ([["blocks.*.mlp.fc1"]], "Expected `products` of lists of two or more patterns"),
        (["blocks.*.mlp.fc1"], "Expected `products` of lists of two or more patterns"),
        ([["blocks.*.mlp.fc1", "blocks.*.mlp.fc3"]], r"`products` to match .*'blocks\.\*\.mlp\.fc3'"),
        (
            [["blocks.*.mlp.fc2", "head"], ["head", "blocks.0.mlp.fc2"]],
            "'head' with 5 outputs before 'blocks.0.mlp.fc2",
        ),
    ],
)
def test_products_that_cannot_be_made_raise(products, sentence):
    with pytest.raises(ValueError, match=sentence):
        measured_matrices(vit(), products=products)


def test_gradients_are_seen_through_the_same_views():
    model = vit()
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    model.head.weight.grad = None
    model.blocks[1].attn.qkv = LowRank(72)
    named = named_matrices(model)
    qkv = model.blocks[0].attn.qkv.weight.grad
    assert torch.equal(named["blocks.0.attn.qkv.k"].gradient(), qkv[24:48])
    assert torch.equal(named["patch_embed.proj"].gradient(), model.patch_embed.proj.weight.grad.flatten(1))
    assert named["head"].gradient() is None  # there is none
    assert named["blocks.1.attn.qkv.q"].gradient() is None  # of a computed weight
    assert {n: m.shape for n, m in named.items()} == {n: tuple(m.shape) for n, m in measured_matrices(model).items()}
