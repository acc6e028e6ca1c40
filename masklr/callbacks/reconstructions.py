"""Pictures of what a masked autoencoder predicts."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from masklr.callbacks.features import element, evaluation
from masklr.callbacks.recording import Recording, first_validation_counts


class Reconstructions(pl.Callback):
    """At every validation, a picture: original, visible part and reconstruction of the first validation images.

    Writes `pictures/reconstructions/step=00000100.png` and shows it in the loggers that show pictures. The
    LightningModule must have `reconstruct(images) -> (visible, reconstruction)`, all (B, C, H, W) with values in [0,
    1].

    Args:
        num_images: Images in the picture, at least 1; no more than the first validation batch has.
        inputs: Where a batch has its images: an index or a key.

    Raises:
        ValueError: The module has no `reconstruct`.
    """

    def __init__(self, num_images: int = 8, inputs: int | str = 0) -> None:
        if num_images < 1:
            raise ValueError(f"Expected `num_images` of at least 1, got {num_images}.")
        self.num_images, self.inputs = num_images, inputs

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that there is something to draw."""
        if not callable(getattr(pl_module, "reconstruct", None)):
            raise ValueError(
                f"Expected a LightningModule with `reconstruct(images)`, got a {type(pl_module).__name__}."
            )
        self._recording = Recording(trainer, "reconstructions")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first images of the first batch."""
        if batch_idx > 0 or dataloader_idx > 0 or not first_validation_counts(trainer):
            return
        step = trainer.global_step
        with self._recording.measurement(), evaluation(trainer, pl_module):
            images = element(batch, self.inputs, "inputs")[: self.num_images]
            # On every process, since weights may be sharded.
            visible, reconstruction = pl_module.reconstruct(images)  # type: ignore[operator]
            if trainer.is_global_zero:
                original = images / 255 if images.dtype == torch.uint8 else images
                self._recording.picture(
                    step, figure_of({"original": original, "visible": visible, "reconstruction": reconstruction}, step)
                )
        self._recording.scalars(step, {})


def figure_of(rows: dict[str, Tensor], step: int) -> Any:
    """A figure with one row of images (B, C, H, W) in [0, 1] for each name."""
    from matplotlib.figure import Figure  # not pyplot: no global state and no window

    num_images = len(next(iter(rows.values())))
    figure = Figure(figsize=(0.6 + 1.1 * num_images, 0.35 + 1.15 * len(rows)), dpi=110, layout="constrained")
    figure.suptitle(f"step {step:,}", fontsize=9)
    axes = figure.subplots(len(rows), num_images, squeeze=False)
    for (name, images), line in zip(rows.items(), axes, strict=True):
        for image, ax in zip(images.float().cpu().clamp(0, 1), line, strict=True):
            pixels = image.permute(1, 2, 0).numpy()
            ax.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
            for side in ax.spines.values():
                side.set_color("0.6")
        line[0].set_ylabel(name, fontsize=9)
    return figure
