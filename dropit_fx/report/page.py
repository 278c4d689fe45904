"""A report as one HTML page to look at: no network, no library, nothing beside the file.

What is computed is computed here; the template ``page.html`` only draws and sorts. The data stands
in it as JSON, in which no character can end the element that holds it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from dropit_fx.capture.provenance import first_line
from dropit_fx.planner import Step
from dropit_fx.planner.timeline import forecast
from dropit_fx.report.palette import FREE, INK, Colour, palette
from dropit_fx.report.rows import Report, Row, short
from dropit_fx.report.step_view import KIND_COLOURS, step_data
from dropit_fx.report.suggest import Progress, suggest

PLACE = "{{data}}"  # of the JSON in the template; {{light}} and {{dark}} are of its colours
SMALL = 1 / 200  # of the largest tensor: what is below is folded
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


class Level(NamedTuple):
    """What is saved while one op runs, forward or backward."""

    row: int  # the last tensor that it saved: an index into the rows
    dense: int  # bytes
    kept: int  # bytes


def write_page(
    report: Report,
    path: str | PathLike[str],
    about: Mapping[str, object] | None = None,
    *,
    suggestions: int = 3,
    progress: Progress = lambda text, share: None,
    **step: Any,
) -> None:
    """Writes the page of a report, as :meth:`Report.page`; ``step``: ``loss`` and ``optimizer``."""
    template = (resources.files("dropit_fx.report") / "page.html").read_text(encoding="utf-8")
    codecs = palette(name for row in report.rows for name in row.codecs)
    colours = {"ink": INK, "free": FREE} | {f"codec-{n}": c for n, c in codecs.items()}
    colours |= {f"kind-{name}": colour for name, colour in KIND_COLOURS.items()}
    for scheme in ("light", "dark"):
        template = template.replace("{{" + scheme + "}}", css(colours, scheme))
    told = {name: str(value) for name, value in (about or {}).items() if value is not None}
    data = {"about": told} | page_data(report) | step_of(report, step)
    data |= suggested(report, suggestions, progress)
    text = json.dumps(data).translate(_ESCAPES)
    Path(path).write_text(template.replace(PLACE, text), encoding="utf-8")


def step_of(report: Report, step: Mapping[str, Any]) -> dict[str, Any]:
    """The predicted step, or why there is none: a page without it is still one."""
    try:
        told, places = report.told(step)
        dense = None
        if report.origin is not None and (model := report.origin.model()) is not None:
            dense = forecast(Step(model, *report.origin.inputs(), **step), model)
    except Exception as error:  # of whatever class the model's, the loss's or the optimizer's is
        if step:  # what the caller gave is not passed over
            raise
        return {"step": None, "no_step": first_line(error).partition(": ")[2]}
    return {"step": step_data(told, places, dense), "no_step": ""}


def suggested(report: Report, count: int, progress: Progress) -> dict[str, Any]:
    """The rules that would lower what is kept most, as lines of a config, or why there are none."""
    try:
        found = suggest(report, count, progress=progress) if count and report.rows else None
    except ValueError as error:  # the model is gone
        return {"suggested": None, "no_suggestion": str(error)}
    if found is None or not found.rules:
        return {"suggested": None, "no_suggestion": "" if found is None else str(found)[2:].strip()}
    saves = sum(rule.saves for rule in found.rules)
    return {"suggested": {"lines": str(found), "saves": saves}, "no_suggestion": ""}


def css(colours: Mapping[str, Colour], scheme: str) -> str:
    """One colour scheme as variables of CSS; a name may hold any character."""
    values = {name: getattr(colour, scheme) for name, colour in colours.items()}
    odd = re.compile(r"[^\w-]")
    named = {odd.sub(lambda c: f"\\{ord(c[0]):x} ", name): v for name, v in values.items()}
    return " ".join(f"--{name}: {value};" for name, value in named.items())


def page_data(report: Report) -> dict[str, Any]:
    """What the page shows, as plain data: totals, rows, timeline, sums by codec."""
    largest = max((row.dense_bytes for row in report.rows), default=0)
    rows = [
        asdict(row)
        | {"where": short(row.where), "codecs": row.codecs, "block": block_of(row.module)}
        | {"small": max(row.dense_bytes, row.kept_bytes) < SMALL * largest}
        for row in report.rows
    ]
    return report.to_dict() | {
        "rows": rows,
        "timeline": timeline(report.rows),
        "codecs": sums_by_codec(report.rows),
    }


def block_of(module: str) -> str:
    """The block that a module belongs to: its name up to the first number, or its first part."""
    names = module.split(".")
    number = next((i for i, name in enumerate(names) if name.isdigit()), 0)
    return ".".join(names[: number + 1])


def timeline(rows: Sequence[Row]) -> list[Level]:
    """Saved bytes through a training step: one level for each tensor, forward, then backward.

    Rows stand in the order in which the forward saves them. The op that saves a tensor first is the
    last whose backward reads it, so the backward lets go in the reverse order; a copy that several
    tensors share belongs to the first of them and goes with it. Between these two times a tensor
    counts whole, also where its later readers have parts of their own. The two levels in the
    middle are the totals of the report.

    Tensors of a checkpointed region are left out: they live only while it is made again.
    """
    levels = [Level(row=-1, dense=0, kept=0)]
    for index, row in enumerate(rows):
        if not row.region:
            last = levels[-1]
            levels.append(Level(index, last.dense + row.dense_bytes, last.kept + row.kept_bytes))
    forward = levels[1:]
    return forward + forward[::-1]


def sums_by_codec(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Dense and kept bytes of the tensors of each codec, the largest dense sum first."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if not row.region:
            groups.setdefault(row.codecs, []).append(row)
    sums = [
        {
            "codecs": codecs,
            "dense_bytes": sum(row.dense_bytes for row in mine),
            "kept_bytes": sum(row.kept_bytes for row in mine),
        }
        for codecs, mine in groups.items()
    ]
    return sorted(sums, key=lambda one: -one["dense_bytes"])
