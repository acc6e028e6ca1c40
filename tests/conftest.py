"""What every test stands on: one thread, annotations checked at run time, tiny models, tiny runs."""

import csv
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)

# Before masklr is imported. An int is a float, as everywhere in Python's annotations.
jaxtyping.install_import_hook(
    [
        f"masklr.{room}"
        for room in (
            "masks",
            "spectra",
            "moments",
            "layer_weights",
            "products",
            "matrices",
            "probes",
            "theory",
            "models",
            "layers",
        )
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

import pytorch_lightning as pl  # noqa: E402
from pytorch_lightning.callbacks import ProgressBar  # noqa: E402
from pytorch_lightning.loggers import CSVLogger  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402


def pytest_configure(config):
    for line in (
        # Lightning 2.6 with torch 2.14; nothing here can do anything about it.
        "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
        # Sets in memory need no worker processes.
        "ignore:The '.*_dataloader' does not have many workers which may be a bottleneck",
        # Measurements at steps that no logger logs at are what is tested.
        "ignore:The number of training batches .* is smaller than the logging interval",
        # Dynamo looks at the gradient of inputs that are no leaves, and hides the warning only if it is not an error.
        "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(params=[True, False], ids=["bf16 products", "float32 products"])
def with_and_without_bf16_products(request, monkeypatch):
    """The test is run as on a CPU that multiplies bf16 matrices, and as on one that does not."""
    from masklr.models import float32_products

    monkeypatch.setattr(float32_products, "ONEDNN_HAS_BF16", request.param)


@pytest.fixture(scope="session")
def load_script():
    """A script of `scripts/` as a module, by its name."""

    def load(name):
        loader = SourceFileLoader(name, str(Path(__file__).parents[1] / "scripts" / name))
        module = module_from_spec(spec_from_loader(name, loader))
        sys.modules[name] = module  # dataclasses look their module up
        loader.exec_module(module)
        return module

    return load


class Classifier(pl.LightningModule):
    """A plain LightningModule around any network, as a user has one."""

    def __init__(self, network, lr=0.05):
        super().__init__()
        self.network, self.lr = network, lr

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def small_network():
    """Convolution, batch norm, dropout and a head for 8 x 8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


@pytest.fixture(scope="session")
def make_classifier():
    """Makes a plain LightningModule, around a small network if none is given; same weights for a same seed."""

    def make(network=None, seed=0, **options):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Classifier(small_network() if network is None else network(), **options)

    return make


@pytest.fixture(scope="session")
def make_mae():
    """Makes a masked autoencoder of 8 x 8 images of one channel in 16 patches; same weights for a same seed."""
    from masklr.models import MaskedAutoencoder

    def make(seed=0, encoder_args=None, **options):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            defaults = {
                "image_size": 8,
                "patch_size": 2,
                "in_chans": 1,
                "decoder_dim": 16,
                "decoder_depth": 1,
                "decoder_heads": 2,
                "encoder_args": {"embed_dim": 24, "depth": 2, "num_heads": 2, **(encoder_args or {})},
            }
            if isinstance(options.get("encoder"), nn.Module):
                defaults = {k: v for k, v in defaults.items() if k.startswith("decoder")}
            return MaskedAutoencoder(**{**defaults, **options})

    return make


@pytest.fixture(scope="session")
def make_task(make_mae):
    """Makes a pretraining task of the digits; options of the model go into `model`."""
    from masklr.optim import Optim
    from masklr.tasks import Pretraining

    def make(model=None, optim=None, **options):
        model = model if isinstance(model, nn.Module) else make_mae(**(model or {}))
        return Pretraining(model, optim or Optim(base_lr=4e-3), mean=[0.305], std=[0.376], **options)

    return make


@pytest.fixture(scope="session")
def make_digits():
    """Makes the data module of scikit-learn's digits: 1,294 images for training, 144 for validation."""
    from masklr.data import Digits

    def make(batch_size=32, **options):
        return Digits(batch_size=batch_size, **options)

    return make


@pytest.fixture(scope="session")
def digits(make_digits):
    """(training images, labels, validation images, labels): images as floats in [0, 1]."""
    data = make_digits()
    data.setup("fit")
    parts = []
    for loader in (data.unaugmented_train_dataloader(), data.val_dataloader()):
        images, labels = zip(*((batch[0], batch[1]) for batch in loader), strict=True)
        parts += [torch.cat(images) / 255, torch.cat(labels)]
    return tuple(parts)


@pytest.fixture(scope="session")
def plain_loaders(digits):
    """Makes ordinary loaders of (image, label): one that shuffles for training, one that does not for validation."""

    def make(batch_size=32, num_train=320, val_batch_size=50):
        train = TensorDataset(digits[0][:num_train], digits[1][:num_train])
        return (
            DataLoader(train, batch_size, shuffle=True, drop_last=True),
            DataLoader(TensorDataset(*digits[2:]), val_batch_size),
        )

    return make


@pytest.fixture(scope="session")
def make_trainer():
    """Makes a quiet trainer on the CPU whose files go into a folder."""

    def make(folder, **options):
        callbacks = options.get("callbacks", [])
        defaults = {
            "accelerator": "cpu",
            "default_root_dir": folder,
            "logger": CSVLogger(folder, name="", version=""),
            "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
        }
        return pl.Trainer(**{**defaults, **options})

    return make


@pytest.fixture(scope="session")
def read_metrics():
    """Reads the values of every key in a run's metrics.csv as {step: value}; a second value of a step is an error."""

    def read(folder):
        found = {}
        with (folder / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                for key, value in row.items():
                    if value:
                        assert step not in found.setdefault(key, {}), f"{key} was logged twice at step {step}"
                        found[key][step] = float(value)
        return found

    return read


@pytest.fixture
def compilable(monkeypatch):
    """Leaves out the checks of annotations, which cannot be compiled; forgets what is compiled, before and after."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
