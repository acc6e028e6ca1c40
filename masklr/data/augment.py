"""Random augmentation of batches, a different draw for each sample, on the device of the images.

torchvision's v2 transforms, called on a batch, draw once: all images are flipped, or cropped alike. Here every sample
has its own draw, in a few tensor operations and without waiting for the device. Draws come from the global generator of
the images' device, or from `generator`; so call these inside a training step, after its seeding.
"""

import math

import torch
from torch import Generator, Tensor, nn


class RandomHorizontalFlip(nn.Module):
    """Mirrors each image left to right with probability `p`.

    Args:
        p: Probability that an image is mirrored, in [0, 1].
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"Expected `p` in [0, 1], got {p}.")
        self.p = p

    def forward(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Images (B, C, H, W) of any dtype; a new tensor of the same."""
        flipped = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < self.p
        return torch.where(flipped, images.flip(3), images)


class RandomCrop(nn.Module):
    """Shifts each image by up to `padding` pixels in each direction; what comes in is `fill`.

    The (2 `padding` + 1)^2 shifts are equally likely: the crop of the original size out of the padded image.

    Args:
        padding: Pixels added on each side, at least 0.
        fill: Value of the added pixels, in the units of the images.
    """

    def __init__(self, padding: int = 4, fill: float = 0.0) -> None:
        super().__init__()
        if padding < 0:
            raise ValueError(f"Expected `padding` of at least 0 pixels, got {padding}.")
        self.padding, self.fill = padding, fill

    def forward(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Images (B, C, H, W) of any dtype; a new tensor of the same."""
        batch, _, height, width = images.shape
        padded = nn.functional.pad(images, [self.padding] * 4, value=self.fill)
        shifts = (2, batch, 1)
        top, left = torch.randint(2 * self.padding + 1, shifts, generator=generator, device=images.device)
        rows = top + torch.arange(height, device=images.device)
        columns = left + torch.arange(width, device=images.device)
        sample = torch.arange(batch, device=images.device)[:, None, None]
        # Channels last for the gather, one index for all of them.
        return (
            padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
        )


class RandomResizedCrop(nn.Module):
    """Cuts a random box out of each image and resizes it to `size`.

    The box has a share of the area uniform in `scale` and a width / height log-uniform in `ratio`, as in torchvision;
    where ten draws do not fit into the image, it is the largest central box of the nearest ratio. Resizing is not
    antialiased, which matters only for boxes larger than `size`: cut large images with the data module's
    `random_resized_crop` instead.

    Args:
        size: Height and width of the result, in pixels; None for that of the images.
        scale: Range of the box's share of the area, in (0, 1].
        ratio: Range of the box's width / height.
        interpolation: `bilinear` or `bicubic`.

    Reference:
        Szegedy et al., "Going deeper with convolutions", CVPR 2015.
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None = None,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"Expected `scale` as 0 < low <= high <= 1, got {scale}.")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"Expected `ratio` as 0 < low <= high, got {ratio}.")
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"Expected `interpolation` bilinear or bicubic, got {interpolation!r}.")
        self.size = (size, size) if isinstance(size, int) else size
        self.scale, self.ratio, self.interpolation = scale, ratio, interpolation

    def boxes(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Boxes (B, 4) as top, left, height, width: whole numbers of pixels, in float32."""
        batch, _, height, width = images.shape
        uniform = torch.rand(4, batch, 10, generator=generator, device=images.device)
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * uniform[0])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = torch.exp(low + (high - low) * uniform[1])
        w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
        first = fits.int().argmax(dim=1, keepdim=True)  # the first draw that fits; 0 where none does
        h, w, u, v = (drawn.gather(1, first).squeeze(1) for drawn in (h, w, uniform[2], uniform[3]))
        nearest = min(max(width / height, self.ratio[0]), self.ratio[1])
        none = ~fits.any(dim=1)
        h = torch.where(none, min(height, round(width / nearest)), h)
        w = torch.where(none, min(width, round(height * nearest)), w)
        top = torch.where(none, ((height - h) / 2).floor(), (u * (height - h + 1)).floor().clamp(max=height - h))
        left = torch.where(none, ((width - w) / 2).floor(), (v * (width - w + 1)).floor().clamp(max=width - w))
        return torch.stack([top, left, h, w], dim=1)

    def forward(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Images (B, C, H, W), uint8 or floating; the same dtype, uint8 rounded and clamped."""
        batch, channels, height, width = images.shape
        out_height, out_width = self.size or (height, width)
        top, left, h, w = self.boxes(images, generator).T
        # The box in grid_sample's coordinates, where -1 and 1 are the outer edges of the image's pixels.
        theta = images.new_zeros((batch, 2, 3), dtype=torch.float32)
        theta[:, 0, 0], theta[:, 0, 2] = w / width, (2 * left + w) / width - 1
        theta[:, 1, 1], theta[:, 1, 2] = h / height, (2 * top + h) / height - 1
        grid = nn.functional.affine_grid(theta, [batch, channels, out_height, out_width], align_corners=False)
        floating = images if images.is_floating_point() else images.float()
        resized = nn.functional.grid_sample(
            floating, grid.to(floating.dtype), mode=self.interpolation, padding_mode="border", align_corners=False
        )
        return resized if images.is_floating_point() else resized.round().clamp(0, 255).to(images.dtype)
