"""What ``bench gpu`` measured, for people: lines of tables for the terminal and the README."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Column, Table

from dropit_fx.bench import gpu_rows
from dropit_fx.bench.gpu_models import MODELS
from dropit_fx.bench.gpu_rows import Row

MIB = 2**20


def key(row: Row) -> tuple[str, ...]:
    """What a row measures: the same for two runs of it."""
    if row["kind"] == "kernel":
        return "kernel", row["name"]
    return "model", row["model"], row["mode"], row["variant"]


def label(row: Row) -> str:
    """A row's name for people."""
    return ", ".join(key(row)[1:])


def said(row: Row) -> str:
    """What came out of a row, in a few words."""
    if "failed" in row:
        return failure(row, 160)
    if row["kind"] == "kernel":
        speeds = (
            f"{what} {row[f'{what}_of_copy']:.0%} of a copy's speed" for what in ("pack", "unpack")
        )
        return ", ".join(speeds)
    sizes = [(what, row.get(f"{what}_bytes")) for what in ("saved", "peak")]
    known = [f"{what} {size / MIB:.0f} MiB" for what, size in sizes if size is not None]
    return ", ".join([*known, f"{row['step_seconds'] * 1e3:.1f} ms"])


def line_of_tests(tests: Row) -> str:
    """How the tests went, in one line."""
    counts = [f"{tests[kind]} {kind}" for kind in ("passed", "failed", "skipped") if kind in tests]
    took = [f"in {tests['seconds']:.0f} s"] if "seconds" in tests else []
    wrong = [f"({tests['error']})"] if "error" in tests else []
    return "tests: " + " ".join([", ".join(counts), *took, *wrong]).strip()


def failure(row: Row, length: int) -> str:
    """Why a row has no figures, on one line of at most so many letters."""
    line: str = row["failed"].splitlines()[0].replace("|", "/")
    return line if len(line) <= length else f"{line[: length - 3]}..."


def model_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The rows of models, with shares of the dense row of the same model and mode.

    Returns:
        Lines of model, mode, variant, saved, peak, time, busy, cosine, first step; see
        :data:`MODEL_HEAD`.
    """
    steps = {key(row): row for row in rows if row["kind"] == "model"}
    lines = []
    for (_, model, mode, variant), row in sorted(steps.items(), key=lambda item: _place(item[0])):
        name = [MODELS[model].title, mode, variant]
        if "failed" in row:
            lines.append([*name, failure(row, 60), *[""] * 5])
            continue
        dense = steps.get(("model", model, mode, gpu_rows.DENSE), {})

        def cell(what: str, scale: float, unit: str, row: Row = row, dense: Row = dense) -> str:
            value, base = row.get(what), dense.get(what)
            if value is None:
                return "-"
            share = f" ({value / base:.0%})" if base and row is not dense else ""
            return f"{value * scale:.{1 if unit == 'ms' else 0}f} {unit}{share}"

        cosine = "-" if row["cosine"] is None else f"{row['cosine']:.4f}"
        sizes = (cell(f"{what}_bytes", 1 / MIB, "MiB") for what in ("saved", "peak"))
        first = f"{row['cold_seconds']:.1f} s"
        times = (cell(f"{what}_seconds", 1e3, "ms") for what in ("step", "busy"))
        lines.append([*name, *sizes, *times, cosine, first])
    return lines


MODEL_HEAD = ("model", "mode", "step", "saved", "peak", "time", "busy", "cosine", "first step")
_OF_A_WAY = ("of a copy", "transient")
KERNEL_HEAD = ("format", "bits", "pack", *_OF_A_WAY, "unpack", *_OF_A_WAY)


def _place(of: tuple[str, ...]) -> tuple[int, ...]:
    _, model, mode, variant = of
    return (
        list(MODELS).index(model),
        list(gpu_rows.MODES).index(mode),
        gpu_rows.MODES[mode].index(variant),
    )


def kernel_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The rows of kernels, as :data:`KERNEL_HEAD` says; transient: bytes an element."""
    lines = []
    for row in (r for r in rows if r["kind"] == "kernel"):
        if "failed" in row:
            lines.append([row["name"], failure(row, 60), *[""] * 6])
            continue
        cells = [row["name"], f"{row['bits']:.2f}"]
        for what in ("pack", "unpack"):
            transient = row[f"{what}_transient"]
            cells += [f"{row[f'{what}_seconds'] * 1e6:.0f} µs", f"{row[f'{what}_of_copy']:.0%}"]
            cells.append("-" if transient is None else f"{transient:.2f} B")
        lines.append(cells)
    return lines


def tables(result: Row) -> list[Table]:
    """The rows for people."""
    found = []
    parts = ((MODEL_HEAD, model_cells(result["rows"])), (KERNEL_HEAD, kernel_cells(result["rows"])))
    for head, lines in parts:
        columns = [Column(name, no_wrap=True) for name in head]
        table = Table(*columns, box=None, header_style="bold", pad_edge=False, title=result["card"])
        for line in lines:
            table.add_row(*line)
        found += [table] if lines else []
    return found
