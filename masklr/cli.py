"""The command `masklr`: what it can do, and one place where a user's mistake becomes a sentence.

Imports nothing heavy: `masklr --help` answers at once. Commands that need Lightning live in `masklr.recipe_cli`, and
`masklr measure` and `masklr export` in `masklr.measure_cli` and `masklr.export_cli`.
"""

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from masklr import __version__
from masklr.names import did_you_mean

COMMANDS = {
    "fit": "train from a recipe, into a run folder of its own",
    "validate": "measure a checkpoint on the validation split",
    "test": "measure a checkpoint on the test split",
    "predict": "write features or logits of a data set as safetensors",
    "measure": "spectra of the weights of a checkpoint or a timm model: a table and a picture",
    "export": "weights of a run as safetensors: a timm model's, or all",
}

HELP = """masklr: train with masks, see the rank, use the rank.

usage: masklr COMMAND [--config RECIPE.yaml] [--key value ...]

commands:
{commands}

  masklr COMMAND --help               every option of a command
  masklr fit --config RECIPE.yaml     run a recipe; those of masklr are in configs/
  masklr fit --config RECIPE.yaml --print_config
                                      the recipe with all defaults filled in
  masklr measure CHECKPOINT_OR_TIMM_NAME
                                      needs no recipe; files go to measured/NAME
  masklr export RUN_OR_CHECKPOINT     writes RUN/encoder.safetensors, which a timm model loads
  masklr --version                    the version

A run writes into runs/NAME/VERSION: config.yaml, metrics.csv, spectra/, pictures/, checkpoints/, wandb/ (offline unless
--wandb PROJECT[/ENTITY] is given). MASKLR_DEBUG=1 shows the stack trace of an error.
"""

# Causes outside of any program, which other libraries tell in words of their own.
WORKER = r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (?:is killed by signal: ([^.]+)|exited unexpectedly)"
MEMORY = r"can't allocate memory|out of memory|Cannot allocate memory|not enough memory"
FULL = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
    errno.EACCES,
    errno.EPERM,
)

SEED = os.path.join("utilities", "seed.py")  # Lightning's, which refuses a number that is none of numpy's seeds
PACKAGE = str(Path(__file__).parent) + os.sep


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 for a mistake of the user's, which one sentence explains."""
    arguments = sys.argv[1:] if argv is None else argv
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())), end="")
        return 0
    if command == "--version":
        print(f"masklr {__version__}")
        return 0
    if command not in COMMANDS:
        return _failed(f"Expected a command, got {command!r}{did_you_mean(command, COMMANDS)}")
    try:
        with _one_notice_of_workers():
            _run(command, arguments)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None or os.environ.get("MASKLR_DEBUG"):
            raise
        return _failed(sentence)
    except KeyboardInterrupt:
        return 130
    return 0


def _run(command: str, arguments: list[str]) -> None:
    if command == "measure":
        from masklr.measure_cli import run as measure

        measure(arguments[1:])
    elif command == "export":
        from masklr.export_cli import run as export

        export(arguments[1:])
    else:
        from masklr.recipe_cli import run

        run(arguments)


@contextlib.contextmanager
def _one_notice_of_workers() -> Iterator[None]:
    """Leave out the stack trace of a killed worker process noticed where Python ignores errors: it is noticed again.

    torch raises in a signal handler, so also inside finalizers and callbacks of weak references, where Python prints
    the error and goes on. The loader then finds the worker gone when it next waits for data.
    """
    former = sys.unraisablehook

    def hook(ignored: "sys.UnraisableHookArgs") -> None:
        if not re.search(WORKER, str(ignored.exc_value)):
            former(ignored)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = former


def _failed(sentence: str) -> int:
    print(f"masklr: error: {sentence}", file=sys.stderr)
    return 2


def sentence_of(error: Exception) -> str | None:
    """What to tell the user of an error of theirs; None for any other, whose stack trace is needed.

    An error is the user's if our own code, or Lightning's check of the configuration, refused something.
    """
    while isinstance(error, ValueError) and "Union subtypes" in str(error) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # jsonargparse wraps what a constructor raised, as often as the recipe is nested
    if (told := _outside(error)) is not None:
        return told
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if raised_in.endswith(SEED) and isinstance(error, ValueError):
        return f"`seed_everything`: {error}."
    ours = type(error).__module__.partition(".")[0] == "masklr" or raised_in.startswith(PACKAGE)
    refused = ours and isinstance(error, ValueError | OSError)
    if not refused and type(error).__name__ != "MisconfigurationException":
        return None
    # A worker process's error comes with its stack trace as text; the sentence is its end, after the error's name.
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())[:4000]


def _outside(error: Exception) -> str | None:
    """The sentence for a full disk, too little memory or a killed process, whichever library noticed; else None."""
    if isinstance(error, MemoryError):
        return "Expected enough memory, but there is too little."
    if isinstance(error, OSError) and error.errno in FULL:
        where = f" {error.filename}" if error.filename else ""
        return f"Cannot write or open{where}: {error.strerror}."
    if not isinstance(error, RuntimeError):
        return None
    if found := re.search(WORKER, str(error)):
        cause = f" (signal: {found[2]})" if found[2] else ""
        return f"Expected the worker processes of the data (`num_workers`) to go on, but {found[1]} has ended{cause}."
    if found := re.search(r"Error\(s\) in loading state_dict for (\w+):\s*(.*)", str(error), re.DOTALL):
        told = " ".join(found[2].split())[:500]
        return f"Expected a checkpoint of this {found[1]}, got one that does not fit: {told}"
    if re.search(MEMORY, str(error)):
        return "Expected enough memory, but there is too little" + _asked_for(str(error))
    return None


def _asked_for(text: str) -> str:
    """How many bytes torch could not have."""
    found = re.search(r"tried to allocate ([\d.]+ ?\w*)", text)
    return f": {found[1]} were asked for." if found else "."
