"""Pictures of what benches measured. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from dropit_fx.report.palette import SERIES
from dropit_fx.report.plot import INK, MIB, figure_class, finish

_HEIGHTS = (-3, 7, -13, 18, -24, 29, -35, 40, -46)  # of a label over its point, in points


def gpu_picture(result: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Draws peak memory over time of the models' steps, one panel a model; down and left is better.

    Args:
        result: What ``bench.gpu.bench_gpu`` returns.
        path: Its suffix says the format: PNG, SVG, PDF.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: No step of a model has been measured, or matplotlib does not know the suffix.
    """
    from dropit_fx.bench.gpu_models import MODELS

    steps = [r for r in result["rows"] if r["kind"] == "model" and r.get("peak_bytes")]
    if not steps:
        raise ValueError("no step has a peak of memory to draw")
    names = [name for name in MODELS if any(r["model"] == name for r in steps)]
    columns = min(3, len(names))
    height = -(-len(names) // columns)
    figure = figure_class()(figsize=(5.5 * columns, 4.6 * height), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False).flatten()
    for axes in grid[len(names) :]:
        axes.remove()
    modes = (("eager", SERIES[0], "o"), ("compiled", SERIES[2], "s"))
    legend: dict[str, Any] = {}
    for axes, name in zip(grid, names, strict=False):
        places: dict[str, tuple[float, float]] = {}
        for mode, colour, marker in modes:
            mine = [r for r in steps if (r["model"], r["mode"]) == (name, mode)]
            at = [(1e3 * r["step_seconds"], r["peak_bytes"] / MIB) for r in mine]
            if at:
                axes.scatter(*zip(*at, strict=True), c=colour, marker=marker, s=40, label=mode)
            marks = {"eager": "", "compiled": ", compiled"}[mode]
            places |= {r["variant"] + marks: p for r, p in zip(mine, at, strict=True)}
        finish(axes, MODELS[name].title, "peak, MiB")
        axes.set_xlabel("ms a step")
        axes.margins(0.2)
        axes.set_ylim(0, 1.15 * max(peak for _, peak in places.values()))
        legend |= {text: dot for dot, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        label_points(axes, places)
    figure.legend(legend.values(), legend.keys(), loc="outside upper right", frameon=False)
    figure.suptitle(f"forward and backward on {result['card']}, bf16 autocast", color=INK)
    figure.savefig(path, dpi=110)


def label_points(axes: Any, places: dict[str, tuple[float, float]]) -> None:
    """Names the points, each inside the axes where it covers no other name and no point."""
    axes.figure.draw_without_rendering()  # settles the scales
    points = 72 / axes.figure.dpi
    at = {name: axes.transData.transform(place) * points for name, place in places.items()}
    left, right = axes.bbox.x0 * points, axes.bbox.x1 * points
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in at.values()]
    for name, (x, y) in sorted(at.items(), key=lambda item: -item[1][1]):
        width, height = 5.6 * len(name), 10.0
        spots = [(side, dy) for dy in _HEIGHTS for side in (8.0, -8 - width)]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in spots]
        free = [
            left <= box[0] and box[2] <= right and not any(_meet(box, other) for other in taken)
            for box in boxes
        ]
        chosen = free.index(True) if any(free) else 0
        taken.append(boxes[chosen])
        axes.annotate(
            name,
            places[name],
            xytext=spots[chosen],
            textcoords="offset points",
            fontsize=9,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": "#b4bac1", "linewidth": 0.7},
        ).set_in_layout(False)


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
