import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from masklr.models import cross_decoder as module
from masklr.models.cross_decoder import CrossAttention, CrossBlock, cross_attention


def by_hand(layer, x, context):
    """Cross-attention one head and one query at a time."""
    q, (k, v) = layer.q(x), layer.kv(context).chunk(2, dim=-1)
    width = q.shape[-1] // layer.num_heads
    heads = []
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        found = []
        for query in q[..., part].unbind(1):
            scores = (k[..., part] * query[:, None]).sum(-1) / width**0.5
            found.append((scores.softmax(-1)[..., None] * v[..., part]).sum(1))
        heads.append(torch.stack(found, 1))
    return layer.proj(torch.cat(heads, -1))


def output_and_gradients(function, layer, x, context):
    x, context = x.clone().requires_grad_(), context.clone().requires_grad_()
    out = function(x, context)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, context, *layer.parameters()])]


@pytest.mark.parametrize("by_products", [True, False])
@pytest.mark.parametrize(("queries", "tokens"), [(1, 5), (7, 1), (12, 17), (60, 50)])
def test_output_and_gradients_are_those_of_attention_written_out(queries, tokens, by_products, monkeypatch):
    monkeypatch.setattr(module, "MAX_PAIRS_BY_PRODUCTS", {torch.float64: 9999 * by_products})
    torch.manual_seed(0)
    layer = CrossAttention(24, context_dim=20, num_heads=3).double()
    x, context = torch.randn(3, queries, 24).double(), torch.randn(3, tokens, 20).double()
    expected = output_and_gradients(lambda *inputs: by_hand(layer, *inputs), layer, x, context)
    for found, wanted in zip(output_and_gradients(layer, layer, x, context), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_products_are_really_used_up_to_their_largest_number_of_pairs():
    largest = module.MAX_PAIRS_BY_PRODUCTS[torch.float32]
    for queries, by_products in ((largest // 9, True), (largest // 9 + 1, False)):
        query, key_value = torch.randn(1, queries, 8, requires_grad=True), torch.randn(1, 9, 16)
        name = type(cross_attention(query, key_value, 2).grad_fn).__name__
        assert ("_CrossAttentionByProductsBackward" in name) == by_products


def test_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    query, key_value = (torch.randn(2, n, w, dtype=torch.float64, requires_grad=True) for n, w in ((3, 6), (4, 12)))
    function = module._CrossAttentionByProducts.apply
    assert torch.autograd.gradcheck(lambda q, kv: function(q, kv, 3, 0.7), (query, key_value))


@pytest.mark.usefixtures("with_and_without_bf16_products")
def test_bf16_is_as_near_to_the_truth_as_fused_attention(monkeypatch):
    torch.manual_seed(0)
    layer = CrossAttention(48, context_dim=32, num_heads=3)
    x, context = torch.randn(4, 12, 48), torch.randn(4, 17, 32)
    exact = copy.deepcopy(layer).double()
    truth = output_and_gradients(exact, exact, x.double(), context.double())
    rounded = layer.bfloat16()
    ours = output_and_gradients(rounded, rounded, x.bfloat16(), context.bfloat16())
    monkeypatch.setattr(module, "MAX_PAIRS_BY_PRODUCTS", {})
    fused = output_and_gradients(rounded, rounded, x.bfloat16(), context.bfloat16())
    for true, found, other in zip(truth, ours, fused, strict=True):
        error, fused_error = ((y.double() - true).norm() / true.norm() for y in (found, other))
        assert found.dtype == torch.bfloat16
        assert error < max(0.01, 1.5 * fused_error)


def test_second_derivative_is_right_under_the_math_kernel_and_an_error_elsewhere():
    torch.manual_seed(0)
    layer = CrossAttention(12, context_dim=12, num_heads=2)
    x, context, v = (torch.randn(2, 5, 12) for _ in range(3))

    def second(layer, dtype):
        along = torch.zeros((), dtype=dtype, requires_grad=True)
        out = layer(x.to(dtype) * (1 + along * v), context.to(dtype))
        (first,) = torch.autograd.grad(out.square().sum(), along, create_graph=True)
        return torch.autograd.grad(first, along)[0]

    with sdpa_kernel(SDPBackend.MATH):
        found, exact = second(layer, torch.float32), second(copy.deepcopy(layer).double(), torch.float64)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="sdpa_kernel"):
        second(layer, torch.float32)


def test_block_is_attention_and_mlp_with_norms_before_and_sums_after():
    torch.manual_seed(0)
    block = CrossBlock(24, context_dim=20, num_heads=3)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x, context = torch.randn(2, 4, 24), torch.randn(2, 6, 20)
    middle = x + by_hand(block.attn, block.norm1(x), context)
    mlp = block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(middle))))
    torch.testing.assert_close(block(x, context), middle + mlp, rtol=1e-5, atol=1e-5)
    for norm in (block.norm1, block.norm2):
        assert norm.eps == 1e-6


@pytest.mark.usefixtures("compilable")
def test_compiled_it_is_products_too_and_the_same():
    torch.manual_seed(0)
    layer = CrossAttention(24, context_dim=20, num_heads=3)
    x, context = torch.randn(3, 5, 24), torch.randn(3, 7, 20)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    expected = output_and_gradients(lambda x, context: by_hand(layer, x, context), layer, x, context)
    for a, b in zip(expected, output_and_gradients(compiled, layer, x, context), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max().clamp(min=1)))
    assert "softmax" in graphs[0]
    assert "scaled_dot_product" not in graphs[0]
