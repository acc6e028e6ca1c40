"""Names and the patterns that choose them: one meaning of `*` everywhere."""

import difflib
import re
from collections.abc import Iterable


def matching(names: Iterable[str], patterns: Iterable[str], argument: str) -> list[str]:
    """Names that match any pattern, in the order of `names`.

    Patterns are matched against whole dotted names: `*` stands for anything but a dot, `**` for anything, `?` for one
    character, `[qk]` for one of these. So `blocks.*` is the blocks and `blocks.**` all their parts.

    Args:
        names: Dotted names, as `named_modules()` gives them.
        patterns: Glob patterns.
        argument: The argument that the patterns came by, for the error.

    Raises:
        ValueError: A pattern matches nothing; the sentence names the nearest names.

    Example:
        >>> matching(["blocks.0", "blocks.0.mlp.fc1", "norm"], ["blocks.*"], "layers")
        ['blocks.0']
    """
    names = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        expression = _expression(pattern)
        found = [name for name in names if expression.fullmatch(name)]
        if not found:
            raise ValueError(f"Expected `{argument}` to match something, got {pattern!r}{did_you_mean(pattern, names)}")
        chosen |= set(found)
    return [name for name in names if name in chosen]


def captures(names: Iterable[str], pattern: str, argument: str) -> dict[str, tuple[str, ...]]:
    """Names that match a pattern, each with what its wildcards stand for.

    Args:
        names: Dotted names.
        pattern: A glob pattern, as `matching` reads it.
        argument: The argument that the pattern came by, for the error.

    Raises:
        ValueError: The pattern matches nothing; the sentence names the nearest names.

    Example:
        >>> captures(["blocks.0.fc1", "blocks.1.fc1", "head"], "blocks.*.fc1", "products")
        {'blocks.0.fc1': ('0',), 'blocks.1.fc1': ('1',)}
    """
    found = matching(names, [pattern], argument)
    expression = _expression(pattern)
    return {name: match.groups() for name in found if (match := expression.fullmatch(name))}


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """The end of an error's sentence: the nearest known names, or the first few where none is near.

    Example:
        >>> did_you_mean("size", ["sizes", "depth"])
        '; did you mean sizes?'
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    if near:
        return f"; did you mean {', '.join(near)}?"
    more = f" and {len(known) - 8} more" if len(known) > 8 else ""
    return f"; there are {', '.join(known[:8])}{more}." if known else "; there are none."


def _expression(pattern: str) -> re.Pattern[str]:
    pieces = {"**": "(.*)", "*": r"([^.]*)", "?": "([^.])"}
    tokens = re.split(r"(\*\*|\*|\?|\[[^\]]+\])", pattern)
    text = "".join(pieces.get(t, f"({t})" if t.startswith("[") else re.escape(t)) for t in tokens)
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"Expected a pattern of names, got {pattern!r} ({error}).") from None
