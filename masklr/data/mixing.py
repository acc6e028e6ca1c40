"""Mixtures of images and of their labels, a different draw for each sample, on the device of the images."""

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn


class Mixed(NamedTuple):
    """A batch of mixtures.

    Attributes:
        images: Images (B, C, H, W).
        labels: Labels (B,) of the images that were mixed in.
        share: Share (B,) of each mixture that is its own image, in [0, 1].
    """

    images: Tensor
    labels: Tensor
    share: Tensor


class Mixing(nn.Module):
    """Mixes each image with the one before it in the batch: in brightness (mixup), or by a box cut out of it (CutMix).

    Where both are on, each sample has one of them, with the same probability. Draws come from the global generator of
    the images' device, or from `generator`, and nothing waits for the device; so call it inside a training step.

    Args:
        mixup: Parameter of mixup's Beta(a, a), from which the share is drawn; 0 for none.
        cutmix: Parameter of CutMix's Beta(a, a); 0 for none. The share is that of the pixels that were left.
        p: Probability that a sample is mixed, in [0, 1].

    Raises:
        ValueError: A value outside its range; both mixtures off.

    Reference:
        Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018; Yun et al., "CutMix", ICCV 2019. The
        masked autoencoder's authors fine-tune with 0.8 and 1.0.
    """

    def __init__(self, mixup: float = 0.8, cutmix: float = 1.0, p: float = 1.0) -> None:
        super().__init__()
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if not value >= 0:
                raise ValueError(f"Expected `{name}` of 0 or more, got {value}.")
        if not mixup and not cutmix:
            raise ValueError("Expected `mixup` or `cutmix` above 0, got 0 for both.")
        if not 0 <= p <= 1:
            raise ValueError(f"Expected `p` in [0, 1], got {p}.")
        self.mixup, self.cutmix, self.p = mixup, cutmix, p

    def forward(self, images: Tensor, labels: Tensor, generator: Generator | None = None) -> Mixed:
        """Mixtures of normalized images (B, C, H, W), in floating point, with labels (B,)."""
        batch, device = len(images), images.device
        others = images.roll(1, 0)
        draws = torch.rand(2, batch, generator=generator, device=device)
        mixed, boxed = draws[0] < self.p, draws[1] < (0.5 if self.mixup and self.cutmix else float(self.cutmix > 0))
        blend = torch.where(mixed & ~boxed, _beta(self.mixup, batch, device, generator), 1.0)
        box = _boxes(_beta(self.cutmix, batch, device, generator), images.shape[2:], generator)
        box = box & (mixed & boxed)[:, None, None]
        weight = torch.where(box, 0.0, blend[:, None, None])
        images = torch.lerp(others, images, weight[:, None].to(images.dtype))
        return Mixed(images, labels.roll(1, 0), weight.mean((1, 2)))


def _beta(a: float, batch: int, device: torch.device, generator: Generator | None) -> Tensor:
    """Draws (B,) from Beta(a, a), as `torch.distributions` makes them, which takes no generator; ones where a is 0."""
    if not a:
        return torch.ones(batch, device=device)
    return torch._sample_dirichlet(torch.full((batch, 2), a, device=device), generator)[:, 0]


def _boxes(share: Tensor, size: torch.Size, generator: Generator | None) -> Tensor:
    """Pixels (B, H, W) of a box of area 1 - share about a uniform center, clipped to the image."""
    center = torch.rand(2, len(share), 1, generator=generator, device=share.device)
    half = (1 - share).clamp(min=0).sqrt()[:, None] / 2
    inside = []
    for axis, length in enumerate(size):
        pixel = (torch.arange(length, device=share.device) + 0.5) / length
        inside.append((pixel - center[axis]).abs() < half)
    return inside[0][:, :, None] & inside[1][:, None, :]
