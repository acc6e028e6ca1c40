"""Linear layers and timm's MLP on CPUs: the same products in fewer passes over memory, and with less of it kept.

Both compute what the layers themselves would, and step aside where somebody listens to a part or has replaced it: what
has a hook, a mask, a low-rank update or a parametrization is served by its own call.
"""

from typing import Any

import torch
from jaxtyping import Float
from timm.layers import GELU, Mlp
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

GELUS = (nn.GELU, GELU)
# What raises where a gradient of this package's own functions is to be differentiated again.
NOT_TWICE = (
    "The gradient of {} is to be differentiated again: compute it under "
    "`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`."
)


def is_bare(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a call of the layer is its class's `forward` and nothing else, the class being exactly one of `kinds`."""
    return (
        type(layer) in kinds
        and "forward" not in layer.__dict__
        and layer._compiled_call_impl is None  # of `layer.compile()`
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not torch_module._has_any_global_hook()
    )


def own_gradients_wanted(x: Tensor) -> bool:
    """Whether to compute gradients by functions of our own: eagerly, on CPUs, where one is asked for, and only once.

    Whoever asks for the math kernel of attention wants second derivatives, which they do not have, as they have none
    forward (`torch.autograd.forward_ad`) or under the transforms of `torch.func`.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.backends.cuda.flash_sdp_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def own_dtype(x: Tensor, *layers: Any) -> torch.dtype | None:
    """The type in which linear layers compute their output for x, if it is bf16 or float32 and all have a bias."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    plain = all(type(parameter) in (nn.Parameter, Tensor) for parameter in parameters)
    if not plain or dtype not in (torch.bfloat16, torch.float32):
        return None
    if torch.is_autocast_enabled("cpu"):
        # What autocast leaves alone, such as float64, is left to it.
        same = {tensor.dtype for tensor in (x, *parameters)} <= {torch.bfloat16, torch.float32}
    else:
        same = all(parameter.dtype == dtype for parameter in parameters)
    return dtype if same else None


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


class _MLP(torch.autograd.Function):
    """W2 gelu(W1 x + b1) + b2 in x's type, which keeps what enters GELU and computes what leaves it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        parameters = weight1, bias1, weight2, bias2
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        weight1, bias1, weight2, bias2 = (parameter.to(x.dtype) for parameter in parameters)
        hidden = affine(x, weight1, bias1)
        ctx.save_for_backward(x, hidden, weight1, weight2)
        return affine(nn.functional.gelu(hidden), weight2, bias2)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NOT_TWICE.format("an MLP"))
        x, hidden, weight1, weight2 = ctx.saved_tensors
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        hidden = hidden.view(-1, hidden.shape[-1])
        wants_x, wants_weight1, wants_bias1, wants_weight2, wants_bias2 = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 4
        grad_x = None
        with torch.autocast("cpu", enabled=False):
            scratch = nn.functional.gelu(hidden)
            if wants_weight2:
                grads[2] = torch.mm(grad.t(), scratch)
            if wants_bias2:
                grads[3] = column_sums(grad)
            if wants_x or wants_weight1 or wants_bias1:
                torch.mm(grad, weight2, out=scratch)
                torch.ops.aten.gelu_backward.grad_input(scratch, hidden, grad_input=scratch)
            if wants_weight1:
                grads[0] = torch.mm(scratch.t(), x.reshape(-1, x.shape[-1]))
            if wants_bias1:
                grads[1] = column_sums(scratch)
            if wants_x:
                grad_x = torch.mm(scratch, weight1).view(x.shape)
        return grad_x, *(
            None if found is None else found.to(dtype) for found, dtype in zip(grads, ctx.dtypes, strict=True)
        )


def linear(layer: nn.Module, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
    """What `layer(x)` gives, to rounding in the gradient of the bias, in one pass less over the output in bf16.

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
        if dtype is not None and has_fused_bias(dtype):
            return _Linear.apply(x.to(dtype), layer.weight, layer.bias)
    return layer(x)


class FastMlp(Mlp):
    """timm's `Mlp` with the same parameters and the same result, which on CPUs does not keep what leaves its GELU.

    That is a fifth of what a transformer block keeps for its backward pass, and costs nothing: its GELU, computed anew,
    leaves its memory to the gradients. What has dropout in training, another activation, a norm, no biases, or a part
    that is no longer timm's own goes through timm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The MLP of each token; x is (..., width)."""
        parts: tuple[Any, Any] = (self.fc1, self.fc2)
        if (
            own_gradients_wanted(x)
            and all(is_bare(layer, nn.Linear) and layer.bias is not None for layer in parts)
            and is_bare(self.act, *GELUS)
            and getattr(self.act, "approximate", "none") == "none"
            and is_bare(self.norm, nn.Identity)
            and all(
                is_bare(drop, nn.Dropout) and not (drop.training and drop.p > 0) for drop in (self.drop1, self.drop2)
            )
        ):
            dtype = own_dtype(x, *parts)
            if dtype is not None:
                return _MLP.apply(x.to(dtype), *(p for layer in parts for p in (layer.weight, layer.bias)))
        return super().forward(x)
