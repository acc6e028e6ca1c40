"""Layers whose every sample has its own masked weight, without a weight held for each.

Masks are functions of a seed that an ordinary PyTorch operator draws, and the backward pass makes a mask again instead
of holding it. So whoever replays PyTorch's random numbers (gradient checkpointing, a compiled graph) gets the same
masks. Seeds live on the CPU, where PyTorch replays them whatever the device is, so that no device is waited for; masks
are drawn where the weights are. Off the CPU the only difference is the generator of `weight_keep`, which is
tested on the CPU; nothing here was run on CUDA.

Operators take (x, weight, bias, seed, p, *settings); what computes their gradients takes (gradient of the output, x,
weight, seed, p, *settings, whether x's is wanted, whether the weight's is).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from masklr.masks import weight_keep

# As many masks of samples are made at once as fit into this number of weights: one of a large layer, many of a small.
CHUNK_WEIGHTS = 2**18


def new_seed() -> Tensor:
    """A seed from PyTorch's CPU generator, as a tensor of one element."""
    return torch.randint(2**62, (1,), device="cpu")


def batch_keep(weight: Tensor, seed: Tensor, p: float) -> Tensor:
    """One mask in the shape and on the device of a weight, True where kept."""
    return weight_keep(weight.shape, p, seed=int(seed), device=weight.device)


def sample_linear(x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """`x[b] @ (weight * keep[b]).T + bias` for every sample b; x is (batch, tokens, in)."""
    y = x.new_empty(*x.shape[:2], weight.shape[0])
    for samples, keep in _chunks(len(x), weight, int(seed), p):
        kept = keep.mul_(weight).mT
        if bias is None:
            torch.bmm(x[samples], kept, out=y[samples])
        else:
            torch.baddbmm(bias, x[samples], kept, out=y[samples])
    return y


def sample_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, seed: Tensor, p: float, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `sample_linear` in x and in the weight; an empty tensor for one that is not wanted."""
    grad_x = torch.empty_like(x) if for_x else x.new_empty(0)
    total = _total(weight, for_weight)
    buffer = None
    for samples, keep in _chunks(len(x), weight, int(seed), p):
        buffer = torch.empty_like(keep) if buffer is None else buffer[: len(keep)]
        if for_x:
            torch.bmm(grad[samples], torch.mul(keep, weight, out=buffer), out=grad_x[samples])
        if for_weight:
            _add_kept(total, torch.bmm(grad[samples].mT, x[samples], out=buffer), keep)
    return grad_x, total.to(weight.dtype)


def sample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    p: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution of every sample b with `weight * keep[b]`; x is (batch, in, height, width)."""
    y = empty_conv2d_output(x, weight, stride, padding, dilation)
    for samples, keep in _chunks(len(x), weight, int(seed), p):
        kept, biases = keep.mul_(weight).flatten(0, 1), None if bias is None else bias.repeat(len(keep))
        out = nn.functional.conv2d(
            _side_by_side(x[samples]), kept, biases, stride, padding, dilation, groups * len(keep)
        )
        y[samples] = out.view_as(y[samples])
    return y


def sample_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    seed: Tensor,
    p: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    for_x: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `sample_conv2d` in x and in the weight; an empty tensor for one that is not wanted."""
    grad_x = torch.empty_like(x) if for_x else x.new_empty(0)
    total = _total(weight, for_weight)
    for samples, keep in _chunks(len(x), weight, int(seed), p):
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            _side_by_side(grad[samples]),
            _side_by_side(x[samples]),
            (keep * weight).flatten(0, 1),
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups * len(keep),
            [for_x, for_weight, False],
        )
        if for_x:
            grad_x[samples] = of_x.view_as(grad_x[samples])
        if for_weight:
            _add_kept(total, of_weight.view_as(keep), keep)
    return grad_x, total.to(weight.dtype)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What the backward pass of either operator needs."""
    x, weight, _, seed, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, seed)


def gradients(backward: Callable[..., tuple[Tensor, Tensor]], features: int) -> Callable[..., Any]:
    """The backward pass of an operator, given what computes it; `features` is the axis of y along which the bias is."""

    def run(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        x, weight, seed = ctx.saved_tensors
        grad_x, grad_weight = backward(grad, x, weight, seed, *ctx.settings, for_x, for_weight)
        grad_bias = grad.sum([axis for axis in range(grad.ndim) if axis != features]) if for_bias else None
        unused = [None] * (1 + len(ctx.settings))
        return grad_x if for_x else None, grad_weight if for_weight else None, grad_bias, *unused

    return run


class SampleLinear(torch.autograd.Function):
    """`sample_linear` with its gradients, for eager mode."""

    forward = staticmethod(sample_linear)
    setup_context = staticmethod(save_inputs)
    backward = staticmethod(once_differentiable(gradients(sample_linear_backward, features=2)))  # type: ignore[assignment]


class SampleConv2d(torch.autograd.Function):
    """`sample_conv2d` with its gradients, for eager mode."""

    forward = staticmethod(sample_conv2d)
    setup_context = staticmethod(save_inputs)
    backward = staticmethod(once_differentiable(gradients(sample_conv2d_backward, features=1)))  # type: ignore[assignment]


def empty_conv2d_output(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """A tensor for the output of a convolution, not filled."""
    sizes = [
        (size + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate(x.shape[2:])
    ]
    return x.new_empty(len(x), len(weight), *sizes)


def _chunks(batch: int, weight: Tensor, seed: int, p: float) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the batch with the masks (samples, *weight shape) of their samples, in one reused buffer."""
    size = max(min(CHUNK_WEIGHTS // weight.numel(), batch), 1)
    buffer = weight.new_empty(size, *weight.shape)
    for start in range(0, batch, size):
        keep = buffer[: batch - start]
        weight_keep(keep.shape, p, seed=seed + start, device=weight.device, out=keep)
        yield slice(start, start + len(keep)), keep


def _total(weight: Tensor, wanted: bool) -> Tensor:
    """Zeros to add the samples' gradients of a weight to: in float32 at least, as inside a matrix product."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(weight.shape if wanted else 0, dtype=dtype, device=weight.device)


def _add_kept(total: Tensor, products: Tensor, keep: Tensor) -> None:
    """Add to a total the kept entries of the samples' products (samples, *weight shape), which are overwritten."""
    if len(keep) == 1 and total.dtype == keep.dtype:
        total.addcmul_(products[0], keep[0])
    elif len(keep) == 1:
        total.add_(products[0].mul_(keep[0]))
    else:
        total.add_(products.mul_(keep).sum(0, dtype=total.dtype))


def _side_by_side(x: Tensor) -> Tensor:
    """(samples, channels, ...) as one sample whose channels are those of all."""
    return x.reshape(1, -1, *x.shape[2:])
