"""The colours of codecs: one palette, for the page and for all pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from colorsys import hls_to_rgb
from itertools import chain, count
from typing import NamedTuple

from dropit_fx.codecs import CODEC, STAND_INS


class Colour(NamedTuple):
    """``#rrggbb`` on a light page (and in pictures), and on a dark one."""

    light: str
    dark: str


INK = Colour("#1d2126", "#e6e9ec")
FREE = Colour("#d9dde2", "#363b42")  # what is let go
KEPT = Colour("#7c848d", "#8b939c")  # what stays as it is

# Told apart with every kind of colour vision, at least 3:1 on the page
CODEC_COLOURS = {
    "quant": Colour("#2a6fd6", "#3f7de8"),
    "derived": Colour("#2aa55f", "#52d795"),
    "mink": Colour("#e2710f", "#f5852c"),
    "few_bit": Colour("#741f90", "#d689f0"),
    "bitmask": Colour("#96170a", "#cf3d4c"),
    "random": Colour("#0e6e8a", "#86ecf5"),
    "drop": Colour("#886602", "#e2dc4a"),
    "recast": Colour("#b02a66", "#b54596"),
}
# So are these, of codecs without a colour of their own, in their order
SPARE = (
    Colour("#4b0fe1", "#f000d2"),
    Colour("#c378c3", "#f0a5ff"),
    Colour("#5a0f69", "#782dff"),
    Colour("#a578ff", "#963cb4"),
    Colour("#c32db4", "#ff0000"),
    Colour("#780000", "#ffa55a"),
    Colour("#2d1e36", "#cffcb7"),
    Colour("#096045", "#9faeb4"),
    Colour("#4e060f", "#1b815d"),
)
SERIES = tuple(colour.light for colour in CODEC_COLOURS.values())  # of lines and points


def palette(names: Iterable[str] = ()) -> dict[str, Colour]:
    """The colour of every codec, of what stands in the place of one, and of other ``names``."""
    spare = chain(SPARE, _more())
    known = {"keep": KEPT} | CODEC_COLOURS
    every = dict.fromkeys(("keep", "drop", *STAND_INS, *CODEC, *names))
    return {name: known.get(name) or next(spare) for name in every}


def _more() -> Iterator[Colour]:
    """Hues without end, each far from the one before."""
    for number in count():
        hue = number * 0.618 % 1
        yield Colour(*(_hex(hls_to_rgb(hue, lightness, 0.55)) for lightness in (0.36, 0.68)))


def _hex(rgb: Iterable[float]) -> str:
    return "#" + bytes(round(255 * channel) for channel in rgb).hex()


def blend(colours: Iterable[str]) -> str:
    """The mean of some colours ``#rrggbb``: of the codecs that share a tensor."""
    channels = list(zip(*(bytes.fromhex(c[1:]) for c in colours), strict=True))
    return "#" + bytes(sum(channel) // len(channel) for channel in channels).hex()
