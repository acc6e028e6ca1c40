import zlib

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional

from masklr.data.decoding import SampleError, View, by_pillow, crop_box, decoded_image, size_pair


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_kind_is_decoded_to_the_wanted_channels(made, kind, in_chans):
    array = made.pixels(3, height=20, width=28)
    image = decoded_image(bytearray(made.encoded(array, kind)), in_chans, "a")
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (in_chans, 20, 28))
    expected = torch.from_numpy(array).permute(2, 0, 1)
    expected = functional.rgb_to_grayscale(expected) if in_chans == 1 else expected
    assert (image.float() - expected.float()).abs().mean() < (2 if kind == "PNG" else 6)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_pillow_decodes_to_the_same_pixels(made, in_chans):
    for kind, operator in (("PNG", torch.ops.image.decode_png), ("JPEG", torch.ops.image.decode_jpeg)):
        data = bytearray(made.encoded(made.pixels(3, height=20, width=28), kind))
        expected = operator(torch.frombuffer(data, dtype=torch.uint8), in_chans, False)
        assert (by_pillow(data, in_chans).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_other_pngs_become_three_channels(made, mode):
    assert decoded_image(bytearray(made.encoded(made.pixels(1), "PNG", mode)), 3, "a").shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
def test_cut_off_files_are_errors_that_name_the_sample(made, kind, share):
    data = made.encoded(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), kind)
    with pytest.raises(SampleError, match=r"^here: cut off or damaged") as error:
        decoded_image(bytearray(data[: int(share * len(data))]), 3, "here")
    assert "\n" not in str(error.value)
    assert ".cpp" not in str(error.value)


def test_any_byte_of_a_png_that_is_another_is_an_error_and_no_crash(made):
    data = made.encoded(made.pixels(3))
    for place in range(len(data)):
        spoiled = bytearray(data)
        spoiled[place] ^= 16
        with pytest.raises(SampleError, match=r"^here: "):
            decoded_image(spoiled, 3, "here")


def test_images_of_too_many_pixels_are_refused_before_they_take_memory(made):
    data = bytearray(made.encoded(made.pixels(1), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(SampleError, match=r"here: an image of 65535 x 65535 pixels is refused; at most 178,956,970"):
        decoded_image(data, 3, "here")
    data = bytearray(made.encoded(np.zeros((8, 8), dtype=np.uint8)))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(SampleError, match=r"here: .*3600000000 pixels"):
        decoded_image(data, 3, "here")


def test_cmyk_and_16_bit_images_are_refused(made):
    with pytest.raises(SampleError, match=r"a.jpg: a CMYK image is refused"):
        decoded_image(bytearray(made.encoded(made.pixels(1), "JPEG", "CMYK")), 3, "a.jpg")
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8)
    with pytest.raises(SampleError, match=r"a.png: a 16-bit image is refused"):
        decoded_image(bytearray(made.encoded(deep)), 3, "a.png")


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"GIF89a....", "neither a JPEG nor a PNG nor a WebP")])
def test_files_of_another_kind_are_refused(data, reason):
    with pytest.raises(SampleError, match=f"a.jpg: .*{reason}"):
        decoded_image(bytearray(data), 3, "a.jpg")


def test_error_of_a_worker_process_keeps_the_sentence_alone():
    wrapped = (
        "Caught SampleError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
        "masklr.data.decoding.SampleError: a.jpg: cut off.\n"
    )
    assert str(SampleError(wrapped)) == "a.jpg: cut off."


def test_crop_boxes_lie_in_the_image_with_the_wanted_share_and_ratio():
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(500):
        top, left, height, width = crop_box(60, 80, (0.2, 1.0), generator)
        assert 0 <= top <= 60 - height
        assert 0 <= left <= 80 - width
        assert 0.7 < width / height < 1.4
        shares.append(height * width / 4800)
    assert 0.19 < min(shares) < 0.22
    image, ratio = torch.zeros(3, 60, 80), [3 / 4, 4 / 3]
    boxes = [RandomResizedCrop.get_params(image, [0.2, 1.0], ratio) for _ in range(500)]
    theirs = [height * width / 4800 for _, _, height, width in boxes]
    error = ((np.var(shares) + np.var(theirs)) / 500) ** 0.5
    assert abs(np.mean(shares) - np.mean(theirs)) < 5 * error


def test_box_of_an_image_too_long_for_any_is_its_center():
    assert crop_box(4, 400, (1.0, 1.0), np.random.default_rng(0)) == (0, 197, 4, 5)


def test_central_view_keeps_the_center_and_random_view_repeats_with_its_draw():
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[:, :, 20:60] = 200
    assert View((20, 20))(image, None).float().mean() > 190
    assert View((20, 40), center_fraction=0.5)(image, None).shape == (3, 20, 40)
    view = View((20, 30), random_resized_crop=(0.2, 0.5))
    noise = torch.randint(0, 256, (3, 40, 80), dtype=torch.uint8)
    assert torch.equal(view(noise, (0, 1, 2)), view(noise, (0, 1, 2)))
    assert not torch.equal(view(noise, (0, 1, 2)), view(noise, (0, 1, 3)))
    assert view(noise, (0, 1, 2)).shape == (3, 20, 30)


def test_image_of_the_wanted_size_is_left_as_it_is():
    image = torch.randint(0, 256, (1, 6, 9), dtype=torch.uint8)
    assert View((6, 9))(image, None) is image
    assert View()(image, None) is image


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (0, 4)}, r"`image_size` to be at least 1 pixel, got \(0, 4\)"),
        ({"center_fraction": 0.0}, r"`center_fraction` in \(0, 1\], got 0.0"),
        ({"interpolation": "nearest"}, "`interpolation` bilinear or bicubic, got 'nearest'"),
        ({"random_resized_crop": (0.5, 0.2), "image_size": (4, 4)}, "`random_resized_crop`"),
        ({"random_resized_crop": (0.2, 1.0)}, "`image_size` beside `random_resized_crop`, got None"),
    ],
)
def test_wrong_views_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        View(**arguments)


def test_size_pair():
    assert (size_pair(4), size_pair((2, 3)), size_pair(None)) == ((4, 4), (2, 3), None)
