"""Linear layers on CPUs: the same products in fewer passes over memory in bf16, and in float32 where bf16 has none.

They step aside where somebody listens to a layer or has replaced it: what has a hook, a mask, a low-rank update or a
parametrization is served by its own call.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from masklr.models.float32_products import LinearInFloat32, apply_layer, has_bf16_products, in_float32, lacks_products
from masklr.models.own_gradients import NOT_TWICE, is_bare, own_dtype, own_gradients_wanted


def has_fused_bias(dtype: torch.dtype) -> bool:
    """Whether oneDNN adds the bias while it writes a product in this type."""
    return bool(
        dtype == torch.bfloat16
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layer: x W^T + b. PyTorch's own fills the output with the bias before the product in bf16, one pass more."""
    if has_fused_bias(x.dtype):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def column_sums(x: Float[Tensor, "rows columns"]) -> Float[Tensor, " columns"]:
    """Sum over rows; of four interleaved parts first in bf16, twice as fast there as rows this short."""
    if x.dtype == torch.bfloat16 and len(x) % 4 == 0:
        return x.reshape(-1, 4 * x.shape[1]).sum(0).view(4, -1).sum(0)
    return x.sum(0)


class _Linear(torch.autograd.Function):
    """x W^T + b, in x's type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.dtypes = weight.dtype, bias.dtype
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return affine(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NOT_TWICE.format("a linear layer"))
        x, weight = ctx.saved_tensors
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            return (
                torch.mm(grad, weight).view(x.shape) if wants_x else None,
                torch.mm(grad.t(), x.reshape(-1, x.shape[-1])).to(ctx.dtypes[0]) if wants_weight else None,
                column_sums(grad).to(ctx.dtypes[1]) if wants_bias else None,
            )


def linear(layer: nn.Module, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
    """What `layer(x)` gives, to rounding, in one pass less over the output in bf16.

    On CPUs without bf16 products its own are taken in float32; what took a linear layer's place gives float32 then.

    Args:
        layer: A linear layer, or what has taken its place.
        x: Its input.

    Returns:
        Its output. Twice differentiable under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` alone, where it comes
        from a plain linear layer in bf16 on CPU.
    """
    if (
        isinstance(layer, nn.Linear)
        and is_bare(layer, nn.Linear)
        and layer.bias is not None
        and own_gradients_wanted(x)
    ):
        dtype = own_dtype(x, layer)
        if dtype == torch.bfloat16 and not has_bf16_products():
            return LinearInFloat32.apply(x.to(dtype), layer.weight, layer.bias)
        if dtype is not None and has_fused_bias(dtype):
            return _Linear.apply(x.to(dtype), layer.weight, layer.bias)
    if isinstance(layer, nn.Linear):
        return apply_layer(layer, layer, x)
    return in_float32(layer, x) if lacks_products(x, layer) else layer(x)
