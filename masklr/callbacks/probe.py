"""Accuracy of a linear classifier on frozen features."""

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric
from torchmetrics.utilities.distributed import gather_all_tensors

from masklr.callbacks.features import Pool, element, evaluation, features, named_layers
from masklr.callbacks.recording import Recording, first_validation_counts, with_means
from masklr.neighbors import neighbor_classes
from masklr.probes import RidgeClassifier, RidgeMoments, ridge

PIXELS = "pixels"
LABELS = "*labels*"  # no layer's name


class Probe(pl.Callback):
    """Ridge classifier on frozen features at every validation: fitted on the training split, accuracy on validation.

    The fit is in closed form on streamed moments; the penalty is chosen by cross-validation within the training
    split. Logs `probe/{layer}/accuracy` in percent and, once, `probe/pixels/accuracy`, the same classifier on raw
    pixels. With `neighbors`, logs `probe/{layer}/knn_accuracy` too, in percent: nearest neighbors vote, nothing is fit.

    Training images come from the data module's `unaugmented_train_dataloader()` where it has one, else from the set
    behind the training loader.

    Args:
        layers: Patterns of layers below `module`, such as `norm`; none probes what `forward` returns, under the name
            `output`.
        module: Dotted path below which layers are named.
        pool: How tokens or feature maps become features: their `mean`, the `first` token, or all `tokens`.
        max_train_samples: Training images to fit on, evenly spaced over the split (the first ones of a stream); None
            takes all.
        pixels: Whether to probe raw pixels too, at the first validation; they must have at most 4,096 values an image.
        neighbors: How many nearest neighbors vote, 20 being usual; 0 for none. Features of the training images are
            kept in memory for it, in float32, on every process.
        inputs: Where a batch has its images: an index or a key.
        labels: Where a batch has its class indices.

    Raises:
        ValueError: A pattern or path that matches nothing; images too large for `pixels`.
    """

    def __init__(
        self,
        layers: list[str] | None = None,
        module: str = "",
        pool: Pool = "mean",
        max_train_samples: int | None = 20_000,
        pixels: bool = True,
        inputs: int | str = 0,
        labels: int | str = 1,
        neighbors: int = 0,
    ) -> None:
        if neighbors < 0:
            raise ValueError(f"Expected `neighbors` of 0 or more, got {neighbors}.")
        if max_train_samples is not None and max_train_samples < 10:
            raise ValueError(f"Expected `max_train_samples` of at least 10, got {max_train_samples}.")
        if pool == "tokens":
            raise ValueError("Expected `pool` to be 'mean' or 'first', got 'tokens': an image has one label.")
        self.layers, self.module, self.pool = layers or [], module, pool
        self.max_train_samples, self.pixels, self.inputs, self.labels = max_train_samples, pixels, inputs, labels
        self.neighbors = neighbors
        self._pixels_due = pixels

    @property
    def state_key(self) -> str:
        """Differs between two such callbacks in one trainer."""
        return f"{type(self).__name__}({self.module!r}, {self.layers}, {self.pool!r})"

    def state_dict(self) -> dict[str, Any]:
        """Whether raw pixels are still to be probed."""
        return {"pixels_due": self._pixels_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run probes raw pixels once, like any other."""
        self._pixels_due = state_dict["pixels_due"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the layers, so that a wrong pattern ends the run before it begins."""
        named_layers(pl_module, self.module, self.layers)
        self._recording = Recording(trainer, "probe")
        self._pixels_due = self.pixels

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit the classifiers on the training split."""
        self._classifiers: dict[str, RidgeClassifier] = {}
        self._accuracies: dict[tuple[str, str], MeanMetric] = {}
        self._known: dict[str, Tensor] = {}
        if not first_validation_counts(trainer):
            return
        moments: dict[str, RidgeMoments] = {}
        known: dict[str, list[Tensor]] = {}
        with self._recording.measurement(), evaluation(trainer, pl_module):
            for batch, positions in self._train_batches(trainer, pl_module):
                labels = element(batch, self.labels, "labels")
                for name, found in self._features(pl_module, batch).items():
                    if name not in moments:
                        moments[name] = RidgeMoments().to(found.device)
                    moments[name].update(found, labels, positions)
                    if self.neighbors and name != PIXELS:
                        known.setdefault(name, []).append(found.float())
                if self.neighbors:
                    known.setdefault(LABELS, []).append(labels)
            self._classifiers = {name: ridge(moment.compute()) for name, moment in moments.items()}
            self._known = {name: _of_all_processes(trainer, torch.cat(parts)) for name, parts in known.items()}
            measures = [(name, "accuracy") for name in moments]
            measures += [(name, "knn_accuracy") for name in self._known if name != LABELS]
            self._accuracies = {measure: MeanMetric().to(pl_module.device) for measure in measures}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Classify a batch of the first validation loader."""
        if dataloader_idx > 0 or not self._classifiers:
            return
        with self._recording.measurement(), evaluation(trainer, pl_module):
            labels = element(batch, self.labels, "labels")
            for name, found in self._features(pl_module, batch).items():
                classes = {(name, "accuracy"): self._classifiers[name].predict(found)}
                if name in self._known:
                    known, of_known = self._known[name], self._known[LABELS]
                    classes[name, "knn_accuracy"] = neighbor_classes(found, known, of_known, self.neighbors)
                for measure, predicted in classes.items():
                    self._accuracies[measure].update(100.0 * (predicted == labels).float())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the accuracies."""
        if not self._classifiers:
            return
        values: dict[str, dict[str, float]] = {}
        for (name, measure), metric in self._accuracies.items():
            values.setdefault(name, {})[measure] = metric.compute().item()
        keys = {f"probe/{PIXELS}/accuracy": values.pop(PIXELS)["accuracy"]} if PIXELS in values else {}
        self._recording.scalars(trainer.global_step, {**keys, **with_means("probe", values)})
        self._pixels_due = False
        self._known = {}

    def _features(self, pl_module: pl.LightningModule, batch: Any) -> dict[str, Tensor]:
        images = element(batch, self.inputs, "inputs")
        found = features(pl_module, named_layers(pl_module, self.module, self.layers), images, self.pool)
        if self._pixels_due:
            if (size := images[0].numel()) > 4096:
                raise ValueError(
                    f"Expected images of at most 4,096 values for `pixels`, got {size}; set `pixels: false`."
                )
            found[PIXELS] = images.flatten(1).float()
        return found

    def _train_batches(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[tuple[Any, Tensor]]:
        """Batches of the training split on the module's device, with each sample's position among those taken."""
        if (make := getattr(getattr(trainer, "datamodule", None), "unaugmented_train_dataloader", None)) is not None:
            loader = make()
        else:
            # The trainer shows its training loader only once training has begun, after the measurement at step 0.
            loader = trainer.train_dataloader
            if loader is None:
                loader = trainer.fit_loop._data_source.dataloader()
        if not isinstance(loader, DataLoader):
            raise ValueError(f"Expected the training loader to be one DataLoader, got a {type(loader).__name__}.")
        rank, world = trainer.global_rank, trainer.world_size
        stream = isinstance(loader.dataset, IterableDataset)
        taken = 0
        for batch in loader if stream else self._evenly_spaced(loader, rank, world):
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            count = len(element(batch, self.labels, "labels"))
            positions = torch.arange(taken, taken + count, device=pl_module.device) * world + rank
            taken += count
            yield batch, positions
            if stream and self.max_train_samples is not None and taken * world >= self.max_train_samples:
                return

    def _evenly_spaced(self, loader: DataLoader, rank: int, world: int) -> DataLoader:
        """Evenly spaced samples of the set behind a loader: a set sorted by class still shows all classes."""
        size = len(loader.dataset)  # type: ignore[arg-type]
        count = size if self.max_train_samples is None else min(size, self.max_train_samples)
        indices = [i * size // count for i in range(rank, count, world)]
        return DataLoader(
            loader.dataset,
            batch_size=getattr(loader.batch_sampler, "batch_size", None) or 256,
            sampler=indices,
            collate_fn=loader.collate_fn,
            generator=torch.Generator(),  # its own: iterating a loader without one draws from the global generator
        )


def _of_all_processes(trainer: pl.Trainer, samples: Tensor) -> Tensor:
    """The samples of all processes, which may have different numbers of them."""
    return samples if trainer.world_size == 1 else torch.cat(gather_all_tensors(samples))
