"""Accuracy on the test split, once, when all is decided."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import pytorch_lightning as pl
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

from masklr.callbacks.features import averages_weights, element, evaluation
from masklr.callbacks.recording import Recording


class FinalTest(pl.Callback):
    """Measure a classifier on the test split after the last step of training, and never before.

    The weights are those of the last step, or their running average where Lightning's `WeightAveraging` (or
    `EMAWeightAveraging`) is a callback too: no checkpoint is chosen by what is measured. Logs `test/accuracy`, a share
    in [0, 1], and `test/loss`, the cross-entropy, of what `forward` returns for the images of the data module's
    `test_dataloader()`; of all, unless the trainer's `limit_test_batches` says less. The split is opened, and decoded
    if it lives in memory, before training, so that one that is missing is found then.

    Args:
        inputs: Where a batch has its images: an index or a key.
        labels: Where a batch has its class indices.

    Raises:
        ValueError: There is no data module with one test loader, or weights are averaged by a callback after this one
            (the command line sees to the order); found before training begins.
    """

    def __init__(self, inputs: int | str = 0, labels: int | str = 1) -> None:
        self.inputs, self.labels = inputs, labels

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See that there is something to test on, before training begins."""
        if stage == "fit":
            callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
            for callback in filter(averages_weights, callbacks[callbacks.index(self) :]):
                # It puts the average in place when training ends, which is then measured already.
                raise ValueError(f"Expected `{type(callback).__name__}` before `FinalTest` among the callbacks.")
            self._recording = Recording(trainer, "final_test")
            loader = self._test_dataloader(trainer)()
            if isinstance(loader, Sequence | Mapping):
                raise ValueError(f"Expected a data module with one test loader, got {len(loader)}.")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the split and log it at the last step."""
        loss, accuracy = MeanMetric().to(pl_module.device), MeanMetric().to(pl_module.device)
        with self._recording.measurement(), evaluation(trainer, pl_module):
            loader, limit = self._test_dataloader(trainer)(), trainer.limit_test_batches
            share = limit * len(loader) if isinstance(limit, float) and limit < 1 else None
            count = share if isinstance(limit, float) else limit
            for batch in islice(loader, None if count is None else int(count)):
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                labels = element(batch, self.labels, "labels")
                logits = pl_module(element(batch, self.inputs, "inputs")).float()
                loss.update(cross_entropy(logits, labels), weight=len(labels))
                accuracy.update((logits.argmax(1) == labels).float())
            found = {"test/loss": loss.compute().item(), "test/accuracy": accuracy.compute().item()}
        self._recording.scalars(trainer.global_step, found)

    def _test_dataloader(self, trainer: pl.Trainer) -> Any:
        """What makes the test loader."""
        data = getattr(trainer, "datamodule", None)
        if data is None or type(data).test_dataloader is pl.LightningDataModule.test_dataloader:
            raise ValueError(f"Expected a data module with a test split, got {type(data).__name__}.")
        return data.test_dataloader
