import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from masklr.callbacks import FreedMemory, freed_memory


class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(freed_memory, "keep_freed_memory", lambda: found.append("keep") or True)
    monkeypatch.setattr(freed_memory, "give_back_freed_memory", lambda: found.append("give back") or True)
    return found


class Batches(pl.Callback):
    def __init__(self, calls):
        self.calls = calls

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.calls.append(batch_idx)


def fit(calls, tmp_path, ckpt_path=None, max_epochs=1, **options):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[Batches(calls), FreedMemory()],
        max_epochs=max_epochs,
        **options,
    )
    trainer.fit(Line(), DataLoader(torch.ones(8, 2), batch_size=2), ckpt_path=ckpt_path)
    return trainer


def test_memory_is_kept_and_given_back_once_after_the_first_step(calls, tmp_path):
    fit(calls, tmp_path)
    assert calls == ["keep", 0, "give back", 1, 2, 3]


def test_the_first_step_is_the_optimizers(calls, tmp_path):
    fit(calls, tmp_path, accumulate_grad_batches=2)
    assert calls == ["keep", 0, 1, "give back", 2, 3]


def test_nothing_is_given_back_where_nothing_is_kept(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(freed_memory, "keep_freed_memory", lambda: False)
    fit(calls, tmp_path)
    assert calls == [0, 1, 2, 3]


def test_a_run_that_goes_on_waits_for_its_own_first_step(calls, tmp_path):
    path = str(tmp_path / "last.ckpt")
    fit(calls, tmp_path, accumulate_grad_batches=2).save_checkpoint(path)
    calls.clear()
    fit(calls, tmp_path, accumulate_grad_batches=2, ckpt_path=path, max_epochs=2)
    assert calls == ["keep", 0, 1, "give back", 2, 3]
