"""The parser of recipes: a mistake in one is answered with one sentence and the nearest valid name."""

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from pytorch_lightning.cli import LightningArgumentParser

from masklr.names import did_you_mean


class RecipeParser(LightningArgumentParser):
    """A parser whose errors are one sentence instead of pages of usage, and that takes no abbreviated options.

    Attributes:
        arguments: The command line, in which the place of a mistake is looked up.
    """

    arguments: ClassVar[list[str]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and exit with code 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        known = [action.dest for action in parser._actions]
        print(f"masklr: error: {sentence(str(message), known, self.arguments)}", file=sys.stderr)
        sys.exit(2)


def sentence(message: str, known: list[str], arguments: list[str]) -> str:
    """What jsonargparse's message says, in one sentence.

    Args:
        message: jsonargparse's own text.
        known: Options of the parser that raised it.
        arguments: The command line, in which the place of an unknown key is looked up.
    """
    if found := re.search(r"^Option '([^']+)' is not accepted", message):
        key = found[1]
        for owner in _owners(key, _recipes(arguments)):
            return f"`{owner.__name__}` has no option {key!r}{did_you_mean(key, _options(owner))}"
        return f"There is no option {key!r}{did_you_mean(key, known)}"
    if found := re.search(r"(?:Subcommand|Group) '([^']+)' does not accept option '([^']+)'", message):
        return f"`{found[1]}` has no option {found[2]!r}{did_you_mean(found[2], known)}"
    if found := re.search(r"unrecognized arguments: --([^\s=]+)", message):
        return f"There is no option {found[1]!r}{did_you_mean(found[1], known)}"
    if found := re.search(r"Problem with given class_path '([^']+)':\s*(.*)", message):
        path, reason = found[1], found[2].strip().rstrip(".")
        module, _, name = path.rpartition(".")
        return f"Expected the path of a class, got {path!r} ({reason}){did_you_mean(name, _classes(module))}"
    if found := re.search(r"File does not exist: '?([^']+)'?", message):
        return f"There is no file {found[1]}."
    return " ".join(_innermost(message).split())


def _innermost(message: str) -> str:
    """Of a list of reasons why no alternative fits, the first: the others are `null` and the like."""
    lead = re.match(r'Parser key "[^"]*":', message)
    reasons = re.findall(r"^\s*- (?!Does not validate|Expected a <class 'NoneType'>)(.*)$", message, re.MULTILINE)
    return (f"{lead[0]} " if lead else "") + reasons[0] if reasons else message


def _recipes(arguments: list[str]) -> list[Any]:
    """The recipes that a command line names, with each `--a.b.c value` as a recipe of its own."""
    recipes = []
    flags = " ".join(arguments).replace("=", " ").split()
    for flag, value in zip(flags, [*flags[1:], ""], strict=True):
        if flag in ("--config", "-c") and Path(value).is_file():
            recipes.append(yaml.safe_load(Path(value).read_text()))
    for flag in flags:
        if flag.startswith("--") and ".init_args." in flag:
            path = flag.removeprefix("--").split(".")
            for recipe in list(recipes):
                node, steps = recipe, path[:-1]
                while steps and isinstance(node, dict) and steps[0] in node:
                    node, steps = node[steps[0]], steps[1:]
                if not steps and isinstance(node, dict):
                    node.setdefault(path[-1], None)
    return recipes


def _owners(key: str, node: Any) -> Iterator[type]:
    """Classes that a recipe gives this key, but that do not take it."""
    if isinstance(node, dict):
        owner = _class(node.get("class_path"))
        if owner is not None and key in (node.get("init_args") or {}) and key not in _options(owner):
            yield owner
        for child in node.values():
            yield from _owners(key, child)
    elif isinstance(node, list):
        for child in node:
            yield from _owners(key, child)


def _class(path: Any) -> type | None:
    if not isinstance(path, str) or "." not in path:
        return None
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


def _options(owner: type) -> list[str]:
    return [name for name in inspect.signature(owner).parameters if name != "self"]


def _classes(module: str) -> list[str]:
    try:
        return [name for name in dir(import_module(module)) if name[0].isupper()]
    except ImportError:
        return []
