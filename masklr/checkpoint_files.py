"""Which checkpoint a path means, and whether a file is whole: without reading what it holds, and without Lightning."""

import contextlib
import hashlib
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

_ARCHIVE = b"PK\x03\x04"
_PICKLE = b"\x80"  # how torch saved before 1.6, with no sign of its end
LABEL = b"masklr sha256 "
COMMENT_SIZE = len(LABEL) + 64  # bytes of the comment of a checkpoint's archive: the checksum of all before it


def damage(path: Path) -> str | None:
    """What is wrong with a file, as the end of a sentence; None if its checksum is right or it never had one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - COMMENT_SIZE))
        comment = file.read()
        if comment.startswith(LABEL):
            file.seek(0)
            digest = _digest(file, size - COMMENT_SIZE)
            return None if comment == LABEL + digest else "is damaged: its checksum differs"
        file.seek(0)
        begin = file.read(len(_ARCHIVE))
    if not begin:
        return "is torn or damaged: it is empty"
    if begin.startswith(_PICKLE):
        return None
    if begin != _ARCHIVE:
        return "is no checkpoint: it is no zip archive"
    # What torch writes ends with the archive's own end, of 22 bytes; their last two say that no comment follows.
    if comment[-2:] != b"\0\0" or comment[-22:-18] != b"PK\x05\x06":
        return "is torn or damaged: its end is missing"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.comment:  # torch writes none
                return "is damaged: its checksum is missing"
            if archive.testzip() is not None:
                return "is damaged"
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError):
        return "is torn or damaged: it is no whole archive"
    return None


def newest_sound(folder: Path) -> Path | None:
    """The sound checkpoint of the highest step in a folder; torn and damaged ones are passed over, with a warning.

    Args:
        folder: A run's `checkpoints`.

    Returns:
        Its path, or None if there is no sound one.
    """
    for path in checkpoints(folder):
        if (problem := damage(path)) is None:
            return path
        log.warning("Passed over %s, which %s.", path, problem)
    return None


def sound_checkpoint(source: Path) -> Path:
    """The checkpoint that a path means: the newest sound one of a run's folder, or the file itself, if it is sound.

    Raises:
        FileNotFoundError: There is no such file or folder, or no sound checkpoint in it.
        ValueError: The file is torn or damaged.
    """
    if not source.exists():
        raise FileNotFoundError(f"Expected a checkpoint or a run's folder, but there is no {source}.")
    if source.is_dir():
        folder = source / "checkpoints"
        checkpoint = newest_sound(folder if folder.is_dir() else source)
        if checkpoint is None:
            raise FileNotFoundError(f"Expected a run's folder with a sound checkpoint, but there is none in {source}.")
        return checkpoint
    if source.suffix == ".ckpt" and (problem := damage(source)) is not None:
        raise ValueError(f"Expected a sound checkpoint, got {source}, which {problem}.")
    return source


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, that of the highest step first; two names of one file count once."""
    found: dict[tuple[int, int], tuple[int, int, Path]] = {}
    for path in sorted(folder.glob("*.ckpt")):
        with contextlib.suppress(FileNotFoundError):  # a link to nothing; removed by another process
            if path.name.startswith(".") or not path.is_file():
                continue
            status = path.stat()
            entry = (step_of(path), status.st_mtime_ns, path)
            file = (status.st_dev, status.st_ino)
            found[file] = max(entry, found.get(file, entry), key=lambda e: e[:2])
    return [path for _, _, path in sorted(found.values(), reverse=True)]


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says; -1 if it says none.

    Example:
        >>> step_of(Path("step=00000100.ckpt")), step_of(Path("last.ckpt"))
        (100, -1)
    """
    found = re.search(r"step=(\d+)", path.name)
    return int(found[1]) if found else -1


def _digest(file: IO[bytes], size: int) -> bytes:
    total = hashlib.sha256()
    for chunk in _chunks(file, size):
        total.update(chunk)
    return total.hexdigest().encode()


def _chunks(file: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(size, 2**22))):
        size -= len(chunk)
        yield chunk
