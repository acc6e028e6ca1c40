"""Predictions of a data set, in one file."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from masklr.callbacks.recording import written_whole


class PredictionWriter(pl.Callback):
    """Write what `predict_step` returns, a dict of tensors with one row a sample, as safetensors.

    With several processes each writes its own part, `predictions.0-of-2.safetensors`.

    Args:
        path: The file to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts: list[dict[str, Tensor]] = []

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: dict[str, Tensor],
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's rows in host memory."""
        if not isinstance(outputs, dict):
            raise ValueError(f"Expected `predict_step` to return a dict of tensors, got a {type(outputs).__name__}.")
        self._parts.append({name: rows.detach().cpu() for name, rows in outputs.items()})

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, whole or not at all."""
        from safetensors.torch import save_file

        if not self._parts:
            raise ValueError("Expected images to predict; the split is empty.")
        tensors = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        if trainer.world_size > 1:
            part = f".{trainer.global_rank}-of-{trainer.world_size}{self.path.suffix}"
            self.path = self.path.with_suffix(part)
        with written_whole(self.path) as path:
            save_file(tensors, path)
        self._parts.clear()
