"""The picture of what the examples found: loss, accuracy, and what a step costs beside dense."""

import statistics
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from dropit_fx.report.palette import SERIES, blend
from dropit_fx.report.plot import INK, MIB, figure_class, finish


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


def _legend_below(axes: Any, depth: float, columns: int = 4) -> None:
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, depth), "borderaxespad": 0}
    axes.legend(
        frameon=False, fontsize=9, ncols=columns, handlelength=1.2, columnspacing=1.2, **place
    )
