"""Pretraining of a masked autoencoder."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from masklr.layers import LayerFactory, insert
from masklr.masks import fixed_patch_split
from masklr.optim import Optim
from masklr.tasks.normalization import Normalization
from masklr.tasks.split_metrics import begin_split, log_split
from masklr.uniformity import of_all_processes, uniformity


class Pretraining(pl.LightningModule):
    """Train a masked autoencoder; `val/loss` is measured on held-out images with masks that never change.

    Batches are `(images, labels, positions)` as masklr's data modules give them, or any tuple that begins with
    images. Images are uint8, or floats in [0, 1]; augmentation and normalization happen here, in batches, on the
    training device. `forward` is the evaluation path: encoder tokens (B, P + N, D) of whole, unmasked images.

    Validation predicts all masked patches, whatever the model's `prediction_ratio`; where its `mask_ratio` is an
    interval, it masks by the middle.

    Logged: `train/loss`, what is minimized, and `train/uniformity` where it has a weight; `val/loss`, of pixels alone,
        and beside it `val/loss_of_patch_means`, the loss of predicting each patch's own mean.

    Args:
        model: A `masklr.models.MaskedAutoencoder`.
        optim: Optimizer and schedule.
        masks: Masks or low-rank layers to put into the model: factories of `masklr.layers` by patterns of names in
            `model.named_modules()`, such as `encoder.blocks.*.mlp.fc2` (`*` does not cross a dot, `**` does).
        augmentation: Modules applied in order to training batches, random ones drawn inside the step: masklr's batched
            `RandomHorizontalFlip`, `RandomCrop`, `RandomResizedCrop`, or torchvision v2 transforms (one draw a batch).
        mean: Mean of each channel, of images in [0, 1]; one value serves all channels.
        std: Standard deviation of each channel.
        uniformity_weight: Weight, 0 or more, of a loss term against dimensional collapse of the features (the mean over
            visible patch tokens), as in U-MAE, whose authors take 0.01: see `masklr.uniformity`.
        mask_seed: Seed of the fixed validation masks, which depend on it and on the sample's position in its split
            alone.
        compile: Whether to compile the model with `torch.compile`.

    Raises:
        ValueError: A standard deviation that is not positive; channel counts that differ; a negative weight; a pattern
            of `masks` that matches nothing, or a layer that can't be masked.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: Optim = Optim(),  # noqa: B008 (frozen)
        masks: dict[str, LayerFactory] | None = None,
        augmentation: list[nn.Module] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        mask_seed: int = 0,
        compile: bool = False,
        uniformity_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if not uniformity_weight >= 0:
            raise ValueError(f"Expected `uniformity_weight` of 0 or more, got {uniformity_weight}.")
        self.normalization = Normalization(mean, std, model.in_chans)  # type: ignore[arg-type]
        insert(model, masks or {})
        self.model: Any = model
        self.optim = optim
        self.augmentation = nn.Sequential(*(augmentation or []))
        self.mask_seed, self.uniformity_weight = mask_seed, uniformity_weight
        self.val_mask_ratio: Any = model.middle_mask_ratio  # stays when a schedule moves that of training
        self.losses: Any = nn.ModuleDict({name: MeanMetric() for name in ("loss", "loss_of_patch_means")})
        self._seen = 0
        if compile:
            # In place: state_dict keys stay, and `forward` below, the evaluation path, stays uncompiled.
            self.model.compile()

    def prepared(self, images: Tensor) -> Tensor:
        """Normalized float images of a batch as the loader gives it."""
        self.model.check_size(images)  # before a mean of three channels makes three of one
        return self.normalization(images)

    def forward(self, images: Tensor) -> Tensor:
        """Encoder tokens (B, P + N, D) of unmasked images (B, C, H, W)."""
        return self.model.encode(self.prepared(images))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss over masked patches, with new masks each step."""
        images = self.prepared(self.augmentation(batch[0]))
        # Drawn here, not inside the model: a generator would break a compiled graph.
        output = self.model(images, self.model.draw_split(len(images), device=images.device))
        loss = output.loss
        if self.uniformity_weight:
            spread = uniformity(of_all_processes(self.features(output.latent)))
            self.log("train/uniformity", spread)
            loss = loss + self.uniformity_weight * spread
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def features(self, tokens: Tensor) -> Tensor:
        """Features (B, D) of encoder tokens (B, P + N, D): the mean over patch tokens, in float32."""
        return tokens[:, self.model.encoder.num_prefix_tokens :].float().mean(1)

    def on_validation_epoch_start(self) -> None:
        """Count positions from the start of the split."""
        begin_split(self.losses)
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
        log_split(self, "val", self.losses)

    def on_test_epoch_end(self) -> None:
        """Log the mean over the whole split, over all processes."""
        log_split(self, "test", self.losses)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Features (B, D), the mean over patch tokens, with the labels and positions that the batch has."""
        return {
            "features": self.features(self(batch[0])),
            **dict(zip(("labels", "positions"), batch[1:], strict=False)),
        }

    def reconstruct(self, images: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images with masked patches hidden, and with masked patches predicted, both (B, C, H, W) in [0, 1].

        Args:
            images: As the loader gives them.
            positions: Positions of the samples in their split, which decide the masks; counted from 0 if None.
        """
        if positions is None:
            positions = torch.arange(len(images), device=images.device)
        hidden, reconstruction = self.model.reconstruct(self.prepared(images), self.fixed_split(positions))
        return self.normalization.inverse(hidden), self.normalization.inverse(reconstruction)

    def fixed_split(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Visible and masked patches of the samples at these positions; the same whenever they are asked for."""
        return fixed_patch_split(
            positions, self.model.grid, self.val_mask_ratio, seed=self.mask_seed, strategy=self.model.strategy
        )

    def positions(self, batch: Any) -> Tensor:
        """Positions of a batch's samples in their split: its third element, or counted where a loader gives none."""
        if len(batch) > 2:
            return batch[2]
        # Lightning's samplers deal samples to processes in turn.
        count = torch.arange(self._seen, self._seen + len(batch[0]), device=batch[0].device)
        self._seen += len(batch[0])
        return count * self.trainer.world_size + self.trainer.global_rank

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer and its schedule."""
        return self.optim.configure(self, self.trainer)
