"""Spectra of representations on held-out images."""

import warnings
from collections.abc import Sequence, Sized
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from masklr.callbacks.features import (
    OUTPUT,
    Pool,
    Weights,
    element,
    evaluation,
    features,
    named_layers,
    weight_averaging,
    weights_in_place,
)
from masklr.callbacks.layer_features import UNCENTERED, LayerFeatures
from masklr.callbacks.recording import Recording, first_validation_counts, with_means
from masklr.callbacks.views import augmentation_of, augmented_views, evenly_spaced, positions
from masklr.spectra import check_measures


class RepresentationSpectrum(pl.Callback):
    """Measure the singular values of features over the whole validation split, at every validation.

    Logs, for each layer,

    * `representation/{layer}/{measure}`, and the means over layers under `representation/mean/`. Features are centered;
      `{measure}_uncentered` is of features as they are, and so is `rankme`, by its definition;
    * `representation/{layer}/effective_rank_null`: of Gaussian features of that count and width;
    * `representation/{layer}/samples`: how many features were measured. Where there are fewer of them than dimensions,
      no rank exceeds their number less one;
    * `.../{measure}_values` beside `alpha_req`, `hill_alpha` and `numerical_rank`: the number of singular values above
      1e-6 of the first, the only ones that these use. A spectrum without a power law (one direction) has no exponent;
    * `.../samples_repeated`, if samplers other than masklr's repeated some to give each process equally many, and
      `.../samples_skipped`, if some were not finite;
    * `.../lidar` on request, and `.../lidar_images`: LiDAR is at most their number less one, and needs more views in
      all than that number and the dimensions together.

    Of averaged weights all keys end in `_ema`. Writes `spectra/representation_spectrum/step=00000100.npz`
    (`representation_spectrum_ema`; a second callback in one trainer, for other layers, writes `..._2` and logs means
    under `representation/mean_2/`). Second moments are summed in float64 over all processes: memory does not grow with
    the number of images. With `num_sanity_val_steps: -1` the initialization is measured too, as step 0.

    Args:
        layers: Patterns of layers below `module`, such as `blocks.*` (`*` does not cross a dot, `**` does); none
            measures what `forward` returns, under the name `output`.
        module: Dotted path below which layers are named.
        pool: How tokens or feature maps become features: their `mean`, the `first` token, or all `tokens` as samples.
        measures: Names of functions in `masklr.spectra`, or these with the ending `_uncentered`.
        inputs: Where a batch has its images: an index or a key.
        weights: `current`, the weights that are trained, or `ema`, their running average, which Lightning's callback
            `EMAWeightAveraging` (or `WeightAveraging`) must keep. The latter puts the average in place for the whole
            validation: `val/loss` is of it, whatever is chosen here.
        lidar_views: Views of each image for LiDAR, at least 2; 0 leaves LiDAR out. The paper takes some 50; each is one
            more forward pass. A view is a function of its position in the split and its number alone.
        lidar_images: Images for LiDAR, at least 2, evenly spaced over the split (the first ones of a stream).
        augmentation: Modules applied in order to an image, to draw a view; those of the LightningModule's own
            `augmentation` if None.
        on_nonfinite: What to do when features are NaN or infinite: `raise`, at the end of the validation and on all
            processes, or `skip`: leave these samples out of their layer, and count them.

    Raises:
        ValueError: A pattern or path that matches nothing, an unknown measure, one view, no augmentation to draw views
            with, no average of weights; during validation, features that are not finite.
    """

    def __init__(
        self,
        layers: list[str] | None = None,
        module: str = "",
        pool: Pool = "mean",
        measures: Sequence[str] = ("stable_rank", "effective_rank", "frobenius_norm"),
        inputs: int | str = 0,
        weights: Weights = "current",
        lidar_views: int = 0,
        lidar_images: int = 1000,
        augmentation: list[nn.Module] | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        check_measures(name.removesuffix(UNCENTERED) for name in measures)
        if lidar_views < 0 or lidar_views == 1:
            raise ValueError(
                f"Expected `lidar_views` of 0 or at least 2, got {lidar_views}: one view of an image has no scatter."
            )
        if lidar_images < 2:
            raise ValueError(f"Expected `lidar_images` of at least 2, got {lidar_images}.")
        if lidar_views and pool == "tokens":
            raise ValueError("Expected `pool` to be 'mean' or 'first' for `lidar_views`, got 'tokens'.")
        self.layers, self.module, self.pool, self.inputs = layers or [], module, pool, inputs
        self.measures, self.weights, self.on_nonfinite = tuple(measures), weights, on_nonfinite
        self.lidar_views, self.lidar_images, self.augmentation = lidar_views, lidar_images, augmentation
        self._found: dict[str, LayerFeatures] = {}

    @property
    def state_key(self) -> str:
        """Differs between two such callbacks in one trainer."""
        return f"{type(self).__name__}({self.module!r}, {self.layers}, {self.pool!r}, {self.weights!r})"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find what is needed, so that a mistake ends the run before it begins."""
        self._layers(pl_module)
        if self.lidar_views:
            augmentation_of(pl_module, self.augmentation)
        if self.weights == "ema" and weight_averaging(trainer) is None:
            raise ValueError(
                "Expected a callback `EMAWeightAveraging` in the trainer for `weights` 'ema', which keeps the average."
            )
        self._number = self._number_in(trainer, pl_module)
        name = "representation_spectrum_ema" if self.weights == "ema" else "representation_spectrum"
        self._recording = Recording(trainer, name + self._number)

    def _number_in(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """Ending of names that tells several such callbacks in one trainer apart; of the first, none."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        alike = [c for c in callbacks if isinstance(c, RepresentationSpectrum) and c.weights == self.weights]
        before = alike[: next(i for i, callback in enumerate(alike) if callback is self)]
        mine = set(self._layers(pl_module)) or {OUTPUT}
        for other in before:
            if same := mine & (set(other._layers(pl_module)) or {OUTPUT}):
                raise ValueError(
                    f"Expected `layers` that no other RepresentationSpectrum measures, got {min(same)!r} in two."
                )
        return f"_{len(before) + 1}" if before else ""

    def _layers(self, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
        return named_layers(pl_module, self.module, self.layers)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the features of the last validation."""
        # For all layers now: a process without a batch must still take part in the sums.
        names = (list(self._layers(pl_module)) or [OUTPUT]) if first_validation_counts(trainer) else []
        self._found = {name: LayerFeatures(pl_module.device) for name in names}
        self._num_images = 0

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the features of a batch of the first validation loader."""
        if dataloader_idx > 0 or not self._found:
            return
        images = element(batch, self.inputs, "inputs")
        with (
            self._recording.measurement(),
            evaluation(trainer, pl_module),
            weights_in_place(trainer, pl_module, self.weights),
        ):
            for name, found in self._features(pl_module, images).items():
                self._found[name].add(found)
            if self.lidar_views:
                self._add_views(trainer, pl_module, images)
        self._num_images += len(images)

    def _features(self, pl_module: pl.LightningModule, images: Tensor) -> dict[str, Tensor]:
        return features(pl_module, self._layers(pl_module), images, self.pool)

    def _add_views(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor) -> None:
        places = positions(self._num_images, len(images), trainer)
        chosen = evenly_spaced(places, self.lidar_images, split_size(trainer))
        if not chosen.any():
            return
        augmentation = augmentation_of(pl_module, self.augmentation)
        views = augmented_views(images[chosen.to(images.device)], places[chosen], augmentation, self.lidar_views)
        of_views = [self._features(pl_module, view) for view in views]
        for name, found in self._found.items():
            found.add_views(torch.stack([view[name] for view in of_views]))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Solve for the spectra and record them."""
        if not self._found:
            return
        step = trainer.global_step

        def total(count: Tensor) -> int:
            return int(trainer.strategy.reduce(count.clone(), reduce_op="sum"))

        with self._recording.measurement(), warnings.catch_warnings():
            # Of torchmetrics, on a process that had no batch.
            warnings.filterwarnings("ignore", ".*was called before the ``update`` method")
            skipped = {name: total(found.skipped) for name, found in self._found.items()}
            if self.on_nonfinite == "raise":
                check_finite(skipped, step)
            repeated = repeated_share(total(torch.tensor(self._num_images, device=pl_module.device)), trainer)
            results = {name: found.results(self.measures, total) for name, found in self._found.items()}
            spectra = {name: result.sigma for name, result in results.items() if result.sigma is not None}
            self._recording.spectra(step, spectra)
        keys: dict[str, float] = {}
        ending = "_ema" if self.weights == "ema" else ""
        for name, result in results.items():
            counts = {**result.counts, "samples_skipped": skipped[name]}
            counts["samples_repeated"] = round(repeated * (counts["samples"] + skipped[name]))
            keys |= {f"representation/{name}/{key}{ending}": n for key, n in counts.items() if n or key == "samples"}
        found = {n: {f"{key}{ending}": value for key, value in r.values.items()} for n, r in results.items()}
        values = with_means("representation", found)
        mean = "representation/mean/"
        values = {key.replace(mean, f"representation/mean{self._number}/"): value for key, value in values.items()}
        self._recording.scalars(step, {**values, **keys})
        self._found = {}


def split_size(trainer: pl.Trainer) -> int | None:
    """Samples of the set behind the first validation loader; None for a stream."""
    loaders: Any = trainer.val_dataloaders
    first = next(iter(loaders.values() if isinstance(loaders, dict) else loaders)) if _several(loaders) else loaders
    dataset = getattr(first, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset) else None


def _several(loaders: Any) -> bool:
    return isinstance(loaders, list | tuple | dict) and len(loaders) > 0


def repeated_share(num_images: int, trainer: pl.Trainer) -> float:
    """Share of these images that samplers repeated, to give each process equally many."""
    size = split_size(trainer)
    return 0.0 if size is None or not num_images else max(0, num_images - size) / num_images


def check_finite(skipped: dict[str, int], step: int) -> None:
    """Raise, on all processes alike, if a layer gave features that are not finite."""
    for name, count in skipped.items():
        if count:
            raise ValueError(
                f"Expected finite features, got NaN or infinity in {count} samples of layer {name!r} at step {step}; "
                "`on_nonfinite: skip` leaves them out."
            )
