"""Where the time of a run goes."""

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.profilers import PassThroughProfiler, Profiler


class StepTiming(pl.Callback):
    """Log how fast training goes and how much of it is waiting for data.

    Logs with the trainer's `log_every_n_steps`: `time/data_share`, the share of the training loop's time (validation
    and measurements left out) spent waiting for the next batch; `time/batches_per_second`, of one process. Nothing is
    logged if the trainer has a profiler of its own, which shows the same.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen where Lightning tells its profiler that it fetches a batch."""
        attributes: Any = trainer  # Lightning sets its profiler without declaring it
        if type(attributes.profiler) is PassThroughProfiler:
            attributes.profiler = _FetchClock()
        self._clock = attributes.profiler if isinstance(attributes.profiler, _FetchClock) else None
        self._every_n_steps: int = attributes.log_every_n_steps
        self._restart()

    def _restart(self) -> None:
        self._batches, self._step_seconds, self._fetch_seconds = 0, 0.0, 0.0
        self._batch_began: float | None = None
        self._step_before = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, idx: int) -> None:
        """A step begins once its batch is there."""
        if self._clock is not None:
            self._fetch_seconds += self._clock.take()
            self._batch_began, self._step_before = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Sum up, and log at the trainer's cadence."""
        if self._clock is None or self._batch_began is None:
            return
        self._step_seconds += time.perf_counter() - self._batch_began
        self._batches += 1
        # The step stands still while gradients accumulate.
        stood_still = trainer.global_step == self._step_before
        if stood_still or trainer.global_step % self._every_n_steps or self._batches < 2:
            return
        seconds = self._step_seconds + self._fetch_seconds
        values = {"time/data_share": self._fetch_seconds / seconds, "time/batches_per_second": self._batches / seconds}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._restart()


class _FetchClock(Profiler):
    """A profiler that only adds up the time of fetching training batches."""

    def __init__(self) -> None:
        super().__init__()
        self._began = 0.0
        self._seconds = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._began = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
