"""A private name of PyTorch: what its line in ``private_names.py`` says, and how it is found."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from types import ModuleType
from typing import Any, Literal

# What it was run with: the whole test suite, or the slice of it that `make slice` runs.
RUN = ("2.11.0", "2.13.0", "2.14.1", "2.15.0")


@dataclass(frozen=True)
class Lack:
    """What happens where a name is missing.

    Attributes:
        part: When it is noticed: the names of a part are looked up together.
        text: What does not work then, or what is done instead.
        vital: Importing the name raises; else calling it does.
    """

    part: str
    text: str
    vital: bool = False


@dataclass(frozen=True)
class Name:
    """One private or unstable name.

    Attributes:
        name: In full. Of attributes of objects: the class and the attribute; of keys of
            ``node.meta``: ``meta[key]``.
        lack: What happens where it is missing.
        used: What it is used for.
        alias: The name under which `private.py` has it, where that is not the last part of ``name``
            without underscores.
        since: The first version in :data:`RUN` that has it.
        until: The last version in :data:`RUN` that has it.
        instead: What stands in its place where it is missing.
        probe: Raises where it is missing, for what cannot be imported; False: a look does not
            tell, only the tests do.
    """

    name: str
    lack: Lack
    used: str
    _: KW_ONLY
    alias: str = ""
    since: str = RUN[0]
    until: str = RUN[-1]
    instead: Any = None
    probe: Callable[[], object] | Literal[False] | None = None

    @property
    def short(self) -> str:
        """The name under which `private.py` has it."""
        return self.alias or self.name.rpartition(".")[2].lstrip("_")

    @property
    def present(self) -> bool:
        """Whether this PyTorch has it, as far as a look tells."""
        try:
            if self.probe is None:
                look_up(self.name)
            elif self.probe:
                self.probe()
        except (AttributeError, ImportError, KeyError):
            return False
        return True


def look_up(name: str) -> Any:
    """What ``a.b.c`` names: modules first, then attributes."""
    first, *rest = name.split(".")
    found, path = importlib.import_module(first), first
    for part in rest:
        path += f".{part}"
        if not hasattr(found, part) and isinstance(found, ModuleType):
            importlib.import_module(path)
        found = getattr(found, part)
    return found
