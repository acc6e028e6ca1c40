"""Images as the network wants them."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn


class Normalization(nn.Module):
    """Subtract a mean from each channel and divide by a standard deviation; nothing of it is in the state_dict.

    Args:
        mean: Mean of each channel, of images in [0, 1]; one value serves all channels. None is 0.5.
        std: Standard deviation of each channel, above 0. None is 0.5.
        in_chans: Channels of the images; None allows any number.

    Raises:
        ValueError: A standard deviation that is not positive; channel counts that differ.

    Example:
        >>> import torch
        >>> Normalization([0.5], [0.25])(torch.ones(2, 3, 4, 4)).unique()
        tensor([2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: list[float] | None = None, std: list[float] | None = None, in_chans: int | None = None
    ) -> None:
        super().__init__()
        mean, std = mean or [0.5], std or [0.5]
        if min(std) <= 0:
            raise ValueError(f"Expected `std` above 0, got {std}.")
        for argument, values in (("mean", mean), ("std", std)):
            if in_chans is not None and len(values) not in (1, in_chans):
                allowed = " or ".join(str(count) for count in sorted({1, in_chans}))
                raise ValueError(f"Expected `{argument}` of {allowed} values (channels), got {values}.")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalized images, of uint8 ones or of floats in [0, 1]."""
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        return (images / scale - self.mean) / self.std

    def inverse(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Images in [0, 1] of normalized ones; what lies outside is cut off."""
        return (images * self.std + self.mean).clamp(0, 1)
