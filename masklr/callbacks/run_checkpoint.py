"""When a run writes its checkpoints, and which of them it keeps."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.environments import LightningEnvironment

from masklr.callbacks.recording import check_still_there, run_folder
from masklr.checkpoints import link, sweep

log = logging.getLogger(__name__)

# Of several processes, each asks the others only so often: asking waits for all of them.
_BATCHES_BETWEEN_AGREEMENTS = 16


class RunCheckpoint(Checkpoint):
    """Write checkpoints from which the run goes on as if nothing had happened, and keep the last few and the best.

    `checkpoints/step=00000100.ckpt`; `last.ckpt` and `best.ckpt` are further names of two of these files. One is
    written after every validation, at the cadence, and at the end, but only where Lightning resumes exactly: not while
    gradients accumulate, not between a batch and the validation that follows it, and not between the last batch of an
    epoch and the next epoch (but for epochs of one step, of which Lightning then counts one too few). The last one is
    written once training has ended and everything is measured, so that a run killed before that measures its end again.

    Ctrl-C (SIGINT), SIGTERM, and SIGUSR1, which SLURM sends ahead of a time limit or a pre-emption
    (`#SBATCH --signal=USR1@300`), have a checkpoint written at the next such place, at step 1 if training has yet to
    begin, and then end the process with exit code 128 + signal; after SIGUSR1 in a SLURM job, the job is put back into
    the queue. A second one of its kind, or Ctrl-C after any, ends the process at once.

    Args:
        every_n_steps: Optimizer steps between checkpoints, besides those after validations; None for none.
        every_minutes: Minutes between checkpoints, besides those; None for none.
        keep_last: How many of the latest are kept, at least 1; with 2, one is left if the other is damaged.
        best: Key of the metric by which `best.ckpt` is chosen, at validations that logged it; None for no best one.
        best_mode: Whether the least or the greatest value is the best.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_minutes: float | None = 10.0,
        keep_last: int = 2,
        best: str | None = "val/loss",
        best_mode: Literal["min", "max"] = "min",
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"Expected `every_n_steps` of at least 1, got {every_n_steps}.")
        if every_minutes is not None and not every_minutes > 0:
            raise ValueError(f"Expected `every_minutes` above 0, got {every_minutes}.")
        if keep_last < 1:
            raise ValueError(f"Expected `keep_last` of at least 1, got {keep_last}.")
        if best_mode not in ("min", "max"):
            raise ValueError(f"Expected `best_mode` min or max, got {best_mode!r}.")
        self.every_n_steps, self.every_minutes, self.keep_last = every_n_steps, every_minutes, keep_last
        self.best, self.best_mode = best, best_mode
        self._best: tuple[int, float] | None = None  # step and value
        self._due = False
        self._signal: int | None = None
        self._listens_in: int | None = None  # process
        self._has_written = False
        self._last_step = -1
        self._last_time = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Which one is the best."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up which one was the best."""
        self._best = state_dict["best"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder."""
        self.folder = run_folder(trainer) / "checkpoints"
        self._signal = self._listens_in = None

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for signals, in the first hook after Lightning has set handlers of its own."""
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count."""
        self._listen(trainer)
        self._last_step, self._last_time = trainer.global_step, time.monotonic()
        self._due = False
        self.on_fit_end(trainer, pl_module)

    def _listen(self, trainer: pl.Trainer) -> None:
        if self._listens_in is not None:
            return
        self._listens_in = os.getpid()
        self._tells = trainer.is_global_zero
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                continue  # a shell's job in the background, which Ctrl-C does not mean
            try:
                # Lightning's own handlers end the run wherever it is; it puts the former ones back afterwards.
                signal.signal(number, self._on_signal)
            except ValueError:  # not in the main thread
                return

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the checkpoint of this step its names, which a run that was killed may not have done."""
        path = self.folder / f"step={trainer.global_step:08d}.ckpt"
        if trainer.is_global_zero and path.exists():
            sweep(self.folder)
            self._name(path, trainer.global_step)
            self._prune()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Write one if it is due and the run can be resumed here."""
        loop = trainer.fit_loop.epoch_loop
        self._due = self._is_due(trainer)
        fetcher: Any = trainer.fit_loop._data_fetcher
        if self._due and is_resumable(trainer) and not loop._should_check_val_fx(fetcher):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write one, if this was a validation of training."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self._compare(trainer)
        if is_resumable(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the last one."""
        self._signal = None  # nothing is left to be done
        self._save(trainer)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        steps = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        due = self._due or (steps and trainer.global_step != self._last_step)
        if trainer.world_size > 1 and trainer.fit_loop.total_batch_idx % _BATCHES_BETWEEN_AGREEMENTS:
            return due
        minutes = (time.monotonic() - self._last_time) / 60
        timely = self._signal is not None or (self.every_minutes is not None and minutes >= self.every_minutes)
        return bool(due or trainer.strategy.reduce_boolean_decision(timely, all=False))

    def _save(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint, remove those that are no longer kept, and end the process if it was told to."""
        step = trainer.global_step
        if step != self._last_step:
            path = self.folder / f"step={step:08d}.ckpt"
            if self._has_written:  # the first one makes the folder
                check_still_there(self.folder.parent)
            trainer.save_checkpoint(path, weights_only=False)
            self._has_written = True
            if trainer.is_global_zero:
                self._name(path, step)
                self._prune()
            self._last_step = step
        self._due, self._last_time = False, time.monotonic()
        if trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            self._stop(trainer)

    def _compare(self, trainer: pl.Trainer) -> None:
        """See whether the validation that just ended was the best so far."""
        if self.best is None or self.best not in trainer.callback_metrics:
            return
        value, sign = float(trainer.callback_metrics[self.best]), 1 if self.best_mode == "min" else -1
        if value == value and (self._best is None or sign * value < sign * self._best[1]):
            self._best = (trainer.global_step, value)

    def _name(self, path: Path, step: int) -> None:
        """Give a checkpoint its further names."""
        link(path, self.folder / "last.ckpt")
        if self._best is not None and self._best[0] == step:
            link(path, self.folder / "best.ckpt")

    def _prune(self) -> None:
        own = [path for path in self.folder.glob("step=*.ckpt") if re.fullmatch(r"step=\d+\.ckpt", path.name)]
        for path in sorted(own, reverse=True)[self.keep_last :]:
            path.unlink(missing_ok=True)  # `best.ckpt` is a name of its own

    def _on_signal(self, number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if number == signal.SIGINT or signal.getsignal(signal.SIGINT) == self._on_signal:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.getpid() != self._listens_in:  # a worker of the data, which the terminal's Ctrl-C reaches too
            return
        if self._signal is None:  # SLURM's limit sends SIGTERM after SIGUSR1, and the job is still to be requeued
            self._signal = number
        if number == signal.SIGINT and self._tells:
            with contextlib.suppress(OSError):  # a reader that Ctrl-C has ended; not `print`, which it may interrupt
                os.write(2, b"\nmasklr: Ctrl-C: ends after the next checkpoint; once more: at once\n")

    def _stop(self, trainer: pl.Trainer) -> None:
        number = self._signal or signal.SIGTERM
        if trainer.is_global_zero:
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):
                told = f"masklr: {name} at step {trainer.global_step}; to go on: masklr fit --resume"
                print(f"{told} {self.folder.parent}", flush=True)
            if number == signal.SIGUSR1:
                requeue()
        # Lightning kills the run as soon as one of the processes that it started itself ends with another code than 0.
        launched = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
        raise SystemExit(0 if launched and not trainer.is_global_zero else 128 + number)


def is_resumable(trainer: pl.Trainer) -> bool:
    """Whether Lightning goes on exactly from a checkpoint that is written now, in a hook of a batch or validation.

    Not while gradients accumulate, whose sum no checkpoint holds. Not at the end of an epoch: Lightning would leave out
    what it does between epochs. Nor at the end of training, where callbacks have yet to measure: a run resumed there
    would find nothing left to do.
    """
    loop = trainer.fit_loop.epoch_loop
    epoch_ends = loop._num_ready_batches_reached()
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    last_step = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    if loop._should_accumulate() or trainer.should_stop or last_step or (last_epoch and epoch_ends):
        return False
    # A validation at the end of an epoch is a place of its own.
    return trainer.validating or not epoch_ends or trainer.num_training_batches <= trainer.accumulate_grad_batches


def requeue() -> None:
    """Put the SLURM job that this process belongs to back into the queue, if it belongs to one."""
    if (job := os.environ.get("SLURM_JOB_ID")) is None:
        return
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("Cannot put job %s back into the queue: %s", job, error)
