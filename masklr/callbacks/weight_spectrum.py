"""Spectra of weight matrices during training."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from masklr.callbacks.features import element, evaluation, submodule
from masklr.callbacks.input_moments import InputMoments, weighted_singular_values
from masklr.callbacks.matrix_measures import Cadence, NonFinite, is_finite, null_of, values_of, with_means_by_kind
from masklr.callbacks.recording import Recording, first_validation_counts
from masklr.callbacks.spectrum_figure import spectrum_figure
from masklr.matrices import Product, Weight, named_matrices
from masklr.spectra import check_measures, effective_rank, measures, singular_values


class WeightSpectrum(pl.Callback):
    """Measure the singular values of weight matrices, from initialization (step 0) to the end.

    Logs `weight/{matrix}/{measure}`, `weight/{matrix}/effective_rank_null` (a Gaussian matrix of that shape; for a
    product, a product of Gaussian matrices) and the means over matrices under `weight/mean/`, those over products apart
    under `weight/mean_qk/`, `weight/mean_ov/`, `weight/mean_product/`; writes
    `spectra/weight_spectrum/step=00000100.npz`. At the end it draws `pictures/weight_spectrum/step=00000100.png`: some
    of the spectra beside those at initialization and those of random matrices.

    Linear layers, convolutions (flattened to output channels x the rest), embeddings, and the query, key and value
    parts of fused projections are measured; see `masklr.matrices.measured_matrices`. Weights that are sharded over
    processes are gathered one at a time.

    With `weighted`, product maps are also measured on what they are given, as W_L ... W_1 C^(1/2): C is the second
    moment of the first layer's inputs, over the whole first validation loader, on the evaluation path. Under dropout
    it is this map that loses rank; single layers even become flatter. Logs `weight/{product}/{measure}_weighted`,
    `weight/{product}/effective_rank_weighted_null` and `weight/{product}/samples_weighted` (fewer inputs than the layer
    is wide bound the rank) at every validation; writes `spectra/weight_spectrum_weighted/`. This costs a pass over the
    validation images.

    Args:
        module: Dotted path of the measured part of the LightningModule; all of it if empty. Names begin below it.
        include: Patterns of matrices to measure, such as `blocks.*.mlp.fc1` (`*` does not cross a dot, `**` does);
            all if None. Products, too, are measured only if a pattern matches their name.
        exclude: Patterns of matrices to leave out.
        measures: Names of functions in `masklr.spectra`.
        every_n_steps: Optimizer steps between measurements.
        attention_products: Whether to measure W_Q^T W_K and W_O W_V of each head, as `blocks.0.attn.qk.0` and
            `blocks.0.attn.ov.0`.
        products: Chains of patterns of layers whose product is measured, the first layer first, such as
            `[["blocks.*.mlp.fc1", "blocks.*.mlp.fc2"]]`, as `blocks.0.mlp.fc2*fc1`.
        weighted: Whether product maps are also weighted by their inputs.
        inputs: Where a validation batch has its images, for `weighted`: an index or a key.
        picture: Whether to draw at the end.
        on_nonfinite: Whether a NaN or an infinity ends the run, or its matrix is left out of that measurement.

    Raises:
        ValueError: A pattern or path that matches nothing, an unknown measure, a cadence below 1; `weighted` without
            `products`.
    """

    def __init__(
        self,
        module: str = "",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        measures: Sequence[str] = ("stable_rank", "effective_rank", "frobenius_norm"),
        every_n_steps: int = 200,
        attention_products: bool = False,
        products: list[list[str]] | None = None,
        weighted: bool = False,
        inputs: int | str = 0,
        picture: bool = True,
        on_nonfinite: NonFinite = "raise",
    ) -> None:
        check_measures(measures)
        if weighted and not products:
            raise ValueError(f"Expected `products` to be weighted, got {products}.")
        self.module, self.include, self.exclude = module, include, exclude
        self.measures = tuple(measures)
        self.attention_products, self.products = attention_products, products or []
        self.weighted, self.inputs, self.picture, self.on_nonfinite = weighted, inputs, picture, on_nonfinite
        self._cadence = Cadence(every_n_steps)
        self._trainer: pl.Trainer | None = None
        self._input_moments: InputMoments | None = None
        self._initial: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        """Differs between two such callbacks in one trainer."""
        chosen = f"{self.module!r}, {self.include}, {self.exclude}, {self.products}, {self.attention_products}"
        return f"{type(self).__name__}({chosen})"

    def state_dict(self) -> dict[str, Any]:
        """The spectra at initialization, which the picture shows in a resumed run too."""
        return {"initial": self._initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the spectra at initialization."""
        self._initial = state_dict["initial"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew, or go on in a trainer that fits again."""
        if self._trainer is not trainer:
            self._initial = {}
        self._trainer = trainer
        self._recording = Recording(trainer, "weight_spectrum")
        self._weighted_recording = Recording(trainer, "weight_spectrum_weighted")
        self._cadence.last_step = None
        self._latest = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the matrices, so that a wrong pattern ends the run before it begins."""
        self._matrices(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the initialization, unless the run is resumed."""
        if trainer.global_step == 0:
            self._measure(trainer, pl_module)
            self._initial = self._latest
        self._cadence.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure at the cadence."""
        if self._cadence.is_due(trainer.global_step):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the end, and draw it."""
        if trainer.global_step != self._cadence.last_step:
            self._measure(trainer, pl_module)
        if self.picture and self._latest and trainer.is_global_zero:
            with self._recording.measurement():
                self._draw(trainer.global_step, self._matrices(pl_module))

    def _matrices(self, pl_module: pl.LightningModule) -> dict[str, Weight | Product]:
        return named_matrices(
            submodule(pl_module, self.module),
            include=self.include,
            exclude=self.exclude,
            attention_products=self.attention_products,
            products=self.products,
        )

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = self._cadence.last_step = trainer.global_step
        with self._recording.measurement():
            matrices = self._matrices(pl_module)
            spectra: dict[str, Tensor] = {}
            for name, matrix in matrices.items():
                value = matrix.value()  # one at a time: sharded weights are gathered here
                if is_finite(value, "weights", name, step, self.on_nonfinite):
                    spectra[name] = singular_values(value).cpu()
            values = {name: values_of(sigma, self.measures, matrices[name]) for name, sigma in spectra.items()}
            self._recording.spectra(step, spectra)
        self._latest = spectra
        self._recording.scalars(step, with_means_by_kind("weight", values, matrices))

    def _draw(self, step: int, matrices: Mapping[str, Weight | Product]) -> None:
        spectra = {name: sigma for name, sigma in self._latest.items() if sigma.any()}
        if spectra:
            nulls = {name: null_of(matrices[name]) for name in spectra}
            figure = spectrum_figure(spectra, self._initial, nulls, step)
            self._recording.picture(step, figure)

    # -------------------------------------------------------------------------------- product maps on their inputs

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to sum the moments of inputs."""
        self._input_moments = None
        if self.weighted and trainer.state.fn == "fit" and first_validation_counts(trainer):
            maps = {
                n: m for n, m in self._matrices(pl_module).items() if isinstance(m, Product) and m.kind == "product"
            }
            self._input_moments = InputMoments(maps, pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the inputs of a batch of the first validation loader."""
        if self._input_moments is not None and dataloader_idx == 0:
            images = element(batch, self.inputs, "inputs")
            with self._weighted_recording.measurement(), evaluation(trainer, pl_module):
                self._input_moments.add(pl_module, images)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the product maps on their inputs."""
        if self._input_moments is None:
            return
        step, products = trainer.global_step, self._input_moments.products
        with self._weighted_recording.measurement():
            spectra, values = {}, {}
            for name, moments in self._input_moments.moments().items():
                spectra[name], null = weighted_singular_values(products[name], moments)
                found = measures(spectra[name], self.measures)
                values[name] = {f"{measure}_weighted": value for measure, value in found.items()}
                if "effective_rank" in found:
                    values[name]["effective_rank_weighted_null"] = effective_rank(null).item()
                values[name]["samples_weighted"] = float(moments.count)
            self._weighted_recording.spectra(step, spectra)
        self._weighted_recording.scalars(step, with_means_by_kind("weight", values, products))
        self._input_moments = None
