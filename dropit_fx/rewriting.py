"""A captured graph through the pipeline, in place; and what to say where it does not run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from dropit_fx.capture import example_inputs
from dropit_fx.capture.around import hooked, hooks_of
from dropit_fx.capture.expand import expand, opaque_nodes
from dropit_fx.capture.fake import fakes_of, propagate
from dropit_fx.capture.graph_module import RewrittenModule
from dropit_fx.capture.provenance import first_line, node_module, node_where
from dropit_fx.capture.regions import outline
from dropit_fx.capture.trace import CaptureError, capture
from dropit_fx.config import Config
from dropit_fx.passes import run_pipeline
from dropit_fx.passes.find_saved import OWN_OPS, FakeRunError
from dropit_fx.passes.plan import Plan
from dropit_fx.private import pytree
from dropit_fx.runtime.overrides import has_own_ops
from dropit_fx.runtime.regions import run_regions


class Rewriter:
    """A model that is captured once, to be rewritten under one config after the other.

    Attributes:
        module: Its graph as it was captured.

    Raises:
        CaptureError: No tracer takes the model.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._given = model, args, dict(kwargs)
        self.module: fx.GraphModule = capture(*self._given)

    def rewritten(self, config: Config) -> Plan:
        """A copy of the captured graph, rewritten."""
        return rewrite(self._copy(), config, *self._given[1:])

    def dense(self) -> fx.GraphModule:
        """The captured graph as the model runs: what its checkpoints make again is made again."""
        module = self._copy()
        outline(module)
        run_regions(module)
        return module

    def _copy(self) -> fx.GraphModule:
        module = self.module
        if any(isinstance(m, fx.GraphModule) for m in list(module.modules())[1:]):
            held = [*module.parameters(), *module.buffers()]
            return copy.deepcopy(module, {id(t): t for t in held})  # the graphs in it, too
        return RewrittenModule(module, copy.deepcopy(module.graph), type(module).__name__)

    def runs(self, module: fx.GraphModule) -> nn.Module:
        """What runs in a step: the graph as it is."""
        return module

    def peak(self, config: Config | None) -> None:
        """Of a real step: as it is told."""


def rewrite(
    graph_module: fx.GraphModule,
    config: Config,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Plan:
    """Runs the pipeline over a captured graph, in place.

    Raises:
        CaptureError: The graph does not run on inputs of the example's shapes.
    """
    called, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    inputs = example_inputs.placeholder_values(graph_module, *hooked(graph_module, args, kwargs))
    for n, value in zip(graph_module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if has_own_ops((value,)):
            n.meta[OWN_OPS] = type(value).__name__
    fakes = fakes_of((*inputs, *called))
    fakes, called = fakes[: len(inputs)], [*fakes[len(inputs) :]]
    given = pytree.tree_unflatten(called, spec) if hooks_of(graph_module) else None
    if opaque_nodes(graph_module, wrapped=True):
        expand(graph_module, propagate(graph_module, fakes), wrapped=True)
    outline(graph_module)
    try:
        plan = run_pipeline(Plan(module=graph_module, inputs=fakes, config=config, given=given))
    except FakeRunError as error:
        raise _does_not_run(graph_module, error) from error
    run_regions(graph_module)
    return plan


def _does_not_run(graph_module: fx.GraphModule, error: FakeRunError) -> CaptureError:
    """Which line of the model stopped the run that tells sizes, why, and the way out."""
    node, cause = error.node, error.__cause__ or error
    kind = type(graph_module).__name__
    if node is None:
        return CaptureError(f"{kind} does not run on inputs of the example's shapes: {cause}")
    module = node_module(node)
    where = [f"module '{module}'"] if module else []
    if node.op == "call_module":
        leaf = graph_module.get_submodule(str(node.target))
        where = [f"module '{node.target}' ({type(leaf).__name__})"]
    where += [node_where(node)] if node_where(node) else []
    reason = first_line(cause)
    if type(cause).__name__.startswith(("DataDependent", "DynamicOutput", "GuardOnData")):
        why = f"asks for the value of a tensor, and a graph is made from shapes alone ({reason})"
    else:
        why = f"does not run on inputs of the example's shapes ({reason})"
    return CaptureError(
        f"{kind} cannot be rewritten: {', '.join(where) or f'{node.name!r}'} {why}.\nIf the model"
        " itself runs on example_args and example_kwargs, use transform(model, modules=...) for the"
        ' other submodules, or torch.compile(model, backend="dropit"), which takes such models'
        " piece by piece."
    )
