"""Where the package's own gradients may stand in for those of a layer, and where they may not."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

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
