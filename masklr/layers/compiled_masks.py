"""The same operators for compiled graphs, which they enter as a whole.

In eager mode the plain functions are called: an operator's dispatch costs a tenth of a millisecond, and its first call
loads the compiler, which takes seconds and 150 MB.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from masklr.layers import sample_masks
from masklr.layers.sample_masks import empty_conv2d_output, gradients, save_inputs

batch_keep = torch.library.custom_op("masklr::batch_keep", sample_masks.batch_keep, mutates_args=())
sample_linear = torch.library.custom_op("masklr::sample_linear", sample_masks.sample_linear, mutates_args=())
sample_linear_backward = torch.library.custom_op(
    "masklr::sample_linear_backward", sample_masks.sample_linear_backward, mutates_args=()
)
sample_conv2d = torch.library.custom_op("masklr::sample_conv2d", sample_masks.sample_conv2d, mutates_args=())
sample_conv2d_backward = torch.library.custom_op(
    "masklr::sample_conv2d_backward", sample_masks.sample_conv2d_backward, mutates_args=()
)

sample_linear.register_autograd(gradients(sample_linear_backward, features=2), setup_context=save_inputs)
sample_conv2d.register_autograd(gradients(sample_conv2d_backward, features=1), setup_context=save_inputs)


@batch_keep.register_fake
def _(weight: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.bool, device=weight.device)


@sample_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


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
    return empty_conv2d_output(x, weight, stride, padding, dilation)


@sample_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, seed: Tensor, p: float, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(x, weight, for_x, for_weight)


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
    return _empty_gradients(x, weight, for_x, for_weight)


def _empty_gradients(x: Tensor, weight: Tensor, for_x: bool, for_weight: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if for_x else 0), weight.new_empty(weight.shape if for_weight else 0)
