"""The parser of recipes: a mistake in one is answered with one sentence and the nearest valid name."""

import ast
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

# Where recipes find classes, and what values are called in a sentence.
ROOMS = ("masklr.layers", "masklr.callbacks", "masklr.data", "masklr.tasks", "masklr.models")
KINDS = {
    "dict": "a mapping of names to values",
    "list": "a list",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
}


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
    return shortened(" ".join(_said(message, known, arguments).split()))


def shortened(text: str, length: int = 600) -> str:
    """A text whose middle is left out if it is too long: it holds a value that nobody wants to read.

    Example:
        >>> shortened("abcdefghij", 8)
        'abc ... ij'
    """
    return text if len(text) <= length else f"{text[: length // 2 - 1]} ... {text[-(length // 4) :]}"


def _said(message: str, known: list[str], arguments: list[str]) -> str:
    if found := re.search(r"^Option '([^']+)' is not accepted", message):
        key = found[1]
        for name in dict.fromkeys((key, key.partition(".")[0])):
            for owner in _owners(name, _recipes(arguments)):
                return f"`{owner.__name__}` has no option {name!r}{did_you_mean(name, _options(owner))}"
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
    if found := re.search(r"Problems parsing config: (.*)", message, re.DOTALL):
        return _unreadable(found[1], arguments)
    if found := re.search(r"the following arguments are required: (.*)", message):
        return f"Expected a recipe, --config RECIPE.yaml, or at least the options {found[1]}."
    return _misfit(message)


def _misfit(message: str) -> str:
    """Of a list of reasons why no alternative fits a value, the first: the others are `null` and the like."""
    lead = re.match(r'Parser key "([^"]*)":', message)
    reasons = re.findall(r"^\s*- (?!Does not validate|Expected a <class 'NoneType'>)(.*)$", message, re.MULTILINE)
    key = f"`{lead[1]}`: " if lead else ""
    reason = reasons[0] if reasons else message[lead.end() :] if lead else message
    given = re.search(r"(?:^\s*Given value|Got value): (.*)", message, re.MULTILINE | re.DOTALL)
    if given and (wrong := _beside_class_path(given[1])):
        return (
            f"{key}Expected only `class_path` and `init_args` in the entry of a class, got {wrong!r} beside them; "
            "its options belong below `init_args`."
        )
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", reason):
        name = found[1].rpartition(".")[2]
        near = [f"{module}.{name}" for module in ROOMS if name in _classes(module) and f"{module}.{name}" != found[1]]
        return f"{key}Expected a {found[2]}, got {found[1]}{did_you_mean(near[0], near) if near else '.'}"
    told = f", got {shortened(' '.join(given[1].split()), 100)}" if given else ""
    if choices := re.findall(r"Expected a typing\.Literal\[([^\]]*)\]", "\n".join(reasons or [reason])):
        beside = dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", "\n".join(reasons)))
        others = "".join(f" or {KINDS.get(kind, kind)}" for kind in beside)
        named = ", ".join(choices)
        return f"{key}Expected {'one of ' if ',' in named else ''}{named}{others}{told}."
    if re.fullmatch(r"Expected an? <class '\w+'>.*", reason.strip()):
        kinds = dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", "\n".join(reasons or [reason])))
        listed = [KINDS.get(kind, kind) for kind in kinds]
        if lengths := re.findall(r"Expected a tuple with (\d+) elements", message):
            listed.append(f"{lengths[0]} of them")
        return f"{key}Expected {' or '.join(listed)}{told}."
    return key + (reason.replace(lead[0], "").strip() if lead else reason)


def _beside_class_path(text: str) -> str | None:
    """A key that stands beside a `class_path`, where only `init_args` may; None if there is none."""
    try:
        todo = [ast.literal_eval(text.strip())]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None  # a value that has no literal
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            if isinstance(node.get("class_path"), str):
                for key in node:
                    if key not in ("class_path", "init_args", "dict_kwargs"):
                        return str(key)
            todo += node.values()
        elif isinstance(node, list):
            todo += node
    return None


def _unreadable(reason: str, arguments: list[str]) -> str:
    """What is wrong with a recipe that is no YAML, with its name and a hint."""
    broken = next((path for path in _recipe_files(arguments) if _recipe(path) is None), None)
    hint = "; a pattern that begins with a star needs quotes" if "an alias" in reason else ""
    reason = reason.replace('"<unicode string>"', str(broken) if broken else "what was given")
    return f"Expected {'the recipe ' + str(broken) if broken else 'a recipe'} to be YAML: {reason.strip()}{hint}."


def _recipe_files(arguments: list[str]) -> list[Path]:
    flags = [part for argument in arguments for part in argument.split("=", 1)]
    pairs = zip(flags, [*flags[1:], ""], strict=True)
    return [Path(value) for flag, value in pairs if flag in ("--config", "-c") and value and Path(value).is_file()]


def check_recipes(arguments: list[str]) -> None:
    """Raise if a recipe that a command line names is no text."""
    for path in _recipe_files(arguments):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"Expected the recipe {path} to be text: {error}.") from error


def _recipe(path: Path) -> Any:
    """What a file holds; None if it is no YAML."""
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _recipes(arguments: list[str]) -> list[Any]:
    """The recipes that a command line names, with each `--a.b.c value` as a recipe of its own."""
    recipes = [_recipe(path) for path in _recipe_files(arguments)]
    for flag in " ".join(arguments).replace("=", " ").split():
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
        owner, options = _class(node.get("class_path")), node.get("init_args")
        if owner is not None and isinstance(options, dict) and key in options and key not in _options(owner):
            yield owner
        for child in node.values():
            yield from _owners(key, child)
    elif isinstance(node, list):
        for child in node:
            yield from _owners(key, child)


def _class(path: Any) -> type | None:
    if not isinstance(path, str) or not re.fullmatch(r"\w+(\.\w+)+", path):
        return None
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) else None


def _options(owner: type) -> list[str]:
    try:
        return [name for name in inspect.signature(owner).parameters if name != "self"]
    except (ValueError, TypeError):  # of some classes that are written in C
        return []


def _classes(module: str) -> list[str]:
    if not re.fullmatch(r"\w+(\.\w+)*", module):
        return []
    try:
        return [name for name in dir(import_module(module)) if name[0].isupper()]
    except ImportError:
        return []
