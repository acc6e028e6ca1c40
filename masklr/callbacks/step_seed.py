"""Randomness as a function of where training stands."""

import os
import random

import numpy as np
import pytorch_lightning as pl
import torch


class StepSeed(pl.Callback):
    """Seed the generators before every training batch from (seed, number of the batch, rank).

    Whatever a step draws (masks, dropout, augmentation) is then the same in a run that was interrupted and resumed,
    with no generator state to save. The number counts batches, not optimizer steps, which stand still while gradients
    accumulate.

    Args:
        seed: The run's seed; None takes the one that `seed_everything` was given, or 0.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, idx: int) -> None:
        """Seed Python, NumPy and PyTorch (all devices)."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        word = step_seed(seed, trainer.fit_loop.total_batch_idx, trainer.global_rank)
        random.seed(word)
        np.random.seed(word % 2**32)  # noqa: NPY002 (users' augmentations draw from it)
        torch.manual_seed(word)


def step_seed(seed: int, batch: int, rank: int) -> int:
    """A 63-bit seed that differs in all its bits between neighboring batches, ranks and seeds (splitmix64).

    Args:
        seed: The run's seed.
        batch: Number of batches that this process was given before.
        rank: Number of the process.
    """
    word = 0
    for part in (seed, batch, rank):
        word = (word + part + 0x9E3779B97F4A7C15) % 2**64
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        word ^= word >> 31
    return word >> 1
