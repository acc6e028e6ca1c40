import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from masklr.callbacks import StepTiming, WeightSpectrum


class Clock:
    """Stands still but for those who sleep: what is measured does not depend on how busy the machine is."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Slow(Dataset):
    """Takes its time over each of its samples."""

    def __init__(self, clock, seconds, size=30):
        self.clock, self.seconds, self.size = clock, seconds, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.clock.sleep(self.seconds)
        return torch.ones(2)


class Sleepy(pl.LightningModule):
    """Takes its time over each step and each validation."""

    def __init__(self, clock, step_seconds=0.0, val_seconds=0.0):
        super().__init__()
        self.clock, self.step_seconds, self.val_seconds = clock, step_seconds, val_seconds
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        self.clock.sleep(self.step_seconds)
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_idx):
        self.clock.sleep(self.val_seconds)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def timing(make_trainer, read_metrics, tmp_path, monkeypatch):
    def timing(data_seconds=0.0, step_seconds=0.0, val_seconds=0.0, **options):
        clock = Clock()
        monkeypatch.setattr("masklr.callbacks.step_timing.time", clock)
        module = Sleepy(clock, step_seconds, val_seconds)
        options = {
            "max_steps": 12,
            "log_every_n_steps": 4,
            "limit_val_batches": 0,
            "callbacks": [StepTiming()],
            **options,
        }
        trainer = make_trainer(tmp_path, **options)
        trainer.fit(module, DataLoader(Slow(clock, data_seconds), 1), DataLoader(Slow(clock, 0.0, 1), 1))
        return read_metrics(tmp_path)

    return timing


def test_run_that_waits_for_data_has_a_share_of_one_and_the_rate_of_its_data(timing):
    found = timing(data_seconds=0.02)
    assert list(found["time/data_share"]) == list(found["time/batches_per_second"]) == [4, 8, 12]
    assert found["time/data_share"][8] == pytest.approx(1)
    assert found["time/batches_per_second"][8] == pytest.approx(50)


def test_run_that_computes_has_a_share_of_zero_and_the_rate_of_its_steps(timing):
    found = timing(step_seconds=0.02)
    assert found["time/data_share"][8] == 0
    assert found["time/batches_per_second"][8] == pytest.approx(50)


def test_equal_times_give_half(timing):
    assert timing(data_seconds=0.02, step_seconds=0.02)["time/data_share"][8] == pytest.approx(0.5)


def test_validation_counts_neither_as_data_nor_as_step(timing):
    found = timing(data_seconds=0.01, step_seconds=0.01, val_seconds=0.2, limit_val_batches=1, val_check_interval=2)
    assert found["time/data_share"][8] == pytest.approx(0.5)
    assert found["time/batches_per_second"][8] == pytest.approx(50)


def test_accumulated_batches_are_logged_once_a_step(timing):
    found = timing(accumulate_grad_batches=4, max_steps=4, log_every_n_steps=1, step_seconds=0.01)
    assert list(found["time/data_share"]) == [1, 2, 3, 4]


def test_trainer_with_a_profiler_of_its_own_keeps_it(timing):
    found = timing(profiler="simple", callbacks=[StepTiming(), WeightSpectrum()])
    assert "weight/mean/stable_rank" in found
    assert "time/data_share" not in found


def test_one_callback_in_two_trainers_starts_anew(make_trainer, read_metrics, tmp_path, monkeypatch):
    callback, clock = StepTiming(), Clock()
    monkeypatch.setattr("masklr.callbacks.step_timing.time", clock)
    for name, seconds in (("slow", 0.03), ("fast", 0.0)):
        trainer = make_trainer(
            tmp_path / name, max_steps=5, log_every_n_steps=4, limit_val_batches=0, callbacks=[callback]
        )
        loaders = DataLoader(Slow(clock, seconds), 1), DataLoader(Slow(clock, 0.0, 1), 1)
        trainer.fit(Sleepy(clock, step_seconds=0.01), *loaders)
    # The fifth step of the slow run was never logged; its time is not the second run's.
    assert read_metrics(tmp_path / "slow")["time/data_share"][4] == pytest.approx(0.75)
    assert read_metrics(tmp_path / "fast")["time/data_share"][4] == 0
