"""A run's recipe with all its values, in the run's folder and in wandb's config."""

from pathlib import Path

import pytorch_lightning as pl
import yaml
from pytorch_lightning.cli import SaveConfigCallback
from pytorch_lightning.loggers import WandbLogger

from masklr.callbacks.recording import written_whole
from masklr.resumed_run import ResumedRun


class SaveRecipe(SaveConfigCallback):
    """Write the recipe with all its values into the run's folder and into wandb's config."""

    resumed: ResumedRun | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the recipe of a new run at once."""
        if self.resumed is None:
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write that of a resumed run once its checkpoint was taken: options that do not fit leave it as it was."""
        if self.resumed is not None and trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write `config.yaml`, whole or not at all; called on rank 0."""
        text = self.parser.dump(self.config, skip_none=False)
        folder = Path(trainer.default_root_dir)
        if self.resumed is not None:
            text = self.resumed.keep_recipe(text)
        with written_whole(folder / "config.yaml") as path:
            path.write_text(text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(yaml.safe_load(text), allow_val_change=True)
