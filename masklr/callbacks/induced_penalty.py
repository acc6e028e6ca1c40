"""What the masks of a model add to its loss: predicted and measured, side by side."""

from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from masklr.callbacks.features import element, submodule
from masklr.callbacks.mask_sites import Site, find_sites
from masklr.callbacks.penalties import Batch, Estimate, Loss, Penalties
from masklr.callbacks.recording import Recording, first_validation_counts

Method = Literal["gauss_newton", "full_curvature", "symmetric_pairs", "measured"]

METHODS = ("gauss_newton", "full_curvature", "symmetric_pairs", "measured")
# What `predicted` is, of what ran, best first.
PREDICTIONS = ("closed_form", "full_curvature", "gauss_newton")


class InducedPenalty(pl.Callback):
    """Predict and measure the penalty that masks induce, on the first held-out samples, at every validation.

    The penalty is the mean over masks of the loss with masks on, less the loss without. Masks are all `Dropout`,
    `DropPath`, `GroupDropout`, DropConnect layers and inserted masks with p > 0; patches left out by timm's
    `PatchDropout` and probabilities dropped inside fused attention are measured only. `forward(inputs)` of the
    LightningModule gives the outputs (B, K). Where the predictions fail is said in `masklr.callbacks.penalties`.

    Logs, for each layer with a mask and for `all` masks on together (not the sum of the others):
    `penalty/{site}/gauss_newton`; `penalty/{site}/closed_form`, where the outputs are linear in what is masked and the
    loss is squared; `penalty/{site}/full_curvature`, `symmetric_pairs` and `measured`, each with `..._halfwidth`, half
    the width of its 95 % interval; `penalty/{site}/predicted`, the best prediction that ran; and the means of each over
    layers under `penalty/mean/`. With `num_sanity_val_steps: -1` the initialization is measured too, as step 0.

    Args:
        methods: Which of `gauss_newton` (one backward pass for all layers), `full_curvature` (double backward),
            `symmetric_pairs` and `measured` (real masks) are used. The closed form is, wherever it holds.
        each_layer: Whether the last three are found for every layer too, not only for all masks together.
        loss: `cross_entropy`, or `squared`, the sum over outputs.
        label_smoothing: Of the cross-entropy, in [0, 1).
        num_samples: How many samples of the validation split are used, over all processes: its first, where samples are
            dealt to processes in turn, as Lightning's and masklr's samplers do.
        relative_error: Masks are drawn until half the width of the 95 % interval is this share of the mean, above 0.
        max_draws: Or until there were so many, at least 2.
        target_draws: Targets drawn for each sample for `gauss_newton`; 0 takes the expectation over them exactly, in
            as many backward passes as there are outputs.
        probes: Probes of `full_curvature`, at least 2.
        module: Dotted path of the part whose masks are looked at; names begin below it.
        include: Patterns of the names of masks (`*` does not cross a dot, `**` does); all if None.
        inputs: Where a batch has its inputs: an index or a key.
        targets: Where it has its class indices or values.

    Raises:
        ValueError: A value outside its range; no masks; a pattern that matches nothing; outputs that are not (B, K).

    Reference:
        Wei, Kakade and Ma, "The implicit and explicit regularization effects of dropout", ICML 2020.
    """

    def __init__(
        self,
        methods: Sequence[Method] = ("gauss_newton", "measured"),
        each_layer: bool = False,
        loss: Loss = "cross_entropy",
        label_smoothing: float = 0.0,
        num_samples: int = 512,
        relative_error: float = 0.1,
        max_draws: int = 64,
        target_draws: int = 1,
        probes: int = 16,
        module: str = "",
        include: list[str] | None = None,
        inputs: int | str = 0,
        targets: int | str = 1,
    ) -> None:
        if unknown := [method for method in methods if method not in METHODS]:
            raise ValueError(f"Expected `methods` of {', '.join(METHODS)}, got {unknown[0]!r}.")
        if loss not in ("cross_entropy", "squared"):
            raise ValueError(f"Expected `loss` cross_entropy or squared, got {loss!r}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Expected `label_smoothing` in [0, 1), got {label_smoothing}.")
        if not relative_error > 0:
            raise ValueError(f"Expected `relative_error` above 0, got {relative_error}.")
        counts = {"num_samples": (num_samples, 1), "max_draws": (max_draws, 2), "probes": (probes, 2)}
        for name, (value, least) in {**counts, "target_draws": (target_draws, 0)}.items():
            if value < least:
                raise ValueError(f"Expected `{name}` of at least {least}, got {value}.")
        self.methods, self.each_layer, self.loss, self.label_smoothing = (
            tuple(methods),
            each_layer,
            loss,
            label_smoothing,
        )
        self.num_samples, self.relative_error, self.max_draws = num_samples, relative_error, max_draws
        self.target_draws, self.probes = target_draws, probes
        self.module, self.include, self.inputs, self.targets = module, include, inputs, targets
        self._batches: list[Batch] = []

    @property
    def state_key(self) -> str:
        """Differs between two such callbacks in one trainer."""
        return f"{type(self).__name__}({self.module!r}, {self.include}, {self.methods})"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the masks, so that a wrong name ends the run before it begins."""
        if stage in ("fit", "validate"):
            find_sites(submodule(pl_module, self.module), self.include)
            self._recording = Recording(trainer, "induced_penalty")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with no samples."""
        self._batches = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first samples."""
        own = (self.num_samples + trainer.world_size - 1 - trainer.global_rank) // trainer.world_size
        missing = own - sum(len(inputs) for inputs, _ in self._batches)
        if missing > 0 and dataloader_idx == 0 and first_validation_counts(trainer):
            inputs, targets = element(batch, self.inputs, "inputs"), element(batch, self.targets, "targets")
            self._batches.append((inputs[:missing], targets[:missing]))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Predict and measure."""
        if not self._batches:
            return  # on every process alike: each has samples, or none has
        with self._recording.measurement():
            # Lightning validates in inference mode, whose tensors no gradient can pass.
            with torch.inference_mode(False), torch.compiler.set_stance("force_eager"):
                batches = [(inputs.clone(), targets.clone()) for inputs, targets in self._batches]
                self._batches = []
                pl_module.eval()
                # The generators are put back afterwards. Processes draw for themselves, always the same at a step.
                torch.manual_seed(trainer.global_step * trainer.world_size + trainer.global_rank)
                values = self._values(pl_module, batches)
            values = _over_processes(trainer, values, sum(len(inputs) for inputs, _ in batches))
        self._recording.scalars(trainer.global_step, _keys(values))

    def _values(self, pl_module: pl.LightningModule, batches: list[Batch]) -> dict[str, dict[str, Estimate]]:
        penalties = Penalties(pl_module, batches, self.loss, self.label_smoothing)
        sites = find_sites(submodule(pl_module, self.module), self.include)
        found: dict[str, dict[str, Estimate]] = {name: {} for name in [*(site.name for site in sites), "all"]}
        if "gauss_newton" in self.methods:
            each = penalties.gauss_newton(sites, self.target_draws)
            for name, value in each.items():
                found[name]["gauss_newton"] = Estimate(value, 0.0, 1)
            if len(each) == len(sites):
                found["all"]["gauss_newton"] = Estimate(sum(each.values()), 0.0, 1)
        for name, chosen in {**{site.name: [site] for site in sites}, "all": sites}.items():
            if (exact := penalties.closed_form(chosen)) is not None:
                found[name]["closed_form"] = Estimate(exact, 0.0, 1)
            if name == "all" or self.each_layer:
                found[name] |= self._together(penalties, chosen)
        return found

    def _together(self, penalties: Penalties, sites: list[Site]) -> dict[str, Estimate]:
        found: dict[str, Estimate] = {}
        seen = all(site.kind != "unseen" for site in sites)
        if "full_curvature" in self.methods and seen:
            found["full_curvature"] = penalties.full_curvature(sites, self.probes)
        if "symmetric_pairs" in self.methods and seen:
            found["symmetric_pairs"] = penalties.symmetric_pairs(sites, self.relative_error, self.max_draws)
        if "measured" in self.methods:
            found["measured"] = penalties.measured(sites, self.relative_error, self.max_draws)
        return found


def _over_processes(
    trainer: pl.Trainer, values: dict[str, dict[str, Estimate]], num_samples: int
) -> dict[str, dict[str, Estimate]]:
    """Means over the samples of all processes, which draw for themselves."""
    if trainer.world_size == 1:
        return values
    names = [(site, key) for site, found in values.items() for key in found]
    estimates = [values[site][key] for site, key in names]
    device = trainer.strategy.root_device
    means = [num_samples * estimate.mean for estimate in estimates]
    squares = [(num_samples * estimate.halfwidth) ** 2 for estimate in estimates]
    counts = [float(num_samples)] * len(estimates)
    sums = torch.tensor([means, squares, counts], dtype=torch.float64, device=device)
    means, squares, counts = (row.tolist() for row in _summed(trainer, sums))
    for (site, key), mean, square, count in zip(names, means, squares, counts, strict=True):
        values[site][key] = Estimate(mean / count, square**0.5 / count, values[site][key].draws)
    return values


def _summed(trainer: pl.Trainer, sums: Tensor) -> Tensor:
    reduced = trainer.strategy.reduce(sums, reduce_op="sum")
    assert isinstance(reduced, Tensor)
    return reduced


def _keys(values: dict[str, dict[str, Estimate]]) -> dict[str, float]:
    """`penalty/{site}/{key}`, with the best prediction of each site and the means over sites."""
    plain: dict[str, dict[str, float]] = {}
    for site, found in values.items():
        keys = {key: e.mean for key, e in found.items()}
        keys |= {f"{key}_halfwidth": e.halfwidth for key, e in found.items() if e.draws > 1}
        if (best := next((key for key in PREDICTIONS if key in found), None)) is not None:
            keys["predicted"] = found[best].mean
        plain[site] = keys
    by_key: dict[str, list[float]] = {}
    for site, keys in plain.items():
        if site != "all":
            for key, value in keys.items():
                by_key.setdefault(key, []).append(value)
    plain["mean"] = {key: sum(found) / len(found) for key, found in by_key.items() if not key.endswith("_halfwidth")}
    return {f"penalty/{site}/{key}": value for site, keys in plain.items() for key, value in keys.items()}
