"""Spectra of what training has added to the weights."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer

from masklr.callbacks.features import submodule
from masklr.callbacks.gradient_spectrum import check_rank, loss_scale, with_gradients
from masklr.callbacks.matrix_measures import Cadence, NonFinite, is_finite, overlaps, values_of
from masklr.callbacks.recording import Recording, with_means
from masklr.matrices import Weight, named_matrices
from masklr.spectra import check_measures
from masklr.spectra.subspaces import Side, leading_subspace


class UpdateSpectrum(pl.Callback):
    """Measure the singular values of W_t - W_0: of what training, or fine-tuning, has added to every weight matrix.

    W_0 are the weights at step 0 of the run, pretrained ones where the model begins with such. Logs
    `update/{matrix}/{measure}`, `update/{matrix}/effective_rank_null` (a Gaussian matrix of that shape) and the means
    over matrices under `update/mean/`; writes `spectra/update_spectrum/step=00000100.npz`. At step 0 the update is
    zero: it has the norm 0 and no rank.

    The subspace of the leading `rank` singular vectors, found exactly in float64 (directions below 1e-6 of the largest
    are rounding and left out), is compared with that of the measurement before and with that of the first gradient:
    `update/{matrix}/overlap_previous` and `overlap_first_gradient`, between 0 and 1, and `overlap_null`, which random
    subspaces have on average (k over the dimension). Weights that a layer computes (`effective_weight()`) have no
    gradient to compare with.

    W_0 is kept in the memory of the CPU, on every process, and in checkpoints, which grow by the size of the measured
    weights (344 MB for ViT-B in float32, a third of what weights and AdamW take); `include` bounds it.

    Args:
        module: Dotted path of the measured part of the LightningModule; all of it if empty. Names begin below it.
        include: Patterns of matrices to measure, such as `blocks.*.mlp.fc1` (`*` does not cross a dot, `**` does);
            all if None.
        exclude: Patterns of matrices to leave out.
        measures: Names of functions in `masklr.spectra`.
        rank: Number of leading singular vectors that are compared.
        side: Whether these are left vectors, directions of a layer's outputs, or right ones, of its inputs.
        every_n_steps: Optimizer steps between measurements.
        on_nonfinite: Whether a NaN or an infinity ends the run, or its matrix is left out of that measurement.

    Raises:
        ValueError: A pattern or path that matches nothing, an unknown measure, a rank or cadence below 1; a run that
            is resumed from one that did not keep W_0.

    Reference:
        Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022; Yaras et al., "Compressible dynamics
        in deep overparameterized low-rank learning and adaptation", ICML 2024.
    """

    def __init__(
        self,
        module: str = "",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        measures: Sequence[str] = ("stable_rank", "energy_rank_90", "effective_rank", "frobenius_norm"),
        rank: int = 8,
        side: Side = "left",
        every_n_steps: int = 200,
        on_nonfinite: NonFinite = "raise",
    ) -> None:
        check_measures(measures)
        check_rank(rank)
        self.module, self.include, self.exclude = module, include, exclude
        self.measures, self.rank, self.side, self.on_nonfinite = tuple(measures), rank, side, on_nonfinite
        self._cadence = Cadence(every_n_steps)
        self._trainer: pl.Trainer | None = None
        self._initial: dict[str, Tensor] = {}
        self._gradient: dict[str, Tensor] = {}
        self._previous: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        """Differs between two such callbacks in one trainer."""
        return f"{type(self).__name__}({self.module!r}, {self.include}, {self.exclude}, {self.rank}, {self.side})"

    def state_dict(self) -> dict[str, Any]:
        """W_0, and the subspaces to compare with: twice `rank` columns in float64 for each matrix."""
        return {"initial": self._initial, "gradient": self._gradient, "previous": self._previous}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up W_0 and the subspaces of the run that is resumed."""
        self._initial = dict(state_dict["initial"])
        self._gradient, self._previous = dict(state_dict["gradient"]), dict(state_dict["previous"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew, or go on in a trainer that fits again."""
        if self._trainer is not trainer:
            self._initial, self._gradient, self._previous = {}, {}, {}
        self._trainer = trainer
        self._recording = Recording(trainer, "update_spectrum")
        self._cadence.last_step = None
        self._seen_optimizers: set[int] = set()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the matrices, so that a wrong pattern ends the run before it begins."""
        self._matrices(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep W_0, unless the run is resumed."""
        self._is_new = trainer.global_step == 0
        if self._is_new:
            with self._recording.measurement():
                for name, matrix in self._matrices(pl_module).items():
                    self._initial[name] = matrix.value().cpu().clone()
            self._measure(trainer, pl_module)
        elif missing := [name for name in self._matrices(pl_module) if name not in self._initial]:
            raise ValueError(
                f"Expected a checkpoint that holds the initial weights for UpdateSpectrum, got one of step "
                f"{trainer.global_step} without those of {missing[0]!r}: the run that is resumed did not measure them."
            )
        self._cadence.last_step = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Keep the leading subspace of the first gradient."""
        if not self._is_new or id(optimizer) in self._seen_optimizers:
            return
        scale = loss_scale(trainer, optimizer)
        with self._recording.measurement():
            found = {}
            for name, matrix in with_gradients(self._matrices(pl_module), optimizer).items():
                gradient = matrix.gradient()
                assert gradient is not None
                on_nonfinite = self.on_nonfinite if scale is None else "skip"
                if is_finite(gradient, "gradients", name, trainer.global_step, on_nonfinite):
                    found[name] = leading_subspace(gradient, self.rank, self.side).basis
                elif scale is not None:
                    return  # an overflow: the scaler skips this step
        self._gradient |= found
        self._seen_optimizers.add(id(optimizer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure at the cadence."""
        if self._cadence.is_due(trainer.global_step):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the end."""
        if trainer.global_step != self._cadence.last_step:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = self._cadence.last_step = trainer.global_step
        spectra: dict[str, Tensor] = {}
        values: dict[str, dict[str, float]] = {}
        with self._recording.measurement():
            for name, matrix in self._matrices(pl_module).items():
                weight = matrix.value()  # one at a time: sharded weights are gathered here
                if not is_finite(weight, "weights", name, step, self.on_nonfinite):
                    continue
                device = "cpu" if weight.device.type == "mps" else weight.device  # which has no float64
                update = weight.to(device).double() - self._initial[name].to(device).double()
                sigma, basis = leading_subspace(update, self.rank, self.side)
                spectra[name] = sigma.cpu()
                others = {"overlap_previous": self._previous.get(name)}
                others["overlap_first_gradient"] = self._gradient.get(name)
                values[name] = values_of(spectra[name], self.measures, matrix) | overlaps(basis, others)
                self._previous[name] = basis
            self._recording.spectra(step, spectra)
        self._recording.scalars(step, with_means("update", values))

    def _matrices(self, pl_module: pl.LightningModule) -> dict[str, Weight]:
        named = named_matrices(submodule(pl_module, self.module), include=self.include, exclude=self.exclude)
        return {name: matrix for name, matrix in named.items() if isinstance(matrix, Weight)}
