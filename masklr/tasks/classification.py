"""Classification with cross-entropy."""

import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

from masklr.layers import LayerFactory, insert
from masklr.optim import Optim
from masklr.tasks.normalization import Normalization
from masklr.tasks.split_metrics import begin_split, log_split


class Classification(pl.LightningModule):
    """Train a classifier of images, from scratch or fine-tuned, with or without masks.

    Batches are `(images, labels, positions)` as masklr's data modules give them, or any tuple that begins with images
    and labels. Images are uint8, or floats in [0, 1]; augmentation and normalization happen here, in batches, on the
    training device. `forward` is the evaluation path: logits (B, classes) of unaugmented images.

    Logged: `train/loss`, with masks, augmentation and label smoothing; `train/accuracy`; and `val/loss` (without any of
        these), `val/accuracy`, over the whole split. Accuracies are shares, in [0, 1].

    Args:
        model: Any module that maps images to logits: a `masklr.models.Classifier`, an `MLP`.
        optim: Optimizer and schedule.
        masks: Masks or low-rank layers to put into the model: factories of `masklr.layers` by patterns of names in
            `model.named_modules()`, such as `backbone.blocks.*.mlp.fc2` (`*` does not cross a dot, `**` does).
        augmentation: Modules applied in order to training batches, random ones drawn inside the step: masklr's batched
            `RandomHorizontalFlip`, `RandomCrop`, `RandomResizedCrop`, or torchvision v2 transforms (one draw a batch).
        mean: Mean of each channel, of images in [0, 1]; one value serves all channels.
        std: Standard deviation of each channel.
        mixing: Mixtures of training images and labels, such as `masklr.data.Mixing`, made after augmentation and
            normalization, inside the step: `mixing(images, labels)` gives images, the labels mixed in, and the share of
            each image's own. The accuracy of a mixture is that of both labels by their shares.
        label_smoothing: Share of the target that goes to all classes alike in training, in [0, 1).
        compile: Whether to compile the model with `torch.compile`.

    Raises:
        ValueError: A value outside its range; a pattern that matches nothing, or a layer that can't be masked; data of
            another number of classes, when training or evaluation begins.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: Optim = Optim(),  # noqa: B008 (frozen)
        masks: dict[str, LayerFactory] | None = None,
        augmentation: list[nn.Module] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        label_smoothing: float = 0.0,
        compile: bool = False,
        mixing: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Expected `label_smoothing` in [0, 1), got {label_smoothing}.")
        self.normalization = Normalization(mean, std, getattr(model, "in_chans", None))
        insert(model, masks or {})
        self.model: Any = model
        self.optim, self.label_smoothing = optim, label_smoothing
        self.augmentation, self.mixing = nn.Sequential(*(augmentation or [])), mixing
        self.metrics: Any = nn.ModuleDict({name: MeanMetric() for name in ("loss", "accuracy")})
        if compile:
            # In place: state_dict keys stay.
            self.model.compile()

    def setup(self, stage: str) -> None:
        """Compare the number of classes with that of the data."""
        of_data = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        own = getattr(self.model, "num_classes", None)
        if None not in (of_data, own) and own != of_data:
            raise ValueError(f"Expected a `model` of as many classes as the data has, {of_data}, got {own}.")
        if getattr(self.model, "frozen", False):
            # Lightning warns of parts in evaluation mode, as one that is frozen is meant to be.
            warnings.filterwarnings("ignore", "Found .* in eval mode at the start of training")

    def prepared(self, images: Tensor) -> Tensor:
        """Normalized float images of a batch as the loader gives it."""
        if hasattr(self.model, "check_size"):
            self.model.check_size(images)  # before a mean of three channels makes three of one
        return self.normalization(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        return self.model(self.prepared(images))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of an augmented batch."""
        images, labels = self.prepared(self.augmentation(batch[0])), batch[1]
        if self.mixing is None:
            logits = self.model(images)
            loss, hits = cross_entropy(logits, labels, label_smoothing=self.label_smoothing), accuracy(logits, labels)
        else:
            images, others, share = self.mixing(images, labels)
            loss, hits = self._of_mixtures(self.model(images), labels, others, share)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", hits)
        return loss

    def _of_mixtures(self, logits: Tensor, labels: Tensor, others: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy, both linear in the target, of targets that are mixtures of two labels."""
        loss, hits = torch.zeros_like(share), torch.zeros_like(share)
        for target, weight in ((labels, share), (others, 1 - share)):
            loss += weight * cross_entropy(logits, target, reduction="none", label_smoothing=self.label_smoothing)
            hits += weight * (logits.argmax(1) == target)
        return loss.mean(), hits.mean()

    def on_validation_epoch_start(self) -> None:
        """Nothing is counted yet."""
        begin_split(self.metrics)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Cross-entropy and accuracy, without label smoothing."""
        labels, logits = batch[1], self(batch[0])
        self.metrics["loss"].update(cross_entropy(logits, labels), weight=len(labels))
        self.metrics["accuracy"].update(accuracy(logits, labels), weight=len(labels))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the mean over the whole split, over all processes."""
        log_split(self, "val", self.metrics)

    def on_test_epoch_end(self) -> None:
        """Log the mean over the whole split, over all processes."""
        log_split(self, "test", self.metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Logits (B, classes), with the labels and positions that the batch has."""
        return {"logits": self(batch[0]), **dict(zip(("labels", "positions"), batch[1:], strict=False))}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer and its schedule."""
        return self.optim.configure(self, self.trainer)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of samples whose largest logit is that of their label.

    Example:
        >>> import torch
        >>> accuracy(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1]))
        tensor(0.5000)
    """
    return (logits.argmax(1) == labels).float().mean()
