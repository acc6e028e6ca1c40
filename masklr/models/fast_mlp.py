"""timm's MLP on CPUs: the same products with less memory kept, in float32 where bf16 has none.

It steps aside where somebody listens to a part or has replaced it: what has a hook, a mask, a low-rank update or a
parametrization is served by its own call.
"""

from typing import Any

import torch
from timm.layers import GELU, Mlp
from torch import Tensor, nn

from masklr.models.fast_linear import affine, column_sums
from masklr.models.float32_products import MLPInFloat32, apply_layer, has_bf16_products
from masklr.models.own_gradients import NOT_TWICE, is_bare, own_dtype, own_gradients_wanted

GELUS = (nn.GELU, GELU)


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
                slow = dtype == torch.bfloat16 and not has_bf16_products()
                function = MLPInFloat32 if slow else _MLP
                return function.apply(x.to(dtype), *(p for layer in parts for p in (layer.weight, layer.bias)))
        return apply_layer(self, super().forward, x)
