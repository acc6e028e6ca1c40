"""All callbacks on anybody's LightningModule: the ten lines of the README, around a timm ResNet."""

import re
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

README = Path(__file__).parents[1] / "README.md"

ATTACHED = """
from masklr.callbacks import GradientSpectrum, InducedPenalty, Probe
from masklr.callbacks import RepresentationSpectrum, UpdateSpectrum, WeightSpectrum

weights = {"module": "backbone", "include": ["layer*.**"]}  # * does not cross a dot, ** does
my_callbacks = [
    WeightSpectrum(**weights),
    GradientSpectrum(**weights),
    UpdateSpectrum(**weights),
    RepresentationSpectrum(module="backbone", layers=["layer*"]),
    Probe(module="backbone", layers=["layer4"], pixels=False),
    InducedPenalty(module="backbone"),
]
trainer = pl.Trainer(max_epochs=10, num_sanity_val_steps=-1, callbacks=my_callbacks)  # -1: the untrained network too
trainer.fit(my_module, my_data)
"""


class MyModule(pl.LightningModule):
    """A module that knows nothing of masklr."""

    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("resnet10t", num_classes=3, drop_path_rate=0.1)

    def forward(self, images):
        return self.backbone(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class MyData(pl.LightningDataModule):
    """Made images of three classes."""

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(24) % 3
        images = torch.randn(24, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1)
        self.images = TensorDataset(images, labels)

    def train_dataloader(self):
        return DataLoader(self.images, 12, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.images, 12)


def keys_after(code, folder, monkeypatch, read_metrics):
    """Keys that a run of this code logs, and the folders of spectra that it leaves."""
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    exec(code, {"pl": pl, "my_module": MyModule(), "my_data": MyData()})
    return set(read_metrics(folder / "run")), folder / "run"


@pytest.fixture
def short(monkeypatch):
    """Two epochs are enough."""
    init = pl.Trainer.__init__

    def shortened(self, **options):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        # Not Lightning's default logger, which depends on what is installed.
        logger = CSVLogger(".", name="run", version="")
        init(self, **{**options, "max_epochs": 2, "accelerator": "cpu", "logger": logger, **quiet})

    monkeypatch.setattr(pl.Trainer, "__init__", shortened)


@pytest.mark.usefixtures("short")
def test_all_callbacks_measure_a_module_of_ones_own(tmp_path, monkeypatch, read_metrics):
    keys, run = keys_after(ATTACHED.replace("layer*.**", "layer[12].**"), tmp_path, monkeypatch, read_metrics)
    assert keys >= {
        "val/loss",
        "weight/layer1.0.conv1/stable_rank",
        "weight/mean/effective_rank_null",
        "gradient/mean/energy_rank_90",
        "update/mean/effective_rank",
        "representation/layer4/effective_rank",
        "representation/layer1/samples",
        "probe/layer4/accuracy",
        "penalty/all/gauss_newton",
        "penalty/all/measured",
    }
    for name in ("weight_spectrum", "gradient_spectrum", "update_spectrum", "representation_spectrum"):
        assert (run / "spectra" / name / "step=00000000.npz").exists(), name
    assert set(np.load(run / "spectra" / "representation_spectrum" / "step=00000004.npz")) == {
        f"layer{i}" for i in (1, 2, 3, 4)
    }


@pytest.mark.usefixtures("short")
def test_example_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch, read_metrics):
    section = README.read_text().partition("## Measure your own LightningModule")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert "trainer.fit(my_module, my_data)" in code
    keys, _ = keys_after(code, tmp_path, monkeypatch, read_metrics)
    named = set(re.findall(r"(\w+Spectrum|Probe|InducedPenalty)\(", code))
    what = {"WeightSpectrum": "weight", "RepresentationSpectrum": "representation", "Probe": "probe"}
    what |= {"GradientSpectrum": "gradient", "UpdateSpectrum": "update", "InducedPenalty": "penalty"}
    assert len(named) >= 3
    assert {what[name] for name in named} <= {key.partition("/")[0] for key in keys}
