"""The plug-in: ``torch.compile(model, backend="dropit", options={...})``.

Dynamo hands over one forward graph at a time; the pipeline rewrites it, and inductor (or the
backend named by ``inner``) compiles what comes out, with the partitioner guard of ``partition.py``.
"""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dropit_fx.capture.expand import expand, opaque_nodes
from dropit_fx.capture.fake import concrete_fakes, propagate
from dropit_fx.capture.provenance import node_where
from dropit_fx.compile.channels_last import channels_last
from dropit_fx.compile.fuse import FusePacking
from dropit_fx.compile.lookups import AddLookups
from dropit_fx.compile.no_graph import TellOfNoGraph
from dropit_fx.compile.partition import KeepPacked
from dropit_fx.compile.planned import Compiles, plan_graph
from dropit_fx.compile.returned import ReturnInputsAsTheyAre, in_turn
from dropit_fx.compile.saved import Partition
from dropit_fx.compile.twice import refuse_twice
from dropit_fx.config import Config, ConfigError, make_config, refuse_backprop, refuse_offload
from dropit_fx.passes import run_pipeline
from dropit_fx.passes.choose_codecs import check_rules_matched
from dropit_fx.passes.find_saved import FakeRunError
from dropit_fx.passes.insert_packing import ROW_NORMS
from dropit_fx.passes.plan import Plan
from dropit_fx.planner import PlannedConfig
from dropit_fx.private import list_options, lookup_backend
from dropit_fx.private_inductor import (
    CACHEABLE,
    FREEING,
    FUSING,
    INNER_COMPILE,
    ORDERING,
    PARTITIONER,
    POST_PASS,
    PRE_PASS,
    inductor_config,
    inductor_has,
)
from dropit_fx.report.rows import Report, attach_compiled, mib, report_of
from dropit_fx.runtime.linear_loss import LOSSES
from dropit_fx.runtime.packed_call import (
    CACHE_VERSION,
    PACKED_OPS,
    VERSIONS,
    derived,
    pack,
    unless_changed,
)
from dropit_fx.runtime.regions import run_regions, stand_in
from dropit_fx.words import closest, did_you_mean

log = logging.getLogger(__name__)

_PLANNED = ("config", "preset", "strategy", "gamma", "bits")  # what a peak stands in the place of
OPTIONS = (*_PLANNED, "peak", "drop_logits", "inner", "fuse")
Compiled = Callable[..., Any]


@dataclass
class CompiledGraph:
    """One graph that the plug-in compiled.

    Attributes:
        report: What the passes decided, with bytes as eager mode saves them.
        partitions: What the compiled forward really saves, one for each time that it was
            partitioned; empty where a compile cache had the result already.
        planned: What was planned for the peak that was asked for, if one was.
    """

    report: Report
    partitions: list[Partition] = field(default_factory=list)
    planned: PlannedConfig | None = None

    @property
    def saved_bytes(self) -> int:
        """What it saves: as it was partitioned, where it was, else as eager mode saves it."""
        return self.partitions[-1].saved_bytes if self.partitions else self.report.kept_bytes


_compiled: list[CompiledGraph] = []


def compiled_graphs() -> tuple[CompiledGraph, ...]:
    """Every graph that the plug-in has rewritten in this process, in order."""
    return tuple(_compiled)


def forget_compiled_graphs(since: int) -> None:
    """Leaves only the first ``since`` of :func:`compiled_graphs`."""
    del _compiled[since:]


def dropit(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    lower: Callable[..., Any] | None = None,
) -> Compiled:
    """The backend ``"dropit"``: rewrite, then inductor.

    Args:
        gm: Dynamo's graph; it is rewritten in place.
        example_inputs: Its inputs, as fake tensors.
        mode: One of inductor's modes.
        options: ``config``, ``preset``, ``strategy``, ``gamma``, ``bits`` as for ``transform``;
            ``peak``: in their place, the memory that a step of this graph may take;
            ``drop_logits``: where given, in the place of the config's; ``inner``: the backend that
            compiles the rewritten graph; ``fuse``: whether inductor gets packing as plain tensor
            ops, to fuse them (True, False; None: False); anything else goes to inductor. Each of
            ours has a default in the environment (``DROPIT_PRESET=...``), for callers that cannot
            pass options.
        lower: What makes code of each forward and backward behind the cut, called with it and its
            fake inputs; as ``inner_compile`` of ``compile_fx``. None: inductor.

    Raises:
        ConfigError: An unknown option, or a value that cannot mean anything.
        PlanError: The peak cannot be understood, or cannot be kept.
    """
    return _compile(gm, example_inputs, "inductor", mode, dict(options or {}), lower)


def dropit_eager(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend ``"dropit_eager"``: rewrite, then run the graph as it is. For debugging."""
    return _compile(gm, example_inputs, "eager", mode, dict(options or {}))


_no_graph = TellOfNoGraph((dropit, dropit_eager))
_no_graph.ask()


def _compile(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    inner: str,
    mode: str | None,
    options: dict[str, Any],
    lower: Callable[..., Any] | None = None,
) -> Compiled:
    _no_graph.ask()
    ours = _from_environment()
    given = {k: options.pop(k) for k in OPTIONS if k in options}
    said = {k: v for k, v in given.items() if v is not None}
    if "peak" in said:  # it stands in the place of what the environment says of a config
        ours |= dict.fromkeys(_PLANNED)
    elif said.keys() & {*_PLANNED}:
        ours["peak"] = None
    ours |= said
    if "config" in given and "preset" not in given:
        # a config says its own preset: the environment's is for callers without one
        ours["preset"] = None
    inner = ours.pop("inner") or inner
    fuse = _checked_fuse(ours.pop("fuse"), inner)
    _check_inductor_options(options)
    compiler = _inner(inner)
    if compiler is _inductor:
        channels_last(gm, _patches(mode, options))

    def fused(module: fx.GraphModule, inputs: list[Any]) -> Compiled:
        return _inductor(_Job(module, inputs, mode, options, None, fuse, lower))

    peak, planned = ours.pop("peak"), None
    if peak is not None:
        cut = None if inner == "eager" else _cut(decompose=inner in _DECOMPOSED)
        fuses = fused if compiler is _inductor else None
        planned = _planned(gm, example_inputs, peak, ours, cut, fuses)
    config = make_config(ours.pop("config") or planned, **ours)
    if compiler is not _eager:
        refuse_offload(
            config,
            "compiled code keeps packed tensors on the device. Leave it out; or transform the"
            " model and run that in eager mode, or as backend='dropit_eager'",
        )
    refuse_backprop(config, "rows of a block are sampled by transform, which sees all of a model")
    record = rewrite_dynamo_graph(gm, example_inputs, config, compiler is not _eager)
    if record is not None:
        record.planned = planned
    compiled = compiler(_Job(gm, example_inputs, mode, options, record, fuse, lower))
    if compiler is not _eager:  # there packed calls refuse it themselves
        compiled = refuse_twice(compiled)
    # what chooses rows lives as long as the code that names it; where gm itself runs, it holds that
    held = [m.meta.get(ROW_NORMS) for m in gm.modules() if isinstance(m, fx.GraphModule)]
    weakref.finalize(compiled, tuple, held)
    return compiled


_TRUTH = ({"1": True, "true": True, "0": False, "false": False}.__getitem__, "not true or false")
_FROM_TEXT: dict[str, tuple[Callable[[Any], Any], str]] = {  # of the environment
    "gamma": (float, "no number"),
    "bits": (int, "no number"),
    "drop_logits": _TRUTH,
    "fuse": _TRUTH,
}


def _from_environment() -> dict[str, Any]:
    """The options that ``DROPIT_...`` variables set, None for others; an empty one is not set."""
    names = {option: f"DROPIT_{option.upper()}" for option in OPTIONS}
    known = (*names.values(), "DROPIT_LOG")
    for name in os.environ:
        if name.startswith("DROPIT_") and name not in known and (hint := closest(name, known)):
            warnings.warn(f"{name} in the environment means nothing.{hint}", stacklevel=2)
    found: dict[str, Any] = {option: os.environ.get(name) or None for option, name in names.items()}
    for option, (convert, kind) in _FROM_TEXT.items():
        value = found[option]
        try:
            found[option] = None if value is None else convert(value)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{names[option]}={value!r} is {kind}") from error
    return found


def _planned(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    peak: Any,
    others: Mapping[str, Any],
    cut: Compiles | None,
    fuse: Compiles | None,
) -> PlannedConfig | None:
    """The config that keeps a peak; None where nothing is to be trained."""
    if any(others[option] is not None for option in _PLANNED):
        raise ConfigError("peak= plans the whole config: give no config beside it.")
    trained = any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)
    if not trained or not torch.is_grad_enabled() or _stays_whole(gm, example_inputs):
        return None
    return plan_graph(gm, example_inputs, peak, cut, fuse)


def _cut(decompose: bool) -> Compiles:
    """Cuts a graph into forward and backward, which run as they are."""
    alike = _aot(decompose)
    return lambda module, inputs: alike(_Job(module, inputs, None, {}, None, fuse=False))


def _checked_fuse(fuse: Any, inner: str) -> bool:
    if fuse is not None and not isinstance(fuse, bool):
        raise ConfigError(f"fuse={fuse!r}: must be True, False, or None for the default")
    if fuse and inner != "inductor":
        raise ConfigError(
            f"fuse=True: inner backend {inner!r} fuses nothing. Leave `fuse` away, or choose"
            " inner='inductor'."
        )
    return bool(fuse)


def _check_inductor_options(options: Mapping[str, Any]) -> None:
    legal = list_options()
    for key in options:
        if key.replace("-", "_") not in legal:
            hint = closest(key, (*OPTIONS, *legal))
            raise ConfigError(
                f"backend 'dropit' has no option {key!r}.{hint} Its own are: {', '.join(OPTIONS)};"
                " others go to inductor (torch._inductor.list_options())."
            )


def rewrite_dynamo_graph(
    gm: fx.GraphModule, example_inputs: list[Any], config: Config, compiled: bool = True
) -> CompiledGraph | None:
    """Runs the pipeline over Dynamo's graph in place; None where nothing is to be trained."""
    if not torch.is_grad_enabled():
        return None
    if whole := _stays_whole(gm, example_inputs):
        log.warning("this graph is compiled as it is, nothing is packed: %s", whole)
        return None
    inputs = concrete_fakes(example_inputs)
    try:
        if opaque_nodes(gm):
            expand(gm, propagate(gm, inputs))
        plan = run_pipeline(Plan(module=gm, inputs=inputs, config=config, compiled=compiled))
    except FakeRunError as error:
        log.warning("this graph is compiled as it is, nothing is packed: %s", error)
        return None
    try:
        check_rules_matched((plan,), config)
    except ConfigError as error:  # no error of one graph: a model may be compiled in several
        log.warning("%s", error)
    record = CompiledGraph(report_of(plan))
    _compiled.append(record)
    attach_compiled(record.report)
    said = record.report
    log.info(
        "graph %d saves %s, dense %s (%.1f %%), preset %s",
        len(_compiled),
        mib(said.kept_bytes),
        mib(said.dense_bytes),
        100 * said.ratio,
        config.preset,
    )
    return record


def _stays_whole(gm: fx.GraphModule, example_inputs: list[Any]) -> str:
    """Why nothing of a graph is packed, where its values have no memory of their own; else ""."""
    if any(isinstance(value, Tensor) and value.is_nested for value in example_inputs):
        return "an input is a nested tensor, whose memory is that of its parts"
    nodes = (n for m in gm.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes)
    inner = next((n for n in nodes if "_increment_nesting" in str(n.target)), None)
    where = node_where(inner) if inner is not None else ""
    return "" if inner is None else f"torch.func transforms a part of it{where and f', in {where}'}"


_OURS = {f.__name__: f for f in (pack, unless_changed, derived, stand_in, *LOSSES)}


class _Job(NamedTuple):
    """What an inner backend compiles."""

    graph_module: fx.GraphModule
    inputs: list[Any]
    mode: str | None
    options: dict[str, Any]
    record: CompiledGraph | None
    fuse: bool
    lower: Callable[..., Any] | None = None

    def guard(self, base: Callable[..., Any] | None) -> KeepPacked:
        """The partitioner guard, which reads what is saved into the record."""
        if self.record is None:
            return KeepPacked(base)
        return KeepPacked(base, self.record.partitions.append, self.record.report.dense_bytes)


def _inner(name: str) -> Callable[[_Job], Compiled]:
    if name in _INNER:
        return _INNER[name]
    known = (*_INNER, *torch.compiler.list_backends(exclude_tags=()))
    if name in ("dropit", "dropit_eager") or name not in known:
        raise ConfigError(f"no inner backend {name!r}.{did_you_mean(name, known)}")

    def foreign(job: _Job) -> Compiled:
        log.warning(
            "inner backend %r partitions by itself: packed tensors may not be what it saves", name
        )
        return lookup_backend(name)(job.graph_module, job.inputs)

    return foreign


def _patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller changes of inductor's config."""
    from dropit_fx.private import list_mode_options

    patches = dict(list_mode_options(mode)) if mode else {}
    return patches | {k.replace("-", "_"): v for k, v in options.items()}


def _inductor(job: _Job) -> Compiled:
    from dropit_fx.private import compile_fx, compile_fx_inner

    patches = _patches(job.mode, job.options)
    if job.record is not None:
        patches = {k: v for k, v in FREEING.items() if inductor_has(k)} | patches
    patches[PARTITIONER] = job.guard(patches.get(PARTITIONER))
    if inductor_has(PRE_PASS):
        patches[PRE_PASS] = in_turn(patches.get(PRE_PASS), AddLookups())
        if job.fuse:
            patches[PRE_PASS] = in_turn(patches[PRE_PASS], FusePacking())
            patches = {k: v for k, v in FUSING.items() if inductor_has(k)} | patches
    if inductor_has(POST_PASS):
        patches[POST_PASS] = in_turn(patches.get(POST_PASS), ReturnInputsAsTheyAre())
    # our functions are safe to cache under a version that changes with the formulas and kernels
    names = {
        f"{op.__module__}.{op.__name__}": CACHE_VERSION + VERSIONS.get(name, "")
        for name, op in {**_OURS, **PACKED_OPS}.items()
    }
    if inductor_has(CACHEABLE):
        patches[CACHEABLE] = names | dict(patches.get(CACHEABLE) or {})
    lower: dict[str, Any] = {INNER_COMPILE: job.lower} if job.lower is not None else {}
    if job.fuse:
        given = _patches(job.mode, job.options)
        lower[INNER_COMPILE] = _in_one_order(job.lower or compile_fx_inner, given)
    compiled: Compiled = compile_fx(job.graph_module, job.inputs, config_patches=patches, **lower)  # type: ignore[assignment]
    return compiled


def _in_one_order(lower: Callable[..., Any], given: Mapping[str, Any]) -> Callable[..., Any]:
    """``lower``, which compiles graphs behind the cut, with `ORDERING` for backwards.

    ``given``: what the caller says of inductor's options, which holds for all graphs.
    """
    options = {k: v for k, v in ORDERING.items() if inductor_has(k) and k not in given}

    def ordered(graph: fx.GraphModule, inputs: Any, **how: Any) -> Any:
        with inductor_config(**options) if how.get("is_backward") else nullcontext():
            return lower(graph, inputs, **how)

    return ordered


def _aot(
    decompose: bool, compiler: Callable[[fx.GraphModule, list[Any]], Compiled] | None = None
) -> Callable[[_Job], Compiled]:
    """AOTAutograd as inner backend; ``compiler``: of forwards and backwards, None: as they are."""

    def compile_aot(job: _Job) -> Compiled:
        from dropit_fx.private import (
            aot_autograd,
            boxed_nop,
            min_cut_rematerialization_partition,
        )

        extra: dict[str, Any] = {}
        if decompose:
            from dropit_fx.private import (
                lowering,  # noqa: F401  the decomposition of max_pool2d needs it
                select_decomp_table,
            )

            extra["decompositions"] = select_decomp_table
        base = None if decompose else min_cut_rematerialization_partition
        return aot_autograd(
            fw_compiler=compiler or boxed_nop,
            bw_compiler=compiler or boxed_nop,
            partition_fn=job.guard(base),
            keep_inference_input_mutations=True,
            **extra,
        )(job.graph_module, job.inputs)

    return compile_aot


def _eager(job: _Job) -> Compiled:
    run_regions(job.graph_module)
    return job.graph_module.forward


_DECOMPOSED = ("inductor", "aot_eager_decomp_partition")
_INNER: dict[str, Callable[[_Job], Compiled]] = {
    "inductor": _inductor,
    "aot_eager": _aot(decompose=False),
    "aot_eager_decomp_partition": _aot(decompose=True),
    "eager": _eager,
}
