"""The options of the plug-in, its own and inductor's, and their defaults in the environment."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from dropit_fx.config import ConfigError
from dropit_fx.private import list_options
from dropit_fx.words import closest

PLANNED = ("config", "preset", "strategy", "gamma", "bits")  # what a peak stands in the place of
OPTIONS = (*PLANNED, "peak", "drop_logits", "inner", "fuse")

_TRUTH = ({"1": True, "true": True, "0": False, "false": False}.__getitem__, "not true or false")
_FROM_TEXT: dict[str, tuple[Callable[[Any], Any], str]] = {  # of the environment
    "gamma": (float, "no number"),
    "bits": (int, "no number"),
    "drop_logits": _TRUTH,
    "fuse": _TRUTH,
}


def from_environment() -> dict[str, Any]:
    """The options that ``DROPIT_...`` variables set, None for others; an empty one is not set."""
    names = {option: f"DROPIT_{option.upper()}" for option in OPTIONS}
    known = (*names.values(), "DROPIT_LOG")
    for name in os.environ:
        if name.startswith("DROPIT_") and name not in known and (hint := closest(name, known)):
            warnings.warn(f"{name} in the environment means nothing.{hint}", stacklevel=2)
    found: dict[str, Any] = {option: os.environ.get(name) or None for option, name in names.items()}
    for option, (convert, kind) in _FROM_TEXT.items():
        value = found[option]
        try:
            found[option] = None if value is None else convert(value)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{names[option]}={value!r} is {kind}") from error
    return found


def checked_fuse(fuse: Any, inner: str) -> bool:
    """Whether packing is given to the inner backend as plain tensor ops.

    Raises:
        ConfigError: It is neither True nor False, or the inner backend fuses nothing.
    """
    if fuse is not None and not isinstance(fuse, bool):
        raise ConfigError(f"fuse={fuse!r}: must be True, False, or None for the default")
    if fuse and inner != "inductor":
        raise ConfigError(
            f"fuse=True: inner backend {inner!r} fuses nothing. Leave `fuse` away, or choose"
            " inner='inductor'."
        )
    return bool(fuse)


def check_inductor_options(options: Mapping[str, Any]) -> None:
    """Raises :class:`ConfigError` where inductor knows no option of that name."""
    legal = list_options()
    for key in options:
        if key.replace("-", "_") not in legal:
            hint = closest(key, (*OPTIONS, *legal))
            raise ConfigError(
                f"backend 'dropit' has no option {key!r}.{hint} Its own are: {', '.join(OPTIONS)};"
                " others go to inductor (torch._inductor.list_options())."
            )
