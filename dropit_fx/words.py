"""A word that is not known: what may have been meant, and what there is to choose from."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: object, legal: Iterable[str]) -> str:
    """`` Did you mean 'linear'? Choose one of: linear, conv2d.``, for the end of a message."""
    known = tuple(legal)
    return f"{closest(word, known)} Choose one of: {', '.join(known)}."


def closest(word: object, legal: Iterable[str], count: int = 1) -> str:
    """`` Did you mean 'linear'?``, with at most ``count`` words; empty where none is close."""
    close = difflib.get_close_matches(str(word), list(legal), n=count)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
