"""Remote tar shards and parquet files, read sample by sample with Hugging Face `datasets`."""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from masklr.data.decoding import EXTENSIONS, SampleError, decoded_image
from masklr.data.tar_index import pair_keys, sample_name


@dataclass(frozen=True)
class Encoded:
    """One sample as it comes from its shard.

    Args:
        name: How an error names it.
        data: The image file; None if the sample has none.
        label: Class index; None if the sample has none.
        problem: What else is wrong with it.
    """

    name: str
    data: bytes | None
    label: int | None
    problem: str | None = None


@dataclass(frozen=True)
class Shards:
    """Shards to be streamed, and which of their samples belong to a split.

    Args:
        paths: Local or remote.
        kind: What they are.
        image_column: Column of a parquet file with the images; None for the only one that can be.
        label_column: Column of a parquet file with the class indices.
        held_out: Share of the samples that is held out, chosen by a hash of shard and sample.
        split_seed: Seed of that hash.
        part: All samples, those held out, or the others.
    """

    paths: tuple[str, ...]
    kind: Literal["webdataset", "parquet"]
    image_column: str | None = None
    label_column: str = "label"
    held_out: float = 0.0
    split_seed: int = 0
    part: Literal["all", "kept", "held out"] = "all"

    def samples(self, path: str) -> Iterator[Encoded]:
        """The split's samples in one shard, in its order."""
        for sample in encoded_samples(path, self.kind, self.image_column, self.label_column):
            if self.part == "all" or (self._is_held_out(sample.name) == (self.part == "held out")):
                yield sample

    def known_length(self, path: str) -> int | None:
        """How many samples of a shard belong to the split, if that can be told without reading it."""
        if self.kind != "webdataset" or "://" in path or (keys := pair_keys(path)) is None:
            return None
        if self.part == "all":
            return len(keys)
        held_out = sum(self._is_held_out(sample_name(path, key)) for key in keys)
        return held_out if self.part == "held out" else len(keys) - held_out

    def _is_held_out(self, name: str) -> bool:
        digest = hashlib.blake2b(f"{self.split_seed}/{name}".encode(errors="surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.held_out * 2**64


def decoded_sample(sample: Encoded, in_chans: int) -> tuple[Tensor, int]:
    """Image and label; `SampleError` names the sample."""
    if sample.problem is not None:
        raise SampleError(f"{sample.name}: {sample.problem}")
    if sample.data is None:
        raise SampleError(f"{sample.name}: no image.")
    if sample.label is None or sample.label < 0:
        raise SampleError(f"{sample.name}: no class index.")
    return decoded_image(bytearray(sample.data), in_chans, sample.name), sample.label


def encoded_samples(path: str, kind: str, image_column: str | None, label_column: str) -> Iterator[Encoded]:
    """Samples of one shard as `datasets` streams them, undecoded; what breaks the stream off is the last of them."""
    key = None
    try:
        for number, row in enumerate(_rows(path, kind)):
            key = str(row.get("__key__", f"{number:06d}"))
            yield _encoded(path, kind, key, row, image_column, label_column)
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        if isinstance(error, (SampleError, FileNotFoundError)):
            raise
        if key is None:
            yield Encoded(os.path.basename(path), None, None, f"the shard cannot be read ({error}).")
        else:
            yield Encoded(sample_name(path, key), None, None, f"the shard cannot be read beyond it ({error}).")


def _rows(path: str, kind: str) -> Iterator[dict[str, Any]]:
    datasets = installed_datasets()
    features = None
    if kind == "webdataset":
        # Said beforehand: otherwise they are guessed from the first samples, which then must be complete and alike.
        images = {extension.removeprefix("."): datasets.Image(decode=False) for extension in EXTENSIONS}
        texts = {name: datasets.Value("string") for name in ("__key__", "__url__")}
        features = datasets.Features({**images, "cls": datasets.Value("int64"), **texts})
    stream = datasets.load_dataset(kind, data_files=[path], split="train", streaming=True, features=features)
    if kind == "parquet" and stream.features is not None:
        stream = stream.decode(False)
    # `iter` and not `for`: inside a worker process the latter deals out shards by its own rule.
    for columns in stream.iter(batch_size=1):
        yield {name: values[0] for name, values in columns.items()}


def _encoded(
    path: str, kind: str, key: str, row: dict[str, Any], image_column: str | None, label_column: str
) -> Encoded:
    name = sample_name(path, key)
    if kind == "webdataset":
        images, label = [row[extension[1:]] for extension in EXTENSIONS if row[extension[1:]]], row["cls"]
        image = images[0] if images else None
    else:
        columns = [column for column, value in row.items() if isinstance(value, dict) and "bytes" in value]
        if image_column is None and len(columns) != 1:
            raise ValueError(f"{path}: expected one column of images, found {columns}; pass `image_column`.")
        for argument, column in (("image_column", image_column or columns[0]), ("label_column", label_column)):
            if column not in row:
                raise SampleError(f"`{argument}`: {path} has no column {column!r}, only {', '.join(row)}.")
        image, label = row[image_column or columns[0]], row[label_column]
    data = image["bytes"] if isinstance(image, dict) else image
    if isinstance(label, (str, bytes)) and label.strip().isdigit():
        label = int(label)
    return Encoded(name, data, label if isinstance(label, int) else None)


def installed_datasets() -> Any:
    """The module `datasets`; ValueError says how to install it."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "Remote shards and parquet files need Hugging Face datasets: pip install 'masklr[stream]'."
        ) from None
    datasets.disable_progress_bars()
    # Otherwise each shard of each pass is reported to the hub, which waits for seconds where there is no network.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets


def shard_kind(argument: str, paths: Sequence[str]) -> Literal["webdataset", "parquet"]:
    """What the files are, by their extension."""
    kinds = {os.path.splitext(path.split("?")[0])[1].lower() == ".parquet" for path in paths}
    if len(kinds) > 1:
        raise ValueError(f"`{argument}`: expected tar shards or parquet files, got both.")
    return "parquet" if kinds.pop() else "webdataset"
