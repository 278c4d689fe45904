"""Pictures of what benches and examples measured. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from dropit_fx.report.palette import SERIES, blend
from dropit_fx.report.plot import INK, MIB, figure_class, finish

_HEIGHTS = (-3, 7, -13, 18, -24, 29, -35, 40, -46)  # of a label over its point, in points


def demo_picture(results: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Draws what the scripts in ``examples/`` found: loss and accuracy, and costs against dense.

    Args:
        results: What they write as JSON.
        path: Its suffix says the format.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    models = results["models"]
    presets = {v: None for ways in models.values() for v in ways["eager"] if v != "dense"}
    colours = {"dense": INK} | dict(zip(presets, SERIES[:1] + SERIES[2:], strict=False))
    figure = figure_class()(figsize=(15, 3.9 * len(models)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    grid = figure.add_gridspec(len(models), 3, width_ratios=(1, 1, 1.15))
    for i, (name, ways) in enumerate(models.items()):
        loss, accuracy, costs = (figure.add_subplot(grid[i, j]) for j in range(3))
        _draw_loss(loss, name, ways["eager"], colours)
        _draw_accuracy(accuracy, name, ways["eager"], colours)
        _draw_costs(costs, name, ways, colours, last=i == len(models) - 1)
    figure.savefig(path, dpi=110)


def _draw_loss(axes: Any, name: str, found: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    for variant, got in found.items():
        curves = [run["loss"] for run in got["runs"]]
        epochs = len(got["runs"][0]["accuracy"])
        places = [(i + 0.5) * epochs / len(curves[0]) for i in range(len(curves[0]))]
        means = _draw_curves(axes, places, curves, colours[variant], variant == "dense")
        axes.plot([], [], color=colours[variant], label=f"{variant} {means[-1]:.3f}")
    finish(axes, f"{name}: loss over epochs, {_seeds(found)}", "")
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks(lambda loss, _: f"{loss:g}" if f"{loss:e}"[0] in "125" else "")
    axes.tick_params(axis="y", which="minor", labelsize=8)
    _legend_below(axes, -0.1)


def _draw_accuracy(
    axes: Any, name: str, found: Mapping[str, Any], colours: Mapping[str, str]
) -> None:
    for variant, got in found.items():
        curves = [[100 * a for a in run["accuracy"]] for run in got["runs"]]
        epochs = range(1, len(curves[0]) + 1)
        means = _draw_curves(axes, epochs, curves, colours[variant], variant == "dense")
        label = f"{variant} {means[-1]:.1f}"
        if len(curves) > 1:
            label += f" ± {statistics.stdev(curve[-1] for curve in curves):.1f}"
        axes.plot([], [], color=colours[variant], label=label)
    finish(axes, f"{name}: test accuracy over epochs, %", "")
    axes.set_ylim(max(0, axes.get_ylim()[0]), 100.5)
    axes.locator_params(axis="x", integer=True)
    _legend_below(axes, -0.1)


def _draw_curves(
    axes: Any, places: Sequence[float], curves: Sequence[Sequence[float]], colour: str, below: bool
) -> list[float]:
    """A line for the mean of some curves, in a band that holds them all. Returns the mean."""
    columns = list(zip(*curves, strict=True))
    means = [statistics.mean(c) for c in columns]
    if len(curves) > 1:
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(places, means, color=colour, linewidth=2.4 if below else 1.5)
    return means


def _seeds(found: Mapping[str, Any]) -> str:
    seeds = len(found["dense"]["runs"])
    return f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"


def _draw_costs(
    axes: Any, name: str, ways: Mapping[str, Any], colours: Mapping[str, str], last: bool
) -> None:
    """Bars for each preset, eager and compiled, in per cent of dense run the same way."""
    costs = (
        ("saved_bytes", "saved\nbytes"),
        ("peak_memory", "peak\nmemory"),
        ("time", "step\ntime"),
    )
    bars = [
        (way, variant)
        for variant in colours
        for way in ways
        if variant in ways[way] and variant != "dense"
    ]
    height = 0.84 / len(bars)
    longest = 100.0
    for j, (way, variant) in enumerate(bars):
        got, dense = ways[way][variant], ways[way]["dense"]
        shares = [100 * got[key] / dense[key] for key, _ in costs]
        longest = max(longest, *shares)
        texts = [
            f"{share:.0f} %"
            + ("" if key == "time" else f"   {got[key] / MIB:.1f} of {dense[key] / MIB:.1f} MiB")
            for share, (key, _) in zip(shares, costs, strict=True)
        ]
        colour = colours[variant] if way == "eager" else blend([colours[variant], "#ffffff"])
        places = [i + (j - (len(bars) - 1) / 2) * height for i in range(len(costs))]
        label = f"{variant}, {way}" if len(ways) > 1 else variant
        drawn = axes.barh(places, shares, height * 0.9, color=colour, label=label)
        for text in axes.bar_label(drawn, texts, padding=4, fontsize=8, color=INK):
            text.set_bbox({"facecolor": "white", "linewidth": 0, "pad": 0.8})
    axes.axvline(100, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(costs)), [text for _, text in costs])
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.2)
    finish(axes, f"{name}: cost of a step, % of dense (dashed)", "")
    axes.tick_params(axis="y", length=0)
    if last:
        _legend_below(axes, -0.1, columns=2)


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


def _legend_below(axes: Any, depth: float, columns: int = 4) -> None:
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, depth), "borderaxespad": 0}
    axes.legend(
        frameon=False, fontsize=9, ncols=columns, handlelength=1.2, columnspacing=1.2, **place
    )


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
