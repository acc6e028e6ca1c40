"""The rows of the theory table: linear networks as their recipes describe them, trained with sampled masks."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import yaml
from torch import Tensor

from masklr.data import Synthetic
from masklr.masks import block_keep, unit_keep
from masklr.models import DeepLinear

ROOT = Path(__file__).parents[1]
CHUNK = 100  # steps whose masks are drawn at once


@dataclass(frozen=True)
class Schedule:
    """How the table trains a row; all else is in the row's recipe.

    Args:
        label: Title of the row's panel.
        steps: Gradient steps: half at the full learning rate, half along a cosine to zero.
        lr: Full learning rate.
        draws: Masks a step; with `sample_inputs`, inputs a step, each with a mask of its own.
        sample_inputs: Whether inputs are drawn from N(0, C); otherwise every mask sees all of C.
        path: Whether theory says how the row is trained, not where it ends: constant learning rate, no control.
    """

    label: str
    steps: int = 6000
    lr: float = 0.02
    draws: int = 128
    sample_inputs: bool = False
    path: bool = False


SCHEDULES = {
    "dropout": Schedule("dropout"),
    "dropout_strong": Schedule("dropout"),
    "dropout_autoencoder": Schedule("linear autoencoder, dropout", steps=8000, draws=512, sample_inputs=True),
    "dropconnect_last": Schedule("DropConnect, last layer"),
    "dropconnect_first": Schedule("DropConnect, first layer"),
    "dropconnect_first_correlated": Schedule("DropConnect, first layer, correlated inputs"),
    "groups": Schedule("groups, 2 of 8 units"),
    "groups_wide": Schedule("groups, 2 of 12 units"),
    "groups_strong": Schedule("groups, 2 of 8 units"),
    "deep_dropout": Schedule("dropout, 2 hidden layers"),
    "deep_dropout_bound": Schedule("dropout, 2 hidden layers, bound"),
    "weight_decay": Schedule("weight decay"),
    "weight_decay_dropout": Schedule("weight decay and dropout"),
    "mae_all": Schedule("linear MAE, loss on all", draws=32),
    "mae_all_exact": Schedule("linear MAE, loss on all", draws=32),
    "mae_masked": Schedule("linear MAE, loss on masked", draws=32),
    "mae_masked_exact": Schedule("linear MAE, loss on masked", draws=32),
    "mae_bottleneck": Schedule("linear MAE, bottleneck", draws=32),
    "mae_bottleneck_exact": Schedule("linear MAE, bottleneck", draws=32),
    "small_init_invariant": Schedule("small weights, first of 3 layers", steps=400, lr=0.025, path=True),
    "small_init_modes": Schedule("small weights, 2 layers", steps=8000, lr=0.000125, path=True),
}


@dataclass(frozen=True)
class Row:
    """One row: a network, its masks and its data, from `configs/regress_synthetic_{name}.yaml`.

    Args:
        name: Its name.
        arguments: Arguments of the recipe's `DeepLinear`.
        C: Uncentered second moment of the inputs, (n, n).
        target: Matrix from inputs to targets, (m, n).
        weight_decay: mu of mu * (sum of squared weights).
        loss_on_masked: Whether the loss is that of masked inputs only.
        schedule: How it is trained.
    """

    name: str
    arguments: dict
    C: Tensor
    target: Tensor
    weight_decay: float
    loss_on_masked: bool
    schedule: Schedule

    @classmethod
    def read(cls, name: str) -> "Row":
        """The row of a recipe."""
        recipe = yaml.safe_load((ROOT / "configs" / f"regress_synthetic_{name}.yaml").read_text())
        task, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
        if "covariance" in data:
            data["covariance"] = str(ROOT / data["covariance"])
        synthetic = Synthetic(**data)
        return cls(
            name=name,
            arguments=task["model"]["init_args"],
            C=synthetic.second_moment,
            target=synthetic.target_matrix,
            # torch's weight decay is the gradient of weight_decay / 2 * (sum of squared weights).
            weight_decay=task["optim"]["weight_decay"] / 2,
            loss_on_masked=task.get("loss_on", "all") == "masked",
            schedule=SCHEDULES[name],
        )

    @cached_property
    def model(self) -> DeepLinear:
        """The network, for what it says about its masks."""
        return DeepLinear(**self.arguments)

    @property
    def p(self) -> float:
        """The probability of being dropped, of what is masked; 0 if nothing is."""
        model = self.model
        return max([1 - model.input_keep_probability if model.input_p else 0.0, *model.drop_probabilities])

    @property
    def setting(self) -> str:
        """How strong the masks are, in a few words for the table and the figure."""
        parts = [f"p = {self.p:g}"] if self.p else []
        if self.weight_decay:
            parts.append(f"mu = {self.weight_decay:g}")
        if self.arguments.get("exact_count"):
            parts.append("exact count")
        if self.schedule.path:
            parts.append(f"initial scale {self.arguments['init_scale']:.2g}")
        return ", ".join(parts)

    @cached_property
    def root(self) -> Tensor:
        """C^(1/2), symmetric."""
        values, vectors = torch.linalg.eigh(self.C)
        return vectors * values.clamp(min=0).sqrt() @ vectors.mT

    def initial_weights(self, seed: int) -> list[Tensor]:
        """Weights before training, float64, first layer first."""
        weights = [W.detach().double() for W in DeepLinear(**{**self.arguments, "init_seed": seed}).weights]
        if self.name == "small_init_modes":
            weights[1] = weights[0].mT.clone()  # balanced, and aligned with the target
        return weights

    def spectrum(self, weights: list[Tensor]) -> Tensor:
        """Singular values that theory predicts: of M C^(1/2), or of M if inputs are masked; (..., r)."""
        M = product(weights)
        return torch.linalg.svdvals(M if self.arguments.get("input_p") else M @ self.root)


def product(weights: list[Tensor]) -> Tensor:
    """Matrix of the whole network, (..., m, n)."""
    M = weights[0]
    for W in weights[1:]:
        M = W @ M
    return M


@dataclass(frozen=True)
class Draws:
    """Factors of mean one for a number of steps, (steps, runs, draws, ...); None where nothing is masked.

    Args:
        inputs: Of each input.
        units: Of each unit of every hidden layer.
        weights: Of each weight of every layer.
        x: Samples of the inputs, in place of their second moment.
    """

    inputs: Tensor | None
    units: list[Tensor | None]
    weights: list[Tensor | None]
    x: Tensor | None


def draw(row: Row, generators: list[torch.Generator], steps: int) -> Draws:
    """Masks of `steps` steps: one run a generator, then as many controls, whose factors are all one."""
    model, K = row.model, row.schedule.draws
    sizes, p = model.sizes, model.drop_probabilities
    connect = model.mask == "dropconnect"

    def factors(keep: list[Tensor], keep_probability: float) -> Tensor:
        """(steps, runs, draws, ...) from one mask of steps * draws entries a generator."""
        factor = torch.stack([k.unflatten(0, (steps, K)) for k in keep], 1) / torch.tensor(keep_probability).double()
        return torch.cat([factor, torch.ones_like(factor)], 1)

    def units(width: int, q: float) -> Tensor | None:
        if not q:
            return None
        keep = [block_keep((steps * K, 1, width), q, model.group_size, generator=g) for g in generators]
        return factors(keep, 1 - q)

    def weights(shape: tuple[int, int], q: float) -> Tensor | None:
        return factors([unit_keep((steps * K, *shape), q, generator=g) for g in generators], 1 - q) if q else None

    inputs = x = None
    if model.input_p:
        keep = [model.draw_input_keep(steps * K, generator=g)[:, None] for g in generators]
        inputs = factors(keep, model.input_keep_probability)
    if row.schedule.sample_inputs:
        shape = (steps, K, 1, sizes[0])
        x = torch.stack([torch.randn(shape, generator=g, dtype=torch.float64) for g in generators], 1) @ row.root
        x = torch.cat([x, x], 1)
    hidden = list(zip(sizes[1:-1], p, strict=True)) if not connect else []
    pairs = list(zip(sizes[1:], sizes, p, strict=False)) if connect else []
    return Draws(
        inputs,
        [units(width, q) for width, q in hidden] or [None] * len(sizes[1:-1]),
        [weights((m, n), q) for m, n, q in pairs] or [None] * len(sizes[1:]),
        x,
    )


def losses(row: Row, weights: list[Tensor], draws: Draws, step: int) -> Tensor:
    """Squared error summed over outputs, mean over draws and inputs, of each run.

    Activations are (runs, draws, inputs, units): rows of C^(1/2) are inputs that together have the second moment C.
    """
    x = row.root[None, None] if draws.x is None else draws.x[step]
    h = x if draws.inputs is None else x * draws.inputs[step]
    for layer, W in enumerate(weights):
        factor = draws.weights[layer]
        if factor is None:
            h = (h.flatten(1, 2) @ W.mT).unflatten(1, h.shape[1:3])
        else:
            h = h @ (W[:, None] * factor[step]).mT
        if layer < len(draws.units) and (unit := draws.units[layer]) is not None:
            h = h * unit[step]
    error = (x @ row.target.mT - h).square()
    if row.loss_on_masked and draws.inputs is not None:
        # The control masks nothing: its loss is on all inputs.
        counted = (draws.inputs[step] == 0).double()
        counted[len(counted) // 2 :] = 1
        error = error * counted
    return error.sum((2, 3)).mean(1)


@dataclass(frozen=True)
class Training:
    """What came of a row.

    Args:
        steps: Steps at which weights were kept, the first 0, the last the end.
        weights: Of these steps, first layer first, each (steps, 2 * seeds, out, in): the runs with masks, then the
            controls.
    """

    steps: list[int]
    weights: list[Tensor]

    def last(self, run: int) -> list[Tensor]:
        """Weights of one run at the end."""
        return [W[-1, run] for W in self.weights]


def train(row: Row, num_seeds: int, num_steps: int) -> Training:
    """Train a row for all seeds at once, beside controls without masks (without weight decay if there are no masks)."""
    initial = [row.initial_weights(seed) for seed in range(num_seeds)]
    weights = [torch.stack(layer * 2).requires_grad_() for layer in map(list, zip(*initial, strict=True))]
    generators = [torch.Generator().manual_seed(seed) for seed in range(num_seeds)]
    mu = torch.full((2 * num_seeds, 1, 1), row.weight_decay, dtype=torch.float64)
    if not row.p:
        mu[num_seeds:] = 0
    kept_steps = sorted({round(math.expm1(math.log1p(num_steps) * i / 150)) for i in range(151)})
    kept = [[W.detach().clone() for W in weights]]
    for step in range(num_steps):
        if step % CHUNK == 0:
            draws = draw(row, generators, min(CHUNK, num_steps - step))
        loss = losses(row, weights, draws, step % CHUNK).sum()
        gradients = torch.autograd.grad(loss, weights)
        lr = row.schedule.lr * (1.0 if row.schedule.path else cosine(step / num_steps))
        with torch.no_grad():
            for W, gradient in zip(weights, gradients, strict=True):
                W -= lr * (gradient + 2 * mu * W)
        if step + 1 in kept_steps:
            kept.append([W.detach().clone() for W in weights])
    return Training(kept_steps, [torch.stack(layer) for layer in zip(*kept, strict=True)])


def cosine(progress: float) -> float:
    """Share of the learning rate: 1 for the first half of training, then a half cosine to 0."""
    return 1.0 if progress < 0.5 else 0.5 * (1 + math.cos(math.pi * (2 * progress - 1)))
