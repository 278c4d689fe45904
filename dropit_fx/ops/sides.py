"""On which side of the places where its slope jumps a value lies: a bit that rounding would lose.

The slope of ``hardswish`` is -1/2 right above -3 and 0 right below. Of a 3 that is read back as 2.9
it would be half off, however fine the rounding. So the row keeps a bit of the exact value beside
the rounded one (``Read.beside``), and the formula reads that on its side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dropit_fx.ops.backwards import Saved
from dropit_fx.ops.rule import Read, Use, one_bit

SIDE = "side"
BESIDE_INPUT = Read(
    operand=SIDE,
    use=Use.SLOPE,
    needed_by=("input",),
    bits=one_bit,
    like="input",
    beside="input",
)


class Jump(NamedTuple):
    """A place where a slope jumps, and what it is there: as above, as below, or neither."""

    at: float
    as_above: bool
    is_apart: bool = False


def slopes(f: Callable[[Tensor], Tensor], places: Tensor) -> Tensor:
    """The slope of a pointwise function at each of some places, in float64."""
    with torch.inference_mode(False), torch.enable_grad():
        x = places.double().requires_grad_()
        (found,) = torch.autograd.grad(f(x).sum(), x)
    return found


def jumps_of(f: Callable[[Tensor], Tensor], *places: float) -> tuple[Jump, ...]:
    """The jumps of a function whose slope jumps at ``places``: it is asked what it is there."""
    there = torch.tensor(places, dtype=torch.float64)
    below, at, above = slopes(f, torch.stack([there - 1e-9, there, there + 1e-9]))
    misses = torch.stack([(at - below).abs(), (at - above).abs()])
    is_apart = misses.amin(0) > 1e-3
    return tuple(map(Jump, places, (misses[1] < misses[0]).tolist(), is_apart.tolist()))


def sides(x: Tensor, jumps: Sequence[Jump]) -> Tensor:
    """Whether the number of jumps below each value is odd."""
    odd = torch.zeros_like(x, dtype=torch.bool)
    for at, as_above, _ in jumps:
        odd = odd ^ (x >= at if as_above else x > at)
    return odd


def on_its_side(saved: Saved, jumps: Sequence[Jump]) -> Tensor:
    """The input; where it was rounded across the jump next to it, it lies right beside that.

    So it does for all that was moved by less than half of what lies between two jumps.

    Args:
        saved: Of a call, with the bit or, where the input is exact, without.
        jumps: From the lowest to the highest.
    """
    x = saved["input"]
    if SIDE not in saved:
        return x
    astray = sides(x, jumps) != saved[SIDE]
    middles = [(a.at + b.at) / 2 for a, b in itertools.pairwise(jumps)]
    out, info = x, torch.finfo(x.dtype)
    for i, (at, as_above, _) in enumerate(jumps):
        near = astray
        near = near & (x > middles[i - 1]) if i > 0 else near
        near = near & (x <= middles[i]) if i < len(middles) else near
        step = max(2 * abs(at) * info.eps, info.tiny)
        is_above = x >= at if as_above else x > at
        across = torch.where(is_above, x.new_full((), at - step), at + step)
        out = torch.where(near, across, out)
    return out
