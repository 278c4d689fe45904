"""``dropit-fx bench codecs``: every codec by itself, in bits and in the gradient of a whole model.

What one kind of op reads, the inputs of all linear layers or those of all GELUs, is kept by one
codec, everything else exactly; the gradient of all parameters is compared with the dense one. So
the error is the codec's alone. The other codecs (``keep``, ``drop``, ``bitmask``) lose nothing. On
two trained models, ``bench.trained``. Where the choice of rows follows the gradients of earlier
steps, one step with the same batch goes before. What is measured is written row by row beside the
file of ``--json``: a run that was cut goes on there, unless the sources have changed.

Needs extra ``test``; the picture, matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from dropit_fx.bench.gpu import begun, sources, write
from dropit_fx.bench.gradients import Gradients, compared, gradients
from dropit_fx.bench.trained import MODELS, Trained, trained
from dropit_fx.codecs import CODEC
from dropit_fx.codecs.cast import DTYPE, FLOAT8
from dropit_fx.codecs.codec import Options
from dropit_fx.codecs.low_rank import RANDOM, RANGE
from dropit_fx.config import load_config
from dropit_fx.kernels.rows import NORM, UNIFORM, WTA_CRS
from dropit_fx.report.palette import SERIES
from dropit_fx.report.plot import INK, figure_class, finish
from dropit_fx.report.rows import plain_table, report_of
from dropit_fx.rewriting import Rewriter

LINEAR, GELU = READS = ("linear", "gelu")
TICKS = (0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 16)


class System(NamedTuple):
    """A codec with options that are not at their defaults, and whose practice that is.

    Attributes:
        codec: Its name.
        options: Of it.
        family: A line of the picture: settings that differ in size alone.
        paper: The system that keeps tensors this way, or "".
    """

    codec: str
    options: Options
    family: str
    paper: str = ""

    @property
    def name(self) -> str:
        """As reports spell a codec, with all that is set."""
        said = ", ".join(f"{k}={v}" for k, v in self.options.items() if v is not None)
        return f"{self.codec}({said})"


def _quant(family: str, bits: Sequence[int], paper: dict[int, str], **more: Any) -> list[System]:
    return [System("quant", {"bits": b} | more, family, paper.get(b, "")) for b in bits]


STOCHASTIC = {"rounding": "stochastic"}
MEAN = {"range": "uniform", "block": 256} | STOCHASTIC  # GACT's levels
_SHARED = (  # of codecs that keep inputs of both ops
    *_quant("quant", (2, 3, 4, 5, 6, 8), {8: "Mesa"}),
    *_quant("quant, stochastic", (2, 4), {4: "GACT"}, **MEAN),
    *_quant("quant, rotated", (2, 3, 4), {4: "HOT"}, hadamard=True, **STOCHASTIC),
    *(System("cast", {"dtype": d}, "cast", "COAT" * (d == DTYPE.default)) for d in FLOAT8),
    System("cast", {"dtype": "bfloat16"}, "cast"),
)
SYSTEMS: dict[str, tuple[System, ...]] = {
    LINEAR: (
        System("mink", {"gamma": 0.9}, "mink", "DropIT"),
        *(System("mink", {"gamma": gamma}, "mink") for gamma in (0.7, 0.5)),
        *(
            System("mink", {"gamma": gamma, "bits": bits}, "mink in few bits")
            for gamma, bits in ((0.87, 2), (0.69, 2), (0.5, 4))
        ),
        *(System("random", {"gamma": gamma}, "random") for gamma in (0.9, 0.7)),
        *(
            System("rows", {"gamma": gamma, "select": select, "bits": bits}, f"rows, {select}")
            for select in (NORM, UNIFORM)
            for gamma, bits in ((0.7, 4), (0.7, None))
        ),
        System("rows", {"gamma": 0.7, "select": WTA_CRS}, f"rows, {WTA_CRS}", "WTA-CRS"),
        *(
            System("rows", {"gamma": gamma, "select": WTA_CRS, "bits": 4}, f"rows, {WTA_CRS}")
            for gamma in (0.9, 0.7, 0.5)
        ),
        System("low_rank", {"rank": 0.125, "projection": RANGE}, f"low_rank, {RANGE}", "LoRAct"),
        *(
            System("low_rank", {"rank": r, "projection": RANGE, "bits": 6}, f"low_rank, {RANGE}")
            for r in (0.0625, 0.125, 0.25, 0.5)
        ),
        System(
            "low_rank",
            {"rank": 0.25, "projection": RANDOM},
            f"low_rank, {RANDOM}",
            "RandomizedLinear",
        ),
        System("low_rank", {"rank": 0.25, "projection": RANDOM, "bits": 4}, f"low_rank, {RANDOM}"),
        *_SHARED,
    ),
    GELU: (
        *(System("few_bit", {"bits": b}, "few_bit", "FewBit" * (b == 3)) for b in (1, 2, 3, 4)),
        *(s._replace(paper="") if s.paper == "HOT" else s for s in _SHARED),  # of linear layers
    ),
}


def bench_codecs(
    loss: str = "mlm",
    models: Sequence[str] = MODELS,
    json_path: str | None = None,
    plot_path: str | None = None,
) -> dict[str, Any]:
    """Measures every codec on both models, prints tables and draws one picture.

    Args:
        loss: Of the encoder.
        models: Of ``bench.trained``.
        json_path: Where to write the figures, once all are there; until then ``<json_path>.part``
            has those that are.
        plot_path: Where to draw them; the suffix says the format.

    Returns:
        Model -> ``title``, and ``rows`` of ``reads``, ``family``, ``codec``, ``name``, ``paper``,
        ``tensors``, ``bits`` (an element, as kept), ``error``, ``cosine`` and ``front``.

    Raises:
        FileNotFoundError: The folder of a path is missing.
        ModuleNotFoundError: matplotlib, or what a model needs, is missing.
    """
    for path in filter(None, (json_path, plot_path)):  # not after minutes
        if not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"no folder to write {path} into")
    if plot_path is not None:
        figure_class()
    part = None if json_path is None else Path(f"{json_path}.part")
    known = begun(part, {"loss": loss, "sources": sources()}, {"rows": {}})
    found: dict[str, Any] = {}
    for model in models:
        run, rows = trained(model, loss), known["rows"].setdefault(model, [])
        for row in measure(run, known=rows):
            rows.append(row)
            if part is not None:
                write(known, [part])
        found[model] = {"title": run.title, "rows": front(rows)}
        for reads in READS:
            Console().print(
                _table(f"inputs of {reads} of {run.title}", found[model]["rows"], reads)
            )
    if json_path is not None and part is not None:
        write(found, [Path(json_path)])
        part.unlink(missing_ok=True)
    if plot_path is not None:
        draw(found, plot_path)
    return found


def measure(
    run: Trained,
    systems: dict[str, tuple[System, ...]] = SYSTEMS,
    known: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """A row for each system that keeps anything of the model's, and has none among the known."""
    done = {(row["reads"], row["name"]) for row in known}
    every = [(reads, one) for reads, mine in systems.items() for one in mine]
    every = [(reads, one) for reads, one in every if (reads, one.name) not in done]
    if not every:
        return
    rewriter = Rewriter(run.model, (), run.inputs)
    exact = gradients(run, run.model)
    for reads, system in track(every, "codecs", console=Console(stderr=True), transient=True):
        row = measure_system(run, rewriter, exact, reads, system)
        if row is not None:
            yield row


def measure_system(
    run: Trained, rewriter: Rewriter, exact: Gradients, reads: str, system: System
) -> dict[str, Any] | None:
    """Bits and error of one; None where it keeps nothing."""
    rule = {"op": reads, "codec": system.codec, **system.options}
    plan = rewriter.rewritten(
        load_config({"preset": None, "derive": False, "keep_small": False, "rules": [rule]})
    )
    kept = [r for r in report_of(plan).rows if r.codecs == (system.codec,) and not r.reason]
    if not kept:
        return None
    torch.manual_seed(0)
    codec = CODEC[system.codec]
    if codec.remembers(codec.defaults() | system.options):
        gradients(run, plan.module)
    lost = compared(exact, gradients(run, plan.module))
    elements = sum(math.prod(r.shape) for r in kept)  # not of a storage that is larger
    return {
        "reads": reads,
        "family": system.family,
        "codec": system.codec,
        "name": system.name,
        "paper": system.paper,
        "tensors": len(kept),
        "bits": 8 * sum(r.kept_bytes for r in kept) / elements,
    } | lost


def front(rows: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows by size; ``front``: those of the same reads that are no larger have more error."""
    least: dict[str, float] = {}
    ranked = sorted(rows, key=lambda row: (row["reads"], row["bits"], row["error"]))
    for row in ranked:
        row["front"] = row["error"] < least.get(row["reads"], float("inf"))
        least[row["reads"]] = min(row["error"], least.get(row["reads"], float("inf")))
    return ranked


def _table(title: str, rows: list[dict[str, Any]], reads: str) -> Any:
    figures = ("bits", "relative error", "cosine")
    table = plain_table("codec", "as in", *figures, figures=figures, title=title)
    for row in (row for row in rows if row["reads"] == reads):
        cells = f"{row['bits']:.2f}", f"{row['error']:.4f}", f"{row['cosine']:.4f}"
        table.add_row(row["name"], row["paper"], *cells, style="bold" if row["front"] else None)
    return table


def draw(found: dict[str, Any], path: str | PathLike[str]) -> None:
    """Error over bits, a panel for each model and kind of op; the front is a line."""
    markers = "osD^vPX<>*hd"
    rows = [row for model in found.values() for row in model["rows"]]
    families = {
        name: number for number, name in enumerate(dict.fromkeys(r["family"] for r in rows))
    }
    figure = figure_class()(figsize=(15, 5.4 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), len(READS), squeeze=False)
    legend: dict[str, Any] = {}
    for line, model in zip(grid, found.values(), strict=True):
        for axes, reads in zip(line, READS, strict=True):
            mine = [row for row in model["rows"] if row["reads"] == reads]
            best = [row for row in mine if row["front"]]
            at = [row["bits"] for row in best], [row["error"] for row in best]
            axes.plot(*at, color=INK, linewidth=1.2, zorder=1)
            for number, name in enumerate(families):
                points = [row for row in mine if row["family"] == name]
                place = [row["bits"] for row in points], [row["error"] for row in points]
                edges = [INK if row["front"] else "none" for row in points]
                colour, marker = SERIES[number % len(SERIES)], markers[number % len(markers)]
                dots = axes.scatter(*place, c=colour, marker=marker, edgecolors=edges, s=60)
                if points:
                    legend[name] = dots
            finish(axes, f"inputs of {reads}: {model['title']}", "relative error of the gradient")
            axes.set(xscale="log", yscale="log", xlabel="bits an element")
            axes.set_xticks(TICKS, labels=[f"{tick:g}" for tick in TICKS])
            axes.minorticks_off()
            axes.grid(color="#eceef0")
            axes.set_axisbelow(True)
    figure.legend(legend.values(), legend.keys(), loc="outside right center", frameon=False)
    figure.suptitle("One codec at a time; on the line: none as small has less error", color=INK)
    figure.savefig(path, dpi=110)
