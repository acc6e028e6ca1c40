"""Images as data sets that answer a whole batch at once: from memory, or decoded on the way."""

import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from masklr.data.decoding import SampleError, View
from masklr.data.sampling import Key

log = logging.getLogger(__name__)

# uint8 images (B, C, H, W), int64 labels (B,), int64 positions in the split (B,)
Batch = tuple[Tensor, Tensor, Tensor]
OnError = Literal["raise", "skip"]

MAX_SKIPPED = 0.1
NAMED_SKIPS = 10  # so many unreadable samples are named in the log, the others counted


class Source(Protocol):
    """Images that can be read one by one, each by its row."""

    num_classes: int
    in_chans: int

    def __len__(self) -> int: ...

    def read(self, row: int) -> tuple[Tensor, int]:
        """Uint8 image (C, H, W) at its own size and its label; `SampleError` names the sample."""
        ...

    def name(self, row: int) -> str:
        """How an error names the sample."""
        ...


class Images(Protocol):
    """Images of one size that can be asked for a batch."""

    num_classes: int
    image_size: tuple[int, int]
    in_chans: int

    @property
    def num_skipped(self) -> int:
        """Samples found unreadable so far."""
        ...

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray, draws: Sequence[tuple[int, ...]] | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images, labels and, if some could not be read, the indices into `rows` of those that could.

        `draws` seeds the augmentation of each sample; None gives the view without augmentation.
        """
        ...


@dataclass
class MemoryImages:
    """Images that live in memory.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), 0 to `num_classes` - 1.
        num_classes: Number of classes.
        num_skipped: How many samples were left out as unreadable.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    num_skipped: int = 0

    def __post_init__(self) -> None:
        self.in_chans = self.images.shape[1]
        self.image_size = (self.images.shape[2], self.images.shape[3])

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: np.ndarray, draws: Sequence[tuple[int, ...]] | None) -> tuple[Tensor, Tensor, None]:
        """See `Images.batch`; there is no augmentation, which is the task's on its device."""
        # By numpy: torch's indexing of bytes spreads over its threads, which costs 10 ms and more where cores are
        # shared, against 20 microseconds for 256 images of 32 x 32.
        return torch.from_numpy(self.images.numpy()[rows]), torch.from_numpy(self.labels.numpy()[rows]), None


class DecodedImages:
    """Images that are decoded when asked for, in the process that asks.

    Args:
        source: Where they come from.
        view: How they are brought to one size.
        on_error: `raise` stops at an unreadable sample; `skip` makes the batch smaller and counts it.
        max_skipped: Share of the samples that may be skipped before that is an error, in [0, 1].
    """

    def __init__(self, source: Source, view: View, on_error: OnError, max_skipped: float = MAX_SKIPPED) -> None:
        self.source, self.view, self.on_error, self.max_skipped = source, view, on_error, max_skipped
        self.num_classes, self.in_chans = source.num_classes, source.in_chans
        self.image_size = view.image_size or first_size(source, on_error)
        # Shared, so that what worker processes skip is counted once, by whomever and in however many epochs.
        self.skipped = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_skipped(self) -> int:
        """Samples found unreadable so far, by any worker process of this rank."""
        return int(self.skipped.sum())

    def batch(self, rows: np.ndarray, draws: Sequence[tuple[int, ...]] | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Images.batch`."""
        images, labels, kept = [], [], []
        for i, row in enumerate(rows.tolist()):
            try:
                image, label = self.source.read(row)
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                self._count(row, error)
                continue
            image = self.view(image, None if draws is None else draws[i])
            if tuple(image.shape[1:]) != self.image_size:
                raise SampleError(mixed_sizes(self.source.name(row), image, self.image_size))
            images.append(image)
            labels.append(label)
            kept.append(i)
        if not images:
            raise SampleError(f"{self.source.name(int(rows[0]))}: no image of its batch of {len(rows)} can be read.")
        return torch.stack(images), torch.tensor(labels), torch.tensor(kept) if len(kept) < len(rows) else None

    def _count(self, row: int, error: SampleError) -> None:
        if not self.skipped[row]:
            self.skipped[row] = True
            if self.num_skipped <= NAMED_SKIPS:
                log.warning("Skipped %s", error)
            check_skipped(self.num_skipped, len(self), self.max_skipped, str(error))


class Split(Dataset[Batch]):
    """Some rows of a set of images, in batches; a sample's position in it is 0 to n - 1.

    Args:
        images: The set.
        rows: int64 (n,), the set's rows that belong to the split.
        seed: Seed of per-sample augmentation.
        augmented: Whether samples are augmented, each from (seed, epoch, position).
    """

    def __init__(self, images: Images, rows: np.ndarray, seed: int = 0, augmented: bool = False) -> None:
        self.images, self.rows, self.seed, self.augmented = images, rows, seed, augmented

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The batch of these samples; a key is (epoch, position), or a position in epoch 0."""
        pairs = np.asarray(keys, dtype=np.int64)
        if pairs.ndim == 1:
            pairs = np.stack([np.zeros_like(pairs), pairs], axis=1)
        positions = pairs[:, 1]
        draws = [(self.seed, epoch, position) for epoch, position in pairs.tolist()] if self.augmented else None
        images, labels, kept = self.images.batch(self.rows[positions], draws)
        position = torch.from_numpy(np.ascontiguousarray(positions))
        return images, labels, position if kept is None else position[kept]

    def __getitem__(self, key: Key) -> Batch:
        """One sample: image (C, H, W), label and position as scalars."""
        images, labels, positions = self.__getitems__([key])
        return images[0], labels[0], positions[0]


def check_skipped(num_skipped: int, num_samples: int, max_skipped: float, last: str) -> None:
    """Raise if more samples were skipped than may be.

    Args:
        num_skipped: How many were.
        num_samples: Out of how many.
        max_skipped: The share that may be skipped.
        last: What is wrong with one of them.
    """
    if num_skipped > max_skipped * num_samples:
        raise SampleError(
            f"Expected at most the share `max_skipped` = {max_skipped:g} of samples that cannot be used, got "
            f"{num_skipped} of {num_samples}; the last is {last}"
        )


def first_size(source: Source, on_error: OnError) -> tuple[int, int]:
    """Height and width of the first image that can be read."""
    for row in range(len(source)):
        try:
            image, _ = source.read(row)
        except SampleError:
            if on_error == "raise":
                raise
            continue
        return image.shape[1], image.shape[2]
    raise SampleError("None of the images can be read.")


def mixed_sizes(name: str, image: Tensor, size: tuple[int, int]) -> str:
    """Sentence for an image whose size is not that of the others."""
    height, width = image.shape[1:]
    return (
        f"{name}: {height} x {width} pixels where others have {size[0]} x {size[1]}; "
        "pass `image_size` to bring them to one size."
    )


def decoded_into_memory(
    source: Source, view: View, on_error: OnError, title: str, max_skipped: float = MAX_SKIPPED
) -> MemoryImages:
    """Read a whole source once; unreadable samples are an error, or left out and counted.

    Args:
        source: Where the images come from.
        view: How they are brought to one size; its augmentation is not used.
        on_error: What an unreadable sample does.
        title: What the progress bar says.
        max_skipped: Share of the samples that may be left out before that is an error, in [0, 1].
    """
    from tqdm.auto import tqdm

    native = first_size(source, on_error)
    size = view.image_size or native
    images = torch.empty((len(source), source.in_chans, *size), dtype=torch.uint8)
    labels = torch.empty(len(source), dtype=torch.int64)
    errors: dict[int, SampleError] = {}

    def read(rows: range) -> int:
        for row in rows:
            try:
                image, label = source.read(row)
            except SampleError as error:
                if on_error == "raise":
                    raise
                errors[row] = error
                continue
            image = view(image, None)
            if tuple(image.shape[1:]) != size:
                raise SampleError(mixed_sizes(source.name(row), image, size))
            images[row], labels[row] = image, label
        return len(rows)

    chunks = [range(start, min(start + 256, len(source))) for start in range(0, len(source), 256)]
    # Decoders let go of the interpreter's lock, but for small images threads wait for it longer than they work.
    pool = ThreadPoolExecutor(1 if math.prod(native) < 128 * 128 else min(4, len(os.sched_getaffinity(0))))
    hidden = True if len(source) < 5000 else None  # None: where nobody looks, in a file
    with pool, tqdm(total=len(source), desc=title, unit=" images", disable=hidden, leave=False) as bar:
        try:
            for count in pool.map(read, chunks):
                bar.update(count)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if errors:
        for row in sorted(errors)[:NAMED_SKIPS]:
            log.warning("Skipped %s", errors[row])
        log.warning("%s: skipped %d of %d samples that cannot be read.", title, len(errors), len(source))
        kept = torch.tensor([row not in errors for row in range(len(source))])
        images, labels = images[kept], labels[kept]
        if not len(images):
            raise SampleError(f"{title}: none of the {len(source)} samples can be read.")
        check_skipped(len(errors), len(source), max_skipped, str(errors[max(errors)]))
    return MemoryImages(images, labels, source.num_classes, num_skipped=len(errors))


def images_of(
    source: Source,
    view: View,
    *,
    in_memory: Literal["auto"] | bool,
    max_memory_bytes: int,
    on_error: OnError,
    title: str,
    max_skipped: float = MAX_SKIPPED,
) -> MemoryImages | DecodedImages:
    """The source in memory if asked for or, on `auto`, if it fits; decoded on the way otherwise."""
    if in_memory == "auto":
        height, width = view.image_size or first_size(source, on_error)
        num_bytes = len(source) * source.in_chans * height * width
        in_memory = view.random_resized_crop is None and num_bytes <= max_memory_bytes
    if in_memory:
        return decoded_into_memory(source, view, on_error, title, max_skipped)
    return DecodedImages(source, view, on_error, max_skipped)
