"""Attention in bf16 on CPUs that have no products in bf16: kept in bf16, computed in float32, some images at a time.

Short sequences by batched products, whose probabilities are kept in float32; others by PyTorch's fused kernel.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from masklr.models.attention_products import attend, write_gradients
from masklr.models.float32_products import piece_size
from masklr.models.own_gradients import NOT_TWICE

# Largest number of queries x keys for which batched products are taken, as of float32 in `masklr.models.cross_decoder`:
# at 17 x 17 a whole step gains 1 to 9 %, at 65 x 65 nothing (2 cores, AVX2).
MAX_PAIRS_BY_PRODUCTS = 48 * 48
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SelfAttentionInFloat32(Function):
    """softmax(Q K^T / sqrt(d)) V of the last queries of (B, N, 3 x width) in bf16, some images at a time."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, last: int) -> Tensor:
        """(B, last, width)."""
        batch, tokens, width = qkv.shape
        out = qkv.new_empty(batch, last, width // 3)
        ctx.sizes = num_heads, last
        queries, *others = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads)).unbind(2)
        kept = _attend(out, queries[:, -last:], *others)
        ctx.save_for_backward(qkv, out, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of `qkv`."""
        qkv, out, *kept = ctx.saved_tensors
        num_heads, last = ctx.sizes
        grad = torch.empty_like(qkv)
        heads = (*qkv.shape[:2], 3, num_heads, qkv.shape[2] // (3 * num_heads))
        (queries, *others), (grad_queries, *other_grads) = qkv.view(heads).unbind(2), grad.view(heads).unbind(2)
        grad_queries[:, :-last] = 0  # of tokens that do not ask
        _attend_backward(grad_out, out, kept, [queries[:, -last:], *others], [grad_queries[:, -last:], *other_grads])
        return grad, None, None


class CrossAttentionInFloat32(Function):
    """softmax(Q K^T / sqrt(d)) V for queries (B, M, width), keys and values (B, N, 2 x width) in bf16."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
        """(B, M, width)."""
        out = torch.empty_like(query)
        ctx.num_heads = num_heads
        heads = num_heads, query.shape[-1] // num_heads
        key_values = key_value.view(*key_value.shape[:2], 2, *heads).unbind(2)
        kept = _attend(out, query.view(*query.shape[:2], *heads), *key_values)
        ctx.save_for_backward(query, key_value, out, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of `query` and `key_value`."""
        query, key_value, out, *kept = ctx.saved_tensors
        factors: list[Tensor] = []
        grads: list[Tensor] = []
        grad_query, grad_key_value = torch.empty_like(query), torch.empty_like(key_value)
        for source, grad in ((query, grad_query), (key_value, grad_key_value)):
            parts = source.shape[-1] // query.shape[-1]
            heads = (*source.shape[:2], parts, ctx.num_heads, query.shape[-1] // ctx.num_heads)
            factors += source.view(heads).unbind(2)
            grads += grad.view(heads).unbind(2)
        _attend_backward(grad_out, out, kept, factors, grads)
        return grad_query, grad_key_value, None


def _by_products(queries: Tensor, keys: Tensor) -> bool:
    """Whether (B, tokens, heads, d) are few enough tokens."""
    return queries.shape[1] * keys.shape[1] <= MAX_PAIRS_BY_PRODUCTS


def _heads(x: Tensor) -> Tensor:
    """(B, tokens, heads, d) in float32 as (B x heads, tokens, d), contiguous."""
    return x.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).flatten(0, 1)


def _write_heads(place: Tensor, x: Tensor) -> None:
    """The inverse of `_heads`, into (B, tokens, heads, d)."""
    place.copy_(x.view(len(place), place.shape[2], *x.shape[1:]).transpose(1, 2))


def _rows_in_float32(x: Tensor) -> Tensor:
    """(B, tokens, heads, d) in float32 as (B, heads, tokens, d).

    Made contiguous before the transpose: the fused kernels assume that the last axis is.
    """
    return x.to(torch.float32, memory_format=torch.contiguous_format).transpose(1, 2)


def _attend(out: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> list[Tensor]:
    """Write the attention of queries, keys and values (B, tokens, heads, d).

    Returns what the backward pass needs of each piece: probabilities, or logarithms of the sums of exponentials.
    """
    size = piece_size(len(out), max(factor.shape[1:].numel() for factor in (queries, keys, values)))
    kept = []
    with torch.autocast("cpu", enabled=False):
        split = (t.split(size) for t in (out.view(queries.shape), queries, keys, values))
        for place, q, k, v in zip(*split, strict=True):
            if _by_products(q, k):
                found, probabilities = attend(_heads(q), _heads(k), _heads(v), q.shape[-1] ** -0.5)
                _write_heads(place, found)
                kept.append(probabilities)
            else:
                found, log_sums = _flash(*(_rows_in_float32(part) for part in (q, k, v)))
                place.copy_(found.transpose(1, 2))
                kept.append(log_sums)
    return kept


def _attend_backward(
    grad_out: Tensor, out: Tensor, kept: list[Tensor], factors: list[Tensor], grads: list[Tensor]
) -> None:
    """Write the gradients of queries, keys and values."""
    if torch.is_grad_enabled():
        raise RuntimeError(NOT_TWICE.format("attention"))
    size = piece_size(len(out), max(factor.shape[1:].numel() for factor in factors))
    heads = factors[0].shape
    split = zip(*(t.split(size) for t in (grad_out.view(heads), out.view(heads), *factors, *grads)), strict=True)
    with torch.autocast("cpu", enabled=False):
        for (grad, found, *parts), of_piece in zip(split, kept, strict=True):
            parts, places = parts[:3], parts[3:]
            if _by_products(*parts[:2]):
                q, k, v = map(_heads, parts)
                results = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
                write_gradients(results, _heads(grad), q, k, v, of_piece, q.shape[-1] ** -0.5)
                for place, result in zip(places, results, strict=True):
                    _write_heads(place, result)
            else:
                grad, q, k, v, found = map(_rows_in_float32, (grad, *parts, found))
                results = _flash_backward(grad, q, k, v, found, of_piece, 0.0, False)
                for place, result in zip(places, results, strict=True):
                    place.copy_(result.transpose(1, 2))
