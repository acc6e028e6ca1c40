"""The decoder of CrossMAE: masked tokens ask the encoder's tokens, and never one another.

Shape suffixes: B batch, M masked tokens (which ask), N encoder tokens (which are asked), D their width, E that of the
decoder.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from masklr.models.attention import compiled_products
from masklr.models.attention_in_float32 import CrossAttentionInFloat32
from masklr.models.attention_products import attend, write_gradients
from masklr.models.fast_linear import linear
from masklr.models.float32_products import in_float32, is_widened, lacks_products
from masklr.models.own_gradients import NOT_TWICE, own_gradients_wanted

# The largest number of queries x keys at which batched products beat fused attention on CPU, forward and backward, by
# dtype (2 cores, AVX-512 with bf16), as in `masklr.models.attention`.
MAX_PAIRS_BY_PRODUCTS = {torch.bfloat16: 512 * 512, torch.float32: 48 * 48}


class _CrossAttentionByProducts(torch.autograd.Function):
    """softmax(Q K^T / sqrt(d)) V by batched products; the probabilities are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key_value: Tensor, num_heads: int, scale: float) -> Tensor:
        batch, queries, width = query.shape
        tokens, head_dim = key_value.shape[1], width // num_heads
        q = query.view(batch, queries, num_heads, head_dim).transpose(1, 2).reshape(-1, queries, head_dim)
        # (2, B * heads, N, d), contiguous: one copy instead of two inside bmm.
        k, v = (
            key_value.view(batch, tokens, 2, num_heads, head_dim)
            .permute(2, 0, 3, 1, 4)
            .reshape(2, batch * num_heads, tokens, head_dim)
        )
        with torch.autocast(query.device.type, enabled=False):
            out, probabilities = attend(q, k, v, scale)
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.num_heads, ctx.scale = num_heads, scale
        return out.view(batch, num_heads, queries, head_dim).transpose(1, 2).reshape(batch, queries, width)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():
            # `once_differentiable` would leave this path out of a second derivative without a word.
            raise RuntimeError(NOT_TWICE.format("attention"))
        q, k, v, probabilities = ctx.saved_tensors
        (products, queries, head_dim), tokens = q.shape, k.shape[1]
        heads, batch = ctx.num_heads, products // ctx.num_heads
        with torch.autocast(q.device.type, enabled=False):
            grad_out = grad_out.view(batch, queries, heads, head_dim).transpose(1, 2).reshape(q.shape)
            grads, grad_q = k.new_empty(2, products, tokens, head_dim), torch.empty_like(q)
            write_gradients((grad_q, grads[0], grads[1]), grad_out, q, k, v, probabilities, ctx.scale)
        grad_q = grad_q.view(batch, heads, queries, head_dim).transpose(1, 2)
        grad_kv = grads.view(2, batch, heads, tokens, head_dim).permute(1, 3, 0, 2, 4)
        return grad_q.reshape(batch, queries, -1), grad_kv.reshape(batch, tokens, -1), None, None


def cross_attention(
    query: Float[Tensor, "B M E"], key_value: Float[Tensor, "B N two_E"], num_heads: int
) -> Float[Tensor, "B M E"]:
    r"""Attention of queries over the tokens of another sequence, by the fastest exact way for device, dtype and length.

    .. math:: \mathrm{softmax}(Q K^\top / \sqrt{d}) V

    Args:
        query: Queries, heads x d wide.
        key_value: Keys and values side by side, each heads x d wide.
        num_heads: Number of heads.

    Returns:
        The heads' outputs side by side, before the output projection. Twice differentiable under
        `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` alone.

    Reference:
        Vaswani et al., "Attention is all you need", NeurIPS 2017.
    """
    batch, queries, width = query.shape
    if lacks_products(query):
        query, key_value = query.bfloat16(), key_value.bfloat16()  # as autocast has it, whatever gave them
    if is_widened(query):
        if own_gradients_wanted(query):
            return CrossAttentionInFloat32.apply(query, key_value, num_heads)
        return in_float32(cross_attention, query, key_value, num_heads=num_heads).to(query.dtype)
    tokens, head_dim = key_value.shape[1], width // num_heads
    by_products = query.device.type == "cpu" and queries * tokens <= MAX_PAIRS_BY_PRODUCTS.get(query.dtype, 0)
    compiling = torch.compiler.is_compiling()
    # Whoever asks for the math kernel wants second derivatives.
    if by_products and not compiling and torch.backends.cuda.flash_sdp_enabled():
        return _CrossAttentionByProducts.apply(query, key_value, num_heads, head_dim**-0.5)
    q = query.view(batch, queries, num_heads, head_dim).transpose(1, 2)
    k, v = (part.view(batch, tokens, num_heads, head_dim).transpose(1, 2) for part in key_value.chunk(2, dim=-1))
    if by_products and compiling:
        return compiled_products(q, k, v)
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence over another.

    Args:
        dim: Width of the tokens that ask, a multiple of `num_heads`, and of the output.
        context_dim: Width of the tokens that are asked.
        num_heads: Number of heads.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B M E"], context: Float[Tensor, "B N D"]) -> Float[Tensor, "B M E"]:
        """What each token of x finds in the context."""
        return linear(self.proj, cross_attention(linear(self.q, x), linear(self.kv, context), self.num_heads))


class CrossBlock(nn.Module):
    """Transformer block whose tokens attend to another sequence and not to one another: cross-attention, then MLP.

    Args:
        dim: Width of the tokens, a multiple of `num_heads`.
        context_dim: Width of the sequence that they attend to, which comes normalized.
        num_heads: Number of attention heads.

    Reference:
        Fu et al., "Rethinking patch dependence for masked autoencoders", 2024 (CrossMAE).
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        from timm.layers import Mlp

        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(dim, context_dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Float[Tensor, "B M E"], context: Float[Tensor, "B N D"]) -> Float[Tensor, "B M E"]:
        """The tokens after the block."""
        x = x + self.attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))
