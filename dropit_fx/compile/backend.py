"""The plug-in: ``torch.compile(model, backend="dropit", options={...})``.

Dynamo hands over one forward graph at a time; the pipeline rewrites it, and inductor (or the
backend named by ``inner``) compiles what comes out, with the partitioner guard of ``partition.py``.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dropit_fx.capture.expand import expand, opaque_nodes
from dropit_fx.capture.fake import concrete_fakes, propagate
from dropit_fx.capture.provenance import transformed_in
from dropit_fx.compile.channels_last import channels_last
from dropit_fx.compile.inner import DECOMPOSED, INNER, Compiled, Job, aot, inner_backend, patched
from dropit_fx.compile.no_graph import TellOfNoGraph
from dropit_fx.compile.options import (
    OPTIONS,
    PLANNED,
    check_inductor_options,
    checked_fuse,
    from_environment,
)
from dropit_fx.compile.planned import Compiles, plan_graph
from dropit_fx.compile.record import (
    CompiledGraph,
    compiled_graphs,
    forget_compiled_graphs,
    remember,
)
from dropit_fx.compile.twice import refuse_twice
from dropit_fx.config import Config, ConfigError, make_config, refuse_backprop, refuse_offload
from dropit_fx.passes import run_pipeline
from dropit_fx.passes.choose_codecs import check_rules_matched
from dropit_fx.passes.find_saved import FakeRunError
from dropit_fx.passes.insert_packing import ROW_NORMS
from dropit_fx.passes.plan import Plan
from dropit_fx.planner import PlannedConfig
from dropit_fx.report.rows import attach_compiled, mib, report_of

__all__ = [
    "OPTIONS",
    "CompiledGraph",
    "compiled_graphs",
    "dropit",
    "dropit_eager",
    "forget_compiled_graphs",
    "rewrite_dynamo_graph",
]

log = logging.getLogger(__name__)


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
    ours = from_environment()
    given = {k: options.pop(k) for k in OPTIONS if k in options}
    said = {k: v for k, v in given.items() if v is not None}
    if "peak" in said:  # it stands in the place of what the environment says of a config
        ours |= dict.fromkeys(PLANNED)
    elif said.keys() & {*PLANNED}:
        ours["peak"] = None
    ours |= said
    if "config" in given and "preset" not in given:
        # a config says its own preset: the environment's is for callers without one
        ours["preset"] = None
    inner = ours.pop("inner") or inner
    fuse = checked_fuse(ours.pop("fuse"), inner)
    check_inductor_options(options)
    compiler = inner_backend(inner)
    if inner == "inductor":
        channels_last(gm, patched(mode, options))

    def fused(module: fx.GraphModule, inputs: list[Any]) -> Compiled:
        return INNER["inductor"](Job(module, inputs, mode, options, None, fuse, lower))

    peak, planned = ours.pop("peak"), None
    if peak is not None:
        cut = None if inner == "eager" else _cut(decompose=inner in DECOMPOSED)
        fuses = fused if inner == "inductor" else None
        planned = _planned(gm, example_inputs, peak, ours, cut, fuses)
    config = make_config(ours.pop("config") or planned, **ours)
    if inner != "eager":
        refuse_offload(
            config,
            "compiled code keeps packed tensors on the device. Leave it out; or transform the"
            " model and run that in eager mode, or as backend='dropit_eager'",
        )
    refuse_backprop(config, "rows of a block are sampled by transform, which sees all of a model")
    record = rewrite_dynamo_graph(gm, example_inputs, config, inner != "eager")
    if record is not None:
        record.planned = planned
    compiled = compiler(Job(gm, example_inputs, mode, options, record, fuse, lower))
    if inner != "eager":  # there packed calls refuse it themselves
        compiled = refuse_twice(compiled)
    # what chooses rows lives as long as the code that names it; where gm itself runs, it holds that
    held = [m.meta.get(ROW_NORMS) for m in gm.modules() if isinstance(m, fx.GraphModule)]
    weakref.finalize(compiled, tuple, held)
    return compiled


def _planned(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    peak: Any,
    others: Mapping[str, Any],
    cut: Compiles | None,
    fuse: Compiles | None,
) -> PlannedConfig | None:
    """The config that keeps a peak; None where nothing is to be trained."""
    if any(others[option] is not None for option in PLANNED):
        raise ConfigError("peak= plans the whole config: give no config beside it.")
    trained = any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)
    if not trained or not torch.is_grad_enabled() or _stays_whole(gm, example_inputs):
        return None
    return plan_graph(gm, example_inputs, peak, cut, fuse)


def _cut(decompose: bool) -> Compiles:
    """Cuts a graph into forward and backward, which run as they are."""
    alike = aot(decompose)
    return lambda module, inputs: alike(Job(module, inputs, None, {}, None, fuse=False))


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
        why = _SPLIT if any(map(_is_split, example_inputs)) else error
        log.warning("this graph is compiled as it is, nothing is packed: %s", why)
        return None
    try:
        check_rules_matched((plan,), config)
    except ConfigError as error:  # no error of one graph: a model may be compiled in several
        log.warning("%s", error)
    record = CompiledGraph(report_of(plan))
    number = remember(record)
    attach_compiled(record.report)
    said = record.report
    log.info(
        "graph %d saves %s, dense %s (%.1f %%), preset %s",
        number,
        mib(said.kept_bytes),
        mib(said.dense_bytes),
        100 * said.ratio,
        config.preset,
    )
    return record


_SPLIT = (
    "its layers are split over ranks (DTensor, as parallelize_module makes them), and rows compute"
    " with plain tensors"
)


def _is_split(value: object) -> bool:
    """Whether it is a DTensor."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def _stays_whole(gm: fx.GraphModule, example_inputs: list[Any]) -> str:
    """Why nothing of a graph is packed, where its values have no memory of their own; else ""."""
    if any(isinstance(value, Tensor) and value.is_nested for value in example_inputs):
        return "an input is a nested tensor, whose memory is that of its parts"
    return transformed_in(gm)
