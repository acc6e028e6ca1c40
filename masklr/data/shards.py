"""Tar shards of image and class, and their remote and parquet kin."""

import logging
from collections.abc import Callable
from typing import Literal

from torch.utils.data import DataLoader

from masklr.data.decoding import Interpolation, SampleError, View, size_pair
from masklr.data.loading import ImageData, SplitName
from masklr.data.remote_shards import Shards, decoded_sample, installed_datasets, shard_kind
from masklr.data.splits import MAX_SKIPPED, NAMED_SKIPS, Images, OnError, check_skipped, images_of
from masklr.data.streams import StreamBatches
from masklr.data.tar_index import TarSource, shard_index, shard_paths

log = logging.getLogger(__name__)


class ShardedImages(ImageData):
    """Images in tar shards, as pairs KEY.jpg (.jpeg, .png, .webp) and KEY.cls, the class index as text.

    Local tars are indexed (0.3 s for 50,000 pairs) and read in place: all that holds for a folder of files holds for
    them. Addresses (`https://`, `hf://`, `s3://`) and parquet files are streamed with Hugging Face `datasets`: no
    length, so the trainer needs `max_steps`; samples are shuffled in a buffer; a resumed run reads past what it has
    seen.

    Args:
        train: Shards of the training split, one pattern or several: `*`, `?`, `[...]`, `{000..004}`, `{a,b}`.
        test: Shards of the test split; None if there is none.
        val: Shards of a validation split; None holds `val_fraction` of the training samples out. For a stream the
            latter means to read all training shards at each validation.
        num_classes: Number of classes; None takes the largest class index in the training split plus one, which a
            stream cannot tell.
        image_size: Pixels, one number or (height, width); None keeps the images as they are, which must be of one size.
        in_chans: 1 or 3; images of the other kind are converted.
        streaming: Whether to read from first to last instead of in place; `auto` for addresses and parquet files.
        shuffle_buffer: Encoded samples of a stream that wait to be drawn, in each worker process.
        image_column: Column of a parquet file with the images; None if it is the only one.
        label_column: Column of a parquet file with the class indices.
        in_memory: Whether the decoded images live in memory; `auto` does that up to `max_memory_bytes`, for local tars.
        max_memory_bytes: Bound for `auto`, for each split, in bytes of decoded images.
        random_resized_crop: Range of the share of the area that a random crop of a training image keeps (MAE: 0.2, 1);
            None for none. Crops are cut from the images at full size, by the worker processes, so not in memory.
        interpolation: How images are resized, always with antialiasing.
        center_fraction: Share of the shorter side that the central crop keeps outside training, in (0, 1].
        on_error: `raise` stops at a sample that cannot be used; `skip` leaves it out and logs how many.
        max_skipped: Share of a split's samples that `skip` may leave out before that is an error, in [0, 1]; of a
            stream, of the samples read so far, once they are 1,000.
        batch_size: Samples in one optimizer step, over all ranks and accumulated batches.
        num_workers: Processes that decode ahead, for each loader; a set in memory uses none.
        val_fraction: Share of the training split that is held out as validation, in [0, 1).
        split_seed: Seed of what is held out.
        seed: Seed of the order of training samples and of their crops.
        predict_split: The split that `predict` runs over.
    """

    def __init__(
        self,
        train: str | list[str],
        test: str | list[str] | None = None,
        val: str | list[str] | None = None,
        num_classes: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        in_chans: Literal[1, 3] = 3,
        streaming: Literal["auto"] | bool = "auto",
        shuffle_buffer: int = 4096,
        image_column: str | None = None,
        label_column: str = "label",
        in_memory: Literal["auto"] | bool = "auto",
        max_memory_bytes: int = 2**30,
        random_resized_crop: tuple[float, float] | None = None,
        interpolation: Interpolation = "bicubic",
        center_fraction: float = 1.0,
        on_error: OnError = "raise",
        max_skipped: float = MAX_SKIPPED,
        batch_size: int = 256,
        num_workers: int = 1,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        predict_split: SplitName = "validation",
    ) -> None:
        super().__init__(batch_size, num_workers, val_fraction, split_seed, seed, predict_split)
        if in_chans not in (1, 3):
            raise ValueError(f"Expected `in_chans` 1 or 3, got {in_chans}.")
        if shuffle_buffer < 1:
            raise ValueError(f"Expected `shuffle_buffer` of at least 1, got {shuffle_buffer}.")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"Expected `num_classes` of at least 1, got {num_classes}.")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"Expected `on_error` raise or skip, got {on_error!r}.")
        if not 0 <= max_skipped <= 1:
            raise ValueError(f"Expected `max_skipped` in [0, 1], got {max_skipped}.")
        if random_resized_crop is not None and in_memory is True:
            raise ValueError("Expected `in_memory` false or auto beside `random_resized_crop`, got true.")
        self.view = View(size_pair(image_size), interpolation, center_fraction, random_resized_crop)
        given = {"train": train, "validation": val, "test": test}
        arguments = {"train": "train", "validation": "val", "test": "test"}
        self.paths: dict[str, list[str]] = {
            name: shard_paths(arguments[name], patterns) for name, patterns in given.items() if patterns is not None
        }
        self.own_validation = val is not None
        self.in_chans = in_chans
        self._num_classes = num_classes
        self._in_memory, self._max_memory_bytes, self._on_error = in_memory, max_memory_bytes, on_error
        self._max_skipped = max_skipped
        self.shuffle_buffer, self._columns = shuffle_buffer, (image_column, label_column)
        self._kinds = {name: shard_kind(arguments[name], paths) for name, paths in self.paths.items()}
        self.streaming = self._streamed(streaming)
        self._streams: list[StreamBatches] = []
        if self.streaming:
            installed_datasets()
            if in_memory is True:
                raise ValueError("Expected `in_memory` false or auto for a stream, got true.")
            if num_classes is None:
                raise ValueError("Expected `num_classes` for a stream, which cannot tell it, got None.")

    def _streamed(self, streaming: Literal["auto"] | bool) -> bool:
        paths = [path for paths in self.paths.values() for path in paths]
        must = any("://" in path for path in paths) or "parquet" in self._kinds.values()
        if streaming is False and must:
            raise ValueError("Expected `streaming` true or auto for addresses and parquet files, got false.")
        return must if streaming == "auto" else streaming

    # Local tars

    def training_images(self) -> Images:
        """Samples of `train`."""
        return self._indexed("train")

    def validation_images(self) -> Images | None:
        """Samples of `val`, if given."""
        return self._indexed("validation") if "validation" in self.paths else None

    def test_images(self) -> Images | None:
        """Samples of `test`, if given."""
        return self._indexed("test") if "test" in self.paths else None

    def _indexed(self, name: str) -> Images:
        indices = [shard_index(path) for path in self.paths[name]]
        errors = [error for index in indices for error in index.errors]
        if errors and self._on_error == "raise":
            others = f" ({len(errors) - 1} more like it.)" if len(errors) > 1 else ""
            raise SampleError(errors[0] + others)
        for error in errors[:NAMED_SKIPS]:
            log.warning("Skipped %s", error)
        if errors:
            log.warning("%s: skipped %d samples while indexing %d shards.", name, len(errors), len(indices))
        source = TarSource(indices, self.in_chans)
        if errors:
            check_skipped(len(errors), len(source) + len(errors), self._max_skipped, errors[-1])
        if self._num_classes is not None:
            if source.num_classes > self._num_classes:
                row = int(source.labels.argmax())
                raise SampleError(
                    f"{source.name(row)}: class {source.labels[row]}, but `num_classes` is {self._num_classes}."
                )
            source.num_classes = self._num_classes
        return images_of(
            source,
            self.view,
            in_memory=self._in_memory,
            max_memory_bytes=self._max_memory_bytes,
            on_error=self._on_error,
            max_skipped=self._max_skipped,
            title=name,
        )

    # Streams

    def setup(self, stage: str | None = None) -> None:
        """Index the shards, or look at the first sample of a stream."""
        if not self.streaming:
            super().setup(stage)
            return
        if stage in (None, "fit"):
            self._rank_batch_size(accumulated=True)
            trainer = self.trainer
            if trainer is not None and trainer.max_steps == -1 and not isinstance(trainer.limit_train_batches, int):
                raise ValueError("Expected the trainer's `max_steps` for a stream, which has no length, got -1.")
        assert self._num_classes is not None
        self.num_classes = self._num_classes
        self.image_size = self.view.image_size or self._first_size()

    def _first_size(self) -> tuple[int, int]:
        shards = self._shards("train")
        for path in shards.paths:
            for sample in shards.samples(path):
                try:
                    image, _ = decoded_sample(sample, self.in_chans)
                except SampleError:
                    if self._on_error == "raise":
                        raise
                    continue
                return image.shape[1], image.shape[2]
        raise SampleError(f"{shards.paths[0]}: no image can be read.")

    def _shards(self, name: SplitName) -> Shards:
        own = name if name in self.paths else "train"
        part: Literal["all", "kept", "held out"] = "all"
        if name == "test" and own != name:
            raise ValueError("Expected `test`, the shards of the test split, got None.")
        if not self.own_validation and name != "test":
            part = "kept" if name == "train" else "held out"
        image_column, label_column = self._columns
        return Shards(
            tuple(self.paths[own]),
            self._kinds[own],
            image_column,
            label_column,
            self.val_fraction,
            self.split_seed,
            part,
        )

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, from where the trainer stands."""
        if not self.streaming:
            return super().train_dataloader()
        return self._stream("train", endless=True, start=None if self.trainer is None else self._batches_seen)

    @property
    def num_train_batches(self) -> int | None:
        """Batches of one rank in one epoch, before `limit_train_batches`; None for a stream."""
        return None if self.streaming else super().num_train_batches

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The validation split in order; no loader if nothing is held out."""
        if self.streaming and not self.own_validation and self.val_fraction == 0:
            return []
        return super().val_dataloader() if not self.streaming else self._stream("validation")

    def _evaluation_loader(self, name: SplitName) -> DataLoader:
        return self._stream(name) if self.streaming else super()._evaluation_loader(name)

    def _stream(self, name: SplitName, endless: bool = False, start: Callable[[], int] | None = None) -> DataLoader:
        rank, num_ranks = self._ranks()
        stream = StreamBatches(
            self._shards(name),
            self.view,
            self.in_chans,
            self._on_error,
            self._rank_batch_size(accumulated=endless),
            rank=rank,
            num_ranks=num_ranks,
            endless=endless,
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer,
            start=start,
            max_skipped=self._max_skipped,
        )
        self._streams.append(stream)
        return self._batches(stream, None, None, num_workers=self.num_workers)

    def teardown(self, stage: str) -> None:
        """Say how many samples were skipped, if any."""
        super().teardown(stage)
        if skipped := sum(stream.num_skipped for stream in self._streams):
            log.warning("Streams: skipped samples that cannot be read %d times, counting each pass.", skipped)
        self._streams = []
