"""The fastest exact attention for (device, dtype, tokens), served to timm's own blocks.

PyTorch's fused attention is the right choice on GPUs. On CPUs its backward pass is slow for the short sequences of
masked autoencoders: in bf16 it is a quarter to a third of the whole training step. There, plain batched matrix products
that keep the probabilities are several times faster and as exact.
"""

from typing import Any

import torch
from jaxtyping import Float
from timm.layers import Attention, PatchEmbed
from torch import Tensor, nn

from masklr.models.attention_in_float32 import SelfAttentionInFloat32
from masklr.models.attention_products import attend, write_gradients
from masklr.models.fast_linear import linear
from masklr.models.fast_mlp import FastMlp, Mlp
from masklr.models.float32_products import (
    apply_layer,
    in_float32,
    is_widened,
    lacks_products,
    leave_compiled_backward_to_its_types,
)
from masklr.models.own_gradients import NOT_TWICE, own_gradients_wanted

# Longest sequence for which batched products beat fused attention on CPU, forward and backward, by dtype: 3 times in
# bf16 at 65 to 197 tokens, 1.1 to 3 times in float32 below 50 (2 cores, AVX-512 with bf16). Beyond, the
# (tokens x tokens) probabilities cost more memory traffic than they save.
MAX_TOKENS_BY_PRODUCTS = {torch.bfloat16: 512, torch.float32: 48}


class _AttentionByProducts(torch.autograd.Function):
    """softmax(Q K^T / sqrt(d)) V of the last queries by batched products; probabilities are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, scale: float, last: int) -> Tensor:
        batch, tokens, width = qkv.shape
        head_dim = width // (3 * num_heads)
        # (3, B * heads, N, d), contiguous: one copy instead of three inside bmm.
        q, k, v = (
            qkv.view(batch, tokens, 3, num_heads, head_dim)
            .permute(2, 0, 3, 1, 4)
            .reshape(3, batch * num_heads, tokens, head_dim)
        )
        q = q[:, -last:].contiguous()
        with torch.autocast(qkv.device.type, enabled=False):
            out, probabilities = attend(q, k, v, scale)
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.num_heads, ctx.scale = num_heads, scale
        return out.view(batch, num_heads, last, head_dim).transpose(1, 2).reshape(batch, last, width // 3)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            # `once_differentiable` would leave this path out of a second derivative without a word.
            raise RuntimeError(NOT_TWICE.format("attention"))
        q, k, v, probabilities = ctx.saved_tensors
        products, last, head_dim = q.shape
        tokens, num_heads = k.shape[1], ctx.num_heads
        batch = products // num_heads
        with torch.autocast(q.device.type, enabled=False):
            grad_out = grad_out.view(batch, last, num_heads, head_dim).transpose(1, 2).reshape(q.shape)
            grads = q.new_empty(3, products, tokens, head_dim)
            grads[0, :, :-last] = 0  # of tokens that do not ask
            write_gradients((grads[0, :, -last:], grads[1], grads[2]), grad_out, q, k, v, probabilities, ctx.scale)
        grad_qkv = grads.view(3, batch, num_heads, tokens, head_dim).permute(1, 3, 0, 2, 4)
        return grad_qkv.reshape(batch, tokens, 3 * num_heads * head_dim), None, None, None


def compiled_products(
    q: Float[Tensor, "batch heads queries d"],
    k: Float[Tensor, "batch heads tokens d"],
    v: Float[Tensor, "batch heads tokens d"],
) -> Float[Tensor, "batch queries width"]:
    """The same by matrix products for compiled graphs, in which inductor fuses all that lies between them.

    Args:
        q: Queries of each head.
        k: Keys of each head.
        v: Values of each head.

    Returns:
        The heads' outputs side by side.
    """
    return (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v).transpose(1, 2).flatten(2)


def attention(
    qkv: Float[Tensor, "batch tokens three_width"], num_heads: int, last: int | None = None
) -> Float[Tensor, "batch queries width"]:
    r"""Self-attention of a fused projection, by the fastest exact way for its device, dtype and length.

    .. math:: \mathrm{softmax}(Q K^\top / \sqrt{d}) V

    Args:
        qkv: Queries, keys and values side by side, each heads x d wide, as timm's `Attention.qkv` gives them.
        num_heads: Number of heads.
        last: How many tokens ask, the last ones, at least 1; all if None. Every token is asked in either case.

    Returns:
        The heads' outputs side by side, before the output projection. Twice differentiable under
        `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` alone.

    Reference:
        Vaswani et al., "Attention is all you need", NeurIPS 2017.
    """
    batch, tokens, width = qkv.shape
    if lacks_products(qkv):
        qkv = qkv.bfloat16()  # as autocast has it: what took the projection's place may have given float32
    if is_widened(qkv):
        if own_gradients_wanted(qkv):
            return SelfAttentionInFloat32.apply(qkv, num_heads, tokens if last is None else last)
        return in_float32(attention, qkv, num_heads=num_heads, last=last).to(qkv.dtype)
    head_dim = width // (3 * num_heads)
    by_products = qkv.device.type == "cpu" and tokens <= MAX_TOKENS_BY_PRODUCTS.get(qkv.dtype, 0)
    # Without a backward pass fused attention is as fast in float32, and timm's results are kept bit for bit.
    by_products &= qkv.dtype != torch.float32 or (torch.is_grad_enabled() and qkv.requires_grad)
    if by_products and torch.compiler.is_compiling():
        q, k, v = qkv.view(batch, tokens, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
        q = q if last is None else q[:, :, -last:]
        return compiled_products(q, k, v)
    # Whoever asks for the math kernel wants second derivatives.
    if by_products and torch.backends.cuda.flash_sdp_enabled():
        return _AttentionByProducts.apply(qkv, num_heads, head_dim**-0.5, tokens if last is None else last)
    # Split along the last axis: the backward pass then writes the three gradients side by side in one copy, where the
    # usual permute and unbind take two.
    q, k, v = (part.view(batch, tokens, num_heads, head_dim).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    if last is not None:
        q = q[:, :, -last:]
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class FastAttention(Attention):
    """timm's `Attention` with the same parameters and the same result, by the fastest way.

    What it does not speed up (attention masks, attention dropout in training, query and key norms) goes through timm.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, last: int | None = None
    ) -> Tensor:
        """Self-attention over tokens; x is (batch, tokens, width). `last` as in `attention`."""
        if attn_mask is not None or is_causal or not self.is_plain:
            x = apply_layer(self, super().forward, x, attn_mask=attn_mask, is_causal=is_causal)
            return x if last is None else x[:, -last:]
        return self.of_projected(linear(self.qkv, x), last)

    @property
    def is_plain(self) -> bool:
        """Whether nothing happens between the projection to queries, keys and values, and attention."""
        return (
            not (self.training and self.attn_drop.p > 0)
            and isinstance(self.q_norm, nn.Identity)
            and isinstance(self.k_norm, nn.Identity)
            and getattr(self, "gate", None) is None
        )

    def of_projected(self, qkv: Tensor, last: int | None = None) -> Tensor:
        """What the layer gives for what `qkv` gave, (batch, tokens, 3 x width), where it `is_plain`."""
        return self.proj_drop(linear(self.proj, self.norm(attention(qkv, self.num_heads, last))))


class FastPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed`, whose convolution is computed in float32 where a CPU has no products in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """Embedded patches of images (batch, channels, height, width)."""
        return apply_layer(self, super().forward, x)


def accelerate(model: nn.Module) -> list[str]:
    """Serve timm's attention layers, MLPs and patch embeddings by the fastest exact way, in place.

    Parameters, state_dict keys and results (to rounding) stay. Only exact instances of timm's `Attention`, `Mlp` and
    `PatchEmbed` change: a subclass may compute something else.

    Args:
        model: Any module; a timm vision transformer usually.

    Returns:
        Names of the layers that changed.
    """
    faster = {Attention: FastAttention, Mlp: FastMlp, PatchEmbed: FastPatchEmbed}
    leave_compiled_backward_to_its_types()
    names = []
    for name, layer in model.named_modules():
        if type(layer) in faster:
            # The class is the only difference: replacing it keeps hooks, parameters and references to the layer.
            layer.__class__ = faster[type(layer)]
            names.append(name)
    return names
