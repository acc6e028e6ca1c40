import logging
import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from masklr.data import SampleError, TorchvisionImages
from masklr.data.splits import DecodedImages, MemoryImages


def every(split):
    return split.__getitems__(range(len(split)))


def opened(*arguments, **options):
    data = TorchvisionImages(*arguments, **options)
    data.setup("fit")
    data.setup("test")
    return data


def write_mnist(root, count=30):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for kind in ("train", "t10k"):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{kind}-images-idx3-ubyte", images), (f"{kind}-labels-idx1-ubyte", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
            (raw / name).write_bytes(head + array.tobytes())


def write_stl10(root, count=12):
    folder = root / "stl10_binary"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for kind in ("train", "test"):
        (folder / f"{kind}_X.bin").write_bytes(generator.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tobytes())
        (folder / f"{kind}_y.bin").write_bytes((np.arange(count) % 10 + 1).astype(np.uint8).tobytes())
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))


def write_cifar(root, monkeypatch, count=10):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(count))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)


def test_set_without_splits_is_partitioned():
    options = {"size": 50, "image_size": [3, 8, 12], "num_classes": 4}
    data = opened("FakeData", options=options, test_fraction=0.2)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 36, "validation": 4, "test": 10}
    assert (data.num_classes, data.image_size, data.in_chans) == (4, (8, 12), 3)
    rows = np.concatenate([split.rows for split in data.splits.values()])
    assert sorted(rows) == list(range(50))
    image, label = datasets.FakeData(50, (3, 8, 12), 4)[int(data.splits["train"].rows[5])]
    sample = data.splits["train"][5]
    assert np.array_equal(sample[0].permute(1, 2, 0), image)
    assert sample[1] == label


def test_mnist_has_one_channel_and_its_own_test_split(tmp_path):
    write_mnist(tmp_path)
    data = opened("MNIST", root=str(tmp_path), val_fraction=0.2)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 24, "validation": 6, "test": 30}
    assert (data.num_classes, data.image_size, data.in_chans) == (10, (28, 28), 1)
    original = datasets.MNIST(str(tmp_path), train=False)
    assert torch.equal(every(data.splits["test"])[0][:, 0], original.data)
    assert torch.equal(every(data.splits["test"])[1], original.targets)
    assert opened("MNIST", root=str(tmp_path), in_chans=3).in_chans == 3


def test_set_with_a_split_argument_is_opened_by_it(tmp_path, monkeypatch):
    write_stl10(tmp_path)
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    data = opened("STL10", root=str(tmp_path), image_size=(12, 16))
    assert (len(data.splits["test"]), data.image_size, data.num_classes) == (12, (12, 16), 10)
    with pytest.raises(ValueError, match="STL10: Unknown value 'dev' for argument split"):
        opened("STL10", root=str(tmp_path), train_split="dev")


def test_cifar_pixels_are_the_originals(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    data = opened("CIFAR10", root=str(tmp_path))
    assert (len(data.splits["train"]), len(data.splits["validation"]), len(data.splits["test"])) == (45, 5, 10)
    original = torch.from_numpy(datasets.CIFAR10(str(tmp_path), train=False).data).permute(0, 3, 1, 2)
    assert torch.equal(every(data.splits["test"])[0], original)


def test_unknown_set_names_the_nearest():
    with pytest.raises(ValueError, match="got 'Cifar-10'; did you mean 'CIFAR10' or 'CIFAR100'"):
        TorchvisionImages("Cifar-10")


def test_set_that_is_not_there_asks_for_download(tmp_path):
    data = TorchvisionImages("CIFAR10", root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"CIFAR10 is not in '.*'; pass `download: true` to fetch it\."):
        data.setup("fit")


def test_wrong_options_are_an_error_in_one_sentence():
    with pytest.raises(ValueError, match=r"`options`: FakeData says: .*'sizes'"):
        opened("FakeData", options={"sizes": 3})


def test_set_that_is_no_classification_is_refused(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)):
        opened("CocoDetection", root=str(tmp_path))


def test_val_folder_of_a_folder_is_its_test_split(folder):
    data = opened(folder=str(folder), val_fraction=0.25)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 9, "validation": 3, "test": 4}
    assert (data.num_classes, data.image_size, data.in_chans) == (2, (10, 12), 3)
    assert every(data.splits["test"])[1].tolist() == [0, 0, 1, 1]


def test_val_folder_given_is_the_validation_split(folder):
    data = TorchvisionImages(folder=str(folder), val_folder="val", test_fraction=0.0)
    data.setup("fit")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 12, "validation": 4}


def test_folder_without_train_holds_its_test_split_out(folder):
    data = opened(folder=str(folder / "train"), test_fraction=0.25, val_fraction=0.0)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 9, "validation": 0, "test": 3}


def test_pixels_of_a_folder_are_the_files(folder, made):
    data = TorchvisionImages(folder=str(folder), val_fraction=0.0)
    data.setup("fit")
    images, labels, _ = every(data.splits["train"])
    assert labels.tolist() == [0] * 6 + [1] * 6
    assert np.array_equal(images[1].permute(1, 2, 0), made.pixels(2, 10, 12))


@pytest.mark.parametrize("in_memory", [True, False])
def test_resized_images_are_the_same_in_memory_and_decoded_on_the_way(folder, in_memory):
    data = opened(folder=str(folder), image_size=(5, 4), in_memory=in_memory, in_chans=1, num_workers=0)
    assert isinstance(data.splits["test"].images, MemoryImages if in_memory else DecodedImages)
    images, _, positions = every(data.splits["test"])
    assert images.shape == (4, 1, 5, 4)
    assert positions.tolist() == [0, 1, 2, 3]
    assert torch.equal(images, every(opened(folder=str(folder), image_size=(5, 4), in_chans=1).splits["test"])[0])


def test_set_above_the_memory_bound_is_decoded_on_the_way(folder):
    data = opened(folder=str(folder), max_memory_bytes=12 * 10 * 12 * 3 - 1)
    assert isinstance(data.splits["train"].images, DecodedImages)
    assert isinstance(data.splits["test"].images, MemoryImages)


@pytest.fixture
def damaged(folder, made):
    """The folder with a truncated JPEG, a CMYK and a 16-bit image among its training images."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    place = folder / "train" / "cat"
    (place / "a.jpg").write_bytes(made.encoded(noise, "JPEG")[:-40])
    (place / "b.jpg").write_bytes(made.encoded(noise, "JPEG", "CMYK"))
    (place / "c.png").write_bytes(made.encoded(noise[..., 0].astype(np.uint16)))
    return folder


@pytest.mark.parametrize("in_memory", [True, False])
def test_damaged_images_are_named(damaged, in_memory):
    data = TorchvisionImages(folder=str(damaged), in_memory=in_memory, num_workers=0, val_fraction=0.0)

    def everything():
        data.setup("fit")
        every(data.splits["train"])

    with pytest.raises(SampleError, match=r"train/cat/(a.jpg: cut off|b.jpg: a CMYK|c.png: a 16-bit)"):
        everything()


def test_damaged_images_are_left_out_of_memory_and_counted(damaged, caplog):
    data = TorchvisionImages(folder=str(damaged), on_error="skip", max_skipped=0.3, val_fraction=0.0)
    data.setup("fit")
    assert len(data.splits["train"]) == 12
    assert "skipped 3 of 15 samples" in caplog.text
    assert "a.jpg: cut off" in caplog.text


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_images_make_batches_smaller_and_are_counted_once_over_workers(damaged, run, caplog, num_workers):
    data = TorchvisionImages(
        folder=str(damaged),
        on_error="skip",
        max_skipped=0.3,
        in_memory=False,
        val_fraction=0.0,
        batch_size=5,
        num_workers=num_workers,
    )
    with caplog.at_level(logging.WARNING):
        module = run(data, max_epochs=3)
    assert sum(map(len, module.seen)) == 36
    assert len({position for batch in module.seen for position in batch}) == 12
    assert min(map(len, module.seen)) < 5
    assert "train: skipped 3 of 15 samples" in caplog.text


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_error_in_a_worker_process_is_the_sentence(damaged, run):
    data = TorchvisionImages(folder=str(damaged), in_memory=False, image_size=8, batch_size=5, num_workers=1)
    with pytest.raises(SampleError, match=r"^/[^\n]*train/cat/[abc]\.\w+: [^\n]*$"):
        run(data, max_epochs=1)


def test_mixed_sizes_ask_for_image_size(folder, made):
    (folder / "train" / "dog" / "z.png").write_bytes(made.encoded(made.pixels(0, 9, 9)))
    with pytest.raises(SampleError, match=r"z\.png: 9 x 9 pixels where others have 10 x 12; pass `image_size`"):
        opened(folder=str(folder))


def test_class_of_the_test_folder_that_training_lacks_is_an_error(folder, made):
    (folder / "val" / "fox").mkdir()
    with pytest.raises(ValueError, match="class 'fox' is not among those of the training split"):
        opened(folder=str(folder))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "either `name` or `folder`"),
        ({"name": "MNIST", "folder": "x"}, ValueError, "either `name` or `folder`"),
        ({"folder": "nowhere"}, FileNotFoundError, "`folder`: there is no folder 'nowhere'"),
        ({"name": "MNIST", "val_folder": "val"}, ValueError, "only beside `folder`"),
        ({"name": "MNIST", "in_chans": 2}, ValueError, "`in_chans` 1 or 3, got 2"),
        ({"name": "MNIST", "on_error": "ignore"}, ValueError, "`on_error` raise or skip, got 'ignore'"),
        (
            {"name": "MNIST", "random_resized_crop": (0.2, 1.0), "image_size": 8, "in_memory": True},
            ValueError,
            "`in_memory` false or auto",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        TorchvisionImages(**arguments)
