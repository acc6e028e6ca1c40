"""Progress of a run in optimizer steps."""

import contextlib
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

from masklr.callbacks.recording import first_validation_counts


class StepProgress(ProgressBar):
    """One bar for the whole run, by optimizer step: short epochs do not each draw a bar of their own.

    Drawn anew every second on a terminal, and as a line every ten seconds elsewhere. Reading the loss for display
    waits for the device, so nothing is read in between.

    Args:
        every_seconds: Seconds between two drawings; None takes 1 on a terminal and 10 elsewhere.
    """

    def __init__(self, every_seconds: float | None = None) -> None:
        super().__init__()
        self._terminal = sys.stderr.isatty()
        self.every_seconds = every_seconds or (1.0 if self._terminal else 10.0)
        self._enabled = True
        self._began = self._drawn = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Draw nothing (Lightning calls this on all processes but one)."""
        self._enabled = False

    def enable(self) -> None:
        """Draw again."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = self._drawn = time.perf_counter()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw if it is time."""
        if self._due():
            self._draw_training(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last state and leave it standing."""
        if self._enabled:
            self._draw_training(trainer, pl_module)
            if self._terminal:
                print(file=sys.stderr)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw if it is time: a validation can take longer than many steps."""
        if self._due():
            what = "validating the initialization" if trainer.sanity_checking else "validating"
            total = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            if trainer.sanity_checking and not first_validation_counts(trainer):
                what = "checking validation"
            self._draw(f"{what}, batch {batch_idx + 1}/{total[dataloader_idx]}")

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Draw if it is time."""
        if self._due():
            self._draw(f"testing, batch {args[3] + 1}/{sum(trainer.num_test_batches)}")

    def on_predict_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Draw if it is time."""
        if self._due():
            self._draw(f"predicting, batch {args[3] + 1}/{sum(trainer.num_predict_batches)}")

    def _due(self) -> bool:
        return self._enabled and time.perf_counter() - self._drawn >= self.every_seconds

    def _draw_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else None
        if total is None and trainer.max_epochs is not None and trainer.max_epochs > 0:
            batches = trainer.num_training_batches
            if batches != float("inf"):
                # The last step of an epoch may accumulate fewer batches.
                total = -(-int(batches) // trainer.accumulate_grad_batches) * trainer.max_epochs
        shown = {
            name: f"{value:.4g}" if isinstance(value, float) else value
            for name, value in self.get_metrics(trainer, pl_module).items()
            if name != "v_num"
        }
        self._draw(
            tqdm.format_meter(
                trainer.global_step,
                total,
                time.perf_counter() - self._began,
                ncols=100,
                ascii=not self._terminal,
                unit=" steps",
                initial=self._first_step,
                postfix=", ".join(f"{name} {value}" for name, value in shown.items()),
            )
        )

    def _draw(self, text: str) -> None:
        self._drawn = time.perf_counter()
        with contextlib.suppress(OSError):  # nobody reads any more
            print(
                f"\r{text:<100}" if self._terminal else text,
                end="" if self._terminal else "\n",
                file=sys.stderr,
                flush=True,
            )
