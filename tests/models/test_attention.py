import copy

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from masklr.models import attention as module
from masklr.models.attention import FastAttention, accelerate, attention
from masklr.models.decoder_blocks import LastTokensBlock
from tests.graphs import backward_functions, second_derivative


def twins(seed=0, width=24, **options):
    """timm's attention and ours with the same weights."""
    torch.manual_seed(seed)
    theirs = Attention(width, num_heads=3, qkv_bias=True, **options)
    ours = FastAttention(width, num_heads=3, qkv_bias=True, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def output_and_gradients(layer, x, **options):
    x = x.clone().requires_grad_()
    out = layer(x, **options)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])
    return [out.detach(), *grads]


@pytest.mark.parametrize("tokens", [1, 7, 80, 81])
def test_output_and_gradients_equal_those_of_timm(tokens):
    theirs, ours = twins()
    x = torch.randn(3, tokens, 24)
    for a, b in zip(output_and_gradients(theirs, x), output_and_gradients(ours, x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=3e-6 * float(a.abs().max().clamp(min=1)))


def test_products_are_really_used_up_to_their_longest_sequence():
    _, ours = twins()
    longest = module.MAX_TOKENS_BY_PRODUCTS[torch.float32]
    for tokens, by_products in ((longest, True), (longest + 1, False)):
        qkv = ours.qkv(torch.randn(1, tokens, 24))
        assert ("_AttentionByProductsBackward" in backward_functions(attention(qkv, 3))) == by_products


@pytest.mark.usefixtures("with_and_without_bf16_products")
def test_bf16_is_as_near_to_the_truth_as_timm():
    theirs, ours = twins(width=48)
    x = torch.randn(4, 17, 48)
    truth = output_and_gradients(copy.deepcopy(theirs).double(), x.double())
    a = output_and_gradients(theirs.bfloat16(), x.bfloat16())
    b = output_and_gradients(ours.bfloat16(), x.bfloat16())
    for exact, timms, fast in zip(truth, a, b, strict=True):
        scale = exact.abs().max()
        error, timms_error = (((y.double() - exact).abs().max() / scale).item() for y in (fast, timms))
        assert fast.dtype == torch.bfloat16
        assert error < max(0.02, 2 * timms_error)


@pytest.mark.usefixtures("with_and_without_bf16_products")
def test_autocast_gives_bf16_and_stays_near_float32():
    _, ours = twins()
    x = torch.randn(2, 9, 24)
    exact = output_and_gradients(ours, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("last", [4, 3, 1])
def test_gradient_is_that_of_finite_differences(last):
    function = module._AttentionByProducts.apply
    torch.manual_seed(0)
    qkv = torch.randn(2, 4, 18, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, 3, 0.7, last), (qkv,))


def test_second_derivative_is_right_under_the_math_kernel_and_an_error_elsewhere():
    _, ours = twins()
    x, v = torch.randn(2, 7, 24), torch.randn(2, 7, 24)

    with sdpa_kernel(SDPBackend.MATH):
        found = second_derivative(ours, x, v, torch.float32)
        exact = second_derivative(copy.deepcopy(ours).double(), x, v, torch.float64)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="sdpa_kernel"):
        second_derivative(ours, x, v, torch.float32)


@pytest.mark.parametrize(
    "options",
    [{"qk_norm": True, "norm_layer": nn.LayerNorm}, {"scale_norm": True}, {"gated": True}, {"attn_drop": 0.5}],
)
@pytest.mark.parametrize("training", [False, True])
def test_options_of_timm_keep_their_meaning(options, training):
    if "qk_norm" in options or "scale_norm" in options:
        options = {**options, "norm_layer": nn.LayerNorm}
    theirs, ours = twins(**options)
    for layer in (theirs, ours):
        layer.train(training)
        for p in layer.parameters():
            if p.ndim == 1:
                nn.init.uniform_(p, 0.5, 1.5, generator=torch.Generator().manual_seed(p.numel()))
    x = torch.randn(2, 7, 24)
    results = []
    for layer in (theirs, ours):
        torch.manual_seed(1)  # attention dropout draws
        results.append(output_and_gradients(layer, x))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": torch.ones(7, 7, dtype=torch.bool).tril(2)}])
def test_attention_masks_keep_their_meaning(options):
    theirs, ours = twins()
    x = torch.randn(2, 7, 24)
    for a, b in zip(output_and_gradients(theirs, x, **options), output_and_gradients(ours, x, **options), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours(x, **options), ours(x))


def test_projection_dropout_is_applied_in_training_only():
    _, ours = twins(proj_drop=0.5)
    x = torch.randn(2, 7, 24)
    assert (ours(x) == 0).any()
    assert not (ours.eval()(x) == 0).any()


def test_accelerate_names_the_layers_it_changes_and_leaves_subclasses_alone():
    class Special(Attention):
        pass

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=3, num_heads=3)
    model.blocks[1].attn.__class__ = Special
    keys, first = list(model.state_dict()), model.blocks[0].attn
    parameters = [id(p) for p in model.parameters()]
    blocks = ["blocks.0.attn", "blocks.0.mlp", "blocks.1.mlp", "blocks.2.attn", "blocks.2.mlp"]
    assert accelerate(model) == ["patch_embed", *blocks]
    assert type(model.blocks[1].attn) is Special
    assert type(model.blocks[0].attn) is FastAttention
    assert model.blocks[0].attn is first
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert accelerate(model) == []


@pytest.mark.parametrize("tokens", [7, 81])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "norm_layer": nn.LayerNorm}])
def test_last_tokens_are_those_of_the_whole_sequence(tokens, options):
    _, ours = twins(**options)
    x = torch.randn(3, tokens, 24)
    torch.testing.assert_close(ours(x, last=3), ours(x)[:, -3:])


@pytest.mark.parametrize("tokens", [9, 70])
def test_block_of_last_tokens_equals_timms_block(tokens):
    torch.manual_seed(0)
    theirs = Block(24, 3, qkv_bias=True)
    ours = LastTokensBlock(24, 3, qkv_bias=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, tokens, 24)
    grads = []
    for run in (lambda x: theirs(x)[:, -5:], lambda x: ours(x, 5)):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        grads.append(
            [
                out,
                *torch.autograd.grad(
                    out.square().sum(), [leaf, *theirs.parameters(), *ours.parameters()], allow_unused=True
                ),
            ]
        )
    for a, b in zip(*([g for g in side if g is not None] for side in grads), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_without_a_backward_pass_float32_is_timms_bit_for_bit():
    theirs, ours = twins()
    x = torch.randn(3, 7, 24)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), theirs(x), rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize("last", [None, 3])
def test_compiled_it_is_products_too_and_the_same(last):
    theirs, ours = twins()
    x = torch.randn(2, 7, 24)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(lambda x: ours(x, last=last), backend=backend, fullgraph=True)
    found = []
    for layer, function in ((theirs, lambda x: theirs(x) if last is None else theirs(x)[:, -last:]), (ours, compiled)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        found.append([out.detach(), *torch.autograd.grad((out * weights).sum(), [leaf, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=3e-6 * float(a.abs().max().clamp(min=1)))
    assert "softmax" in graphs[0]
    assert "scaled_dot_product" not in graphs[0]
