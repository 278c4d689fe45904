"""``dropit-fx bench formats``: what a format costs in bits and in the weight gradient.

Every format packs the real inputs of all Linear layers of a trained model (``bench.trained``), and
the weight gradient dW = dY^T x is formed once with x and once with what comes back. Two numbers are
reported, each the mean over the layers:

* error: |dW' - dW| / |dW|,
* projection: <dW', dW> / <dW, dW>; below 1 the gradient is shrunk, which slows training down.

Needs extra ``test``; the picture, matplotlib.
"""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from dropit_fx.bench.published import scatter, select
from dropit_fx.bench.trained import ENCODER, Trained, trained
from dropit_fx.codecs import CODEC
from dropit_fx.codecs.cast import FLOAT8
from dropit_fx.codecs.codec import Options
from dropit_fx.codecs.low_rank import PROJECTIONS
from dropit_fx.codecs.mink import format_of
from dropit_fx.kernels import AFFINE, FULL, SPACINGS, SYMMETRIC, UNIFORM, Format
from dropit_fx.kernels.rows import SELECTIONS
from dropit_fx.report.plot import figure_class
from dropit_fx.report.rows import plain_table
from dropit_fx.runtime.copies import WIDTH

MARKERS = "osD^vPX<>*hdp8H1234"  # of the families in the picture


class Coded(NamedTuple):
    """A codec, with the options that are not at their defaults."""

    codec: str
    options: Options

    @property
    def all_options(self) -> Options:
        """Defaults included."""
        return CODEC[self.codec].defaults() | self.options


ROWS = tuple(
    Coded("rows", {"gamma": gamma, "select": select, "bits": bits})
    for gamma in (0.5, 0.7)
    for select in SELECTIONS
    for bits in (None, 4)
)
ROTATED: tuple[Options, ...] = (
    {"hadamard": True, "block": 1024},
    {"hadamard": True, "block": 256, "range": SPACINGS[UNIFORM]},
)
FORMATS: tuple[tuple[str, Format | Coded], ...] = (
    *(("dropped", Format(keep, 1024)) for keep in (1000, 3000, 5000)),
    *(("dropped and coded", Format(keep, 1024, 2)) for keep in (1320, 2000, 3086, 4000)),
    *(("dropped and coded", Format(keep, 1024, 3)) for keep in (4000, 5000, 6611, 8000)),
    *(("dropped and coded", Format(keep, 1024, 4)) for keep in (3000, 5044, 7000)),
    ("dropped and coded", Format(1000, 1024, 8)),
    *(("coded", Format(FULL, 1024, bits)) for bits in (1, 2, 3, 4, 5, 6, 8)),
    *(("coded, affine", Format(FULL, 256, bits, AFFINE)) for bits in (2, 3, 4, 5, 8)),
    *(("coded, uniform", Format(FULL, 256, bits, UNIFORM)) for bits in (2, 3, 4)),
    *(("coded, stochastic", Format(FULL, 1024, bits, stochastic=True)) for bits in (2, 3, 4, 5, 8)),
    *(
        (f"rotated, {rounding}", Coded("quant", options | {"bits": bits, "rounding": rounding}))
        for rounding in ("nearest", "stochastic")
        for options in ROTATED
        for bits in (2, 3, 4)
    ),
    *(("cast", Coded("cast", {"dtype": dtype})) for dtype in FLOAT8),
    ("cast", Coded("cast", {"dtype": "float8_e4m3fn", "block": None})),
    ("cast", Coded("cast", {"dtype": "bfloat16"})),
    *((f"rows, {form.options['select']}", form) for form in ROWS),
    *(
        (
            f"low rank, {projection}",
            Coded("low_rank", {"rank": rank, "projection": projection, "bits": bits}),
        )
        for projection in PROJECTIONS
        for bits in (None, 4, 6)
        for rank in (0.0625, 0.125, 0.25, 0.5)
    ),
)


def named(form: Format | Coded) -> str:
    """A format as the table shows it."""
    if isinstance(form, Format):
        return _spelled(form)
    options = form.all_options
    bits = f"{options['bits']} bits" if options.get("bits") else "as is"
    if form.codec == "rows":
        share = 100 * (1 - options["gamma"])
        return f"keep {share:.0f} % of rows, {options['select']}, {bits}"
    if form.codec == "low_rank":
        return f"rank {100 * options['rank']:g} %, {options['projection']}, {bits}"
    if form.codec == "quant":
        return f"{_spelled(format_of(options))}, rotated"
    said = [str(options["dtype"])]
    if options["dtype"] in FLOAT8:
        said.append(f"block {options['block'] or 'all'}")
    return ", ".join(said)


def _spelled(form: Format) -> str:
    words = ["keep all" if form.full else f"keep {form.keep / 100:g} %"]
    words.append(f"{form.bits} bits" if form.bits else "as is")
    words += [SPACINGS[form.spacing]] if form.spacing != SYMMETRIC else []
    words += ["stochastic"] if form.stochastic else []
    words += [f"block {form.block or 'all'}"] if form.block != 1024 else []
    return ", ".join(words)


class Sample(NamedTuple):
    """One Linear layer: its input x (rows, in) and the gradient dy of its output (rows, out)."""

    name: str
    x: Tensor
    dy: Tensor


def collect(run: Trained) -> list[Sample]:
    """Runs one forward and backward."""
    samples: list[Sample] = []

    def watch(name: str, x: Tensor, y: Tensor) -> None:
        def keep(dy: Tensor) -> None:
            samples.append(Sample(name, x.detach().flatten(0, -2), dy.flatten(0, -2)))

        if y.requires_grad:
            y.register_hook(keep)  # type: ignore[no-untyped-call]

    handles = [
        layer.register_forward_hook(lambda _, args, y, name=name: watch(name, args[0], y))
        for name, layer in run.model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    value = run.loss(run.model)
    torch.autograd.grad(value, list(run.model.parameters()), allow_unused=True)
    for handle in handles:
        handle.remove()
    return sorted(samples)


def measure_format(samples: list[Sample], form: Format | Coded | None) -> dict[str, float]:
    """``bits`` an element as stored, ``error`` and ``projection`` of one format.

    Args:
        samples: From ``collect``.
        form: None is the published format at gamma 0.9.
    """
    stored, elements = 0, 0
    errors, projections = [], []
    for _, x, dy in samples:
        flat = x.reshape(-1)
        packed: tuple[Tensor, ...]
        if form is None:
            packed = select(flat, 0.9)
            back = scatter(*packed, x.shape)
        elif isinstance(form, Coded):
            codec, options = CODEC[form.codec], form.all_options | {WIDTH: x.shape[-1]}
            packed = codec.pack(flat, options)
            back = codec.unpack(packed, options, x.numel(), x.dtype).view_as(x)
        else:
            packed = torch.ops.dropit.sparsify(flat, *form.numbers, form.stochastic)
            given = *packed, x.numel(), x.dtype, *form.numbers
            back = torch.ops.dropit.unsparsify(*given).view_as(x)
        stored += sum(t.untyped_storage().nbytes() for t in packed)
        elements += x.numel()
        exact, approximate = dy.t() @ x, dy.t() @ back
        squared = exact.square().sum()
        errors.append(((approximate - exact).square().sum() / squared).sqrt().item())
        projections.append(((approximate * exact).sum() / squared).item())
    return {
        "bits": stored * 8 / elements,
        "error": statistics.mean(errors),
        "projection": statistics.mean(projections),
    }


def bench_formats(
    loss: str = "mlm",
    model: str = ENCODER,
    json_path: str | None = None,
    plot_path: str | None = None,
) -> list[dict[str, Any]]:
    """Measures every format and prints a table, best error for its size marked.

    Args:
        loss: Of the encoder.
        model: "encoder" or "deit", of ``bench.trained``.
        json_path: Where to write the rows.
        plot_path: Where to draw them; the suffix says the format.

    Returns:
        Rows of ``family``, ``name``, ``bits``, ``error``, ``projection``, ``limit`` (2^-bits: no
        code for Gaussian values has less error) and ``best`` (no smaller format has less error).
    """
    torch.manual_seed(0)
    run = trained(model, loss, sequences=32)
    samples, title = collect(run), run.title
    measured: list[tuple[str, str, Format | Coded | None]] = [
        ("published", "keep 10 % of the tensor, int32 index", None),
        *((family, named(form), form) for family, form in FORMATS),
    ]
    rows: list[dict[str, Any]] = []
    for family, name, form in track(
        measured, "formats", console=Console(stderr=True), transient=True
    ):
        row: dict[str, Any] = {"family": family, "name": name, **measure_format(samples, form)}
        row["limit"] = 2.0 ** -row["bits"]
        rows.append(row)
    rows.sort(key=lambda row: row["bits"])
    least = float("inf")
    for row in rows:
        row["best"] = row["error"] < least
        least = min(least, row["error"])
    Console().print(_table(f"{len(samples)} Linear inputs of {title}", rows))
    if json_path is not None:
        tokens = max(len(sample.x) for sample in samples)
        found = {"model": title, "tokens": tokens, "rows": rows}
        Path(json_path).write_text(json.dumps(found, indent=2))
    if plot_path is not None:
        draw(rows, plot_path, title)
    return rows


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    figures = ("bits", "error of dW", "projection", "limit")
    table = plain_table("family", "format", *figures, figures=figures, title=title)
    for row in rows:
        cells = (f"{row[key]:.4f}" for key in ("error", "projection", "limit"))
        style = "bold" if row["best"] else None
        table.add_row(row["family"], row["name"], f"{row['bits']:.3f}", *cells, style=style)
    return table


def draw(rows: list[dict[str, Any]], path: str, title: str) -> None:
    """Draws error and projection over bits an element, a line for each family."""
    figure = figure_class()(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    families = dict.fromkeys(row["family"] for row in rows)
    markers = dict(zip(families, itertools.cycle(MARKERS), strict=False))
    for family, marker in markers.items():
        # of several bits at several keeps only the points: a line would join what is not in order
        scattered = family.startswith(("dropped and coded", "rotated", "rows", "low", "cast"))
        style = "" if scattered else "-"
        mine = [row for row in rows if row["family"] == family]
        for axes, key in ((left, "error"), (right, "projection")):
            points = ([row["bits"] for row in mine], [row[key] for row in mine])
            axes.plot(*points, marker=marker, linestyle=style, label=family, alpha=0.85)
    limit = [1 + i / 20 for i in range(120)]
    left.plot(limit, [2.0**-b for b in limit], color="black", linestyle=":", label="Gaussian limit")
    left.set(xlabel="bits an element", ylabel="relative error of dW", yscale="log", xscale="log")
    left.set_ylim(top=1.5, bottom=min(row["error"] for row in rows) / 1.5)
    right.axhline(1, color="black", linewidth=0.8, linestyle=":")
    right.set(xlabel="bits an element", ylabel="projection of dW on the exact one", xscale="log")
    for axes in (left, right):
        ticks = (0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 16)
        axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.suptitle(f"Linear inputs of {title}")
    figure.savefig(path, dpi=110)
