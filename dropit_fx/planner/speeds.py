"""Seconds of what a packed step does more than a dense one: measured here, or told of a card.

On the device at hand each format is packed and unpacked at two sizes, and a line goes through both:
a fixed part and one for each element. That takes milliseconds for each format that is asked for,
and is remembered in the user's cache directory, for this machine and this PyTorch; where nothing
can be written there, it is measured again. Of a card that is not at hand its limits are told: the
bytes that a kernel reads and writes, or its arithmetic, whichever takes longer.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dropit_fx.codecs import CODEC
from dropit_fx.planner.cards import Card
from dropit_fx.planner.step import Step, device_of

SMALL, LARGE = 2**10, 2**20  # elements of what is timed
REPEATS = 5  # of which the fastest counts
_WIDTH = 512  # of the matrices that are multiplied


class Speeds(Protocol):
    """How fast something packs, moves and computes. All take and give seconds and bytes."""

    name: str

    def pack(self, codec: str, options: Mapping[str, Any], numel: int, dtype: torch.dtype) -> float:
        """Of packing so many elements."""

    def unpack(
        self, codec: str, options: Mapping[str, Any], numel: int, dtype: torch.dtype
    ) -> float:
        """Of reading them back."""

    def moves(self, nbytes: int) -> float:
        """Of a kernel that reads and writes so many bytes."""

    def computes(self, flops: int, dtype: torch.dtype) -> float:
        """Of a product."""

    def remember(self) -> None:
        """Keeps for later processes what was measured."""


class CardSpeeds:
    """Of a card at its limits, as its maker states them."""

    def __init__(self, card: Card) -> None:
        self.name, self._card = f"{card.name} at its limits", card

    def pack(self, codec: str, options: Mapping[str, Any], numel: int, dtype: torch.dtype) -> float:
        """The tensor is read once, and its packed form written."""
        kept = CODEC[codec].nbytes(numel, dtype, dict(options))
        return self.moves(numel * dtype.itemsize + kept)

    def unpack(
        self, codec: str, options: Mapping[str, Any], numel: int, dtype: torch.dtype
    ) -> float:
        """The packed form is read, and the tensor written."""
        return self.pack(codec, options, numel, dtype)

    def moves(self, nbytes: int) -> float:
        """At the bandwidth of its memory."""
        return self._card.seconds(nbytes)

    def computes(self, flops: int, dtype: torch.dtype) -> float:
        """At the peak of its arithmetic."""
        return self._card.seconds(0, flops, dtype)

    def remember(self) -> None:
        """There is nothing to remember."""


class Line(NamedTuple):
    """Seconds as a line: ``fixed + each * count``."""

    fixed: float
    each: float

    def at(self, count: int) -> float:
        """Seconds of so many."""
        return self.fixed + self.each * count


class MeasuredSpeeds:
    """Of a device at hand; lines are measured when they are first asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        count = torch.get_num_threads()
        what = f"{count} thread{'s' if count > 1 else ''} of the CPU"
        if device.type == "cuda":
            what = torch.cuda.get_device_name(device)
        self.name = f"{what}, measured"
        self._machine = f"{platform.node()}, {what}, PyTorch {torch.__version__}"
        self._lines = _LINES.setdefault(self._machine, {})
        if not self._lines:
            self._lines.update(_remembered().get(self._machine, {}))
        self._known = len(self._lines)

    def pack(self, codec: str, options: Mapping[str, Any], numel: int, dtype: torch.dtype) -> float:
        """By a line through two sizes; statistics of channels are not in it."""
        return self._of_codec(codec, options, dtype)[0].at(numel)

    def unpack(
        self, codec: str, options: Mapping[str, Any], numel: int, dtype: torch.dtype
    ) -> float:
        """As :meth:`pack`."""
        return self._of_codec(codec, options, dtype)[1].at(numel)

    def moves(self, nbytes: int) -> float:
        """By copies."""

        def copying(count: int) -> Callable[[], object]:
            given = torch.zeros(count, dtype=torch.uint8, device=self._device)
            return given.clone

        return self._line("copy", lambda: self._through(copying, 4 * SMALL, 4 * LARGE)).at(
            nbytes // 2
        )

    def computes(self, flops: int, dtype: torch.dtype) -> float:
        """By products of matrices."""

        def product(width: int) -> Callable[[], object]:
            x = torch.zeros(width, width, dtype=dtype, device=self._device)
            return lambda: x @ x

        def measured() -> Line:
            return Line(0.0, self._fastest(product(_WIDTH)) / (2 * _WIDTH**3))

        return self._line(f"product {dtype}", measured).at(flops)

    def remember(self) -> None:
        """Writes what was measured since into the cache, if that can be written."""
        if len(self._lines) == self._known:
            return
        self._known = len(self._lines)
        with suppress(OSError, RuntimeError):  # a home that is read-only, or none
            path = cache_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(_remembered() | {self._machine: self._lines}, indent=1)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
                file.write(text)
            os.replace(file.name, path)

    def _of_codec(
        self, name: str, options: Mapping[str, Any], dtype: torch.dtype
    ) -> tuple[Line, Line]:
        codec = CODEC[name]
        given = {k: v for k, v in options.items() if k != "by_channel"}
        if codec.codes:
            dtype = torch.bool if given.get("bits") == 1 else torch.uint8
        key = f"{name} {json.dumps(given, sort_keys=True, default=str)} {dtype}"

        def values(count: int) -> Tensor:
            drawn = torch.linspace(-1, 1, count, device=self._device)
            return (drawn > 0).to(dtype) if codec.codes else drawn.to(dtype)

        def packing(count: int) -> Callable[[], object]:
            flat = values(count)
            return lambda: codec.pack(flat, given)

        def unpacking(count: int) -> Callable[[], object]:
            parts = codec.pack(values(count), given)
            return lambda: codec.unpack(parts, given, count, dtype)

        return (
            self._line(f"pack {key}", lambda: self._through(packing, SMALL, LARGE)),
            self._line(f"unpack {key}", lambda: self._through(unpacking, SMALL, LARGE)),
        )

    def _line(self, key: str, measure: Callable[[], Line]) -> Line:
        if key not in self._lines:
            with torch.no_grad():
                self._lines[key] = measure()
        return self._lines[key]

    def _through(self, made: Callable[[int], Callable[[], object]], few: int, many: int) -> Line:
        short, long = (self._fastest(made(count)) for count in (few, many))
        each = max(0.0, (long - short) / (many - few))
        return Line(max(0.0, short - each * few), each)

    def _fastest(self, run: Callable[[], object], repeats: int = REPEATS) -> float:
        return fastest(run, self._device, repeats)


def fastest(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Seconds of the fastest of some calls, after one that is not timed."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def step_seconds(step: Step, module: Callable[..., Any]) -> float:
    """Of a real step of ``module`` in the place of the step's model, without the optimizer."""
    with step.real() as (args, kwargs):

        def run() -> None:
            step.loss_of(module(*args, **kwargs)).backward()  # type: ignore[no-untyped-call]

        return fastest(run, device_of(step), repeats=2)


def cache_file() -> Path:
    """Where lines are remembered: ``seconds.json`` in the user's cache directory.

    Raises:
        RuntimeError: There is no home.
    """
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "dropit_fx" / "seconds.json"


def shown_seconds(seconds: float) -> str:
    """Seconds to three digits, in the unit that fits."""
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    return f"{float(f'{seconds / size:.3g}'):g} {unit}"


_LINES: dict[str, dict[str, Line]] = {}  # machine -> what was measured, in this process


def _remembered() -> dict[str, dict[str, Line]]:
    """What the cache holds; nothing where it cannot be read, or was not written by this module."""

    def number(x: object) -> bool:
        return isinstance(x, int | float) and math.isfinite(x) and x >= 0

    try:
        held = json.loads(cache_file().read_text())
        return {
            str(machine): {
                str(key): Line(*line) for key, line in lines.items() if all(map(number, line))
            }
            for machine, lines in held.items()
        }
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError):
        return {}
