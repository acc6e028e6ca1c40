#!/usr/bin/env python
"""Time the measurements beside the plain SVD, WeightWatcher, and the training that they watch.

    pip install 'masklr[bench]' && python scripts/bench_spectra.py

Both sides of a ratio run in one process, alternating; medians are printed. Exits with 1 if a line falls short of its
limit; a line whose peer is not installed is said to be not measured.
"""

import argparse
import contextlib
import io
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from masklr.callbacks.matrix_measures import values_of
from masklr.matrices import named_matrices
from masklr.moments import SecondMoment
from masklr.spectra import effective_rank, measures, null_singular_values, singular_values

MEASURES = ("stable_rank", "effective_rank", "frobenius_norm")
SAMPLES, WIDTH, BATCH = 20_000, 768, 256


@dataclass(frozen=True)
class Recipe:
    """What of a recipe's YAML decides how much measuring costs."""

    name: str
    limit: float
    image: int
    batch: int
    timed_batch: int
    train_images: int
    val_images: int
    epochs_per_validation: int
    layers: tuple[str, ...]
    model: dict[str, Any]


RECIPES = (
    Recipe(
        "configs/pretrain_imagenet.yaml, ViT-B/16", 0.02, 224, 4096, 16, 1_268_355, 12_812, 20, ("blocks.*", "norm"),
        {"encoder": "vit_base_patch16_224", "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16},
    ),
    Recipe(
        "configs/pretrain_cifar10.yaml, ViT-Ti/4", 0.05, 32, 512, 256, 45_000, 5_000, 10, ("norm",),
        {"image_size": 32, "patch_size": 4, "decoder_dim": 192, "decoder_depth": 4, "decoder_heads": 3},
    ),
)  # fmt: skip
EVERY_N_STEPS = 200
PROBED = 20_000  # training images of Probe, its default


# ------------------------------------------------------------------------------------------------ both sides


def weight_spectrum(model: nn.Module) -> None:
    """The work of the callback WeightSpectrum."""
    for matrix in named_matrices(model).values():
        values_of(singular_values(matrix.value()), MEASURES, matrix)


def plain_svd(model: nn.Module) -> None:
    """The same matrices by torch's SVD, in their own float32."""
    for matrix in named_matrices(model).values():
        torch.linalg.svdvals(matrix.value())


def weight_watcher(model: nn.Module) -> None:
    """The peer; it also fits power laws."""
    import weightwatcher

    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weightwatcher.WeightWatcher(model=model, log_level=logging.ERROR).analyze()


def representation_spectrum(features: Tensor) -> None:
    """The work of the callback RepresentationSpectrum, in batches."""
    moment = SecondMoment(features.shape[1])
    for batch in features.split(BATCH):
        moment.update(batch)
    moments = moment.compute()
    measures(moments.singular_values(), MEASURES)
    effective_rank(null_singular_values(int(moments.count), len(moments.sum), centered=True))


def peak_bytes(samples: int) -> None:
    """Print the peak memory of this process, into which so many features come in batches and are solved."""
    moment = SecondMoment(WIDTH)
    for _ in range(samples // BATCH):
        moment.update(torch.randn(BATCH, WIDTH))
    moment.compute().singular_values()
    # Not getrusage's maximum, which a process inherits from the larger one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024)


# ------------------------------------------------------------------------------------------------ lines


def seconds(call: Callable[[], None]) -> float:
    """Wall-clock time of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def ratio_line(title: str, limit: float, repeats: int, ours: Callable[[], None], theirs: Callable[[], None]) -> bool:
    """Print the median of the ratios of alternating calls; whether it keeps the limit."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    ratio = statistics.median(ratios)
    spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
    return verdict(f"{title}: {mine:.3f} s, {other:.3f} s, ratio {ratio:.2f} {spread}", ratio <= limit, f"{limit:g}")


def verdict(text: str, kept: bool, limit: str) -> bool:
    """Print a line and whether it keeps its limit."""
    print(f"{'ok   ' if kept else 'SHORT'} {text}, at most {limit}")
    return kept


def weights_lines(repeats: int) -> bool:
    """Lines 1 and 2."""
    import timm

    model = timm.create_model("vit_base_patch16_224")
    title = f"1. WeightSpectrum of the {len(named_matrices(model))} matrices of ViT-B/16 and float32 svdvals"
    kept = ratio_line(title, 0.7, repeats, lambda: weight_spectrum(model), lambda: plain_svd(model))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import weightwatcher  # noqa: F401
    except ImportError as error:
        print(f"      2. not measured: {error}; pip install 'masklr[bench]'")
        return kept
    title = "2. WeightSpectrum and WeightWatcher, ViT-B/16"
    return ratio_line(title, 1.0, repeats, lambda: weight_spectrum(model), lambda: weight_watcher(model)) and kept


def representation_lines(repeats: int) -> bool:
    """Line 3: time, and memory for N and 4 N samples, each in a process of its own."""
    features = torch.randn(SAMPLES, WIDTH) * torch.linspace(1, 0.05, WIDTH)
    title = f"3. RepresentationSpectrum of {SAMPLES:,} x {WIDTH} features and float32 svdvals of them"
    kept = ratio_line(
        title, 1.1, repeats, lambda: representation_spectrum(features), lambda: torch.linalg.svdvals(features)
    )
    if not Path("/proc/self/status").exists():
        print("      its peak memory: not measured, this system does not tell it")
        return kept
    peaks = []
    for samples in (SAMPLES, 4 * SAMPLES):
        command = [sys.executable, __file__, "--peak", str(samples)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    shown = [f"{peak / 2**20:.0f} MiB for {n:,}" for peak, n in zip(peaks, (SAMPLES, 4 * SAMPLES), strict=True)]
    text = f"   peak memory of a process that does so: {', '.join(shown)}"
    # The features themselves would take 59 and 234 MiB.
    return verdict(text, peaks[1] - peaks[0] < 32 * 2**20, "32 MiB more") and kept


def recipe_line(recipe: Recipe, steps: int) -> bool:
    """Line 4 of one recipe: costs that the callbacks log, against timed training steps, at the recipe's cadence."""
    costs, step_seconds = measured_run(recipe, steps)
    recipe_step = step_seconds * recipe.batch / recipe.timed_batch
    every = sum(costs[name] for name in ("weight_spectrum", "gradient_spectrum", "update_spectrum"))
    steps_per_validation = recipe.epochs_per_validation * (recipe.train_images // recipe.batch)
    validation = costs["representation_spectrum"] * recipe.val_images + costs["reconstructions"]
    # The solution of the ridge problem is counted once an image: more than it takes.
    probe = costs["probe"] * (PROBED + recipe.val_images)
    share = every / (EVERY_N_STEPS * recipe_step) + (validation + probe) / (steps_per_validation * recipe_step)
    print(f"      4. {recipe.name}: {recipe.model}")
    print(
        f"         a step: {step_seconds:.2f} s for {recipe.timed_batch} images in bf16, "
        f"so {recipe_step:.1f} s for the recipe's {recipe.batch}"
    )
    listed = ", ".join(f"{n} {costs[n]:.2f} s" for n in ("weight_spectrum", "gradient_spectrum", "update_spectrum"))
    print(f"         every {EVERY_N_STEPS} steps ({EVERY_N_STEPS * recipe_step:.0f} s): {listed}")
    print(
        f"         every {steps_per_validation} steps: representation_spectrum "
        f"{1e3 * costs['representation_spectrum']:.2f} ms an image, with a picture {validation:.0f} s for "
        f"{recipe.val_images:,}; probe {1e3 * costs['probe']:.2f} ms an image, so {probe:.0f} s"
    )
    # What depends on the batch is the time of a step; the batch at which the cadence alone would reach the limit:
    least = every / (EVERY_N_STEPS * recipe.limit) / (step_seconds / recipe.timed_batch)
    print(f"         the limit would be reached at a batch of {least:.0f} images")
    return verdict(
        f"   all together {100 * share:.2f} % of training", share <= recipe.limit, f"{100 * recipe.limit:g} %"
    )


def measured_run(recipe: Recipe, steps: int) -> tuple[dict[str, float], float]:
    """Seconds of each callback (of RepresentationSpectrum and Probe, an image), and of a training step without them."""
    import pytorch_lightning as pl

    from masklr.callbacks import (
        GradientSpectrum,
        Probe,
        Reconstructions,
        RepresentationSpectrum,
        UpdateSpectrum,
        WeightSpectrum,
    )
    from masklr.models import MaskedAutoencoder
    from masklr.optim import Optim
    from masklr.tasks import Pretraining

    torch.manual_seed(0)
    task = Pretraining(MaskedAutoencoder(**recipe.model), Optim(base_lr=1.5e-4))
    images = torch.randint(0, 256, (recipe.timed_batch, 3, recipe.image, recipe.image), dtype=torch.uint8)
    data = TensorDataset(torch.cat([images] * (steps + 1)), torch.arange(len(images) * (steps + 1)) % 10)
    loader = DataLoader(data, len(images))
    found: dict[str, list[float]] = {}

    class Costs(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            for key, value in trainer.callback_metrics.items():
                if key.startswith("cost/") and key.endswith("/seconds"):
                    found.setdefault(key.split("/")[1], []).append(float(value))

    options: dict[str, Any] = {"module": "model.encoder", "every_n_steps": 1}
    callbacks: list[pl.Callback] = [
        WeightSpectrum(**options, picture=False),
        GradientSpectrum(**options),
        UpdateSpectrum(**options),
        RepresentationSpectrum(layers=list(recipe.layers), module="model.encoder"),
        Probe(layers=["norm"], module="model.encoder", max_train_samples=len(images), pixels=False),
        Reconstructions(),
        Costs(),
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu", precision="bf16-mixed", max_steps=steps + 1, callbacks=callbacks,
            default_root_dir=folder, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=-1, limit_val_batches=1, val_check_interval=1,
        )  # fmt: skip
        trainer.fit(task, loader, loader)
    # The first of each draws its nulls, keeps the initial weights and the first gradient: once a run.
    costs = {name: statistics.median(values[1:]) for name, values in found.items()}
    costs["representation_spectrum"] /= len(images)
    costs["probe"] /= 2 * len(images)  # as many of the training as of the validation split
    return costs, statistics.median(training_seconds(task.model, images.float() / 255, steps))


def training_seconds(model: nn.Module, images: Tensor, steps: int) -> list[float]:
    """Times of training steps: forward, backward, AdamW, in bf16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return [seconds(step) for _ in range(steps)]


def main() -> int:
    """Print the lines; 1 if one falls short."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side")
    parser.add_argument("--lines", nargs="+", default=["weights", "representations", "recipes"], help="which to run")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak_bytes(options.peak)
        return 0
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    load = os.getloadavg()[0]
    print(f"{torch.get_num_threads()} CPU threads, {platform.machine()}, torch {torch.__version__}, load {load:.1f}")
    kept = True
    if "weights" in options.lines:
        kept = weights_lines(options.repeats) and kept
    if "representations" in options.lines:
        kept = representation_lines(options.repeats) and kept
    if "recipes" in options.lines:
        for recipe in RECIPES:
            kept = recipe_line(recipe, options.repeats) and kept
    print("every line keeps its limit" if kept else "a line falls short")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
