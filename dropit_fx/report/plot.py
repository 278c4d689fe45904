"""The picture of a report, and what all pictures share. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, groupby
from os import PathLike
from typing import TYPE_CHECKING, Any

from dropit_fx.report import palette
from dropit_fx.report.palette import blend

if TYPE_CHECKING:
    from dropit_fx.report.rows import Report, Row

DENSE, KEPT, INK = palette.FREE.light, palette.KEPT.light, palette.INK.light
MIB = 2**20
LABELS = 28  # at most so many names under the bars


def report_picture(report: Report, path: str | PathLike[str]) -> None:
    """Draws what each saved tensor takes, dense and kept, in graph order; totals by op; the sum.

    Args:
        report: Of a rewritten model.
        path: Its suffix says the format: PNG, SVG, PDF.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: The report has no rows, or matplotlib does not know the suffix.
    """
    rows = [r for r in report.rows if not r.region]
    if not rows:
        raise ValueError("nothing to draw: the model saves no tensor for a backward")
    figure = figure_class()(figsize=(14, 8), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2.4, 1), height_ratios=(1.5, 1))
    colours = _colours(rows)
    _draw_tensors(figure.add_subplot(grid[0, 0]), rows, colours)
    _draw_sum(figure.add_subplot(grid[1, 0]), rows)
    _draw_ops(figure.add_subplot(grid[:, 1]), rows, colours)
    dense, kept = report.dense_bytes / MIB, report.kept_bytes / MIB
    figure.suptitle(
        f"saved for backward: {dense:.1f} MiB dense, {kept:.1f} MiB kept"
        f" ({kept / dense if dense else 1:.1%})",
        fontsize=14,
        color=INK,
    )
    figure.savefig(path, dpi=110)


def _draw_tensors(axes: Any, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    largest = max(r.dense_bytes for r in rows)
    shown = [r for r in rows if r.dense_bytes >= largest / 200]
    places = range(len(shown))
    width = 0.86
    axes.bar(places, [r.dense_bytes / MIB for r in shown], width, color=DENSE, label="let go")
    for name, colour in colours.items():
        mine = [i for i in places if _codec(shown[i]) == name]
        label = "kept dense" if name == "keep" else name
        heights = [shown[i].kept_bytes / MIB for i in mine]
        axes.bar(mine, heights, width, color=colour, label=label)
    _name_places(axes, shown)
    hidden = len(rows) - len(shown)
    note = f"; {hidden} under 0.5 % of the largest are left out" if hidden else ""
    finish(axes, f"each saved tensor, in the order of the forward{note}", "MiB")
    axes.set_xlim(-0.8, len(shown) - 0.2)
    axes.legend(frameon=False, fontsize=9, ncols=6, loc="lower left", bbox_to_anchor=(0, 1.06))


def _name_places(axes: Any, rows: Sequence[Row]) -> None:
    """Names the bars: each by its op and module if they are few, else by groups of modules."""
    if len(rows) <= LABELS:
        axes.set_xticks(range(len(rows)), [f"{r.op}\n{r.module}" for r in rows], fontsize=7)
        axes.tick_params(axis="x", rotation=90, length=0)
        return
    for depth in (3, 2, 1):
        groups = _groups(rows, depth)
        if len(groups) <= LABELS:
            break
    axes.set_xticks([start - 0.5 for _, start, _ in groups], [""] * len(groups))
    axes.tick_params(axis="x", length=14, color=DENSE)
    for name, start, end in groups:
        crowded = len(name) > 90 * (end - start) / len(rows)  # some 100 letters fit in a line
        axes.annotate(
            name,
            ((start + end - 1) / 2, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -5),
            textcoords="offset points",
            rotation=90 if crowded else 0,
            ha="center",
            va="top",
            fontsize=8,
            color=INK,
        )


def _groups(rows: Sequence[Row], depth: int) -> list[tuple[str, int, int]]:
    """Runs of rows whose modules share their first ``depth`` names: (name, start, end)."""
    names = [".".join(row.module.split(".")[:depth]) for row in rows]
    runs = [[*run] for _, run in groupby(range(len(rows)), key=names.__getitem__)]
    return [(names[run[0]], run[0], run[-1] + 1) for run in runs]


def _draw_sum(axes: Any, rows: Sequence[Row]) -> None:
    dense, kept = _running(r.dense_bytes for r in rows), _running(r.kept_bytes for r in rows)
    places = range(len(rows) + 1)
    axes.fill_between(places, dense, kept, step="post", color=DENSE)
    axes.fill_between(places, kept, step="post", color=KEPT)
    axes.step(places, dense, where="post", color=INK, linewidth=1)
    for curve, text in ((dense, "dense"), (kept, "kept")):
        _note(axes, f"{curve[-1]:.0f}\n{text}", (len(rows), curve[-1]), 10)
    finish(axes, "held at once, as the forward goes on", "MiB")
    axes.set_xlim(0, len(rows) * 1.07)
    axes.set_ylim(0, dense[-1] * 1.08)
    axes.set_xticks([])


def _running(sizes: Iterable[int]) -> list[float]:
    return [total / MIB for total in accumulate(sizes, initial=0)]


def _draw_ops(axes: Any, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    dense: dict[str, float] = {}
    kept: dict[str, dict[str, float]] = {}
    for r in rows:
        dense[r.op] = dense.get(r.op, 0.0) + r.dense_bytes / MIB
        parts = kept.setdefault(r.op, {})
        parts[_codec(r)] = parts.get(_codec(r), 0.0) + r.kept_bytes / MIB
    ops = sorted(dense, key=dense.__getitem__)[-16:]
    axes.barh(range(len(ops)), [dense[op] for op in ops], color=DENSE)
    for i, op in enumerate(ops):
        left = 0.0
        for name, size in sorted(kept[op].items(), key=lambda item: list(colours).index(item[0])):
            axes.barh(i, size, left=left, color=colours[name])
            left += size
        sizes = f"{dense[op]:.1f} → {left:.1f}" if left != dense[op] else f"{left:.1f}"
        _note(axes, sizes, (dense[op], i), 8)
    axes.set_yticks(range(len(ops)), [_wrapped(op) for op in ops], fontsize=8)
    axes.set_xlim(0, max(dense.values()) * 1.32)
    finish(axes, "by the ops that read it, MiB", "")
    axes.tick_params(axis="y", length=0)


def _note(axes: Any, text: str, place: tuple[float, float], size: int) -> None:
    """Writes to the right of a place."""
    beside = {"xytext": (size // 2, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, place, fontsize=size, color=INK, **beside)


def _wrapped(op: str) -> str:
    lines = [""]
    for word in op.replace("+", "+\n").replace("_", "_\n").split("\n"):
        fits = len(lines[-1]) + len(word) <= 18 and not lines[-1].endswith("+")
        lines[-1:] = [lines[-1] + word] if fits else [lines[-1], word]
    return "\n".join(lines)


def _codec(row: Row) -> str:
    """The codecs of a row without their options: ``bitmask + mink``."""
    return " + ".join(row.codecs)


def _colours(rows: Iterable[Row]) -> dict[str, str]:
    """Codecs -> colour, dense first; the same codec has the same colour in every picture."""
    present = {_codec(r): r.codecs for r in rows}
    colours = palette.palette(name for names in present.values() for name in names)
    order = [*colours, *sorted(present.keys() - colours.keys())]
    return {
        name: blend(colours[part].light for part in present[name])
        for name in order
        if name in present
    }


def finish(axes: Any, title: str, unit: str) -> None:
    """What all axes have: a title, a unit, two sides."""
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def figure_class() -> Any:
    """The Figure class of matplotlib; without pyplot, so that no window system is touched."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib: pip install 'dropit-fx[plot]'", name="matplotlib"
        ) from error
    return Figure
