import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from masklr.data import Digits


def opened(**arguments):
    data = Digits(**arguments)
    data.setup("fit")
    data.setup("test")
    return data


def test_pixels_are_the_scaled_originals_and_splits_are_a_partition():
    data = opened(batch_size=64)
    images, labels = load_digits(return_X_y=True)
    expected = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes() + bytes([label])
        for image, label in zip(images, labels, strict=True)
    }
    found = []
    for split in data.splits.values():
        pixels, classes, positions = split.__getitems__(range(len(split)))
        assert (pixels.dtype, classes.dtype, positions.dtype) == (torch.uint8, torch.int64, torch.int64)
        assert positions.tolist() == list(range(len(split)))
        found += [
            image.numpy().tobytes() + bytes([label]) for image, label in zip(pixels, classes.tolist(), strict=True)
        ]
    assert len(found) == len(expected) == 1797
    assert set(found) == expected
    assert (data.num_classes, data.image_size, data.in_chans) == (10, (8, 8), 1)


def test_test_split_is_stratified_and_does_not_move_with_the_validation_seed():
    first, other = opened(split_seed=0), opened(split_seed=1, val_fraction=0.5)
    test, same = (data.splits["test"].__getitems__(range(len(data.splits["test"]))) for data in (first, other))
    assert torch.equal(test[0], same[0])
    share = torch.bincount(test[1]) / torch.from_numpy(np.bincount(load_digits().target))
    assert ((share - 0.2).abs() < 0.01).all()


def test_three_channels_are_equal():
    images, _, _ = next(iter(opened(in_chans=3, batch_size=8).train_dataloader()))
    assert images.shape == (8, 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])


def test_evaluation_loaders_give_every_sample_once_in_order():
    data = opened(batch_size=50)
    for loader, name in ((data.val_dataloader(), "validation"), (data.test_dataloader(), "test")):
        assert torch.cat([positions for _, _, positions in loader]).tolist() == list(range(len(data.splits[name])))
    loader = data.unaugmented_train_dataloader()
    assert torch.cat([positions for _, _, positions in loader]).tolist() == list(range(len(data.splits["train"])))


def test_one_key_is_one_sample():
    split = opened().splits["train"]
    image, label, position = split[(3, 5)]
    assert image.shape == (1, 8, 8)
    assert (label.ndim, position.item()) == (0, 5)
    assert torch.equal(image, split[5][0])


def test_no_validation_fraction_means_no_validation_loader():
    data = opened(val_fraction=0.0)
    assert data.val_dataloader() == []
    assert len(data.splits["train"]) == 1797 - len(data.splits["test"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` of at least 1, got 0"),
        ({"val_fraction": 1.0}, r"`val_fraction` in \[0, 1\), got 1.0"),
        ({"test_fraction": 0.0}, r"`test_fraction` in \(0, 1\), got 0"),
        ({"in_chans": 2}, "`in_chans` 1 or 3, got 2"),
        ({"predict_split": "val"}, "`predict_split` train, validation or test, got 'val'"),
        ({"seed": -1}, "`seed` of at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)
