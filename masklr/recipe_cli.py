"""`masklr fit|validate|test|predict`: LightningCLI with a folder for each run and errors in one sentence."""

import argparse
import contextlib
import logging
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint, ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities.exceptions import SIGTERMException

import masklr.callbacks
import masklr.data
import masklr.tasks  # noqa: F401 (imported so that recipes can use short class names)
from masklr.callbacks import (
    FinalTest,
    FreedMemory,
    NonFinite,
    Peers,
    Probe,
    RunCheckpoint,
    RunState,
    StepProgress,
    StepSeed,
    StepTiming,
)
from masklr.callbacks.features import averages_weights
from masklr.callbacks.peers import is_loss_of_a_peer, leave_peers
from masklr.callbacks.predictions import PredictionWriter
from masklr.checkpoint_files import sound_checkpoint
from masklr.checkpoints import WholeCheckpointIO, read
from masklr.cli import sentence_of
from masklr.data.loading import ImageData, rank_batch_size
from masklr.loggers import RunLock, new_run_folder, process_rank, run_loggers
from masklr.recipe_parser import RecipeParser, check_recipes
from masklr.resumed_run import ResumedRun, without_resume
from masklr.saved_recipe import SaveRecipe
from masklr.strategies import FullyShard
from masklr.summary import summary


class RecipeCLI(LightningCLI):
    """LightningCLI in subclass mode for task and data, with a run folder."""

    def __init__(self, arguments: list[str]) -> None:
        self._command = arguments[0]
        self.run_folder: Path
        self.lock: RunLock | None = None
        self._step = 0  # of the checkpoint that is measured
        folder, arguments = without_resume(arguments)
        self.resumed = None if folder is None else ResumedRun(Path(folder), arguments[1:])
        if self.resumed is not None:
            arguments = [self._command, *self.resumed.arguments]
        check_recipes(arguments)
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=type("SaveRecipe", (SaveRecipe,), {"resumed": self.resumed}),
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            parser_class=type("RecipeParser", (RecipeParser,), {"arguments": arguments}),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the command that was asked for: its parser is all that is needed."""
        return {self._command: super().subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of the run itself."""
        parser.add_argument("--name", type=str, default="run", help="Name of the run's folder below `runs`.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder in which runs live.")
        parser.add_argument(
            "--wandb",
            type=str,
            default="offline",
            help="`offline` (no account needed), `off`, or PROJECT[/ENTITY] to log online.",
        )
        if self._command == "fit":
            parser.add_argument(
                "--resume",
                type=str,
                default=argparse.SUPPRESS,  # taken off the command line before it is parsed; here for --help
                help="Folder of a run that was interrupted: go on in it, from its newest sound checkpoint and with its "
                "recipe; options given beside it win over the recipe's.",
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with Lightning's remark about arguments from Python left out: ours come from the command line."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Check what can be checked before anything is built."""
        if self.resumed is not None:
            # Parsed like the other, so that an option that is younger than the run stands in both.
            stored = self.parser.parse_args([self._command, f"--config={self.resumed.recipe}"])
            parser = self._parser(self._command)
            recipes = (parser.dump(config[self._command], skip_none=False) for config in (stored, self.config))
            self.resumed.compare(*recipes)

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint that `ckpt_path` means, and see that it is one.

        Lightning would read it here for hyperparameters, which recipes hold, and later take `last` and `best` for files
        of the new run, which has none yet.
        """
        if self.resumed is not None:
            return  # which has found and read it
        options = self.config[self._command]
        if not (given := options.get("ckpt_path")):
            if self._command != "fit" and process_rank() == "0":
                told = "no `ckpt_path`: the weights are those that the recipe begins with, untrained if it names none"
                print(f"masklr: {told}", file=sys.stderr, flush=True)
            return
        if not Path(given).exists():
            raise FileNotFoundError(
                f"Expected `ckpt_path` to be a checkpoint or a run's folder, but there is no {given}."
            )
        checkpoint = sound_checkpoint(Path(given)) if Path(given).is_dir() else Path(given)
        content = read(checkpoint)
        for entry in ("state_dict", "optimizer_states") if self._command == "fit" else ("state_dict",):
            if entry not in content:
                raise ValueError(
                    f"Expected `ckpt_path` to be a checkpoint of a run, got {checkpoint}, which has no {entry!r}."
                )
        if self._command != "fit" and isinstance(step := content.get("global_step"), int):
            self._step = step
        options.ckpt_path = str(checkpoint)

    def instantiate_classes(self) -> None:
        """Build task, data and trainer; what a library refuses, in whatever words, is the recipe's fault."""
        try:
            super().instantiate_classes()
        except Exception as error:
            if sentence_of(error) is not None:
                raise
            cause = error
            while "Union subtypes" in str(cause) and isinstance(cause.__cause__, Exception):
                cause = cause.__cause__
            told = " ".join(f"{type(cause).__name__}: {cause}".split()).replace("Union subtypes", "types")
            raise ValueError(f"Expected a recipe that can be built, got one that fails with {told}") from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer, with a folder of this run's own, made only now that task and data have accepted their values."""
        options, trainer = self.config_init[self._command], self.config_init[self._command].trainer
        if (epochs := trainer.check_val_every_n_epoch) is not None and epochs < 1:
            raise ValueError(f"Expected `check_val_every_n_epoch` of at least 1 or null, got {epochs}.")
        if self.resumed is not None:
            folder = self.resumed.folder
            os.environ["MASKLR_RUN_FOLDER"] = str(folder)
        else:
            folder = new_run_folder(Path(options.runs), options.name, self._command)
        if self._command == "fit" and process_rank() == "0":
            self.lock = RunLock(folder)
            if self.resumed is not None:
                self.resumed.announce()
        self.run_folder = folder
        if trainer.logger is None or trainer.logger is True:
            kwargs["logger"] = run_loggers(
                folder, options.wandb, None if self.resumed is None else self.resumed.wandb_id
            )
        plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins] if trainer.plugins else []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpointIO()]
        kwargs["default_root_dir"] = str(folder)
        callbacks = sorted(trainer.callbacks or [], key=_place)
        given = tuple(type(callback) for callback in callbacks)
        if not any(issubclass(kind, StepSeed) for kind in given):
            callbacks.append(StepSeed())
        if self._command == "fit" and not any(issubclass(kind, NonFinite) for kind in given):
            callbacks.insert(0, NonFinite())
        callbacks += [StepTiming(), Peers(), FreedMemory()]
        if trainer.enable_progress_bar is not False and not any(issubclass(kind, ProgressBar) for kind in given):
            callbacks.append(StepProgress())
        if self._command != "fit":
            kwargs["enable_checkpointing"] = any(issubclass(kind, ModelCheckpoint | RunCheckpoint) for kind in given)
        elif trainer.enable_checkpointing is not False:
            callbacks.insert(0, RunState(changed=self.resumed is not None and bool(self.resumed.changes)))
            if not any(issubclass(kind, RunCheckpoint) for kind in given):
                callbacks.append(RunCheckpoint())
        if self._command == "predict":
            callbacks.append(PredictionWriter(folder / "predictions.safetensors"))
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (ValueError, TypeError) as error:
            # Lightning refuses an accelerator, a precision or a cadence that it does not know.
            raise ValueError(f"`trainer`: {error}") from error

    def before_fit(self) -> None:
        """Refuse a batch that the processes cannot share before further ones are started, and watch these."""
        trainer = self.trainer
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Peers):
                callback.watch_from_launch(trainer)
        tensor_parallel = isinstance(trainer.strategy, ModelParallelStrategy) and not isinstance(
            trainer.strategy, FullyShard
        )
        if isinstance(self.datamodule, ImageData) and not tensor_parallel:  # those share the data otherwise
            num_ranks = trainer.num_devices * trainer.num_nodes
            rank_batch_size(self.datamodule.batch_size, num_ranks, trainer.accumulate_grad_batches)

    def before_validate(self) -> None:
        """Let what is measured stand at the step of the checkpoint; Lightning would have it stand at 0."""
        loop = self.trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = max(self._step - 1, 0)  # where `self.log` of a module of one's own stands in `fit`
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = self._step
        loop.manual_optimization.optim_step_progress.total.completed = self._step

    before_test = before_validate

    def after_fit(self) -> None:
        """Show what the run found."""
        if self.trainer.is_global_zero:
            print(summary(self.run_folder), flush=True)

    def after_validate(self) -> None:
        """Say where the metrics are."""
        if self.trainer.is_global_zero:
            print(f"run: {self.run_folder}", flush=True)

    after_test = after_validate

    def after_predict(self) -> None:
        """Say where the predictions are."""
        if self.trainer.is_global_zero:
            for path in sorted(self.run_folder.glob("predictions*.safetensors")):
                print(f"predictions: {path}", flush=True)


def run(arguments: list[str]) -> Path:
    """Run a command line; returns the run's folder. One that fails leaves none, unless it has trained a step."""
    _quiet()
    try:
        folder = _run(arguments)
    except SystemExit as stopped:  # at a signal on which all processes agreed, or that came too early or twice
        leave_peers()
        if isinstance(stopped, SIGTERMException):
            raise SystemExit(128 + signal.SIGTERM) from None
        if isinstance(stopped.__context__, KeyboardInterrupt):
            raise SystemExit(128 + signal.SIGINT) from None
        raise
    leave_peers()
    return folder


def _run(arguments: list[str]) -> Path:
    cli = RecipeCLI.__new__(RecipeCLI)
    try:
        cli.__init__(arguments)  # type: ignore[misc]
    except BaseException as error:
        _finish_wandb(exit_code=2)
        folder, trainer = getattr(cli, "run_folder", None), getattr(cli, "trainer", None)
        has_trained = arguments[0] == "fit" and trainer is not None and trainer.global_step > 0
        fresh = getattr(cli, "resumed", None) is None and not has_trained
        if fresh and folder is not None and folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other runs are beside it
                folder.parent.rmdir()
        elif trainer is not None and trainer.is_global_zero and isinstance(error, Exception) and folder is not None:
            _say_how_to_go_on(folder)
        began = trainer is not None and any(c.began for c in trainer.callbacks if isinstance(c, RunState))
        resumed = getattr(cli, "resumed", None)
        lost = is_loss_of_a_peer(error)
        if resumed is not None and not (began or lost) and isinstance(error, Exception) and sentence_of(error) is None:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"Expected a checkpoint that fits its recipe, got {resumed.checkpoint}, from which the run cannot go "
                f"on ({told})."
            ) from error
        if lost:
            raise ConnectionError(
                "Expected all processes of the run to go on, but one has ended, or has kept the others waiting for "
                "longer than the strategy's `timeout`."
            ) from error
        raise
    finally:
        if (lock := getattr(cli, "lock", None)) is not None:
            lock.release()
    _finish_wandb(exit_code=0)
    return cli.run_folder


def _place(callback: pl.Callback) -> int:
    """What averages weights acts after what observes those that are trained, and before what tests the average."""
    return 2 if isinstance(callback, FinalTest | Probe) else int(averages_weights(callback))


def _say_how_to_go_on(folder: Path) -> None:
    """Name the command that resumes a run that failed, if there is something to resume."""
    if any((folder / "checkpoints").glob("step=*.ckpt")):
        print(f"masklr: the run can be resumed: masklr fit --resume {folder}", file=sys.stderr)


def _quiet() -> None:
    """Leave out what Lightning says about itself, not about the run."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of functions that Lightning calls
    for message in (
        ".*does not have many workers.*",  # sets in memory need none
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*is smaller than the logging interval.*",  # recipes count steps, not epochs
        ".*is not supported by the model summary.*",
        ".*callbacks used to create the checkpoint need to be provided.*",  # measuring one needs fewer
        ".*WeightAveraging callback, but loading a checkpoint outside the 'fit' stage.*",  # its weights are the average
    ):
        warnings.filterwarnings("ignore", message)
    noise = ("Tip:", "TPU available")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: not any(part in record.getMessage() for part in noise)
    )


def _finish_wandb(exit_code: int) -> None:
    """Wandb writes until it is told that the run is over."""
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish(exit_code=exit_code)
