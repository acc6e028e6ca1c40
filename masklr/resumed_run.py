"""What `masklr fit --resume RUN` takes from the folder of an interrupted run, and what may differ from it."""

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from masklr import __version__
from masklr.callbacks.recording import written_whole
from masklr.callbacks.run_state import STATE
from masklr.checkpoint_files import newest_sound
from masklr.checkpoints import read

# Of the command line, not of the run.
_NOT_COMPARED = ("ckpt_path", "resume", "weights_only")


class ResumedRun:
    """The recipe and the newest sound checkpoint of a run.

    Args:
        folder: The run's folder.
        options: The rest of the command line, whose options win over the recipe in the folder.

    Raises:
        FileNotFoundError: There is no such folder, no recipe or no checkpoint in it.
        ValueError: No checkpoint is sound, or a newer masklr wrote it.
    """

    def __init__(self, folder: Path, options: list[str]) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"Expected `resume` to be the folder of a run, but there is no folder {folder}.")
        self.recipe = folder / "config.yaml"
        if not self.recipe.is_file():
            inside = sorted(folder.glob("version_*/config.yaml"), key=lambda path: path.stat().st_mtime)
            hint = f"; did you mean {inside[-1].parent}?" if inside else "."
            raise FileNotFoundError(
                f"Expected `resume` to be the folder of a run, but {folder} has no config.yaml{hint}"
            )
        if any(re.match(r"--ckpt_path(=|$)", option) for option in options):
            raise ValueError("Expected no `ckpt_path` beside `resume`, which takes the newest sound checkpoint.")
        checkpoint = newest_sound(folder / "checkpoints")
        if checkpoint is None:
            raise FileNotFoundError(
                f"Expected a run with a checkpoint to resume, but {folder / 'checkpoints'} has no sound one; to begin "
                f"anew: masklr fit --config {self.recipe}"
            )
        content = read(checkpoint)
        state = content.get(STATE, {})
        version = state.get("version", "0") if isinstance(state, dict) else None
        step, epoch = content.get("global_step"), content.get("epoch")
        if not isinstance(version, str) or not isinstance(step, int) or not isinstance(epoch, int):
            raise ValueError(f"Expected a checkpoint of a run, got {checkpoint}, which does not say where it stands.")
        if _numbers(version) > _numbers(__version__):
            raise ValueError(f"Expected a run of masklr {__version__} or older to resume, got one of {version}.")
        self.folder, self.checkpoint, self.options = folder, checkpoint, options
        self.step: int = step
        self.epoch: int = epoch
        self.wandb_id: str | None = state.get("wandb_id")
        self.changes: dict[str, tuple[Any, Any]] = {}

    @property
    def arguments(self) -> list[str]:
        """The command line of `fit` that goes on with the run."""
        return [f"--config={self.recipe}", *self.options, f"--ckpt_path={self.checkpoint}"]

    def compare(self, stored: str, recipe: str) -> None:
        """Find what the command line changes.

        Args:
            stored: The recipe in the folder with all its values, as YAML.
            recipe: The recipe that is about to run, likewise.

        Raises:
            ValueError: A recipe on the command line differs from the run's, or an option could not have an effect.
        """
        found = changes(yaml.safe_load(stored), yaml.safe_load(recipe))
        found = {key: values for key, values in found.items() if key not in _NOT_COMPARED}
        options = [option.partition("=")[0][2:] for option in self.options if option.startswith("--")]
        flags = [_short(option.removesuffix(".class_path")) for option in options]  # a class is a whole entry
        others = {
            key: values
            for key, values in found.items()
            if not any(f"{_short(key)}.".startswith(f"{flag}.") for flag in flags if flag not in ("config", "resume"))
        }
        if others:
            told = "; ".join(f"{key} is {_shown(new)}, not {_shown(old)}" for key, (old, new) in others.items())
            raise ValueError(f"Expected the recipe of {self.folder} to resume it, got another: {told}.")
        self._check(found)
        self.changes = found

    def _check(self, changed: dict[str, tuple[Any, Any]]) -> None:
        """Raise for options that could not have an effect."""
        if "name" in changed:
            raise ValueError(f"Expected no `name` beside `resume`, which goes on in {self.folder}, got another.")
        for key, reached in (("trainer.max_steps", self.step), ("trainer.max_epochs", self.epoch)):
            _, limit = changed.get(key, (None, None))
            if isinstance(limit, int) and 0 <= limit <= reached:
                raise ValueError(f"Expected `{key}` above {reached}, where {self.folder} goes on, got {limit}.")

    def announce(self) -> None:
        """Tell where the run goes on, and with what changed."""
        told = ", ".join(f"{key} {_shown(new)} instead of {_shown(old)}" for key, (old, new) in self.changes.items())
        print(
            f"masklr: {self.folder} goes on at step {self.step}" + (f"; {told}" if told else ""),
            file=sys.stderr,
            flush=True,
        )

    def keep_recipe(self, recipe: str) -> str:
        """The recipe to be written into the folder; one that was changed is kept beside it."""
        former = self.recipe.read_text()
        if not self.changes:
            return former
        with written_whole(self.folder / f"config_until_step={self.step:08d}.yaml") as path:
            path.write_text(former)
        new = yaml.safe_load(recipe)
        old = yaml.safe_load(former)
        new |= {key: old.get(key) for key in _NOT_COMPARED if key in new}
        header = itertools.takewhile(lambda line: line.startswith("#"), recipe.splitlines(keepends=True))
        return "".join(header) + yaml.safe_dump(new, sort_keys=False)


def without_resume(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The folder that `--resume` names on a command line, and the rest of the line.

    Example:
        >>> without_resume(["fit", "--resume", "runs/a/version_0", "--trainer.max_steps=9"])
        ('runs/a/version_0', ['fit', '--trainer.max_steps=9'])
    """
    if arguments[0] != "fit":
        return None, arguments
    for place, argument in enumerate(arguments):
        if argument.startswith("--resume="):
            return argument.partition("=")[2], arguments[:place] + arguments[place + 1 :]
        if argument == "--resume":
            if place + 1 == len(arguments):
                raise ValueError("Expected the folder of a run after `--resume`, got nothing.")
            return arguments[place + 1], arguments[:place] + arguments[place + 2 :]
    return None, arguments


def changes(old: Any, new: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two nested recipes differ, with both values.

    Example:
        >>> changes({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
        {'a.c': (2, 3)}
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(name for name in new if name not in old)]
        found: dict[str, tuple[Any, Any]] = {}
        for name in keys:
            found |= changes(old.get(name), new.get(name), f"{key}.{name}".strip("."))
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = (changes(a, b, f"{key}.{number}") for number, (a, b) in enumerate(zip(old, new, strict=True)))
        return {name: values for part in parts for name, values in part.items()}
    return {} if old == new else {key: (old, new)}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _short(key: str) -> str:
    """A key as a flag may name it: without `init_args`, without places in lists."""
    return re.sub(r"\.\d+(?=\.|$)", "", key.replace(".init_args", "")).rstrip("+")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
