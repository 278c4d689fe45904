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

from dropit_fx.report.palette import FREE, INK, Colour, palette
from dropit_fx.report.rows import Report, Row, short

PLACE = "{{data}}"  # of the JSON in the template; {{light}} and {{dark}} are of its colours
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


class Level(NamedTuple):
    """What is saved while one op runs, forward or backward."""

    row: int  # the last tensor that it saved: an index into the rows
    dense: int  # bytes
    kept: int  # bytes


def write_page(
    report: Report, path: str | PathLike[str], about: Mapping[str, object] | None = None
) -> None:
    """Writes the page of a report.

    Args:
        report: Of a rewritten model; it may have no rows.
        path: Of the HTML file.
        about: What else the heading tells, by name, but what is None; ``model`` is its title.
    """
    template = (resources.files("dropit_fx.report") / "page.html").read_text(encoding="utf-8")
    codecs = palette(name for row in report.rows for name in row.codecs)
    colours = {"ink": INK, "free": FREE} | {f"codec-{n}": c for n, c in codecs.items()}
    for scheme in ("light", "dark"):
        template = template.replace("{{" + scheme + "}}", css(colours, scheme))
    told = {name: str(value) for name, value in (about or {}).items() if value is not None}
    text = json.dumps({"about": told} | page_data(report)).translate(_ESCAPES)
    Path(path).write_text(template.replace(PLACE, text), encoding="utf-8")


def css(colours: Mapping[str, Colour], scheme: str) -> str:
    """One colour scheme as variables of CSS; a name may hold any character."""
    values = {name: getattr(colour, scheme) for name, colour in colours.items()}
    odd = re.compile(r"[^\w-]")
    named = {odd.sub(lambda c: f"\\{ord(c[0]):x} ", name): v for name, v in values.items()}
    return " ".join(f"--{name}: {value};" for name, value in named.items())


def page_data(report: Report) -> dict[str, Any]:
    """What the page shows, as plain data: totals, rows, timeline, sums by codec."""
    rows = [asdict(row) | {"where": short(row.where), "codecs": row.codecs} for row in report.rows]
    return report.to_dict() | {
        "rows": rows,
        "timeline": timeline(report.rows),
        "codecs": sums_by_codec(report.rows),
    }


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
