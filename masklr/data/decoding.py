"""From an encoded image to uint8 pixels of the size that is wanted, or to a sentence that says what is wrong."""

import io
import math
import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchvision.transforms import InterpolationMode

Interpolation = Literal["bilinear", "bicubic"]
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 178_956_970  # Pillow's own bound, which it too takes for an attack on memory


class SampleError(ValueError):
    """One sample of a data set cannot be used; the message is one sentence that names it.

    `torch.utils.data` raises what happened in a worker process again, with a traceback for its message: of that, the
    sentence is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("SampleError: ")[2].strip())


@dataclass(frozen=True)
class View:
    """How an image is brought to the size of the batch.

    Args:
        image_size: Height and width, in pixels; None leaves the image as it is.
        interpolation: With antialiasing in both cases.
        center_fraction: Share of the shorter side that the central crop keeps, in (0, 1]; 224 / 256 is the custom for
            ImageNet.
        random_resized_crop: Range of the share of the area that a random crop keeps; None for the central crop only.
    """

    image_size: tuple[int, int] | None = None
    interpolation: Interpolation = "bicubic"
    center_fraction: float = 1.0
    random_resized_crop: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"Expected `image_size` to be at least 1 pixel, got {self.image_size}.")
        if not 0 < self.center_fraction <= 1:
            raise ValueError(f"Expected `center_fraction` in (0, 1], got {self.center_fraction}.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"Expected `interpolation` bilinear or bicubic, got {self.interpolation!r}.")
        if self.random_resized_crop is not None:
            low, high = self.random_resized_crop
            if not 0 < low <= high <= 1:
                raise ValueError(f"Expected `random_resized_crop` as 0 < low <= high <= 1, got {low}, {high}.")
            if self.image_size is None:
                raise ValueError("Expected `image_size` beside `random_resized_crop`, got None.")

    def __call__(self, image: Tensor, draw: tuple[int, ...] | None) -> Tensor:
        """The image in this view; `draw` seeds the random crop, None takes the central one."""
        if self.image_size is None:
            return image
        if draw is None or self.random_resized_crop is None:
            return self._central(image)
        from torchvision.transforms.v2 import functional

        # A generator of its own: the worker's global ones stay untouched, and a resumed run draws the same.
        box = crop_box(image.shape[1], image.shape[2], self.random_resized_crop, np.random.default_rng(draw))
        return functional.resized_crop(
            image, *box, size=list(self.image_size), interpolation=self._mode(), antialias=True
        )

    def _central(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional

        assert self.image_size is not None
        height, width = self.image_size
        if tuple(image.shape[1:]) == (height, width) and self.center_fraction == 1:
            return image
        scale = max(height / image.shape[1], width / image.shape[2]) / self.center_fraction
        resized = [max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))]
        image = functional.resize(image, resized, interpolation=self._mode(), antialias=True)
        return functional.center_crop(image, [height, width])

    def _mode(self) -> "InterpolationMode":
        from torchvision.transforms import InterpolationMode

        return InterpolationMode(self.interpolation)


def size_pair(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width from one number or two."""
    if image_size is None:
        return None
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])


def crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    generator: np.random.Generator,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Random box (top, left, height, width) as torchvision's RandomResizedCrop draws it.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        scale: Range of the box's share of the area, uniform.
        generator: What the box is drawn from.
        ratio: Range of width / height, log-uniform.

    Reference:
        Szegedy et al., "Going deeper with convolutions", CVPR 2015.
    """
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w
    # Too long an image for these ratios: the largest central box of the nearest ratio.
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def decoded_image(data: bytearray, in_chans: int, name: str) -> Tensor:
    """uint8 (in_chans, H, W) of a JPEG, PNG or WebP file; gray and color are converted into one another.

    Args:
        data: The file's bytes.
        in_chans: 1 for gray, 3 for red, green and blue.
        name: How an error names the sample.

    Raises:
        SampleError: The file is cut off or damaged, has more than `MAX_PIXELS`, or holds CMYK or 16-bit pixels, which
            torchvision's decoder would pass on as something else without a word.
    """
    if reason := refusal(data):
        raise SampleError(f"{name}: {reason}")
    try:
        return _decoded(data, in_chans)
    except Exception as error:  # torchvision and Pillow raise of every kind when bytes are not what they should be
        reason = re.sub(r"^.*?\.cpp:\d+, ", "", (str(error).splitlines() or [type(error).__name__])[0])
        raise SampleError(f"{name}: cut off or damaged ({reason.strip('. ')}).") from None


def _decoded(data: bytearray, in_chans: int) -> Tensor:
    import torchvision.io  # noqa: F401  (loads the operators)
    from torchvision.transforms.v2 import functional

    # The operators and not `torchvision.io.decode_jpeg`, which says at each call, at half the cost of a small image,
    # that it is deprecated. On 32 x 32 images they are three times as fast as Pillow, which takes over when they go.
    # It always decodes PNG, at 1.5 to 2 times the cost: a bit flipped in one ends the process in torchvision 0.29.
    operators = torch.ops.image
    if data[:4] == b"\x89PNG" or not hasattr(operators, "decode_jpeg"):
        return by_pillow(data, in_chans)
    encoded = torch.frombuffer(data, dtype=torch.uint8)
    if data[:2] == b"\xff\xd8":
        return operators.decode_jpeg(encoded, 1 if in_chans == 1 else 3, False)  # ImageReadMode.GRAY, .RGB
    image = operators.decode_webp(encoded, 3)  # knows no gray
    return functional.rgb_to_grayscale(image) if in_chans == 1 else image


def by_pillow(data: bytearray, in_chans: int) -> Tensor:
    """uint8 (in_chans, H, W) of an image file, decoded by Pillow."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        pixels = np.array(image.convert("L" if in_chans == 1 else "RGB"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], in_chans)).permute(2, 0, 1).contiguous()


def refusal(data: bytearray) -> str | None:
    """Why the file is not decoded, or None."""
    if data[:2] == b"\xff\xd8":
        height, width, components = _jpeg_frame(data) or (0, 0, 0)
        if components == 4:
            return "a CMYK image is refused, since its colors have no exact RGB; convert it, or pass `on_error: skip`."
        if height * width > MAX_PIXELS:
            return f"an image of {height} x {width} pixels is refused; at most {MAX_PIXELS:,} are decoded."
    elif data[:4] == b"\x89PNG":
        if len(data) > 24 and data[24] == 16:
            return "a 16-bit image is refused, since it does not fit uint8; convert it, or pass `on_error: skip`."
        if not _png_is_whole(data):
            return "cut off or damaged (a checksum is wrong, or the end is missing)."
    elif not (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return "neither a JPEG nor a PNG nor a WebP file." if data else "the file is empty."
    return None


def _jpeg_frame(data: bytearray) -> tuple[int, int, int] | None:
    """Height, width and number of color components in the frame header; None where the file ends before it."""
    i = 2
    while i + 9 < len(data) and data[i] == 0xFF:
        marker = data[i + 1]
        if marker == 0xFF:  # fill byte
            i += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[i + 5 : i + 7], "big"), int.from_bytes(data[i + 7 : i + 9], "big"), data[i + 9]
        else:
            i += 2 + int.from_bytes(data[i + 2 : i + 4], "big")
    return None


def _png_is_whole(data: bytearray) -> bool:
    """Whether each chunk up to the last has its checksum, which Pillow does not compare for pixels."""
    view, i = memoryview(data), 8
    while i + 12 <= len(data):
        end = i + 8 + int.from_bytes(view[i : i + 4], "big")
        if end + 4 > len(data) or zlib.crc32(view[i + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return False
        if view[i + 4 : i + 8] == b"IEND":
            return True
        i = end + 4
    return False
