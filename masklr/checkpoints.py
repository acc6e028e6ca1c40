"""Checkpoints that are whole or not there, that show when a bit has flipped, and that can run no code."""

import contextlib
import hashlib
import os
import pickle
import re
from pathlib import Path
from typing import IO, Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from masklr.checkpoint_files import COMMENT_SIZE, LABEL, damage


class WholeCheckpointIO(CheckpointIO):
    """Writes a checkpoint whole or not at all, with a checksum; reads only tensors and plain values.

    The file is written under a temporary name in the same folder, flushed to the disk and renamed, so that a process
    killed at any moment leaves the checkpoint before. It is an ordinary file of `torch.save`, a zip archive, whose zip
    comment is the SHA-256 of all that stands before it: one file, so that no half of a pair can be missing, and
    `torch.load` reads it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `path`, whole or not at all."""
        if storage_options is not None:
            raise TypeError("Expected no `storage_options`, which belong to remote file systems.")
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            sweep(target.parent)
            write(checkpoint, target)
        except OSError as error:
            raise OSError(
                f"Cannot write the checkpoint {target}: {error.strerror or error}; the one before is untouched."
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What `read` returns; nothing but tensors and plain values is read, whatever `weights_only` says."""
        return read(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the file, if it is there."""
        Path(path).unlink(missing_ok=True)


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all, with its checksum.

    Args:
        checkpoint: Tensors and plain values, nested.
        path: Where; a file there is replaced.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            archive = _Archive(file)
            torch.save(checkpoint, archive)  # type: ignore[arg-type]
            archive.finish()
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # of a file system that has become read-only
            temporary.unlink()


def read(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's content, after its checksum was compared.

    Args:
        path: A checkpoint of masklr's, or any file of `torch.save`, which has no checksum.
        map_location: As in `torch.load`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is torn or damaged, or reading it would run code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint, but there is no file {path}.")
    if (problem := damage(path)) is not None:
        raise ValueError(f"Expected a sound checkpoint, got {path}, which {problem}.")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise ValueError(
            f"Expected a checkpoint of tensors and plain values, got {path}, which asks for code to be run{what}."
        ) from error
    except Exception as error:  # torch's reader raises of every kind when bytes are not what they should be
        raise ValueError(f"Expected a sound checkpoint, got {path}, which torch cannot read.") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"Expected a checkpoint, got {path}, which holds a {type(checkpoint).__name__}.")
    return checkpoint


def sweep(folder: Path) -> None:
    """Remove temporary files, `.NAME.PID`, of processes that were killed while they wrote NAME into a folder."""
    for path in folder.glob(".*.*"):
        pid = path.name.rpartition(".")[2]
        if pid.isdigit() and int(pid) != os.getpid() and not _is_alive(int(pid)):
            path.unlink(missing_ok=True)


def link(path: Path, name: Path) -> None:
    """Make `name` another name of a checkpoint, at once and at no cost of space; a file there is replaced."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:  # some file systems have no hard links
            temporary.symlink_to(path.name)
        temporary.replace(name)
    finally:
        temporary.unlink(missing_ok=True)  # renaming one name of a file to another of it does nothing


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot
        pass
    finally:
        os.close(descriptor)


class _Archive:
    """A file to which `torch.save` writes its archive, and which then gets the checksum as the archive's comment."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._end = file, hashlib.sha256(), b""

    def write(self, data: Any) -> int:
        """Write on, two bytes late: the last two say how long the comment is."""
        view = memoryview(data).cast("B")
        if len(view) >= 2:
            self._put(self._end)
            self._put(view[:-2])
            self._end = bytes(view[-2:])
        else:
            joined = self._end + bytes(view)
            self._put(joined[:-2])
            self._end = joined[-2:]
        return len(view)

    def flush(self) -> None:
        """Nothing: the caller flushes the file."""

    def finish(self) -> None:
        """Write the comment."""
        if self._end != b"\0\0":
            raise RuntimeError("Expected torch.save to end with a zip archive without a comment.")
        self._put(COMMENT_SIZE.to_bytes(2, "little"))
        self._file.write(LABEL + self._hash.hexdigest().encode())

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
