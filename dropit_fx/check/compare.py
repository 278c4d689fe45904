"""Two steps beside each other: what differs, in a bit or by more than rounding, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from dropit_fx.capture.untouched.values import equal_bits
from dropit_fx.check.found import GradientError
from dropit_fx.check.step import Seen

NEGLIGIBLE = 1e-4  # of the largest gradient of a parameter: smaller ones are not compared by share
# The relative error that counts as rounding, by the itemsize of the dtype in bytes
ROUNDING = {8: 1e-9, 4: 1e-4, 2: 3e-2, 1: 1e-1}
Tensors = Mapping[str, Tensor | None]


def differing(dense: Tensors, other: Tensors, exact: bool) -> list[str]:
    """The names that differ: in a bit, or by more than rounding."""
    names = [n for n in dense if (dense[n] is None) != (other.get(n) is None)]
    pairs = [(n, a, other[n]) for n, a in dense.items() if a is not None and n not in names]
    scale = _root_mean_square([a for _, a, _ in pairs])
    for name, a, b in pairs:
        assert b is not None
        if equal_bits(a, b):
            continue
        if exact or a.shape != b.shape or a.dtype != b.dtype or not a.dtype.is_floating_point:
            names.append(name)
            continue
        size = float(a.double().norm()) + scale * math.sqrt(a.numel())
        error = float((a.double() - b.double()).norm())
        if not error <= ROUNDING[a.dtype.itemsize] * size:
            names.append(name)
    return names


def unlike(a: Seen, b: Seen, exact: bool) -> list[str]:
    """What of one step another does not repeat."""
    pairs: dict[str, tuple[Tensors, Tensors]] = {
        "output": (a.outputs[0], b.outputs[0]),
        "second output": (a.outputs[1], b.outputs[1]),
        "gradients": (a.gradients, b.gradients),
        "buffers": (a.buffers, b.buffers),
    }
    return [name for name, (x, y) in pairs.items() if differing(x, y, exact)]


def _root_mean_square(tensors: list[Tensor]) -> float:
    floats = [t.detach() for t in tensors if t.dtype.is_floating_point and t.numel()]
    total = sum(float(t.double().square().sum()) for t in floats)
    return math.sqrt(total / max(sum(t.numel() for t in floats), 1))


def finite(seen: Seen) -> bool:
    """Whether output, loss and gradients are."""
    tensors = [*seen.outputs[0].values(), *(g for g in seen.gradients.values() if g is not None)]
    return math.isfinite(seen.loss) and all(bool(t.isfinite().all()) for t in tensors)


def paired(dense: Tensors, other: Tensors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What both have, in the same shape."""
    for name, a in dense.items():
        b = other.get(name)
        if a is not None and b is not None and a.shape == b.shape:
            yield name, a, b


def losses(
    pairs: Iterable[tuple[str, Tensor, Tensor]],
) -> tuple[GradientError, list[GradientError]]:
    """Of all gradients as one vector, and of each, the worst first; names, dense ones, others."""
    dots = {}
    for name, a, b in pairs:
        exact, found = a.double(), b.double()
        dots[name] = (
            float(exact.norm()),
            float((found - exact).norm()),
            float((exact * found).sum()),
            float((found * found).sum()),
        )
    largest = max((size for size, *_ in dots.values()), default=0.0)
    each = [
        GradientError(
            name=n, relative=error / size, cosine=dot / max(size * math.sqrt(mine), 1e-300)
        )
        for n, (size, error, dot, mine) in dots.items()
        if size > NEGLIGIBLE * largest
    ]
    norm = math.sqrt(sum(size**2 for size, *_ in dots.values()))
    error = math.sqrt(sum(error**2 for _, error, *_ in dots.values()))
    mine = math.sqrt(sum(m for *_, m in dots.values()))
    dot = sum(d for _, _, d, _ in dots.values())
    whole = GradientError(
        name="all",
        relative=error / norm if norm else math.nan,
        cosine=dot / (norm * mine) if norm * mine else math.nan,
    )
    return whole, sorted(
        each, key=lambda e: -e.relative if math.isfinite(e.relative) else -math.inf
    )
