"""What a resumed run needs beside weights, optimizer and loops: where its logs stood."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from masklr import __version__
from masklr.callbacks.recording import run_folder
from masklr.checkpoint_files import step_of
from masklr.checkpoints import sweep

STATE = "masklr"


class RunState(pl.Callback):
    """Keep in every checkpoint where the run's logs stand, and go on from there when it is resumed.

    A checkpoint's entry `masklr` holds the `version` that wrote it; `metrics_rows`, the rows of `metrics.csv` so far;
    `pending`, what Lightning is about to log of the step just taken; and `wandb_id`. A resumed run drops later rows,
    spectra and pictures, which it writes again, and logs what was pending: no step is lost and none stands twice.

    Attributes:
        began: Whether everything was restored and training began.

    Args:
        changed: Whether the resumed run has options of its own: learning rate, weight decay and the like are then those
            that the task gives its optimizer now, not those in the checkpoint.
    """

    def __init__(self, changed: bool = False) -> None:
        self.changed = changed
        self.began = False
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder, which takes all processes."""
        self.folder = run_folder(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note where the logs stand, with all rows so far on the disk."""
        rows = 0
        for logger in trainer.loggers:
            logger.save()
            if hasattr(logger, "num_rows") and trainer.is_global_zero:
                rows = logger.num_rows
        wandb = [logger.version for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        checkpoint[STATE] = {
            "version": __version__,
            "metrics_rows": rows,
            "pending": pending_metrics(trainer),
            "wandb_id": wandb[0] if wandb else None,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up where the logs stood."""
        if trainer.state.fn == "fit":
            check_entries(checkpoint)
            self._restored = checkpoint.get(STATE)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the run's folder back to where the checkpoint was written."""
        self.began = True
        restored, self._restored = self._restored, None
        if restored is None:
            return
        if self.changed:
            reapply_options(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        remove_later(self.folder, trainer.global_step)
        for logger in trainer.loggers:
            if hasattr(logger, "keep_rows"):
                logger.keep_rows(restored["metrics_rows"])
            if restored["pending"] is not None:
                step, values = restored["pending"]
                logger.log_metrics(dict(values), step=step)
                logger.save()


def check_entries(checkpoint: dict[str, Any]) -> None:
    """Raise if a checkpoint lacks what a run goes on from: others find out in the middle of a step, or never."""
    state = checkpoint.get(STATE)
    if state is not None and not (isinstance(state, dict) and {"metrics_rows", "pending"} <= state.keys()):
        raise ValueError(
            f"Expected `metrics_rows` and `pending` in the checkpoint's entry `{STATE}`, got {state!r:.90}."
        )
    for optimizer in checkpoint.get("optimizer_states") or []:
        parameters = optimizer.get("state") if isinstance(optimizer, dict) else None
        if not isinstance(parameters, dict) or not all(isinstance(values, dict) for values in parameters.values()):
            raise ValueError("Expected a mapping for each parameter in the checkpoint's entry `optimizer_states`.")
    kinds = {"base_lrs": list, "_last_lr": list, "_step_count": int, "last_epoch": int}
    for schedule in checkpoint.get("lr_schedulers") or []:
        fits = isinstance(schedule, dict) and all(
            isinstance(schedule.get(k, kind()), kind) for k, kind in kinds.items()
        )
        if not fits:
            raise ValueError(f"Expected a schedule in the checkpoint's entry `lr_schedulers`, got {schedule!r:.90}.")


def pending_metrics(trainer: pl.Trainer) -> tuple[int, dict[str, float]] | None:
    """Step and values that Lightning has yet to log of the batch in whose last hook it is; None if it is in none."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    progress: Any = loop.batch_progress.current
    if not trainer.training or progress.processed == progress.completed or loop._should_accumulate():
        return None
    if not connector.should_update_logs:
        return None
    values = {key: float(value) for key, value in connector.metrics["log"].items()}
    if not values:
        return None
    step = int(values.pop("step")) if "step" in values else loop._batches_that_stepped
    return step, {**values, "epoch": values.get("epoch", trainer.current_epoch)}


def remove_later(folder: Path, step: int) -> None:
    """Remove what a resumed run writes again, maybe otherwise: spectra and pictures of later steps, half a file."""
    for kept in [folder, *folder.glob("spectra/*/"), *folder.glob("pictures/*/")]:
        sweep(kept)
        if kept == folder:
            continue
        for path in kept.glob("step=*"):
            if step_of(path) > step:
                path.unlink(missing_ok=True)


def reapply_options(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Give a restored optimizer the options that the task gives a new one, and its rates at this step."""
    configured: Any = pl_module.configure_optimizers()
    new = configured["optimizer"] if isinstance(configured, dict) else configured
    if not isinstance(new, Optimizer) or len(trainer.optimizers) != 1:
        return  # several optimizers, or none: those of the checkpoint stay
    for group, fresh in zip(trainer.optimizers[0].param_groups, new.param_groups, strict=True):
        group.update({key: value for key, value in fresh.items() if key != "params"})
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
            for group, base, factor in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(scheduler.last_epoch)
