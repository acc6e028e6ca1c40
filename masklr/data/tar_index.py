"""Local tar shards as a map-style source: an index of their headers, and bytes read in place."""

import glob
import mmap
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from torch import Tensor

from masklr.data.decoding import EXTENSIONS, SampleError, decoded_image

_BLOCK = 512
_MAX_OPEN_SHARDS = 256  # well below the customary limit of 1,024 open files a process


@dataclass
class ShardIndex:
    """Where the samples of one shard lie.

    Args:
        path: The shard.
        keys: Names of the samples, without extension.
        offsets: First byte of each image in the shard.
        sizes: Bytes of each image.
        labels: Class of each image.
        errors: One sentence for each sample that cannot be used, naming shard and sample.
        version: Size and time of the last change (ns), by which a shard that is replaced or cut later is recognized.
    """

    path: str
    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    version: tuple[int, int] = (0, 0)


class TarSource:
    """Samples of several shards, one after the other, each read from its place in its shard.

    Args:
        indices: One for each shard.
        in_chans: 1 or 3.
    """

    def __init__(self, indices: Sequence[ShardIndex], in_chans: int) -> None:
        self.paths = [index.path for index in indices]
        self.versions = {index.path: index.version for index in indices}
        self.shard = np.repeat(np.arange(len(indices), dtype=np.int32), [len(index.keys) for index in indices])
        self.offsets = np.array([offset for index in indices for offset in index.offsets], dtype=np.int64)
        self.sizes = np.array([size for index in indices for size in index.sizes], dtype=np.int64)
        self.labels = np.array([label for index in indices for label in index.labels], dtype=np.int64)
        # Bytes and not a list of str: a million small objects would be copied into every worker page by page.
        self.keys = np.array([os.fsencode(key) for index in indices for key in index.keys])
        if not len(self.keys):
            raise SampleError(f"{', '.join(map(os.path.basename, self.paths))}: no samples.")
        self.num_classes, self.in_chans = int(self.labels.max()) + 1, in_chans
        self._forget_descriptors()

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, row: int) -> str:
        """Shard and sample."""
        return sample_name(self.paths[self.shard[row]], os.fsdecode(self.keys[row]))

    def read(self, row: int) -> tuple[Tensor, int]:
        """See `Source.read`."""
        data = bytearray(int(self.sizes[row]))
        path = self.paths[self.shard[row]]
        try:
            descriptor = self._descriptor(path)
            if _version(descriptor) != self.versions[path]:  # its samples may lie elsewhere now, under other labels
                raise SampleError(f"{self.name(row)}: the shard was changed or replaced since it was indexed.")
            num_read = os.preadv(descriptor, [data], int(self.offsets[row]))
        except OSError as error:
            raise SampleError(f"{self.name(row)}: {error.strerror}.") from None
        if num_read < len(data):
            raise SampleError(f"{self.name(row)}: the shard is cut off.")
        return decoded_image(data, self.in_chans, self.name(row)), int(self.labels[row])

    def _forget_descriptors(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def _descriptor(self, path: str) -> int:
        if self._process != os.getpid():  # a fork: what was inherited belongs to the parent
            self._forget_descriptors()
        with self._lock:
            if path not in self._descriptors:
                if len(self._descriptors) == _MAX_OPEN_SHARDS:
                    os.close(self._descriptors.popitem(last=False)[1])
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._descriptors.move_to_end(path)
            return self._descriptors[path]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_descriptors", "_lock")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget_descriptors()

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():
            for descriptor in self._descriptors.values():
                os.close(descriptor)


def sample_name(path: str, key: str) -> str:
    """How an error names a sample."""
    return f"{os.path.basename(path)}: sample {key}"


def shard_index(path: str) -> ShardIndex:
    """Index of one shard of pairs KEY.jpg (or .jpeg, .png, .webp) and KEY.cls; other members are passed over.

    Reads the headers and the .cls files only. What cannot be used is listed in `errors`: a pair that is not complete, a
    .cls that is not a class index, a shard that ends in the middle.
    """
    index = ShardIndex(path)
    with open(path, "rb") as file:
        index.version = _version(file.fileno())
        if index.version[0] == 0:
            index.errors.append(f"{os.path.basename(path)}: the shard is empty.")
            return index
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as shard:
            members, cut = tar_members(path, shard)
            _pair_up(index, members, cut, shard)
    return index


def pair_keys(path: str) -> list[str] | None:
    """Keys of a shard's samples, in order, if it is a whole tar of nothing but pairs KEY.jpg, KEY.cls; else None.

    Reads the headers only, so that a stream need not be read to be counted.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as shard:
            members, cut = tar_members(path, shard)
    except (OSError, ValueError):  # not local; empty
        return None
    if cut is not None or len(members) % 2:
        return None
    keys, endings = [], {".cls", *EXTENSIONS}
    for (first, _, _), (second, _, _) in zip(members[::2], members[1::2], strict=True):
        dot = first.find(".", first.rfind("/") + 1)
        pair = {first[dot:].lower(), second[dot:].lower()}
        if dot <= first.rfind("/") + 1 or second[:dot] != first[:dot] or len(pair) < 2 or not pair <= endings:
            return None
        if ".cls" not in pair:
            return None
        keys.append(first[:dot])
    return keys if len(set(keys)) == len(keys) else None


def _version(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _pair_up(index: ShardIndex, members: list[tuple[str, int, int]], cut: str | None, shard: mmap.mmap) -> None:
    images: dict[str, tuple[int, int]] = {}
    classes: dict[str, bytes] = {}
    last_key = ""
    for name, offset, size in members:
        start = name.rfind("/") + 1
        dot = name.find(".", start)
        if dot <= start:  # no extension, or a hidden file
            continue
        last_key, extension = name[:dot], name[dot:].lower()
        if extension == ".cls":
            classes[last_key] = shard[offset : offset + size]
        elif extension in EXTENSIONS:
            if last_key in images:
                index.errors.append(f"{sample_name(index.path, last_key)}: more than one image.")
            images[last_key] = (offset, size)
    if cut is not None:
        index.errors.append(f"{sample_name(index.path, last_key)}: {cut}")
    for key, (offset, size) in images.items():
        text = classes.get(key)
        if text is None:
            if cut is None or key != last_key:
                index.errors.append(f"{sample_name(index.path, key)}: no .cls file beside its image.")
        elif not text.strip().isdigit():
            shown = text[:40].decode(errors="replace")
            index.errors.append(f"{sample_name(index.path, key)}: .cls holds {shown!r}, which is not a class index.")
        else:
            index.keys.append(key)
            index.offsets.append(offset)
            index.sizes.append(size)
            index.labels.append(int(text))
    for key in classes.keys() - images.keys():
        if cut is None or key != last_key:
            index.errors.append(f"{sample_name(index.path, key)}: no image ({', '.join(EXTENSIONS)}) beside its .cls.")


def tar_members(path: str, shard: mmap.mmap) -> tuple[list[tuple[str, int, int]], str | None]:
    """Name, first byte and size of each regular file of a tar, and what is wrong with its end, if anything.

    Walks plain headers itself, about 40 times faster than `tarfile`; at the first header of another kind (long names in
    GNU or PAX form, sizes above 8 GiB, links) `tarfile` reads the whole shard.
    """
    members: list[tuple[str, int, int]] = []
    position, end = 0, len(shard)
    while True:
        header = shard[position : position + _BLOCK]
        if len(header) < _BLOCK:
            return members, "the shard is cut off after it."
        if header[0] == 0:
            return members, None if not any(header) else "what follows it is not a tar header."
        kind, magic, octal = header[156], header[257:263], header[124:136].strip(b"\0 ")
        if kind not in b"05\0" or magic[:5] != b"ustar" or not octal.isdigit():
            return _members_by_tarfile(path, end)
        name = header[:100].split(b"\0", 1)[0]
        if magic[5] == 0 and header[345]:
            name = header[345:500].split(b"\0", 1)[0] + b"/" + name
        size = int(octal, 8)
        if kind != 0x35:  # a directory
            members.append((os.fsdecode(name), position + _BLOCK, size))
        position += _BLOCK + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if position > end:
            return members, "the shard is cut off in it."


def _members_by_tarfile(path: str, end: int) -> tuple[list[tuple[str, int, int]], str | None]:
    members: list[tuple[str, int, int]] = []
    position = 0
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                position = member.offset_data + (member.size + _BLOCK - 1) // _BLOCK * _BLOCK
                if member.isreg():
                    members.append((member.name, member.offset_data, member.size))
    except tarfile.TarError as error:
        return members, f"not a whole, uncompressed tar file ({error})."
    return members, "the shard is cut off after it." if position + _BLOCK > end else None


def shard_paths(argument: str, patterns: str | Sequence[str]) -> list[str]:
    """Paths or addresses that patterns stand for, sorted within each pattern.

    `{000..004}` counts, `{a,b}` lists; `*`, `?` and `[...]` match local files. Addresses (`://`) are not matched.

    Args:
        argument: Name of the argument, for errors.
        patterns: One or several.

    Raises:
        FileNotFoundError: A pattern matches no file.

    Example:
        >>> shard_paths("train", "https://host/train-{008..010}.tar")[0]
        'https://host/train-008.tar'
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for expanded in _without_braces(pattern):
            found = [expanded] if "://" in expanded else sorted(glob.glob(os.path.expanduser(expanded)))
            if not found:
                raise FileNotFoundError(f"`{argument}`: no file matches {expanded!r}.")
            paths += found
    if not paths:
        raise FileNotFoundError(f"`{argument}`: no patterns given.")
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"`{argument}`: {twice!r} is matched more than once.")
    return paths


def _without_braces(pattern: str) -> list[str]:
    choices: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        if span := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part):
            first, last = span.groups()
            choices.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
        elif part.startswith("{") and part.endswith("}") and "," in part:
            choices.append(part[1:-1].split(","))
        else:
            choices.append([part])
    return ["".join(chosen) for chosen in product(*choices)]
