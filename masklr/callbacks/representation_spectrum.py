"""Spectra of representations on held-out images."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import nn

from masklr.callbacks.features import Pool, element, evaluation, features, named_layers
from masklr.callbacks.recording import Recording, first_validation_counts, with_means
from masklr.moments import SecondMoment
from masklr.spectra import check_measures, effective_rank, measures, null_singular_values


class RepresentationSpectrum(pl.Callback):
    """Measure the singular values of features over the whole validation split, at every validation.

    Logs `representation/{layer}/{measure}`, `representation/{layer}/effective_rank_null` (Gaussian features of that
    count and width) and the means over layers under `representation/mean/`; writes
    `spectra/representation_spectrum/step=00000100.npz`. Features are centered. Their second moments are summed in
    float64 over all processes: memory does not grow with the number of images. With `num_sanity_val_steps: -1` the
    initialization is measured too, as step 0.

    Args:
        layers: Patterns of layers below `module`, such as `blocks.*` (`*` does not cross a dot, `**` does); none
            measures what `forward` returns, under the name `output`.
        module: Dotted path below which layers are named.
        pool: How tokens or feature maps become features: their `mean`, the `first` token, or all `tokens` as samples.
        measures: Names of functions in `masklr.spectra`.
        inputs: Where a batch has its images: an index or a key.

    Raises:
        ValueError: A pattern or path that matches nothing, an unknown measure.
    """

    def __init__(
        self,
        layers: list[str] | None = None,
        module: str = "",
        pool: Pool = "mean",
        measures: Sequence[str] = ("stable_rank", "effective_rank", "frobenius_norm"),
        inputs: int | str = 0,
    ) -> None:
        check_measures(measures)
        self.layers, self.module, self.pool, self.inputs = layers or [], module, pool, inputs
        self.measures = tuple(measures)

    @property
    def state_key(self) -> str:
        """Differs between two such callbacks in one trainer."""
        return f"{type(self).__name__}({self.module!r}, {self.layers}, {self.pool!r})"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the layers, so that a wrong pattern ends the run before it begins."""
        self._layers(pl_module)
        self._recording = Recording(trainer, "representation_spectrum")

    def _layers(self, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
        return named_layers(pl_module, self.module, self.layers)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the features of the last validation."""
        self._moments: dict[str, SecondMoment] = {}

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
        if dataloader_idx > 0 or not first_validation_counts(trainer):
            return
        images = element(batch, self.inputs, "inputs")
        with self._recording.measurement(), evaluation(trainer, pl_module):
            for name, found in features(pl_module, self._layers(pl_module), images, self.pool).items():
                if name not in self._moments:
                    self._moments[name] = SecondMoment(found.shape[1]).to(found.device)
                self._moments[name].update(found)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Solve for the spectra and record them."""
        if not self._moments:
            return
        with self._recording.measurement():
            spectra, values = {}, {}
            for name, moment in self._moments.items():
                moments = moment.compute()
                sigma = spectra[name] = moments.singular_values()
                values[name] = measures(sigma, self.measures)
                if "effective_rank" in values[name]:
                    null = null_singular_values(int(moments.count), len(moments.sum), centered=True)
                    values[name]["effective_rank_null"] = effective_rank(null).item()
            self._recording.spectra(trainer.global_step, spectra)
        self._recording.scalars(trainer.global_step, with_means("representation", values))
        self._moments = {}
