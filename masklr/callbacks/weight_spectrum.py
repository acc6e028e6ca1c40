"""Spectra of weight matrices during training."""

from collections.abc import Sequence

import pytorch_lightning as pl
from torch import Tensor

from masklr.callbacks.features import submodule
from masklr.callbacks.recording import Recording, with_means
from masklr.matrices import measured_matrices
from masklr.spectra import check_measures, effective_rank, measures, null_singular_values, singular_values


class WeightSpectrum(pl.Callback):
    """Measure the singular values of weight matrices, from initialization (step 0) to the end.

    Logs `weight/{matrix}/{measure}`, `weight/{matrix}/effective_rank_null` (a Gaussian matrix of that shape) and the
    means over matrices under `weight/mean/`; writes `spectra/weight_spectrum/step=00000100.npz`. Linear layers,
    convolutions (flattened to output channels x the rest) and the query, key and value parts of fused projections are
    measured.

    Args:
        module: Dotted path of the measured part of the LightningModule; all of it if empty. Names begin below it.
        include: Patterns of matrices to measure, such as `blocks.*.mlp.fc1` (`*` does not cross a dot, `**` does);
            all if None.
        exclude: Patterns of matrices to leave out.
        measures: Names of functions in `masklr.spectra`.
        every_n_steps: Optimizer steps between measurements.

    Raises:
        ValueError: A pattern or path that matches nothing, an unknown measure, a cadence below 1.
    """

    def __init__(
        self,
        module: str = "",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        measures: Sequence[str] = ("stable_rank", "effective_rank", "frobenius_norm"),
        every_n_steps: int = 200,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected `every_n_steps` of at least 1, got {every_n_steps}.")
        check_measures(measures)
        self.module, self.include, self.exclude = module, include, exclude
        self.measures, self.every_n_steps = tuple(measures), every_n_steps
        self._last_step: int | None = None

    @property
    def state_key(self) -> str:
        """Differs between two such callbacks in one trainer."""
        return f"{type(self).__name__}({self.module!r}, {self.include}, {self.exclude})"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the matrices, so that a wrong pattern ends the run before it begins."""
        if stage == "fit":
            self._matrices(pl_module)
            self._recording = Recording(trainer, "weight_spectrum")
            self._last_step = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the initialization, unless the run is resumed."""
        if trainer.global_step == 0:
            self._measure(trainer, pl_module)
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure at the cadence; the step stands still while gradients accumulate."""
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._last_step:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the end."""
        if trainer.global_step != self._last_step:
            self._measure(trainer, pl_module)

    def _matrices(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        return measured_matrices(submodule(pl_module, self.module), include=self.include, exclude=self.exclude)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        with self._recording.measurement():
            matrices = self._matrices(pl_module)
            spectra = {name: singular_values(matrix) for name, matrix in matrices.items()}
            values = {name: measures(sigma, self.measures) for name, sigma in spectra.items()}
            for name, matrix in matrices.items():
                if "effective_rank" in values[name]:
                    null = effective_rank(null_singular_values(*matrix.shape))
                    values[name]["effective_rank_null"] = null.item()
            self._recording.spectra(trainer.global_step, spectra)
        self._recording.scalars(trainer.global_step, with_means("weight", values))
