"""What becomes of every saved tensor: one line each, totals, JSON and a picture."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from itertools import chain
from os import PathLike
from typing import Any
from weakref import WeakKeyDictionary

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, fx, nn

from dropit_fx.capture.provenance import node_module, node_where
from dropit_fx.codecs import UNREAD
from dropit_fx.passes.plan import Copy, Decision, Plan, Site
from dropit_fx.passes.share_packed import by_site, packed_bytes
from dropit_fx.planner import Step
from dropit_fx.planner.timeline import Timeline, forecast
from dropit_fx.private import being_compiled, compiled_in_place, pytree, uncompiled
from dropit_fx.report.origin import Alive, Blank, Origin, fakes
from dropit_fx.runtime.offload import OFFLOAD, obstacle

_META = "dropit_report"
NOTEBOOK = "<pre style='line-height:normal'><code>{code}</code></pre>"  # what Rich exports into
_ORIGIN = "dropit_origin"
_INPUTS = "dropit_inputs"  # what the example inputs were, in the order of the placeholders
UNTRAINED = "untrained"  # in the place of a codec: no rule trains what needed it
SAMPLED = "sampled"  # in the place of a codec: gradients flow through some of its rows
REPEATED = "repeated"  # in the place of a codec: the layer runs again in the backward
FUSED = "fused"  # in the place of a codec: the loss that kept it is computed with its layer


@dataclass(frozen=True, kw_only=True)
class Row:
    """One storage that autograd keeps.

    Attributes:
        name: The fx node that made it.
        module: Qualified module name of its first reader.
        op: The ops that read it, joined by ``+``.
        where: The user's ``file:line``.
        shape: Shape as its first reader saves it.
        dtype: Its dtype.
        dense_bytes: Bytes of the whole storage.
        kept_bytes: Bytes after packing (dense bytes where it is kept; a copy shared with an earlier
            row is 0).
        codec: Codecs of its readers, joined by ``+``.
        reason: Why it is kept, or ``""``.
        region: The checkpointed region that it belongs to (kept only while that is recomputed), or
            ``""``.
        note: In what it differs from what the rules ask for, or what that loses; or ``""``.
        host_bytes: Of the kept bytes, those that wait on the host for the backward.
    """

    name: str
    module: str
    op: str
    where: str
    shape: tuple[int, ...]
    dtype: str
    dense_bytes: int
    kept_bytes: int
    codec: str
    reason: str
    region: str = ""
    note: str = ""
    host_bytes: int = 0

    @property
    def codecs(self) -> tuple[str, ...]:
        """The codecs without their options, sorted; ``drop`` only where there is no other."""
        names = {part.split("(")[0] for part in self.codec.split("+")}
        return tuple(sorted(names - {"drop"} or names))


@dataclass(frozen=True)
class Report:
    """Rows for every saved tensor of one model, in graph order.

    Attributes:
        rows: One for each storage.
        parameters: Where a rule of the config says what is trained: qualified names, and whether
            what reads the parameter gives it a gradient: True, False, or None: some of it does.
        graph: The rewritten graph, where it is one for the whole model and still there: its step
            can be told.
        origin: What ``transform`` was given, where it rewrote the whole model.
    """

    rows: tuple[Row, ...]
    parameters: tuple[tuple[str, bool | None], ...] = ()
    graph: Alive | None = field(default=None, compare=False, repr=False)
    origin: Origin | None = field(default=None, compare=False, repr=False)

    @property
    def untrained(self) -> tuple[str, ...]:
        """Names of the parameters that get no gradient, because of a rule of the config."""
        return tuple(name for name, trained in self.parameters if trained is False)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of those that one node reads untrained, and another gives them their gradient."""
        return tuple(name for name, trained in self.parameters if trained is None)

    @property
    def dense_bytes(self) -> int:
        """Saved bytes of the untouched model; parameters, buffers and inputs are not counted.

        Nor is what a checkpoint is given and does not read, which eager PyTorch holds: it is in no
        graph, Dynamo's or ours, and the rewritten model lets it go.
        """
        return sum(r.dense_bytes for r in self.rows if not r.region)

    @property
    def kept_bytes(self) -> int:
        """Saved bytes of the rewritten model."""
        return sum(r.kept_bytes for r in self.rows if not r.region)

    @property
    def host_bytes(self) -> int:
        """Of these, the bytes that wait on the host, and are on the device for two layers only."""
        return sum(r.host_bytes for r in self.rows if not r.region)

    @property
    def ratio(self) -> float:
        """What is kept, as a share of dense; 1 where nothing is saved."""
        return self.kept_bytes / self.dense_bytes if self.dense_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data: totals in bytes, names of parameters that no rule trains, and the rows."""
        return {
            "dense_bytes": self.dense_bytes,
            "kept_bytes": self.kept_bytes,
            "host_bytes": self.host_bytes,
            "ratio": self.ratio,
            "untrained": list(self.untrained),
            "rows": self.records(),
        }

    def to_json(self) -> str:
        """``to_dict`` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def records(self) -> list[dict[str, Any]]:
        """The rows as plain mappings, such as ``pandas.DataFrame`` takes."""
        return [asdict(r) for r in self.rows]

    def _repr_html_(self) -> str:
        """The summary, for notebooks."""
        out = StringIO()
        console = Console(file=out, record=True, width=120, force_jupyter=False)
        console.print(self.summary_table())
        return console.export_html(inline_styles=True, code_format=NOTEBOOK)

    def table(self) -> Table:
        """The rows as a rich table, with totals below."""
        names = ("saved tensor", "module", "op", "where", "dense", "kept")
        table = plain_table(*names, "codec, or why it is kept", figures=("dense", "kept"))
        for r in self.rows:
            cells = (r.name, r.module, r.op, short(r.where), mib(r.dense_bytes), mib(r.kept_bytes))
            text = _told(r) if not r.reason else f"kept: {r.reason}"
            text += f" ({r.note})" if r.note else ""
            text += f" [in {r.region}]" if r.region else ""
            table.add_row(*map(escape, (*cells, text)))
        table.add_section()
        table.add_row("total", "", "", "", *self._totals())
        return table

    def summary(self) -> str:
        """``summary_table`` as plain text."""
        return as_text(self.summary_table())

    def summary_table(self) -> Table:
        """One line for each op and what became of the tensors that it reads, largest first."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for r in self.rows:
            if not r.region:
                groups.setdefault((r.op, "kept dense" if r.reason else _told(r)), []).append(r)
        figures = ("tensors", "dense", "kept")
        table = plain_table("read by", *figures, "codec", figures=figures)
        dense = {key: sum(r.dense_bytes for r in rows) for key, rows in groups.items()}
        for (op, codec), rows in sorted(groups.items(), key=lambda group: -dense[group[0]]):
            kept = sum(r.kept_bytes for r in rows)
            table.add_row(op, str(len(rows)), mib(dense[op, codec]), mib(kept), codec)
        table.add_section()
        table.add_row("total", str(sum(map(len, groups.values()))), *self._totals())
        return table

    def _totals(self) -> tuple[str, str, str]:
        text = f"{self.ratio:.1%} of dense"
        text += f", {mib(self.host_bytes)} of it on the host" if self.host_bytes else ""
        return mib(self.dense_bytes), mib(self.kept_bytes), text

    def __str__(self) -> str:
        """The table, one line for each tensor however long."""
        return as_text(self.table())

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws dense and kept bytes of each saved tensor, in graph order, as PNG, SVG or PDF.

        Raises:
            ModuleNotFoundError: matplotlib is missing (``pip install 'dropit-fx[plot]'``).
        """
        from dropit_fx.report.plot import report_picture

        report_picture(self, path)

    def snapshot(self, path: str | PathLike[str], **step: Any) -> None:
        """Writes the predicted step for PyTorch's memory visualiser, pytorch.org/memory_viz.

        Each block is told with its kind, the op that made it, the node, its module and the line.
        Times are numbers of ops. Nothing runs: it is told on fake tensors of the example's shapes,
        and what ops take for themselves while they run is not in it.

        Args:
            path: Of the file, ``step.pickle``.
            **step: ``loss``, from the model's output to a scalar (default: its own loss, or a
                projection of what it returns), and ``optimizer``, over its parameters.

        Raises:
            ValueError: Several graphs, or one that ``transform`` has not made.
        """
        from dropit_fx.report.step_files import write_snapshot

        write_snapshot(*self.told(step), path)

    def trace(self, path: str | PathLike[str], **step: Any) -> None:
        """Writes the predicted step as Chrome's trace events, for ui.perfetto.dev.

        Phases, ops, and bytes by kind as counters. As :meth:`snapshot` otherwise.
        """
        from dropit_fx.report.step_files import write_trace

        write_trace(self.told(step)[0], path)

    @property
    def model(self) -> fx.GraphModule | None:
        """What ``graph`` is of."""
        found: fx.GraphModule | None = None if self.graph is None else self.graph()
        return found

    def told(self, step: Mapping[str, Any]) -> tuple[Timeline, dict[str, tuple[str, str]]]:
        """A step of the model, and where its nodes come from."""
        if (model := self.model) is None:
            raise ValueError(
                "a step is predicted of one graph of a whole model that is still there: keep what"
                " transform(model) returned; modules= and torch.compile make others"
            )
        places = {n.name: (node_module(n), node_where(n)) for n in model.graph.nodes}
        return forecast(Step(model, fakes(model.meta[_INPUTS]), **step), model), places

    def page(
        self,
        path: str | PathLike[str],
        about: Mapping[str, object] | None = None,
        *,
        suggestions: int = 3,
        progress: Callable[[str, float], object] = lambda text, share: None,
        **step: Any,
    ) -> None:
        """Writes one HTML file to look at.

        First the memory of the predicted step, parameters and optimizer included, with what stands
        at its peak and the rules that would lower most, as lines of a config; then codecs, and a
        table that sorts. Nothing runs but fake tensors; rules are tried, which takes some times as
        long as ``transform`` did.

        Args:
            path: Of the file; it needs no other, and nothing from the network.
            about: What else the heading tells, by name: ``{"model": ..., "preset": ...}``.
            suggestions: How many rules, at most; 0: none are tried. They need the model that
                ``transform`` was given.
            progress: Called with what is done, and the share of it that is.
            **step: ``loss`` and ``optimizer``, as for :meth:`snapshot`.

        Raises:
            ValueError: A step is described of a report that has none.
        """
        from dropit_fx.report.page import write_page

        write_page(self, path, about, suggestions=suggestions, progress=progress, **step)


def plain_table(*names: str, figures: Collection[str] = (), **settings: Any) -> Table:
    """A table without lines; columns of ``figures`` stand to the right, and are never broken."""
    table = Table(box=None, header_style="bold", pad_edge=False, **settings)
    for name in names:
        if name in figures:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    return table


def _told(row: Row) -> str:
    """The codec, and where its copy waits."""
    return f"{row.codec}, on the host" if row.host_bytes else row.codec


def as_text(table: Table) -> str:
    """A table as plain text, in which no line is broken."""
    out = StringIO()
    Console(file=out, width=10_000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def mib(count: int) -> str:
    """Bytes for reading: ``12.3 MiB``."""
    return f"{count / 2**20:.2f} MiB"


def short(where: str) -> str:
    """``folder/file.py:line`` of a longer path."""
    return "/".join(where.split("/")[-2:])


def report(rewritten: nn.Module) -> Report:
    """The report of a model that ``transform`` returned (or holds submodules that it rewrote).

    Or of one that backend ``dropit`` compiles, once it has run: of each function that was compiled
    the newest graph, with bytes as eager mode saves them. A graph that ``torch.compile`` uses for
    several models is told with the first.

    Raises:
        ValueError: Nothing in it was rewritten by dropit_fx.
    """
    whole, rewritten = rewritten, uncompiled(rewritten)
    graphs = [m for m in rewritten.modules() if isinstance(m, fx.GraphModule)]
    found = [m.meta[_META] for m in graphs if _META in m.meta]
    found = found or [one for m in whole.modules() for one in _compiled.get(m, {}).values()]
    if not found:
        waits = any(uncompiled(m) is not m or compiled_in_place(m) for m in whole.modules())
        why = "was not rewritten by dropit_fx.transform"
        if waits:
            why += (
                ", nor has backend 'dropit' compiled a graph of it: it does when a step first runs"
            )
        raise ValueError(f"{type(rewritten).__name__} {why}")
    if not isinstance(rewritten, fx.GraphModule) or _INPUTS not in rewritten.meta:
        return merged(found)
    return replace(merged(found), graph=Alive(rewritten), origin=rewritten.meta[_ORIGIN])


# of each model that is compiled, by the part of it that is
_compiled: WeakKeyDictionary[nn.Module, dict[Hashable, Report]] = WeakKeyDictionary()


def attach_compiled(made: Report) -> None:
    """Leaves the report of a graph with the model whose call is compiled just now, if it is one."""
    if (compiling := being_compiled()) is not None:
        model, part = compiling
        _compiled.setdefault(model, {})[part] = made


def attach(
    graph_module: fx.GraphModule, plan: Plan, prefix: str = "", origin: Origin | None = None
) -> None:
    """Leaves the report on the module, so that it survives deepcopy and pickle."""
    graph_module.meta[_META] = report_of(plan, prefix)
    graph_module.meta[_ORIGIN] = origin
    if not prefix:
        graph_module.meta[_INPUTS] = pytree.tree_map_only(Tensor, Blank.of, plan.inputs)


def report_of(plan: Plan, prefix: str = "") -> Report:
    """The report of a finished plan, of a submodule of that qualified name."""
    reads = (
        (".".join(p for p in (prefix, read.parameter) if p), read.trained)
        for read in plan.parameters
    )
    return Report(tuple(rows(plan, prefix)), _in_all(reads))


def merged(reports: Sequence[Report]) -> Report:
    """One report of several parts of a model."""
    read = (pair for one in reports for pair in one.parameters)
    return Report(tuple(row for one in reports for row in one.rows), _in_all(read))


def _in_all(reads: Iterable[tuple[str, bool | None]]) -> tuple[tuple[str, bool | None], ...]:
    """``Report.parameters`` of all that is read."""
    found: dict[str, bool | None] = {}
    for name, trained in reads:
        found[name] = trained if found.get(name, trained) is trained else None
    return tuple(found.items())


def rows(plan: Plan, prefix: str = "", region: str = "") -> Iterator[Row]:
    """The rows of a finished plan."""
    counted: set[Copy] = set()
    stays = obstacle(plan.device)
    swapped = {d.read.node for d in plan.decisions if d.packed}
    untouched: dict[str, list[Site]] = defaultdict(list)  # losses may be fused since
    for site in plan.unfused or plan.sites:
        if site.dense:
            untouched[site.name].append(site)
    for site, decisions in by_site(plan.sites, plan.decisions):
        made = any(d.read.node in swapped and d.codec != UNREAD for d in decisions)
        if not site.dense and not made:
            continue
        packed = [d for d in decisions if d.packed]
        kept = [d for d in decisions if not d.packed]
        offloaded = [] if region else [d for d in packed if OFFLOAD in d.options]
        away = 0 if kept or stays else packed_bytes(offloaded, set(counted))
        size = site.nbytes if kept else packed_bytes(packed, counted)
        note = next((d.note for d in decisions if d.note), _said(plan, decisions))
        if offloaded and stays:
            note = "; ".join(filter(None, (note, f"not offloaded: {stays}")))
        before = untouched[site.name].pop(0).nbytes if site.dense and untouched[site.name] else 0
        yield _row(
            site,
            prefix,
            dense_bytes=before,
            kept_bytes=size,
            codec="keep" if kept else "+".join(dict.fromkeys(d.spelled for d in packed)),
            reason=kept[0].reason if kept else "",
            # a checkpoint keeps what hooks do not see: numbers are not made again
            region="" if site.reads[0].number else region,
            note=note,
            host_bytes=away,
        )
    # what is left, a fused loss or a repeated layer does without, or no rule trains what needs it
    for site in chain.from_iterable(untouched.values()):
        codec = UNTRAINED if site.name in plan.untrained else FUSED
        codec = SAMPLED if site.name in plan.sampled else codec
        codec = REPEATED if site.name in plan.repeated else codec
        note = _untrained(site, plan) if codec == UNTRAINED else ""
        yield _row(
            site, prefix, dense_bytes=site.nbytes, kept_bytes=0, codec=codec, reason="", note=note
        )
    for name, body in plan.bodies.items():
        yield from rows(body, prefix, region=name)


def _untrained(site: Site, plan: Plan) -> str:
    """Why nobody keeps it: the rules that do not train what read it, or what is before that."""
    nodes = {read.node for read in site.reads}
    rules = {r.rules[0] for r in plan.parameters if r.node in nodes and not r.trained}
    numbers = ", ".join(map(str, sorted(rules)))
    return f"not trained: rule {numbers}" if rules else "nothing is trained that needs it"


def _said(plan: Plan, decisions: Sequence[Decision]) -> str:
    """What is to be said of a reader, where no reason says it."""
    notes = (plan.notes.get(d.read.node, "") for d in decisions)
    reasons = {d.reason for d in decisions}
    return next((note for note in notes if note and note not in reasons), "")


def _row(site: Site, prefix: str, **found: Any) -> Row:
    """The row of a storage: who reads it, where; and what was found of it."""
    first = site.reads[0]
    return Row(
        name=site.name,
        module=".".join(p for p in (prefix, first.module) if p),
        op="+".join(dict.fromkeys(read.op for read in site.reads)),
        where=first.where,
        shape=first.shape,
        dtype=str(first.dtype).removeprefix("torch."),
        **found,
    )
