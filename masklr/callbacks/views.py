"""Augmented views of validation images: a function of the image's position, not of its batch or process."""

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn


def augmentation_of(pl_module: pl.LightningModule, given: list[nn.Module] | None) -> nn.Module:
    """The augmentation that is given, or the module's own, `augmentation`.

    Raises:
        ValueError: There is none, or it is empty.
    """
    found: Any = nn.Sequential(*given) if given else getattr(pl_module, "augmentation", None)
    if not isinstance(found, nn.Module) or (isinstance(found, nn.Sequential) and not len(found)):
        raise ValueError(
            f"Expected `augmentation` to draw views with, since {type(pl_module).__name__} has none of its own."
        )
    return found


def positions(seen: int, count: int, trainer: pl.Trainer) -> Tensor:
    """Positions in the split of the next samples of this process; samplers deal them out to processes in turn.

    Args:
        seen: Samples of this process so far.
        count: Samples of its next batch.
        trainer: The trainer, which knows how many processes see different data.
    """
    placed = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return torch.arange(seen, seen + count) * placed["num_replicas"] + placed["rank"]


def evenly_spaced(positions: Tensor, count: int, size: int | None) -> Tensor:
    """Which positions are among `count` evenly spaced ones of a split of this size; of an unknown size the first ones.

    Example:
        >>> evenly_spaced(torch.arange(6), 2, 6)
        tensor([False, False,  True, False, False,  True])
    """
    if size is None:
        return positions < count
    return (positions < size) & ((positions + 1) * count // size > positions * count // size)


def augmented_views(images: Tensor, positions: Tensor, augmentation: nn.Module, num_views: int) -> Tensor:
    """Views (V, B, C, H, W) of images (B, C, H, W), each drawn after seeding from its image's position and its number.

    Images go through the augmentation one at a time, since many transforms draw once a batch. The global generators are
    seeded, torch's, numpy's and Python's: call it where they are put back afterwards.

    Args:
        images: As the loader gives them.
        positions: Positions of the images in their split.
        augmentation: Takes and returns a batch of images; it is put into training mode.
        num_views: Views of each image.
    """
    augmentation.to(images.device).train()
    views = []
    for number in range(num_views):
        drawn = []
        for position, image in zip(positions.tolist(), images, strict=True):
            seed = int(np.random.SeedSequence((position, number)).generate_state(1)[0])
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002 (transforms may draw from it)
            random.seed(seed)
            drawn.append(augmentation(image[None])[0])
        views.append(torch.stack(drawn))
    return torch.stack(views)
