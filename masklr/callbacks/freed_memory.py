"""What a training run on CPUs does with freed memory."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.accelerators import CPUAccelerator

from masklr.allocator import give_back_freed_memory, keep_freed_memory


class FreedMemory(pl.Callback):
    """Keep what a step on CPUs frees for the next one; after the first, give back once what no step will use.

    See `masklr.allocator`. Nothing happens on other devices, without glibc, or where the user has set it himself.
    """

    def __init__(self) -> None:
        self._kept = False
        self._begun_at = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep freed memory from here on."""
        self._kept = isinstance(trainer.accelerator, CPUAccelerator) and keep_freed_memory()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know the first step, which a run that goes on has read from its checkpoint by now."""
        self._begun_at = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Give back what the first step of the optimizer has left."""
        if self._kept and trainer.global_step > self._begun_at:
            give_back_freed_memory()
            self._kept = False
