"""DropConnect: layers whose weights, not activations, are dropped at random."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from masklr.layers import compiled_masks
from masklr.layers.sample_masks import SampleConv2d, SampleLinear, batch_keep, new_seed
from masklr.masks import check_probability, kept_share

Per = Literal["batch", "sample"]


def check_dropconnect(p: float, per: str) -> None:
    """Raise the ValueError of a wrong `p` or `per`."""
    check_probability(p)
    if per not in ("batch", "sample"):
        raise ValueError(f"Expected `per` to be batch or sample, got {per!r}.")


class DropConnectLinear(nn.Linear):
    """Linear layer whose weights, not activations, are dropped at random in training.

    Weights that are kept are divided by the keep probability, so that the mask has mean one. In evaluation and at
    p = 0 it is bitwise `nn.Linear`; parameters and state_dict keys are those of `nn.Linear` always. The mask is a
    function of a seed drawn from PyTorch's CPU generator, and so the same when a checkpointed block is recomputed.
    Gradients of gradients work for one mask a batch, not for one a sample.

    Args:
        in_features: Size of each input vector.
        out_features: Size of each output vector.
        bias: Whether there is a bias. It is never dropped.
        p: Probability that a weight is dropped, in [0, 1), rounded to a multiple of 2^-16. May be set at any time.
        per: One mask for the whole `batch`, or one for each `sample`: each entry of the first axis, whose tokens and
            positions share it. Masks of samples are made one after another and never held together.
        device: Where the parameters are, as in `nn.Linear`.
        dtype: Type of the parameters, as in `nn.Linear`.

    Raises:
        ValueError: `p` is outside [0, 1), or `per` is neither batch nor sample.

    Example:
        >>> layer = DropConnectLinear(3, 2, p=0.5)
        >>> list(layer.state_dict()), isinstance(layer, nn.Linear)
        (['weight', 'bias'], True)

    Reference:
        Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of neural networks using DropConnect", ICML 2013.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0.5,
        per: Per = "batch",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_dropconnect(p, per)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.p, self.per = p, per

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's output."""
        if not self.training or self.p == 0:
            return super().forward(x)
        if self.per == "batch":
            return nn.functional.linear(x, masked_weight(self.weight, self.p), self.bias)
        # A vector is one sample; (samples, in) are samples of one token.
        tokens = x.reshape(len(x) if x.ndim > 1 else 1, x.shape[1:-1].numel(), self.in_features)
        weight = self.weight * (1 / kept_share(self.p))
        operator = compiled_masks.sample_linear if torch.compiler.is_compiling() else SampleLinear.apply
        y = operator(*as_autocast(tokens.contiguous(), weight, self.bias), new_seed(), self.p)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Arguments, for `print`."""
        return f"{super().extra_repr()}, p={self.p}, per={self.per}"


class DropConnectConv2d(nn.Conv2d):
    """Convolution whose weights, not activations, are dropped at random in training.

    The mask is drawn for the filters, one entry a weight, and so is the same at all positions of an image. Everything
    else is as in `DropConnectLinear`.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the filters.
        stride: Step of the filters.
        padding: Rows and columns of padding on each side, or `same` or `valid`.
        dilation: Spacing within the filters.
        groups: Groups of channels that are convolved apart.
        bias: Whether there is a bias. It is never dropped.
        padding_mode: What the padding holds, as in `nn.Conv2d`.
        p: Probability that a weight is dropped, in [0, 1), rounded to a multiple of 2^-16. May be set at any time.
        per: One mask for the whole `batch`, or one for each `sample`, the images.
        device: Where the parameters are, as in `nn.Conv2d`.
        dtype: Type of the parameters, as in `nn.Conv2d`.

    Raises:
        ValueError: `p` is outside [0, 1), or `per` is neither batch nor sample.

    Example:
        >>> DropConnectConv2d(3, 8, 3, padding=1, p=0.2, per="sample")(torch.zeros(2, 3, 5, 5)).shape
        torch.Size([2, 8, 5, 5])

    Reference:
        Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of neural networks using DropConnect", ICML 2013.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        p: float = 0.5,
        per: Per = "batch",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_dropconnect(p, per)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self.p, self.per = p, per

    def forward(self, x: Float[Tensor, "*batch in height width"]) -> Float[Tensor, "*batch out new_height new_width"]:
        """The layer's output."""
        if not self.training or self.p == 0:
            return super().forward(x)
        if self.per == "batch":
            return self._conv_forward(x, masked_weight(self.weight, self.p), self.bias)
        images, padding = self._padded(x if x.ndim == 4 else x[None])
        weight = self.weight * (1 / kept_share(self.p))
        operator = compiled_masks.sample_conv2d if torch.compiler.is_compiling() else SampleConv2d.apply
        cast = as_autocast(images.contiguous(), weight, self.bias)
        y = operator(*cast, new_seed(), self.p, self.stride, padding, self.dilation, self.groups)
        return y if x.ndim == 4 else y[0]

    def _padded(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """What the convolution is to be applied to, and the padding by zeros that is left to it."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x, list(self.padding)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return nn.functional.pad(x, self._reversed_padding_repeated_twice, mode=mode), [0, 0]

    def extra_repr(self) -> str:
        """Arguments, for `print`."""
        return f"{super().extra_repr()}, p={self.p}, per={self.per}"


def masked_weight(weight: Tensor, p: float) -> Tensor:
    """A weight with one new mask of mean one on it."""
    keep = (compiled_masks.batch_keep if torch.compiler.is_compiling() else batch_keep)(weight, new_seed(), p)
    # The scale is a Python number: in bf16 a tensor that holds it would be rounded, and the mean would not be one.
    return weight * keep * (1 / kept_share(p))


def as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three as autocast casts the inputs of a matrix product; as they are where it is off."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    cast = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias)]
    return cast[0], cast[1], cast[2]  # type: ignore[return-value]
