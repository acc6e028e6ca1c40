"""Spectra of gradients during training."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer

from masklr.callbacks.features import submodule
from masklr.callbacks.matrix_measures import Cadence, NonFinite, is_finite, overlaps, values_of
from masklr.callbacks.recording import Recording, with_means
from masklr.matrices import Weight, named_matrices
from masklr.spectra import check_measures
from masklr.spectra.subspaces import Side, leading_subspace


class GradientSpectrum(pl.Callback):
    """Measure the singular values of the gradient of every weight matrix, and whether their leading subspace stays.

    At step t it is the gradient at the weights after t updates, which the next update takes: summed over accumulated
    batches, averaged over processes, without the factor of a loss scaler, before clipping. Logs
    `gradient/{matrix}/{measure}`, `gradient/{matrix}/effective_rank_null` (a Gaussian matrix of that shape) and the
    means over matrices under `gradient/mean/`; writes `spectra/gradient_spectrum/step=00000100.npz`.

    The subspace of the leading `rank` singular vectors, found exactly in float64 (directions below 1e-6 of the largest
    are rounding and left out), is compared with that of the measurement before and with that of the first gradient:
    `gradient/{matrix}/overlap_previous` and `overlap_first`, between 0 and 1, and `overlap_null`, which random
    subspaces have on average (k over the dimension). A resumed run goes on comparing; if the run before did not
    measure, there is no first gradient.

    Matrices without a gradient are left out: frozen ones, and weights that a layer computes (`effective_weight()`).
    A step whose gradients overflowed under a loss scaler, which the scaler skips, is left to the next step.

    Args:
        module: Dotted path of the measured part of the LightningModule; all of it if empty. Names begin below it.
        include: Patterns of matrices to measure, such as `blocks.*.mlp.fc1` (`*` does not cross a dot, `**` does);
            all if None.
        exclude: Patterns of matrices to leave out.
        measures: Names of functions in `masklr.spectra`.
        rank: Number of leading singular vectors that are compared.
        side: Whether these are left vectors, directions of a layer's outputs, or right ones, of its inputs.
        every_n_steps: Optimizer steps between measurements. Of several optimizers, each is measured at its first step
            from there on.
        on_nonfinite: Whether a NaN or an infinity ends the run, or its matrix is left out of that measurement.

    Raises:
        ValueError: A pattern or path that matches nothing, an unknown measure, a rank or cadence below 1; no matrix
            has a gradient.

    Reference:
        Zhao et al., "GaLore: memory-efficient LLM training by gradient low-rank projection", ICML 2024.
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
        self.every_n_steps = Cadence(every_n_steps).every_n_steps
        self._trainer: pl.Trainer | None = None
        self._first: dict[str, Tensor] = {}
        self._previous: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        """Differs between two such callbacks in one trainer."""
        return f"{type(self).__name__}({self.module!r}, {self.include}, {self.exclude}, {self.rank}, {self.side})"

    def state_dict(self) -> dict[str, Any]:
        """The subspaces to compare with: twice `rank` columns in float64 for each matrix."""
        return {"first": self._first, "previous": self._previous}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the subspaces of the run that is resumed."""
        self._first, self._previous = dict(state_dict["first"]), dict(state_dict["previous"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew, or go on in a trainer that fits again."""
        if self._trainer is not trainer:
            self._first, self._previous = {}, {}
        self._trainer = trainer
        self._recording = Recording(trainer, "gradient_spectrum")
        self._periods: dict[int, int] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the matrices, so that a wrong pattern ends the run before it begins."""
        self._matrices(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run resumed between two measurements waits for the next."""
        self._period_at_start = (trainer.global_step - 1) // self.every_n_steps
        self._is_new = trainer.global_step == 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure at the cadence."""
        step = trainer.global_step
        period = step // self.every_n_steps
        if period <= self._periods.get(id(optimizer), self._period_at_start):
            return
        with self._recording.measurement():
            spectra, values = self._measured(trainer, pl_module, optimizer)
            if spectra is None:
                return
            self._periods[id(optimizer)] = period
            if spectra:
                self._recording.spectra(step, spectra)
        if spectra:
            self._recording.scalars(step, with_means("gradient", values))

    def _measured(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> tuple[dict[str, Tensor] | None, dict[str, dict[str, float]]]:
        """Spectra and values by matrix; None where the loss scaler will skip the step."""
        step, scale = trainer.global_step, loss_scale(trainer, optimizer)
        matrices = with_gradients(self._matrices(pl_module), optimizer)
        if not matrices and len(trainer.optimizers) == 1:
            raise ValueError(f"Expected matrices with gradients, got none at step {step}: they are frozen or computed.")
        spectra: dict[str, Tensor] = {}
        values: dict[str, dict[str, float]] = {}
        bases: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            gradient = matrix.gradient()  # one at a time: sharded gradients are gathered here
            assert gradient is not None
            if not is_finite(gradient, "gradients", name, step, self.on_nonfinite if scale is None else "skip"):
                if scale is None:
                    continue
                return None, {}
            sigma, bases[name] = leading_subspace(gradient, self.rank, self.side)
            spectra[name] = sigma.cpu() / (scale or 1)
            values[name] = values_of(spectra[name], self.measures, matrix)
        for name, basis in bases.items():
            others = {"overlap_previous": self._previous.get(name), "overlap_first": self._first.get(name)}
            values[name] |= overlaps(basis, others)
            self._previous[name] = basis
            if self._is_new:
                self._first.setdefault(name, basis)
        return spectra, values

    def _matrices(self, pl_module: pl.LightningModule) -> dict[str, Weight]:
        named = named_matrices(submodule(pl_module, self.module), include=self.include, exclude=self.exclude)
        return {name: matrix for name, matrix in named.items() if isinstance(matrix, Weight)}


def check_rank(rank: int) -> None:
    """Raise unless there are leading vectors to compare.

    Args:
        rank: Number of leading singular vectors.

    Raises:
        ValueError: It is below 1.
    """
    if rank < 1:
        raise ValueError(f"Expected `rank` of at least 1, got {rank}.")


def with_gradients(matrices: dict[str, Weight], optimizer: Optimizer) -> dict[str, Weight]:
    """The matrices whose parameters an optimizer is about to update.

    Args:
        matrices: Matrices by name.
        optimizer: The optimizer.
    """
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, matrix in matrices.items():
        parameter = matrix.parameter
        if parameter is not None and parameter.grad is not None and id(parameter) in updated:
            found[name] = matrix
    return found


def loss_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float | None:
    """What gradients are multiplied by just before the optimizer's step; None without a loss scaler.

    The scaler has divided them by then, unless the optimizer does so itself, as fused ones do.

    Args:
        trainer: The trainer, of whose precision the scaler is a part.
        optimizer: The optimizer.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return None
    return scaler.get_scale() if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
