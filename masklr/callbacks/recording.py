"""The one way out of every callback: scalars, spectra and pictures go to the loggers and into the run's folder.

Callbacks measure at their own steps. `pl_module.log` would hold a value back until the next multiple of
`log_every_n_steps` and put it on that step, so values are handed to each logger here, at the step of their measurement.
"""

import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Recording:
    """Records what one callback measures. Every process makes one, in `setup`; rank 0 writes.

    Besides what it is given, it logs `cost/{name}/seconds`, the time of the measurement, and `cost/{name}/share`, the
    share of the run so far that went into this callback's measurements.

    Args:
        trainer: The trainer of the run.
        name: Name of the callback in keys and folders, such as `weight_spectrum`.
    """

    def __init__(self, trainer: pl.Trainer, name: str) -> None:
        self.trainer, self.name = trainer, name
        self.folder = run_folder(trainer)
        self._has_written = False
        self._began = time.perf_counter()
        self._total_seconds = 0.0
        self._seconds = 0.0

    @contextmanager
    def measurement(self) -> Iterator[None]:
        """Time what happens inside, and leave every generator and `training` flag as it was found."""
        # What the device still has to do for the training step is not part of the measurement.
        _synchronize(self.trainer.strategy.root_device)
        began = time.perf_counter()
        with undisturbed(self.trainer.lightning_module):
            yield
        self._seconds += time.perf_counter() - began

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars at a step, with the cost of the measurements since the last call."""
        self._total_seconds += self._seconds
        share = self._total_seconds / (time.perf_counter() - self._began)
        values = {
            **values,
            f"cost/{self.name}/seconds": self._seconds,
            f"cost/{self.name}/share": share,
        }
        self._seconds = 0.0
        # On every process, so that ModelCheckpoint and EarlyStopping decide alike.
        self.trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                logger.log_metrics(dict(values), step=step)
                logger.save()

    def spectra(self, step: int, spectra: Mapping[str, Tensor]) -> None:
        """Write `spectra/{name}/step=00000100.npz`, one array of singular values a matrix."""
        if not self.trainer.is_global_zero:
            return
        arrays: dict[str, Any] = {key: sigma.detach().cpu().numpy() for key, sigma in spectra.items()}
        target = self._target("spectra", f"step={step:08d}.npz")
        # Opened here: numpy adds its own ending to a path.
        with written_whole(target) as path, path.open("wb") as file:
            np.savez(file, **arrays)
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                histograms: dict[str, Any] = {
                    f"spectra/{self.name}/{key}": wandb.Histogram(np.log10(positive))
                    for key, array in arrays.items()
                    if len(positive := array[array > 0])
                }
                logger.log_metrics(histograms, step=step)

    def picture(self, step: int, figure: "Figure") -> None:
        """Write `pictures/{name}/step=00000100.png` and show it in the loggers that show pictures."""
        if not self.trainer.is_global_zero:
            return
        with written_whole(self._target("pictures", f"step={step:08d}.png")) as path:
            figure.savefig(path, format="png")
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                picture: Any = wandb.Image(str(self.folder / "pictures" / self.name / f"step={step:08d}.png"))
                logger.log_metrics({f"pictures/{self.name}": picture}, step=step)
            elif (add_figure := getattr(getattr(logger, "experiment", None), "add_figure", None)) is not None:
                add_figure(f"pictures/{self.name}", figure, global_step=step)

    def _target(self, kind: str, name: str) -> Path:
        """Where a file goes; in a folder that is gone none is written, since that would make it anew."""
        if self._has_written:
            check_still_there(self.folder)
        self._has_written = True
        return self.folder / kind / self.name / name


def run_folder(trainer: pl.Trainer) -> Path:
    """Where this run keeps its files: the trainer's root folder if one was given, else the folder of its first logger.

    Must be called by every process (Lightning broadcasts the folder).
    """
    log_dir = trainer.log_dir
    if Path(trainer.default_root_dir).absolute() != Path.cwd():
        return Path(trainer.default_root_dir)
    return Path(log_dir or trainer.default_root_dir)


def check_still_there(folder: Path) -> None:
    """Raise if a run's folder was removed or moved while it runs: what is written on would belong to no run.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected the run's folder {folder} to stay where it is while the run goes on.")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` at the end, so that readers see a whole file or none.

    Raises:
        OSError: It cannot be written, for whatever reason the system has.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, all generators and each module's own `training` flag are as before afterwards."""
    flags = {module: module.training for module in model.modules()}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (users' code may draw from it)
    devices = list({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for module, training in flags.items():
                module.training = training


def first_validation_counts(trainer: pl.Trainer) -> bool:
    """Whether the validation under way is a measurement.

    Lightning's sanity check is one, at step 0, if it covers the whole split (`num_sanity_val_steps: -1`).
    """
    return not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")


def with_means(what: str, values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Keys `{what}/{where}/{measure}`, and `{what}/mean/{measure}` over all places that have the measure."""
    keys = {f"{what}/{where}/{measure}": v for where, measures in values.items() for measure, v in measures.items()}
    by_measure: dict[str, list[float]] = {}
    for measures in values.values():
        for measure, value in measures.items():
            by_measure.setdefault(measure, []).append(value)
    keys |= {f"{what}/mean/{measure}": sum(found) / len(found) for measure, found in by_measure.items()}
    return keys


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
