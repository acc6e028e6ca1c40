"""Images, folders, shards and runs that are small enough to be made by each test."""

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image


def pytest_configure(config):
    # Lightning 2.6 with torch 2.14; nothing here can do anything about it.
    config.addinivalue_line("filterwarnings", "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recorder(pl.LightningModule):
    """Records what it is given; its loss is that of one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated, self.sums = [], [], []

    def training_step(self, batch, batch_idx):
        images, _, positions = batch
        self.seen.append(positions.tolist())
        self.sums.append(int(images.long().sum()))
        return (self.weight - images.float().mean()) ** 2

    def validation_step(self, batch, batch_idx):
        self.validated += batch[2].tolist()

    def test_step(self, batch, batch_idx):
        self.validated += batch[2].tolist()

    def predict_step(self, batch, batch_idx):
        return batch[2]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def recorder():
    return Recorder


class Saver(pl.Callback):
    """Saves at the end of the last step's batch, as a run would that is killed right after."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def run():
    """Trains on a data module; returns the module with what its steps saw."""

    def run(data, checkpoint=None, save=None, validate=False, module=None, **trainer):
        module = module or Recorder()
        pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[Saver(save)] if save else [],
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if validate else 0,
            **trainer,
        ).fit(module, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return module

    return run


def pixels(number, height=8, width=8, channels=3):
    """Smooth pixels that survive a JPEG, different for each number."""
    rows, columns = np.mgrid[0:height, 0:width]
    value = (40 * rows / height + 40 * columns / width + 7 * number) % 256
    return np.stack([value, 255 - value, value / 2], axis=2)[..., :channels].astype(np.uint8)


def encoded(array, kind="PNG", mode=None):
    """Bytes of an image file."""
    image = Image.fromarray(array.squeeze())
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind)
    return file.getvalue()


def write_tar(path, members, **options):
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(numbers, num_classes=4, kind="png", **size):
    """Members of a shard: an image and its class for each number."""
    encoder = "JPEG" if kind in ("jpg", "jpeg") else kind.upper()
    members = []
    for number in numbers:
        members.append((f"{number:06d}.{kind}", encoded(pixels(number, **size), encoder)))
        members.append((f"{number:06d}.cls", str(number % num_classes).encode()))
    return members


@pytest.fixture
def made():
    """What makes images and shards."""
    return SimpleNamespace(pixels=pixels, encoded=encoded, write_tar=write_tar, pairs=pairs)


@pytest.fixture
def shards(tmp_path):
    """Four shards of 10 images, 6 x 8."""
    for shard in range(4):
        write_tar(tmp_path / f"train-{shard:03d}.tar", pairs(range(10 * shard, 10 * shard + 10), height=6))
    return str(tmp_path / "train-*.tar")


@pytest.fixture
def folder(tmp_path) -> Path:
    """`train/` and `val/` of two classes, 12 and 4 images."""
    for split, count in (("train", 12), ("val", 4)):
        for number in range(count):
            place = tmp_path / "images" / split / ("cat", "dog")[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:03d}.png").write_bytes(encoded(pixels(number, 10, 12)))
    return tmp_path / "images"
