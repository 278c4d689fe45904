"""Words and globs of the user: what they match, or what may have been meant."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, TypeGuard

LONGEST = 200  # characters of a word in a message
MOST = 100  # items of a list in it: there are fewer ops


def did_you_mean(word: object, legal: Iterable[str]) -> str:
    """`` Did you mean 'linear'? Choose one of: linear, conv2d.``, for the end of a message."""
    known = tuple(legal)
    return f"{closest(word, known)} Choose one of: {', '.join(known)}."


def closest(word: object, legal: Iterable[str], count: int = 1) -> str:
    """`` Did you mean 'linear'?``, with at most ``count`` words; empty where none is close."""
    close = difflib.get_close_matches(str(word)[:LONGEST], list(legal), n=count)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether one of some globs matches a name; ``*`` crosses dots."""
    return any(_matches(name, glob) for glob in globs)


def _matches(name: str, glob: str) -> bool:
    """By what stands before the first wildcard, if that is enough: a config may have many rules."""
    start, wild = _start(glob)
    if not name.startswith(start):
        return False
    return glob == "*" or (fnmatchcase(name, glob) if wild else name == glob)


@lru_cache(2**16)
def _start(glob: str) -> tuple[str, bool]:
    """What a glob's matches start with, and whether a wildcard follows."""
    start = re.split(r"[*?[]", glob, maxsplit=1)[0]
    return start, start != glob


def unmatched(globs: Iterable[str], names: Iterable[str]) -> Iterator[str]:
    """The globs that match none of the names."""
    known = tuple(names)
    return (glob for glob in globs if not any(_matches(name, glob) for name in known))


def fits(value: object, schema: Mapping[str, Any]) -> bool:
    """Whether a value is as a JSON schema says: ``enum``, ``anyOf``, or a ``type`` with bounds."""
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    bounds = ((holds, schema[key]) for key, holds in _BOUNDS.items() if key in schema)
    return _KINDS[schema["type"]](value) and all(holds(value, bound) for holds, bound in bounds)


def is_number(value: object) -> bool:
    """Whether a value of the user's is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


_KINDS: dict[str, Callable[[object], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": is_whole,
    "number": is_number,
}
_BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMaximum": operator.lt,
    "multipleOf": lambda value, part: value % part == 0,
}


def shortened(message: str) -> str:
    """The message without the middle of words and of lists that are longer than a person reads."""
    short = re.sub(rf"\S{{{LONGEST},}}", lambda word: f"{word[0][:40]}...{word[0][-20:]}", message)
    # from where an item begins: from each character on, it would take the square of the time
    return re.sub(rf"(?<![^,])(?:[^,]++, ){{{MOST},}}", _ends_of, short)


def _ends_of(items: re.Match[str]) -> str:
    """The first and the last of some items, each with the comma behind it."""
    each = items[0].split(", ")[:-1]
    return ", ".join([*each[:5], f"... ({len(each) - 6} more)", each[-1], ""])
