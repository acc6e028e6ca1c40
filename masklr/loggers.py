"""Run folders, who may write into them, and the loggers that do."""

import contextlib
import csv
import errno
import io
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment

from masklr.callbacks.recording import check_still_there, written_whole
from masklr.processes import start_of

log = logging.getLogger(__name__)


def new_run_folder(runs: Path, name: str, command: str) -> Path:
    """Make and return `runs/name/version_N`, N after the largest there; `command_N` for commands other than fit.

    Making the folder is what takes the number, so two runs that start together never share one. Further processes of
    a run take the folder of the first from the environment.

    Raises:
        ValueError: The folder cannot be made.
    """
    if (rank := process_rank()) != "0":
        # Launchers that start all processes at once pass no folder on; only rank 0 writes, and Lightning broadcasts.
        return Path(os.environ.get("MASKLR_RUN_FOLDER", runs / name / f"rank_{rank}"))
    prefix = "version" if command == "fit" else command
    parent = runs / name
    try:
        taken = [path.name.removeprefix(f"{prefix}_") for path in parent.glob(f"{prefix}_*")]
        number = 1 + max((int(suffix) for suffix in taken if suffix.isdecimal()), default=-1)
        while True:
            parent.mkdir(parents=True, exist_ok=True)
            folder = parent / f"{prefix}_{number}"
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1
            except FileNotFoundError:  # a run beside this one has failed, and taken the empty parent with it
                continue
    except OSError as error:
        raise ValueError(f"Cannot make a run folder in {parent} (`runs`, `name`): {error.strerror}.") from error
    os.environ["MASKLR_RUN_FOLDER"] = str(folder)
    return folder


def process_rank() -> str:
    """This process's number among those of a run, as its launcher says."""
    return os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or "0"


class RunLock:
    """A run's folder belongs to one process at a time: `run.lock` in it names the process, and goes with it.

    What a killed process left is taken over: one of this host that no longer lives, or an earlier life of this SLURM
    job. A process of another host cannot be seen, so its lock has to be removed by hand.

    Args:
        folder: The run's folder.

    Raises:
        ValueError: Another process has the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        self.owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": start_of(os.getpid()),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        }
        mine = self.path.with_name(f".run.lock.{os.getpid()}")
        try:
            mine.write_text(json.dumps(self.owner))
            for _ in range(10):
                try:
                    os.link(mine, self.path)  # fails if there is one, at any moment
                    return
                except FileExistsError:
                    self._remove_if_left()
            raise ValueError(f"Expected a run folder that no other process takes, got {folder}.")
        except OSError as error:
            raise OSError(f"Cannot write into the run's folder {folder}: {error.strerror or error}.") from error
        finally:
            with contextlib.suppress(OSError):
                mine.unlink()

    def _remove_if_left(self) -> None:
        try:
            other = json.loads(self.path.read_text())
        except (OSError, ValueError, RecursionError):
            other = {}
        other = other if isinstance(other, dict) else {}
        if self._lives(other):
            raise ValueError(
                f"Expected a run folder that no other process uses, but {self.path.parent} is in use by process "
                f"{other.get('pid')} on {other.get('host')}; if that is no more, remove {self.path}."
            )
        self.path.unlink(missing_ok=True)

    def _lives(self, other: dict[str, Any]) -> bool:
        if other.get("host") != self.owner["host"]:
            same_job = other.get("slurm_job") is not None and other["slurm_job"] == self.owner["slurm_job"]
            return bool(other) and not same_job
        pid = other.get("pid")
        if not isinstance(pid, int) or pid == os.getpid():
            return False
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        # A number can be given again to another process, which then began at another time. Where the kernel does not
        # say when, both are None.
        return start_of(pid) == other.get("started")

    def release(self) -> None:
        """Give the folder back."""
        with contextlib.suppress(OSError):  # the folder is gone, or can no longer be written into
            self.path.unlink()


class MetricsCSV(CSVLogger):
    """Lightning's CSVLogger, whose `metrics.csv` outlives a resume and can be read at any moment.

    Rows are added at the end in one write; when a new key comes, the file is written anew, whole or not at all.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> "_Rows":
        """The writer."""
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir)
        return self._experiment  # type: ignore[return-value]

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return self.experiment.num_rows

    def keep_rows(self, count: int) -> None:
        """Drop all rows but the first ones."""
        self.experiment.keep(count)


class _Rows(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._path = Path(self.metrics_file_path)
        rows = self._read()
        self.num_rows = len(rows)

    def _check_log_dir_exists(self) -> None:
        """Lightning would remove what is there."""

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        try:
            with self._path.open(newline="") as file:
                reader = csv.DictReader(file)
                rows = list(reader)
                self.metrics_keys = sorted(reader.fieldnames or [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"Expected {self._path} to be a table of comma-separated values: {error}.") from error
        return [row for row in rows if None not in row]

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics_dict, step)
        self.num_rows += 1

    def save(self) -> None:
        """Write what was logged since the last time."""
        if not self.metrics:
            return
        check_still_there(self._path.parent)
        if not self._path.exists() or self._record_new_keys():
            self._record_new_keys()
            self._write([*self._read_keeping_keys(), *self.metrics])
        else:
            self._append(self._text(self.metrics).encode())
        self.metrics = []

    def _append(self, rows: bytes) -> None:
        """Add rows at the end, all or none of them."""
        try:
            with self._path.open("ab", buffering=0) as file:
                end = file.tell()
                try:
                    if file.write(rows) < len(rows):  # the disk is full
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise OSError(f"Cannot write {self._path}: {error.strerror or error}.") from error

    def keep(self, count: int) -> None:
        """Drop all rows but the first ones, and with them the keys that no row has."""
        self.save()
        rows = self._read()[:count]
        if len(rows) < count:
            missing = count - len(rows)
            log.warning(
                "%s has %d rows, %d fewer than when the checkpoint was written.", self._path, len(rows), missing
            )
        self.num_rows = len(rows)
        if self._path.exists():
            self.metrics_keys = sorted({key for row in rows for key, value in row.items() if value})
            self._write(rows)

    def _read_keeping_keys(self) -> list[dict[str, Any]]:
        keys = self.metrics_keys
        rows = self._read()
        self.metrics_keys = keys
        return rows

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with written_whole(self._path) as path:
            path.write_bytes((self._text([]) + self._text(rows)).encode() if rows else b"")

    def _text(self, rows: list[dict[str, Any]]) -> str:
        """Rows as CSV; the header for none."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.metrics_keys, extrasaction="ignore")
        writer.writerows(rows) if rows else writer.writeheader()
        return text.getvalue()


def run_loggers(folder: Path, wandb: str, wandb_id: str | None = None) -> list[Logger]:
    """CSV and, unless it is off, wandb, both in a run's folder.

    Args:
        folder: The run's folder, runs/name/version.
        wandb: `offline`, `off`, or `project[/entity]` to log online.
        wandb_id: The run of wandb's that goes on; None begins one.
    """
    name, version = folder.parent.name, folder.name
    metrics = MetricsCSV(folder.parent.parent, name=name, version=version)
    loggers: list[Logger] = [metrics]
    if wandb == "off":
        return loggers
    from wandb import Settings

    offline = wandb == "offline"
    if offline:
        os.environ.setdefault("WANDB_SILENT", "true")  # settings come too late for what wandb.init itself says
    project, _, entity = ("masklr", "", "") if offline else wandb.partition("/")
    logger = WandbLogger(
        name=f"{name}/{version}",
        save_dir=folder,
        project=project,
        entity=entity or None,
        offline=offline,
        id=wandb_id,
        # An offline run has nothing to say on the terminal; an online one shows its link.
        settings=Settings(silent=offline),
    )
    # Lightning hands on an option that wandb has dropped and warns of, on every run.
    logger._wandb_init.pop("anonymous", None)
    return [*loggers, logger]
