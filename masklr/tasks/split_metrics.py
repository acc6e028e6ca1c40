"""Metrics over a whole split, for every task."""

from collections.abc import Mapping

import pytorch_lightning as pl
from torchmetrics import Metric


def begin_split(metrics: Mapping[str, Metric]) -> None:
    """Empty the metrics before an evaluation.

    `trainer.validate` runs in inference mode and leaves tensors behind that `trainer.fit` cannot add to.

    Args:
        metrics: Metrics by name.
    """
    for metric in metrics.values():
        metric.reset()


def log_split(task: pl.LightningModule, split: str, metrics: Mapping[str, Metric]) -> None:
    """Log each metric as `{split}/{name}` at the exact step, over all processes, at the end of an evaluation.

    A sanity check of the whole split (`num_sanity_val_steps: -1`) is the measurement at step 0, which Lightning
    computes and then discards: it is handed to the loggers here.

    Args:
        task: The module whose evaluation ends.
        split: `val` or `test`.
        metrics: Metrics by name, updated in the steps of the evaluation.
    """
    named = {f"{split}/{name}": metric for name, metric in metrics.items()}
    trainer = task.trainer
    if not trainer.sanity_checking:
        # Lightning's own count is one short here: it stands at the index of the last batch.
        task.log_dict({**named, "step": float(trainer.global_step)}, sync_dist=True)
        return
    values = {key: metric.compute().item() for key, metric in named.items()}
    begin_split(named)
    if trainer.num_sanity_val_steps == float("inf"):
        for logger in task.loggers:
            logger.log_metrics(values, step=0)
