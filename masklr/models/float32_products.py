"""Layers in bf16 on CPUs that have no products in bf16: kept in bf16, computed in float32, a piece at a time.

Without AVX-512, AMX or their like, PyTorch multiplies bf16 matrices 6 to 130 times slower than float32 ones. Here rows
are taken to float32, multiplied, and what leaves a layer is rounded to bf16: what the backward pass keeps is as small
as in bf16, while weights, sums and all that lies between two products of a layer are not rounded. Pieces of the rows
bound what float32 takes beside that.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.autograd import Function

from masklr.models.own_gradients import NOT_TWICE

# Numbers of the widest matrix of a piece, 4 MiB in float32. With 64 MiB a step is 5 to 9 % faster, but takes 300 MiB
# more at 32 px, patch 4 and batch 256, and so more than the peers' bf16.
PIECE = 2**20
ONEDNN_HAS_BF16: bool = (  # a constant, which compiled graphs can be made with
    hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
FLOAT32: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are


def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 matrices: by oneDNN, which needs AVX-512, AMX or their like."""
    return ONEDNN_HAS_BF16


def is_widened(x: Tensor) -> bool:
    """Whether products of x are taken in float32 here: bf16 on a CPU that has none."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not has_bf16_products()


def lacks_products(x: Tensor, module: nn.Module | None = None) -> bool:
    """Whether autocast would have a layer of x multiply bf16 matrices on a CPU that cannot, and float32 ones would do.

    They would not for a module that has parameters of another type.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float32)
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not has_bf16_products()
        and (module is None or all(p.dtype == torch.float32 for p in module.parameters()))
    )


def in_float32(layer: Callable[..., Tensor], *tensors: Tensor, **options: Any) -> Tensor:
    """What a layer gives for tensors in float32 without autocast: float32."""
    cast = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    with torch.autocast("cpu", enabled=False):
        return layer(*(tensor.float() for tensor in tensors), **cast)


def leave_compiled_backward_to_its_types() -> None:
    """On such a CPU, have backward passes that `torch.compile` makes run without autocast, as Lightning runs others.

    Compiled under autocast, they would have it by default, and multiply in bf16 what is float32 here. The setting is
    the process's, so it stays as it is where there is another device to compile for, or somebody has chosen.
    """
    config = torch._functorch.config
    if (
        not has_bf16_products()
        and not torch.cuda.is_available()
        and getattr(config, "backward_pass_autocast", None) == "same_as_forward"
    ):
        config.backward_pass_autocast = "off"


def apply_layer(
    module: nn.Module | None, layer: Callable[..., Tensor], x: Tensor, *others: Tensor, **options: Any
) -> Tensor:
    """What a layer of products gives, in bf16 under such autocast; computed in float32 on a CPU without bf16's.

    `module` is what has the parameters of the layer, if they are not given.
    """
    if lacks_products(x, module):
        return in_float32(layer, x, *others, **options).bfloat16()
    return layer(x, *others, **options)


def piece_size(rows: int, width: int) -> int:
    """Rows of a piece, all of about one size, where each row makes `width` numbers."""
    return max(1, -(-rows // max(1, round(rows * width / PIECE))))


class _Rows:
    """Memory for a piece of rows in float32, which the next piece finds again."""

    def __init__(self, size: int, width: int) -> None:
        self.memory = torch.empty(size, width, **FLOAT32)

    def room(self, rows: Tensor) -> Tensor:
        """Place for as many rows."""
        return self.memory[: len(rows)]

    def of(self, rows: Tensor) -> Tensor:
        """The rows in float32."""
        return self.room(rows).copy_(rows)


class LinearInFloat32(Function):
    """x W^T + b for x in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The layer."""
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        flat = x.reshape(-1, x.shape[-1])
        out = x.new_empty(len(flat), len(weight))
        size = piece_size(len(flat), max(weight.shape))
        rows, products = _Rows(size, flat.shape[1]), _Rows(size, out.shape[1])
        with torch.autocast("cpu", enabled=False):
            weight, bias = weight.float(), bias.float()
            for x_, out_ in zip(flat.split(size), out.split(size), strict=True):
                out_.copy_(torch.addmm(bias, rows.of(x_), weight.t(), out=products.room(x_)))
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias, as far as they are wanted."""
        if torch.is_grad_enabled():
            raise RuntimeError(NOT_TWICE.format("a linear layer"))
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        # Contiguous, so that its rows are views; of no use where no gradient of x is wanted.
        grad_x = x.new_empty(x.shape) if wants_x else x
        flat, grad, flat_grad = (t.reshape(-1, t.shape[-1]) for t in (x, grad_out, grad_x))
        size = piece_size(len(flat), max(weight.shape))
        rows, grads = _Rows(size, flat.shape[1]), _Rows(size, grad.shape[1])
        grad_weight, grad_bias = torch.zeros(weight.shape, **FLOAT32), torch.zeros(len(weight), **FLOAT32)
        with torch.autocast("cpu", enabled=False):
            factor = weight.float()
            for x_, grad_, grad_x_ in zip(*(t.split(size) for t in (flat, grad, flat_grad)), strict=True):
                out_grads = grads.of(grad_)
                if wants_weight:
                    grad_weight.addmm_(out_grads.t(), rows.of(x_))
                if wants_bias:
                    grad_bias += out_grads.sum(0)
                if wants_x:
                    grad_x_.copy_(torch.mm(out_grads, factor, out=rows.room(x_)))
        return (
            grad_x if wants_x else None,
            grad_weight.to(weight.dtype) if wants_weight else None,
            grad_bias.to(ctx.bias_dtype) if wants_bias else None,
        )


class MLPInFloat32(Function):
    """W2 gelu(W1 x + b1) + b2 for x in bf16, which keeps what enters GELU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        """The MLP."""
        ctx.dtypes = [parameter.dtype for parameter in (weight1, bias1, weight2, bias2)]
        flat = x.reshape(-1, x.shape[-1])
        hidden, out = x.new_empty(len(flat), len(weight1)), x.new_empty(len(flat), len(weight2))
        ctx.save_for_backward(x, hidden, weight1, weight2)
        size = piece_size(len(flat), len(weight1))
        rows, between, products = (_Rows(size, t.shape[1]) for t in (flat, hidden, out))
        with torch.autocast("cpu", enabled=False):
            weight1, bias1, weight2, bias2 = (parameter.float() for parameter in (weight1, bias1, weight2, bias2))
            for x_, hidden_, out_ in zip(*(t.split(size) for t in (flat, hidden, out)), strict=True):
                inner = torch.addmm(bias1, rows.of(x_), weight1.t(), out=between.room(x_))
                hidden_.copy_(inner)
                torch.ops.aten.gelu_(inner)
                out_.copy_(torch.addmm(bias2, inner, weight2.t(), out=products.room(x_)))
        return out.view(*x.shape[:-1], len(weight2))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the four parameters, as far as they are wanted."""
        if torch.is_grad_enabled():
            raise RuntimeError(NOT_TWICE.format("an MLP"))
        x, hidden, weight1, weight2 = ctx.saved_tensors
        wants_x, *wanted = ctx.needs_input_grad
        wants_weight1, wants_bias1, wants_weight2, wants_bias2 = wanted
        # Contiguous, so that its rows are views; of no use where no gradient of x is wanted.
        grad_x = x.new_empty(x.shape) if wants_x else x
        flat, grad, flat_grad = (t.reshape(-1, t.shape[-1]) for t in (x, grad_out, grad_x))
        sums = [torch.zeros(shape, **FLOAT32) for w in (weight1, weight2) for shape in (w.shape, w.shape[:1])]
        size = piece_size(len(flat), len(weight1))
        rows, grads = _Rows(size, flat.shape[1]), _Rows(size, grad.shape[1])
        before, inner_grads = _Rows(size, hidden.shape[1]), _Rows(size, hidden.shape[1])
        with torch.autocast("cpu", enabled=False):
            factor1, factor2 = weight1.float(), weight2.float()
            split = (t.split(size) for t in (flat, hidden, grad, flat_grad))
            for x_, hidden_, grad_, grad_x_ in zip(*split, strict=True):
                out_grads, inner, scratch = grads.of(grad_), before.of(hidden_), inner_grads.room(x_)
                if wants_weight2:
                    sums[2].addmm_(out_grads.t(), torch.ops.aten.gelu.out(inner, out=scratch))
                if wants_bias2:
                    sums[3] += out_grads.sum(0)
                if not (wants_x or wants_weight1 or wants_bias1):
                    continue
                torch.mm(out_grads, factor2, out=scratch)
                torch.ops.aten.gelu_backward.grad_input(scratch, inner, grad_input=scratch)
                if wants_weight1:
                    sums[0].addmm_(scratch.t(), rows.of(x_))
                if wants_bias1:
                    sums[1] += scratch.sum(0)
                if wants_x:
                    grad_x_.copy_(torch.mm(scratch, factor1, out=rows.room(x_)))
        grads_of_parameters = (
            found.to(dtype) if wants else None for found, dtype, wants in zip(sums, ctx.dtypes, wanted, strict=True)
        )
        return grad_x if wants_x else None, *grads_of_parameters
