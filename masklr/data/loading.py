"""The one LightningDataModule behind all sets of images: splits, batches, ranks, exact resume."""

import logging
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from masklr.data.sampling import EvaluationSampler, TrainingSampler, even_batch_size, held_out_rows
from masklr.data.splits import DecodedImages, Images, Split

log = logging.getLogger(__name__)

SplitName = Literal["train", "validation", "test"]


class Loader(DataLoader):
    """DataLoader without a state: it reads where it stands from the trainer when its first batch is asked for.

    Not before: a module that asks for `trainer.estimated_stepping_batches` in `configure_optimizers` makes Lightning
    begin to iterate before it restores its counters, and worker processes would fetch from the wrong place. The empty
    state tells Lightning that a run can be resumed in the middle of an epoch.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""


class ImageData(pl.LightningDataModule):
    """What all sets of images share; a batch is (images, labels, positions), all exact integers.

    Images are uint8 (B, C, H, W), labels int64 (B,), positions int64 (B,): the place of the sample in its split, the
    same in every run and on every rank. Normalization and augmentation in batches belong to the task, on its device.

    After `setup`, `num_classes`, `image_size` (height, width) and `in_chans` describe the images.

    Args:
        batch_size: Samples in one optimizer step, over all ranks and accumulated batches.
        num_workers: Processes that decode ahead, for each loader; sets that live in memory need none and use none.
        val_fraction: Share of the training split that is held out as validation, in [0, 1).
        split_seed: Seed of what is held out.
        seed: Seed of the order of training samples and of their augmentation.
        predict_split: The split that `predict` runs over.
    """

    num_classes: int
    image_size: tuple[int, int]
    in_chans: int

    def __init__(
        self,
        batch_size: int = 256,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        predict_split: SplitName = "validation",
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"Expected `batch_size` of at least 1, got {batch_size}.")
        if num_workers < 0:
            raise ValueError(f"Expected `num_workers` of at least 0, got {num_workers}.")
        for name, value in (("split_seed", split_seed), ("seed", seed)):
            if value < 0:
                raise ValueError(f"Expected `{name}` of at least 0, got {value}.")
        if predict_split not in ("train", "validation", "test"):
            raise ValueError(f"Expected `predict_split` train, validation or test, got {predict_split!r}.")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.val_fraction = in_unit_interval("val_fraction", val_fraction)
        self.split_seed, self.seed = split_seed, seed
        self.predict_split: SplitName = predict_split
        self.test_fraction = 0.0  # share of the training images that is the test split where there is no other
        self.own_validation = False  # whether `validation_images` returns some
        self._opened: dict[str, Images] = {}
        self.splits: dict[str, Split] = {}

    # What a subclass provides

    def training_images(self) -> Images:
        """All images but those of the published test split."""
        raise NotImplementedError

    def validation_images(self) -> Images | None:
        """Images of a validation split of their own; None holds some of the training images out."""
        return None

    def test_images(self) -> Images | None:
        """Images of the test split; None if there is none of its own."""
        return None

    # Splits

    def setup(self, stage: str | None = None) -> None:
        """Open the splits that the stage needs, once."""
        if stage in (None, "fit"):
            self._rank_batch_size(accumulated=True)
        wanted: dict[str | None, list[SplitName]] = {
            "fit": ["train", "validation"],
            "validate": ["validation"],
            "test": ["test"],
            "predict": [self.predict_split],
        }
        names: list[SplitName] = wanted.get(stage, ["train", "validation"])
        for name in names:
            if name not in self.splits:
                self._open(name)
        self._describe(list(self._opened.values()))

    def _open(self, name: SplitName) -> None:
        own = {"validation": self.validation_images, "test": self.test_images}
        if name in own and (images := own[name]()) is not None:
            self._opened[name] = images
            self.splits[name] = Split(images, np.arange(len(images)))
            return
        if "train" not in self._opened:
            self._opened["train"] = self.training_images()
        images = self._opened["train"]
        rest, test = held_out_rows(len(images), self.test_fraction, self.split_seed)
        val_fraction = 0.0 if self.own_validation else self.val_fraction
        kept, held_out = held_out_rows(len(rest), val_fraction, self.split_seed)
        rows = {"train": rest[kept], "validation": rest[held_out], "test": test}
        self.splits[name] = Split(images, rows[name], self.seed, augmented=name == "train")

    def _describe(self, opened: list[Images]) -> None:
        self.num_classes = max(images.num_classes for images in opened)
        self.image_size, self.in_chans = opened[0].image_size, opened[0].in_chans
        for images in opened[1:]:
            if images.image_size != self.image_size:
                raise ValueError(
                    f"Expected splits of one image size, got {self.image_size} and {images.image_size}; "
                    "pass `image_size` to bring them to one size."
                )

    def teardown(self, stage: str) -> None:
        """Say how many samples were skipped, if any."""
        for name, images in self._opened.items():
            if isinstance(images, DecodedImages) and images.num_skipped:
                log.warning("%s: skipped %d of %d samples that cannot be read.", name, images.num_skipped, len(images))

    # Loaders

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, from where the trainer stands."""
        split, (rank, num_ranks) = self.splits["train"], self._ranks()
        batch_size = self._rank_batch_size(accumulated=True)
        start = None if self.trainer is None else self._place
        sampler = TrainingSampler(split, batch_size, rank=rank, num_ranks=num_ranks, seed=self.seed, start=start)
        return self._loader(split, sampler, batch_size, drop_last=True)

    @property
    def num_train_batches(self) -> int | None:
        """Batches of one rank in one epoch, before `limit_train_batches`; None for a stream."""
        return len(self.splits["train"]) // self._ranks()[1] // self._rank_batch_size(accumulated=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The validation split in order; no loader if nothing is held out."""
        return self._evaluation_loader("validation") if len(self.splits["validation"]) else []

    def test_dataloader(self) -> DataLoader:
        """The test split in order."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """The split `predict_split` in order, without augmentation."""
        return self._evaluation_loader(self.predict_split)

    def unaugmented_train_dataloader(self) -> DataLoader:
        """The training split in order, each sample once over all ranks, without augmentation."""
        return self._evaluation_loader("train")

    def _evaluation_loader(self, name: SplitName) -> DataLoader:
        if name not in self.splits:  # a probe needs the training split in validation too
            self._open(name)
        split, (rank, num_ranks) = self.splits[name], self._ranks()
        if len(split) < num_ranks:
            raise ValueError(f"Expected a {name} split of at least one sample a rank ({num_ranks}), got {len(split)}.")
        split = Split(split.images, split.rows)
        batch_size = even_batch_size(len(split), num_ranks, self._rank_batch_size(accumulated=False))
        return self._loader(split, EvaluationSampler(split, rank=rank, num_ranks=num_ranks), batch_size)

    def _loader(
        self, split: Split, sampler: TrainingSampler | EvaluationSampler, batch_size: int, drop_last: bool = False
    ) -> DataLoader:
        if isinstance(split.images, DecodedImages):
            return self._batches(split, sampler, batch_size, drop_last, self.num_workers)
        # Lightning's advice to add worker processes is wrong for a set in memory: a batch is one indexing.
        warnings.filterwarnings("ignore", message=r".*does not have many workers which may be a bottleneck")
        return self._batches(split, sampler, batch_size, drop_last, num_workers=0)

    def _batches(
        self,
        dataset: Dataset,
        sampler: TrainingSampler | EvaluationSampler | None,
        batch_size: int | None,
        drop_last: bool = False,
        num_workers: int = 0,
    ) -> DataLoader:
        return Loader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=as_it_is,
            pin_memory=self._on_cuda(),
            drop_last=drop_last,
            # Not for streams: their worker processes are told where the run stands when they are started.
            persistent_workers=num_workers > 0 and sampler is not None,
            # Without one of its own, iterating a loader draws from the global generator: a validation or a probe
            # would then change the training that follows.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _ranks(self) -> tuple[int, int]:
        """This process among those that see different data, and their number (tensor-parallel ones see the same)."""
        placed = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (0, 1) if placed is None else (placed["rank"], placed["num_replicas"])

    def _rank_batch_size(self, accumulated: bool) -> int:
        num_ranks = self._ranks()[1]
        accumulation = self.trainer.accumulate_grad_batches if accumulated and self.trainer is not None else 1
        return rank_batch_size(self.batch_size, num_ranks, accumulation)

    def _batches_seen(self) -> int:
        assert self.trainer is not None
        # `ready`, since a checkpoint that is written in `on_train_batch_end` has `completed` one short.
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.ready

    def _place(self) -> tuple[int, int]:
        """Epoch in which the run stands, and how many of its batches were seen."""
        assert self.trainer is not None
        num_batches, limit = self.num_train_batches or 0, self.trainer.limit_train_batches
        shortened = min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)
        return divmod(self._batches_seen(), max(1, shortened))

    def _on_cuda(self) -> bool:
        from pytorch_lightning.accelerators import CUDAAccelerator

        return self.trainer is not None and isinstance(self.trainer.accelerator, CUDAAccelerator)


def as_it_is(batch: Any) -> Any:
    """Collate function of data sets that return whole batches."""
    return batch


def rank_batch_size(batch_size: int, num_ranks: int, accumulation: int) -> int:
    """Samples in one batch of one rank, of a batch size that is that of an optimizer step over all ranks.

    Raises:
        ValueError: The ranks cannot share it evenly.
    """
    if batch_size % (num_ranks * accumulation):
        raise ValueError(
            f"Expected `batch_size` to be a multiple of ranks x accumulated batches, {num_ranks} x {accumulation}, "
            f"got {batch_size}."
        )
    return batch_size // (num_ranks * accumulation)


def in_unit_interval(name: str, value: float) -> float:
    """The value, if it lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"Expected `{name}` in [0, 1), got {value}.")
    return value
