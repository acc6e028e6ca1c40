"""Pretraining of a masked autoencoder."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from masklr.masks import fixed_patch_split, patch_split
from masklr.optim import Optim


class Pretraining(pl.LightningModule):
    """Train a masked autoencoder; `val/loss` is measured on held-out images with masks that never change.

    Batches are `(images, labels, positions)` as masklr's data modules give them, or any tuple that begins with
    images. Images are uint8, or floats in [0, 1]; augmentation and normalization happen here, in batches, on the
    training device. `forward` is the evaluation path: encoder tokens (B, P + N, D) of whole, unmasked images.

    Logged: `train/loss`; `val/loss`, and beside it `val/loss_of_patch_means`, the loss of predicting each patch's own
        mean.

    Args:
        model: A `masklr.models.MaskedAutoencoder`.
        optim: Optimizer and schedule.
        augmentation: Modules applied in order to training batches, random ones drawn inside the step: masklr's batched
            `RandomHorizontalFlip`, `RandomCrop`, `RandomResizedCrop`, or torchvision v2 transforms (one draw a batch).
        mean: Mean of each channel, of images in [0, 1]; one value serves all channels.
        std: Standard deviation of each channel.
        mask_seed: Seed of the fixed validation masks, which depend on it and on the sample's position in its split
            alone.
        compile: Whether to compile the model with `torch.compile`.

    Raises:
        ValueError: A standard deviation that is not positive; channel counts that differ.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        optim: Optim = Optim(),  # noqa: B008 (frozen)
        augmentation: list[nn.Module] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        mask_seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        mean, std = mean or [0.5], std or [0.5]
        self.model: Any = model
        if min(std) <= 0:
            raise ValueError(f"Expected `std` above 0, got {std}.")
        in_chans: Any = model.in_chans
        allowed = " or ".join(str(count) for count in sorted({1, in_chans}))
        for argument, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, in_chans):
                raise ValueError(f"Expected `{argument}` of {allowed} values (channels), got {values}.")
        self.optim = optim
        self.augmentation = nn.Sequential(*(augmentation or []))
        self.mask_seed = mask_seed
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.losses: Any = nn.ModuleDict({name: MeanMetric() for name in ("loss", "loss_of_patch_means")})
        self._seen = 0
        if compile:
            # In place: state_dict keys stay, and `forward` below, the evaluation path, stays uncompiled.
            self.model.compile()

    def prepared(self, images: Tensor) -> Tensor:
        """Normalized float images of a batch as the loader gives it."""
        self.model.check_size(images)  # before a mean of three channels makes three of one
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        return (images / scale - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Encoder tokens (B, P + N, D) of unmasked images (B, C, H, W)."""
        return self.model.encode(self.prepared(images))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss over masked patches, with new masks each step."""
        images = self.prepared(self.augmentation(batch[0]))
        # Drawn here, not inside the model: a generator would break a compiled graph.
        split = patch_split(
            len(images), self.model.grid, self.model.mask_ratio, strategy=self.model.strategy, device=images.device
        )
        loss = self.model(images, split).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Count positions from the start of the split."""
        self._seen = 0

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The loss with the masks that belong to these samples."""
        images = self.prepared(batch[0])
        split = self.fixed_split(self.positions(batch))
        self.losses["loss"].update(self.model(images, split).loss, weight=len(images))
        target = self.model.target(images, split[1])
        self.losses["loss_of_patch_means"].update(target.var(-1, correction=0).mean(), weight=len(images))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the mean over the whole split, over all processes."""
        self._log_losses("val")

    def on_test_epoch_end(self) -> None:
        """Log the mean over the whole split, over all processes."""
        self._log_losses("test")

    def _log_losses(self, split: str) -> None:
        metrics = {f"{split}/{name}": metric for name, metric in self.losses.items()}
        if not self.trainer.sanity_checking:
            # Lightning's own count is one short here: it stands at the index of the last batch.
            self.log_dict({**metrics, "step": float(self.trainer.global_step)})
            return
        values = {key: metric.compute().item() for key, metric in metrics.items()}
        for metric in self.losses.values():
            metric.reset()
        # A sanity check of the whole split is the measurement at step 0, which Lightning computes and then discards.
        if self.trainer.num_sanity_val_steps == float("inf"):
            for logger in self.loggers:
                logger.log_metrics(values, step=0)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Features (B, D), the mean over patch tokens, with the labels and positions that the batch has."""
        tokens = self(batch[0])
        features = tokens[:, self.model.encoder.num_prefix_tokens :].float().mean(1)
        return {"features": features, **dict(zip(("labels", "positions"), batch[1:], strict=False))}

    def reconstruct(self, images: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images with masked patches hidden, and with masked patches predicted, both (B, C, H, W) in [0, 1].

        Args:
            images: As the loader gives them.
            positions: Positions of the samples in their split, which decide the masks; counted from 0 if None.
        """
        if positions is None:
            positions = torch.arange(len(images), device=images.device)
        hidden, reconstruction = self.model.reconstruct(self.prepared(images), self.fixed_split(positions))
        hidden, reconstruction = ((picture * self.std + self.mean).clamp(0, 1) for picture in (hidden, reconstruction))
        return hidden, reconstruction

    def fixed_split(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Visible and masked patches of the samples at these positions; the same whenever they are asked for."""
        model = self.model
        return fixed_patch_split(positions, model.grid, model.mask_ratio, seed=self.mask_seed, strategy=model.strategy)

    def positions(self, batch: Any) -> Tensor:
        """Positions of a batch's samples in their split: its third element, or counted where a loader gives none."""
        if len(batch) > 2:
            return batch[2]
        # Lightning's samplers deal samples to processes in turn.
        count = torch.arange(self._seen, self._seen + len(batch[0]), device=batch[0].device)
        self._seen += len(batch[0])
        return count * self.trainer.world_size + self.trainer.global_rank

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW and its schedule."""
        return self.optim.configure(self, self.trainer)
