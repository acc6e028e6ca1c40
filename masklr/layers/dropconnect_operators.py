"""The operators of DropConnect: pure functions of a seed, opaque to the compiler.

A seed is drawn by an ordinary PyTorch operator, and masks are functions of it. So whoever replays PyTorch's random
numbers (gradient checkpointing, a compiled graph) gets the same masks, and the backward pass makes a mask again instead
of holding it. Seeds live on the CPU: no device is waited for. Masks are drawn where the weights are.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from masklr.masks import weight_keep

# As many masks of samples are made at once as fit into this number of weights: one of a large layer, many of a small.
CHUNK_WEIGHTS = 2**18


def new_seed() -> Tensor:
    """A seed from PyTorch's CPU generator, as a tensor of one element."""
    return torch.randint(2**62, (1,), device="cpu")


@torch.library.custom_op("masklr::weight_keep", mutates_args=())
def batch_keep(weight: Tensor, seed: Tensor, p: float) -> Tensor:
    """One mask in the shape and on the device of a weight, True where kept."""
    return weight_keep(weight.shape, p, seed=int(seed), device=weight.device)


@batch_keep.register_fake
def _(weight: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.bool, device=weight.device)


@torch.library.custom_op("masklr::sample_linear", mutates_args=())
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


@sample_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


@torch.library.custom_op("masklr::sample_linear_backward", mutates_args=())
def sample_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, seed: Tensor, p: float, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `sample_linear` in x and in the weight; an empty tensor for one that is not asked for."""
    grad_x = torch.empty_like(x) if for_x else x.new_empty(0)
    total = _total(weight, for_weight)
    product = None
    for samples, keep in _chunks(len(x), weight, int(seed), p):
        product = torch.empty_like(keep) if product is None else product[: len(keep)]
        if for_x:
            torch.bmm(grad[samples], torch.mul(keep, weight, out=product), out=grad_x[samples])
        if for_weight:
            _add_kept(total, torch.bmm(grad[samples].mT, x[samples], out=product), keep)
    return grad_x, total.to(weight.dtype)


@sample_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, seed: Tensor, p: float, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    return _fake_gradients(x, weight, for_x, for_weight)


@torch.library.custom_op("masklr::sample_conv2d", mutates_args=())
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
    y = _empty_output(x, weight, stride, padding, dilation)
    for samples, keep in _chunks(len(x), weight, int(seed), p):
        kept, biases = keep.mul_(weight).flatten(0, 1), None if bias is None else bias.repeat(len(keep))
        out = nn.functional.conv2d(
            _side_by_side(x[samples]), kept, biases, stride, padding, dilation, groups * len(keep)
        )
        y[samples] = out.view_as(y[samples])
    return y


@sample_conv2d.register_fake
def _(
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
    return _empty_output(x, weight, stride, padding, dilation)


@torch.library.custom_op("masklr::sample_conv2d_backward", mutates_args=())
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
    """Gradients of `sample_conv2d` in x and in the weight; an empty tensor for one that is not asked for."""
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


@sample_conv2d_backward.register_fake
def _(
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
    return _fake_gradients(x, weight, for_x, for_weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, seed, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, seed)


def _gradients(backward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradient of an operator (x, weight, bias, seed, *settings) from the operator that computes it."""

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        x, weight, seed = ctx.saved_tensors
        grad_x, grad_weight = backward(grad, x, weight, seed, *ctx.settings, for_x, for_weight)
        features = 2 if backward is sample_linear_backward else 1
        grad_bias = grad.sum([axis for axis in range(grad.ndim) if axis != features]) if for_bias else None
        unused = [None] * (1 + len(ctx.settings))
        return grad_x if for_x else None, grad_weight if for_weight else None, grad_bias, *unused

    return gradients


sample_linear.register_autograd(_gradients(sample_linear_backward), setup_context=_save)
sample_conv2d.register_autograd(_gradients(sample_conv2d_backward), setup_context=_save)


def _chunks(batch: int, weight: Tensor, seed: int, p: float) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the batch with the masks (samples, *weight shape) of their samples, in one reused buffer."""
    size = min(max(CHUNK_WEIGHTS // max(weight.numel(), 1), 1), batch)
    buffer = weight.new_empty(size, *weight.shape)
    for start in range(0, batch, size):
        keep = buffer[: batch - start]
        weight_keep(keep.shape, p, seed=seed + start, device=weight.device, out=keep)
        yield slice(start, start + len(keep)), keep


def _total(weight: Tensor, wanted: bool) -> Tensor:
    """Zeros to add a weight's gradients of samples to: in float32 at least, as a matrix product does."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(weight.shape if wanted else 0, dtype=dtype, device=weight.device)


def _add_kept(total: Tensor, gradients: Tensor, keep: Tensor) -> None:
    """Add to a total the gradients (samples, *weight shape) of kept weights; `gradients` is overwritten."""
    if len(keep) == 1 and total.dtype == keep.dtype:
        total.addcmul_(gradients[0], keep[0])
    elif len(keep) == 1:
        total.add_(gradients[0].mul_(keep[0]))
    else:
        total.add_(gradients.mul_(keep).sum(0, dtype=total.dtype))


def _fake_gradients(x: Tensor, weight: Tensor, for_x: bool, for_weight: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if for_x else 0), weight.new_empty(weight.shape if for_weight else 0)


def _side_by_side(x: Tensor) -> Tensor:
    """(samples, channels, ...) as one sample whose channels are those of all."""
    return x.reshape(1, -1, *x.shape[2:])


def _empty_output(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    sizes = [
        (size + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate(x.shape[2:])
    ]
    return x.new_empty(len(x), len(weight), *sizes)
