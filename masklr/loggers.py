"""Run folders and the loggers that write into them."""

import os
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger


def new_run_folder(runs: Path, name: str, command: str) -> Path:
    """Make and return `runs/name/version_N`, N the first free number; `command_N` for commands other than fit.

    Making the folder is what takes the number, so two runs that start together never share one. Further processes of
    a run take the folder of the first from the environment.

    Raises:
        ValueError: The folder cannot be made.
    """
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank != "0":
        # Launchers that start all processes at once pass no folder on; only rank 0 writes, and Lightning broadcasts.
        return Path(os.environ.get("MASKLR_RUN_FOLDER", runs / name / f"rank_{rank}"))
    prefix = "version" if command == "fit" else command
    parent = runs / name
    number = 0
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = parent / f"{prefix}_{number}"
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ValueError(f"Cannot make a run folder in {parent} (`runs`, `name`): {error.strerror}.") from error
    os.environ["MASKLR_RUN_FOLDER"] = str(folder)
    return folder


def run_loggers(folder: Path, wandb: str) -> list[Logger]:
    """CSV and, unless it is off, wandb, both in a run's folder.

    Args:
        folder: The run's folder, runs/name/version.
        wandb: `offline`, `off`, or `project[/entity]` to log online.
    """
    name, version = folder.parent.name, folder.name
    csv = CSVLogger(folder.parent.parent, name=name, version=version)
    _ = csv.experiment  # made while the folder is empty: later Lightning would warn that it is not
    loggers: list[Logger] = [csv]
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
        # An offline run has nothing to say on the terminal; an online one shows its link.
        settings=Settings(silent=offline),
    )
    # Lightning hands on an option that wandb has dropped and warns of, on every run.
    logger._wandb_init.pop("anonymous", None)
    return [*loggers, logger]
