"""What dropit_fx says while it works: ``DROPIT_LOG=passes,graphs``, or Python's logging.

Each word turns a logger on: ``passes`` (DEBUG of ``dropit_fx.passes``) prints the plan after each
pass and the graph at the end, ``graphs`` (INFO of ``dropit_fx.compile``) one line for each graph
that ``torch.compile`` hands over. ``TORCH_LOGS="+dropit_fx.passes"`` does the same.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO

LOGGERS = {
    "passes": ("dropit_fx.passes", logging.DEBUG),
    "graphs": ("dropit_fx.compile", logging.INFO),
}


def read_environment() -> None:
    """Turns on what ``DROPIT_LOG`` asks for; an unknown word is a warning that names the legal."""
    for word in filter(None, os.environ.get("DROPIT_LOG", "").replace(" ", "").split(",")):
        if word in LOGGERS:
            _turn_on(word, sys.stderr)
        else:
            warnings.warn(
                f"DROPIT_LOG={word!r} means nothing. Choose from: {', '.join(LOGGERS)}.",
                stacklevel=2,
            )


@contextmanager
def shown(word: str, stream: TextIO) -> Iterator[None]:
    """Prints what ``word`` turns on to ``stream``, for as long as this lasts."""
    logger = logging.getLogger(LOGGERS[word][0])
    level = logger.level
    handler = _turn_on(word, stream)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _turn_on(word: str, stream: TextIO) -> logging.Handler:
    name, level = LOGGERS[word]
    logger = logging.getLogger(name)
    handler = logging.StreamHandler(stream)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(min(level, logger.level or level))
    return handler


@contextmanager
def without_dumps(log: logging.Logger) -> Iterator[None]:
    """For the time of a block, graphs that PyTorch prints to stderr go to a log, at level INFO.

    ``torch.export`` prints as far as it came before it raises; what is made of the error is said by
    whoever catches it.
    """
    with redirect_stderr(_Without(sys.stderr, log)):
        yield


class _Without:
    """A stream that graphs do not go to."""

    def __init__(self, stream: Any, log: logging.Logger) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        if not text.lstrip().startswith("def forward("):
            return int(self._stream.write(text))
        self._log.info("%s", text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
