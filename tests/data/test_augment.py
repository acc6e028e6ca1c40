import pytest
import torch
from torch.nn.functional import pad

from masklr.data import RandomCrop, RandomHorizontalFlip, RandomResizedCrop


@pytest.fixture
def images():
    return torch.randint(0, 256, (2000, 2, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def seeded(number=1):
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_each_image_is_flipped_or_not_with_probability_p(images, p):
    out = RandomHorizontalFlip(p)(images, seeded())
    kept = (out == images).flatten(1).all(1)
    flipped = (out == images.flip(3)).flatten(1).all(1)
    assert (kept ^ flipped).all()
    assert abs(flipped.float().mean() - p) <= 5 * (p * (1 - p) / len(images)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_each_crop_is_one_of_the_shifts_and_all_are_equally_likely(images, dtype):
    images = images.to(dtype)
    out = RandomCrop(padding=1, fill=9)(images, seeded())
    padded = pad(images, [1] * 4, value=9)
    shifts = [padded[:, :, top : top + 5, left : left + 7] for top in range(3) for left in range(3)]
    hits = torch.stack([(out == shift).flatten(1).all(1) for shift in shifts])
    assert (hits.sum(0) == 1).all()
    assert ((hits.float().mean(1) - 1 / 9).abs() <= 5 * (8 / 81 / len(images)) ** 0.5).all()
    assert out.dtype == dtype
    assert out.is_contiguous()


def test_crop_without_padding_is_the_image(images):
    assert torch.equal(RandomCrop(0)(images), images)


def test_boxes_have_the_shares_and_ratios_of_torchvision():
    images = torch.zeros(4000, 1, 64, 48)
    top, left, height, width = RandomResizedCrop(scale=(0.3, 0.6)).boxes(images, seeded()).T
    assert ((top >= 0) & (top + height <= 64) & (left >= 0) & (left + width <= 48)).all()
    share = height * width / (64 * 48)
    assert abs(share.mean() - 0.45) < 5 * (0.3 / 12**0.5) / 4000**0.5 + 0.01
    ratio = (width / height).log()
    assert ratio.abs().max() < 0.33
    assert torch.equal(height, height.round())


def test_box_of_an_image_too_long_for_any_is_its_center():
    boxes = RandomResizedCrop(scale=(1.0, 1.0)).boxes(torch.zeros(2, 1, 4, 400), seeded())
    assert boxes.tolist() == [[0, 197, 4, 5]] * 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resized_crops_are_those_of_torchvision(images, interpolation):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    images = images[:20]
    crop = RandomResizedCrop((10, 14), (0.2, 1.0), interpolation=interpolation)
    boxes = crop.boxes(images, seeded(3)).long().tolist()
    out = crop(images, seeded(3))
    assert (out.shape, out.dtype) == ((20, 2, 10, 14), torch.uint8)
    for image, box, result in zip(images, boxes, out, strict=True):
        top, left, height, width = box
        expected = functional.resized_crop(
            image.float(), top, left, height, width, [10, 14], InterpolationMode(interpolation), antialias=False
        )
        # At the rim, the crop here goes on with the pixels outside its box, and torchvision's repeats its last ones.
        rim = 14 // width * 2 + 2
        inner = (slice(None), slice(rim, 10 - rim), slice(rim, 14 - rim))
        assert (expected.clamp(0, 255)[inner] - result.float()[inner]).abs().le(0.51).all()


def test_crop_of_the_whole_image_is_the_image(images):
    square = images[:10, :, :5, :5]
    out = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))(square, seeded())
    assert torch.equal(out, square)


@pytest.mark.parametrize("augment", [RandomHorizontalFlip(), RandomCrop(2), RandomResizedCrop()])
def test_samples_differ_and_the_global_generator_decides(augment):
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8).expand(64, -1, -1, -1)
    torch.manual_seed(4)
    first = augment(image)
    assert len({sample.numpy().tobytes() for sample in first}) > 1
    torch.manual_seed(4)
    assert torch.equal(augment(image), first)
    assert not torch.equal(augment(image), first)
    assert torch.equal(augment(image, seeded(4)), first)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomHorizontalFlip(1.5), r"`p` in \[0, 1\], got 1.5"),
        (lambda: RandomCrop(-1), "`padding` of at least 0 pixels, got -1"),
        (lambda: RandomResizedCrop(scale=(0.0, 1.0)), "`scale`"),
        (lambda: RandomResizedCrop(ratio=(2.0, 1.0)), "`ratio`"),
        (lambda: RandomResizedCrop(interpolation="nearest"), "`interpolation` bilinear or bicubic"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
