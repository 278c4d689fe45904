"""The command ``dropit-fx``: ``report`` on a model, check, forecast, plan, bench it.

Errors that the user can mend are one message on stderr and exit code 2; a check that fails is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import dropit_fx
from dropit_fx.bench import model_spec
from dropit_fx.bench.commands import PRESET_OPTIONS, add_benches, add_model, add_plot
from dropit_fx.bench.device import find_device
from dropit_fx.bench.model_spec import SpecError
from dropit_fx.capture.provenance import first_line
from dropit_fx.capture.trace import CaptureError
from dropit_fx.check import BACKENDS
from dropit_fx.config import DEFAULT_PRESET, PAPER_PRESET, ConfigError, make_config
from dropit_fx.logs import shown
from dropit_fx.planner import PlanError, Step
from dropit_fx.planner.cards import CARDS
from dropit_fx.planner.fits import memory_bytes
from dropit_fx.planner.speeds import shown_seconds
from dropit_fx.report.plot import figure_class
from dropit_fx.report.rows import Report, as_text, mib, plain_table
from dropit_fx.schema import config_schema
from dropit_fx.words import did_you_mean

if TYPE_CHECKING:
    from dropit_fx.compile.saved import Partition

# What the user can mend. A missing module: the extras, and what a factory imports.
USER_ERRORS = (
    CaptureError,
    ConfigError,
    PlanError,
    SpecError,
    OSError,
    ModuleNotFoundError,
)
NO_MEMORY = "can't allocate memory"  # a part of what PyTorch says of the host's


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    Args:
        argv: The arguments without the program's name; None: those of the process.

    Raises:
        SystemExit: ``--help`` (0), or arguments that do not parse (2).
    """
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
    except USER_ERRORS as error:
        return _error(str(error))
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and NO_MEMORY not in str(error):
            raise
        return _error(f"out of memory, try a smaller --batch: {str(error).splitlines()[0]}")
    return code


def _error(text: str) -> int:
    """Says what the user can mend; the exit code."""
    print(f"dropit-fx: error: {text}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dropit-fx", description="Keeps what a training step saves for backward packed."
    )
    versions = f"dropit-fx {dropit_fx.__version__}, PyTorch {torch.__version__}"
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    report = commands.add_parser(
        "report",
        help="what a training step of a model saves, dense and packed",
        description="One line for each op and what became of the tensors that it reads; with"
        " --no-summary one for each tensor that autograd saves: who reads it, its bytes dense and"
        " packed, or why it is kept. The model runs on fake tensors: only its parameters"
        " take memory.",
        epilog="example: dropit-fx report --model timm:deit_tiny_patch16_224 --batch 16",
    )
    add_model(report)
    _add_config(report)
    report.add_argument(
        "--summary",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one line for each op (default), or for each tensor",
    )
    report.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON to FILE; without FILE, to stdout in the place of the table",
    )
    report.add_argument(
        "--passes", action="store_true", help="also print the plan after each pass, and the graph"
    )
    add_plot(report)
    report.add_argument("--html", metavar="FILE", help="write it as a page for a browser")
    report.add_argument(
        "--snapshot", metavar="FILE", help="the predicted step for pytorch.org/memory_viz (.pickle)"
    )
    report.add_argument(
        "--trace", metavar="FILE", help="the predicted step for ui.perfetto.dev (.json)"
    )
    report.add_argument(
        "--compiled",
        action="store_true",
        help="also compile the model, dense and with the plug-in, and read what the compiled"
        " forwards really save (takes minutes for a large model)",
    )
    report.set_defaults(run=_report)

    check = commands.add_parser(
        "check",
        help="whether a packed model does what the dense one does",
        description="Runs a few training steps, dense and packed, and compares: output bits,"
        " buffers, gradients with nothing approximated, bytes as predicted and as measured, chance;"
        " then what the gradient loses. Exit code 1 where something is not as it must be.",
        epilog="example: dropit-fx check --model timm:resnet18 --batch 4 --backend dropit_eager",
    )
    add_model(check)
    _add_config(check)
    check.add_argument(
        "--backend",
        choices=BACKENDS,
        default="transform",
        help="what rewrites the model (default: transform)",
    )
    check.set_defaults(run=_check)

    forecast = commands.add_parser(
        "forecast",
        help="whether a step fits into a device, and which batch would",
        description="Tells the peak of a training step, dense and packed, what stands there, and"
        " the largest batch that fits. No GPU is needed and nothing runs: fake tensors tell it, of"
        " the ops that the CPU has. Not counted is what ops, the driver and libraries take for"
        " themselves, nor what the allocator's gaps take. Exit code 1 where neither fits.",
        epilog="example: dropit-fx forecast --model hf:gpt2 --device 24GiB --optimizer AdamW",
    )
    add_model(forecast)
    forecast.add_argument(
        "--device",
        required=True,
        metavar="NAME|BYTES",
        help=f"{', '.join(CARDS)}, as its maker states it; cuda; or a size: 24GiB, 80GB",
    )
    forecast.add_argument(
        "--optimizer", metavar="CLASS", help="of torch.optim: AdamW, SGD, ... (default: none)"
    )
    forecast.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of parameters and inputs (default: float32)",
    )
    forecast.add_argument("--json", metavar="FILE", help="write it to FILE too")
    _add_config(forecast)
    forecast.set_defaults(run=_forecast)

    plan = commands.add_parser(
        "plan",
        help="a config file that keeps the peak of a step below so many bytes",
        description="Plans what is packed, in how many bits, and what is made again, so that all"
        " tensors of an eager training step stay below a peak at the least error of the gradient;"
        " writes a config file of explicit rules. The model runs a few times on random inputs: a"
        " factory that returns (module, example_args) plans for real ones. With --frontier it plans"
        " for one peak after the other, and prints what the gradient loses at each, beside the"
        " presets, checkpointed blocks and PyTorch's memory budgets.",
        epilog="example: dropit-fx plan --model timm:resnet18 --batch 32 --peak 80%% -o plan.yaml",
    )
    add_model(plan)
    asked = plan.add_mutually_exclusive_group(required=True)
    asked.add_argument("--peak", metavar="BYTES", help="6GiB, 800MB, or 40%% of the dense step's")
    asked.add_argument("--frontier", action="store_true", help="all peaks, from dense's down")
    plan.add_argument(
        "--error-limit",
        type=float,
        metavar="SHARE",
        help="the most that the gradient may lose, relative to its norm: plans for the least time"
        " then (default: what it takes)",
    )
    plan.add_argument(
        "--time-limit",
        metavar="SECONDS",
        help="the most that an eager step may take more, as told: 0.05, or 10%% of the dense step",
    )
    plan.add_argument(
        "--device",
        metavar="CARD",
        help=f"whose seconds are told: {', '.join(CARDS)}, or TFLOP/s,TB/s (default: as here)",
    )
    plan.add_argument("--time", action="store_true", help="measure each step of a frontier, too")
    plan.add_argument("-o", "--out", metavar="FILE", help="default: standard output")
    plan.add_argument("--json", metavar="FILE", help="write the frontier to FILE, plans among it")
    add_plot(plan)
    plan.set_defaults(run=_plan)

    suggest = commands.add_parser(
        "suggest",
        help="the rules that would lower what is kept most",
        description="Tries rules in front of what is packed already, and writes the three that"
        " save most as lines of a config file, each with the bytes that it saves.",
        epilog="example: dropit-fx suggest --model timm:resnet18 --batch 32 > rules.yaml",
    )
    add_model(suggest)
    _add_config(suggest)
    suggest.set_defaults(run=_suggest)

    demo = commands.add_parser(
        "demo",
        help="the same as a page for a browser",
        description="Writes what a training step of a model saves, dense and packed, as one HTML"
        " file: the memory of the predicted step and what stands at its peak, the rules that would"
        " lower it most, codecs, a table that sorts. The file needs no other, and nothing from the"
        " network.",
        epilog="example: dropit-fx demo --batch 64 --preset max --out max.html",
    )
    add_model(demo, default=_demo_model())
    for name, default in (("preset", DEFAULT_PRESET), ("out", "report.html")):
        demo.add_argument(f"--{name}", default=default, help="default: %(default)s")
    demo.set_defaults(run=_demo)

    schema = commands.add_parser(
        "schema",
        help="the JSON schema of config files",
        description="Writes the JSON schema of config files, from which editors complete and"
        " mark what is wrong: a first line `# yaml-language-server: $schema=schema.json`.",
    )
    schema.set_defaults(run=_schema)

    add_benches(commands.add_parser("bench", help="what packing costs on this machine"))
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to pack")
    group.add_argument("--config", metavar="FILE", help="a YAML file of rules")
    group.add_argument(
        "--strategy",
        metavar="CODEC",
        help="codec of linear and conv inputs; without --preset and --config, of the preset"
        f" {PAPER_PRESET}, the published algorithm",
    )
    for name, kind, text in PRESET_OPTIONS:
        group.add_argument(f"--{name}", type=kind, help=text)


def _report(options: argparse.Namespace) -> int:
    progress = Console(stderr=True)
    config = _settings(options)
    with shown("passes", sys.stdout) if options.passes else nullcontext():
        built = _packed(progress, options, config, fake=not options.compiled)
    model, inputs, report = built.model, built.inputs, built.report
    compiled = _compiled(progress, model, inputs, config) if options.compiled else {}

    named = {k: v for k, v in config.items() if v is not None}
    about = _about(options)
    if options.plot:
        try:
            report.plot(options.plot)
        except ValueError as error:  # no saved tensor to draw
            raise SpecError(f"--plot: {error}") from error
    for path, write in ((options.snapshot, report.snapshot), (options.trace, report.trace)):
        if path:
            write(path)
    if options.html:
        _page(report, options.html, about | (named or {"preset": DEFAULT_PRESET}))
    if options.json:
        data = about | {"config": named} | report.to_dict()
        if compiled:
            data["compiled"] = {k: _partition_data(v) for k, v in compiled.items()}
        text = json.dumps(data, indent=2) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)
    if options.json != "-":
        out = Console()
        table = report.summary_table() if options.summary else report.table()
        if out.is_terminal:
            out.print(table)
        else:
            sys.stdout.write(as_text(table))
        if compiled:
            sys.stdout.write(_compiled_text(compiled, options.summary))
    return 0


def _check(options: argparse.Namespace) -> int:
    settled = make_config(**_settings(options))
    progress = Console(stderr=True)
    with progress.status(f"building {options.model}") as status:
        model, args, kwargs = model_spec.build_step(options.model, options.batch, options.size)
        found = dropit_fx.check(
            model,
            args,
            kwargs,
            config=settled,
            backend=options.backend,
            progress=lambda text: status.update(f"checking: {text}"),
        )
    out = Console()
    if out.is_terminal:
        out.print(found.table())
        out.print(found.verdict)
    else:
        sys.stdout.write(str(found))
    return 0 if found else 1


def _forecast(options: argparse.Namespace) -> int:
    memory = _memory(options.device)
    settled = make_config(**_settings(options))
    kind = None if options.optimizer is None else _optimizer_class(options.optimizer)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"building {options.model}", total=1.0)
        model, args, kwargs = model_spec.build_step(
            options.model, options.batch, options.size, fake=True
        )
        args, kwargs = model_spec.in_dtype(model, (args, kwargs), getattr(torch, options.dtype))
        found = dropit_fx.forecast(
            model,
            kwargs or args,
            memory=memory,
            config=settled,
            optimizer=None if kind is None else _over(kind, model),
            progress=lambda text, share: bar.update(task, description=text, completed=share),
        )
    print(found)
    if options.json:
        about = _about(options) | {k: getattr(options, k) for k in ("device", "optimizer", "dtype")}
        Path(options.json).write_text(json.dumps(about | found.to_dict(), indent=2) + "\n")
    return 0 if found else 1


def _memory(device: str) -> int | str:
    """Of a device by name, else the size that its name is."""
    card = CARDS.get(device.lower())
    if card is not None and card.memory is not None:
        return card.memory
    try:
        if not device.startswith("cuda"):
            return memory_bytes(device)
        found: int = torch.cuda.get_device_properties(find_device(device)).total_memory
        return found
    except (PlanError, SpecError) as error:
        known = ", ".join(CARDS)
        raise SpecError(
            f"--device {device}: write {known}, a size such as 24GiB, or the cuda that is here"
        ) from error


def _over(kind: Any, model: nn.Module) -> Any:
    """An optimizer of a class."""
    try:
        return kind(model.parameters())
    except ValueError as error:
        raise SpecError(f"--optimizer {kind.__name__}: {first_line(error)}") from error


def _optimizer_class(name: str) -> Any:
    """The class of torch.optim, however its letters are written."""
    bases = torch.optim.Optimizer, torch.optim.LBFGS  # which needs a closure
    known = {
        k.lower(): v
        for k, v in vars(torch.optim).items()
        if isinstance(v, type) and issubclass(v, torch.optim.Optimizer) and v not in bases
    }
    if name.lower() not in known:
        names = [kind.__name__ for kind in known.values()]
        raise SpecError(f"--optimizer: torch.optim has no {name}.{did_you_mean(name, names)}")
    return known[name.lower()]


def _plan(options: argparse.Namespace) -> int:
    others = ("out", "error_limit", "time_limit") if options.frontier else ("json", "plot", "time")
    for name in (n for n in others if getattr(options, n) not in (None, False)):
        way = "--peak" if options.frontier else "--frontier"
        raise SpecError(f"--{name.replace('_', '-')} goes with {way}")
    if options.frontier:
        return _frontier(options)
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"building {options.model}", total=1.0)
        model, args, kwargs = model_spec.build_step(options.model, options.batch, options.size)
        planned = dropit_fx.plan(
            model,
            kwargs or args,
            peak=options.peak,
            error_limit=options.error_limit,
            time_limit=options.time_limit,
            device=options.device,
            progress=lambda text, share: bar.update(task, description=text, completed=share),
        )
    if options.out:
        planned.save(options.out)
    else:
        sys.stdout.write(planned.to_yaml())
    console.print(
        f"peak {mib(planned.predicted)} of {mib(planned.asked)} asked for, {mib(planned.dense)}"
        f" dense; the gradient loses {planned.error:.2%}, a step takes"
        f" {shown_seconds(planned.seconds)} more"
    )
    return 0


def _frontier(options: argparse.Namespace) -> int:
    from dropit_fx.bench import frontier  # imports inductor, which takes seconds

    if options.plot:  # not after minutes
        figure_class()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"building {options.model}", total=1.0)
        model, args, kwargs = model_spec.build_step(options.model, options.batch, options.size)
        found = frontier.frontier_of(
            Step(model, args, kwargs),
            progress=lambda text, share: bar.update(task, description=text, completed=share),
            device=options.device,
            timed=options.time,
        )
    sys.stdout.write(str(found))
    if options.json:
        text = json.dumps(_about(options) | found.to_dict(), indent=2) + "\n"
        Path(options.json).write_text(text, encoding="utf-8")
    if options.plot:
        frontier.draw(found, f"{options.model}, batch {options.batch}", options.plot)
    return 0


def _suggest(options: argparse.Namespace) -> int:
    console = Console(stderr=True)
    built = _packed(console, options, _settings(options), fake=True)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"trying rules: {type(built.model).__name__}", total=1.0)
        found = dropit_fx.suggest(
            built.report, progress=lambda text, share: bar.update(task, completed=share)
        )
    sys.stdout.write(str(found))
    return 0


def _schema(options: argparse.Namespace) -> int:
    sys.stdout.write(json.dumps(config_schema(), indent=2) + "\n")
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {k: getattr(options, k) for k in ("config", "preset", "strategy", "gamma", "bits")}


def _demo(options: argparse.Namespace) -> int:
    config = {"preset": options.preset}
    built = _packed(Console(stderr=True), options, config, fake=True)
    report = built.report
    _page(report, options.out, _about(options) | config)
    dense, kept = mib(report.dense_bytes), mib(report.kept_bytes)
    print(f"{options.out}: {dense} saved dense, {kept} kept, {report.ratio:.1%} of dense")
    return 0


def _page(report: Report, path: str, about: dict[str, Any]) -> None:
    """Writes a report as a page, rules that were tried in it."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("trying rules", total=1.0)
        report.page(path, about, progress=lambda text, share: bar.update(task, completed=share))


def _about(options: argparse.Namespace) -> dict[str, Any]:
    return {"model": options.model, "batch": options.batch, "size": options.size}


def _demo_model() -> str:
    """Of the README where timm is installed, else one that needs nothing."""
    timm = importlib.util.find_spec("timm")
    return "timm:deit_tiny_patch16_224" if timm else "dropit_fx.bench.model_spec:small_net"


class _Packed(NamedTuple):
    model: nn.Module
    packed: nn.Module  # which the report does not keep
    inputs: model_spec.Inputs
    report: Report


def _packed(
    progress: Console, options: argparse.Namespace, config: dict[str, Any], fake: bool
) -> _Packed:
    """The model that the options name, packed, its inputs, and the report."""
    with progress.status(f"building {options.model}"):
        model, args, kwargs = model_spec.build_step(
            options.model, options.batch, options.size, fake
        )
    with progress.status("finding what autograd saves"):
        packed = dropit_fx.transform(model, example_args=args, example_kwargs=kwargs, **config)
    return _Packed(model, packed, (args, kwargs), dropit_fx.report(packed))


Partitions = dict[str, "list[Partition]"]  # "dense" and "packed"


def _compiled(
    progress: Console, model: nn.Module, inputs: model_spec.Inputs, config: dict[str, Any]
) -> Partitions:
    """Compiles the model twice with inductor and reads the partitions."""
    from dropit_fx.compile import backend  # these import inductor, which takes seconds
    from dropit_fx.compile.partition import KeepPacked
    from dropit_fx.private_inductor import PARTITIONER

    args, kwargs = inputs
    dense: list[Partition] = []
    before = len(backend.compiled_graphs())
    options = {k: v for k, v in config.items() if v is not None}
    guard: dict[str, Any] = {PARTITIONER: KeepPacked(note=dense.append)}
    no_caches = torch.compiler.config.patch(force_disable_caches=True)  # type: ignore[attr-defined]
    with warnings.catch_warnings(), no_caches:  # a cached result has no graph to read
        warnings.filterwarnings("ignore", ".*force_disable_caches")
        with progress.status("compiling it dense"):
            torch.compile(model, options=guard)(*args, **kwargs)
        torch.compiler.reset()
        with progress.status("compiling it packed"):
            torch.compile(model, backend="dropit", options=options)(*args, **kwargs)
        torch.compiler.reset()
    packed = [p for graph in backend.compiled_graphs()[before:] for p in graph.partitions]
    return {"dense": dense, "packed": packed}


def _partition_data(partitions: list[Partition]) -> dict[str, Any]:
    return {
        "saved_bytes": sum(p.saved_bytes for p in partitions),
        "packs_in_backward": [name for p in partitions for name in p.packs_in_backward],
        "unpacks_in_forward": [name for p in partitions for name in p.unpacks_in_forward],
        "saved": [vars(v) for p in partitions for v in p.saved],
    }


def _compiled_text(compiled: Partitions, summary: bool) -> str:
    names = ("saved by the compiled forward", "made by", "bytes", "")
    table = plain_table(*names, figures=("bytes",))
    for p in compiled["packed"]:
        for v in () if summary else p.saved:
            table.add_row(v.name, v.source, mib(v.nbytes), "packed" if v.packed else "")
    dense, packed = (sum(p.saved_bytes for p in compiled[k]) for k in ("dense", "packed"))
    table.add_row("total, packed", "", mib(packed), f"{packed / max(dense, 1):.1%} of dense")
    table.add_row("total, dense", "", mib(dense), "")
    wrong = [n for p in compiled["packed"] for n in (*p.packs_in_backward, *p.unpacks_in_forward)]
    note = f"on the wrong side of the partition: {', '.join(wrong)}\n" if wrong else ""
    return "\n" + as_text(table) + note


if __name__ == "__main__":
    sys.exit(main())
