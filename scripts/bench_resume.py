#!/usr/bin/env python
"""What a resumed run costs beyond loading, and what StepSeed costs in a step.

    python scripts/bench_resume.py
    python scripts/bench_resume.py --train 'shards/cifar10-train-*.tar'

Times the first training batch of a run that stands at some place beside that of a run that begins: of shards read in
place, and of the same shards as a stream, which reads past what was seen. Positions are given as passes over the data.
StepSeed's own hook is timed beside the step of configs/pretrain_cifar10.yaml (batch 512). The data are 50,000 made
images of 32 x 32 pixels in 5 shards, or `--train`. Exits with 1 if a resume takes more than 2 s (in place) or 10 s
(stream) longer than a beginning, or StepSeed more than 0.1 % of a step. Needs an otherwise idle machine.
"""

import argparse
import io
import logging
import platform
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image

from masklr.callbacks import StepSeed
from masklr.data import ShardedImages
from masklr.data.tar_index import shard_index, shard_paths
from masklr.models import MaskedAutoencoder
from masklr.optim import Optim
from masklr.tasks import Pretraining

IN_PLACE, STREAM, STEP_SEED = 2.0, 10.0, 1e-3  # limits: seconds, seconds, share of a step
POSITIONS = (0.0, 0.1, 0.5, 0.99, 3.5, 100.99)  # passes over the data
BATCH = 512


def write_shards(folder: Path, num_shards: int = 5, size: int = 10_000) -> str:
    """Shards of made images; 500 different ones, each under many keys."""
    rng, files = np.random.default_rng(0), []
    for _ in range(500):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(data, "JPEG", quality=95)
        files.append(data.getvalue())
    for shard in range(num_shards):
        with tarfile.open(folder / f"made-{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(size * shard, size * (shard + 1)):
                for ending, content in (("jpg", files[number % 500]), ("cls", b"%d" % (number % 10))):
                    entry = tarfile.TarInfo(f"{number:08d}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return str(folder / "made-*.tar")


def first_batch(train: str, streaming: bool, num_workers: int, passes: float, num_samples: int) -> tuple[float, float]:
    """Seconds to open the data, and from there to the first batch of a run that stands at a place.

    Args:
        train: Pattern of the shards.
        streaming: Whether they are read as a stream.
        num_workers: Processes that read.
        passes: Where the run stands.
        num_samples: Samples in one pass.
    """
    began = time.perf_counter()
    data = ShardedImages(
        train, streaming=streaming, in_memory=False, num_classes=10, image_size=32, batch_size=BATCH,
        num_workers=num_workers, val_fraction=0.0,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=10**6, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    data.trainer = trainer
    data.setup("fit")
    trainer.fit_loop.epoch_loop.batch_progress.total.ready = int(passes * num_samples) // BATCH
    opened = time.perf_counter()
    batches = iter(data.train_dataloader())
    next(batches)
    return opened - began, time.perf_counter() - opened


def resume_costs(train: str, streaming: bool, num_workers: int) -> bool:
    """Print the costs of all positions; returns whether they are within the limit."""
    limit = STREAM if streaming else IN_PLACE
    what = f"{'stream' if streaming else 'in place'}, {num_workers} workers"
    holds, num_samples = True, sum(len(shard_index(path).keys) for path in shard_paths("train", train))
    first_batch(train, streaming, num_workers, 0.0, num_samples)  # imports and the disk's cache
    for passes in POSITIONS:
        opened, first = first_batch(train, streaming, num_workers, passes, num_samples)
        if passes == 0:
            beginning = first
        cost = first - beginning
        holds &= cost <= limit
        print(f"{what:<24}{passes:>9.2f}{opened:>10.2f}{first:>14.2f}{cost:>9.2f}{limit:>8.0f}", flush=True)
    return holds


def seed_share(steps: int = 5) -> tuple[float, float]:
    """Seconds of StepSeed's hook, and of a step of the CIFAR recipe, forward, backward and AdamW."""
    hook, trainer = StepSeed(0), SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=0), global_rank=0)
    times = []
    for number in range(2000):
        trainer.fit_loop.total_batch_idx = number
        began = time.perf_counter()
        hook.on_train_batch_start(trainer, None, None, 0)  # type: ignore[arg-type]
        times.append(time.perf_counter() - began)
    task: Any = Pretraining(cifar_model(), Optim(), mean=[0.5] * 3, std=[0.25] * 3)
    task.log = task.log_dict = lambda *args, **options: None
    optimizer = torch.optim.AdamW(task.parameters())
    batch = (torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8), torch.zeros(BATCH), torch.arange(BATCH))
    step_times = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        loss = task.training_step(batch, 0)
        (loss["loss"] if isinstance(loss, dict) else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        step_times.append(time.perf_counter() - began)
    return statistics.median(times), statistics.median(step_times[1:])


def cifar_model() -> MaskedAutoencoder:
    """The model of configs/pretrain_cifar10.yaml."""
    import yaml

    path = Path(__file__).resolve().parents[1] / "configs" / "pretrain_cifar10.yaml"
    options = yaml.safe_load(path.read_text())["model"]["init_args"]["model"]["init_args"]
    return MaskedAutoencoder(**options)


def main(arguments: list[str]) -> int:
    """Time everything; print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="pattern of tar shards; default: made ones")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="bench_resume_") as name:
        train = options.train or write_shards(Path(name))
        print(f"{torch.get_num_threads()} CPU threads, {platform.machine()}, torch {torch.__version__}")
        print(f"{'':<24}{'passes':>9}{'open, s':>10}{'batch, s':>14}{'cost, s':>9}{'limit':>8}")
        holds = [resume_costs(train, streaming, n) for streaming in (False, True) for n in options.workers]
    seed, step = seed_share()
    share = seed / step
    print(f"StepSeed {seed * 1e6:.0f} microseconds of a step of {step:.2f} s: {100 * share:.4f} %, limit 0.1 %")
    return int(not all(holds) or share > STEP_SEED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
