"""``options={"peak": "40%"}``: a config for one graph of Dynamo's that keeps a peak.

Dynamo hands over real inputs, so that the graph is planned as a model is (``planner``). What is
told is the step of the two graphs into which the joint graph is cut, op after op. That is what runs
but for inductor, which joins ops and orders them anew: there the dense graph and what was chosen
are compiled and take a real step, and where that takes more, a lower peak is planned for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

from torch import Tensor, fx, nn

from dropit_fx.capture.expand import expand, opaque_nodes
from dropit_fx.capture.fake import concrete_fakes, propagate
from dropit_fx.config import Config, ConfigError
from dropit_fx.holders import tensors_in
from dropit_fx.measure import peak_memory
from dropit_fx.passes import run_pipeline
from dropit_fx.passes.plan import Plan
from dropit_fx.planner import GraphStep, PlannedConfig, plan_step
from dropit_fx.private import FakeTensor, storage_id, tracing
from dropit_fx.private_inductor import backwards_at_once
from dropit_fx.runtime.regions import run_regions

Compiles = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def plan_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    peak: Any,
    cut: Compiles | None,
    fuse: Compiles | None,
) -> PlannedConfig:
    """Plans a config that keeps a step of a graph under a peak.

    Args:
        gm: Dynamo's graph; it is left as it is.
        inputs: Its inputs, parameters among them: real tensors. They are left as they are.
        peak: As for ``dropit_fx.plan``; a share is one of the dense graph's peak, compiled alike.
        cut: Cuts a graph into forward and backward, which run as they are; None: it runs whole.
        fuse: Compiles a graph into what takes another peak than its ops; None: nothing does.

    Raises:
        ConfigError: The inputs are fake tensors, on which no error can be measured.
        PlanError: As for ``dropit_fx.plan``.
    """
    if any(isinstance(value, FakeTensor) for value in inputs):
        raise ConfigError(
            "peak= needs real inputs, and whoever compiles this graph has none:"
            " plan with dropit_fx.plan, and give the result as config="
        )
    step = GraphStep(gm, tuple(map(_own, inputs)))
    with tracing(None), backwards_at_once() or nullcontext():  # nothing of Dynamo's own graph
        return plan_step(step, peak, rewriter=_Rewriter(step, cut, fuse))


def _own(value: Any) -> Any:
    """An input that the graph may write into; parameters as they are."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value


class _Rewriter:
    """A graph of Dynamo's under one config after the other; see ``rewriting.Rewriter``."""

    def __init__(self, step: GraphStep, cut: Compiles | None, fuse: Compiles | None) -> None:
        self._step, self._fuse = step, fuse
        parts = [m for m in step.model.modules() if isinstance(m, fx.GraphModule)]
        whole = backwards_at_once() is None or len(parts) > 1 or [*step.model.parameters()]
        self._cut = None if whole else cut  # regions, and tensors of its own, are told as they are

    def dense(self) -> fx.GraphModule:
        """A copy of the graph, which runs as it is."""
        module = self._copy()
        run_regions(module)
        return module

    def _copy(self) -> fx.GraphModule:
        """A copy of the graph, with the tensors of the given one."""
        held = [*self._step.model.parameters(), *self._step.model.buffers()]
        copied: Any = copy.deepcopy(self._step.model, {id(t): t for t in held})
        return cast("fx.GraphModule", copied)

    def rewritten(self, config: Config) -> Plan:
        """A copy of the graph, rewritten."""
        plan = self._plan(config)
        run_regions(plan.module)
        return plan

    def _plan(self, config: Config) -> Plan:
        module, fakes = self._copy(), concrete_fakes(self._step.args)
        if opaque_nodes(module):
            expand(module, propagate(module, fakes))
        compiled = self._cut is not None
        return run_pipeline(Plan(module=module, inputs=fakes, config=config, compiled=compiled))

    def runs(self, module: fx.GraphModule) -> nn.Module:
        """The two graphs into which it is cut."""
        return module if self._cut is None else self._compiled(self._cut, module)

    def peak(self, config: Config | None) -> int | None:
        """Of a real step, where ops are fused."""
        if self._fuse is None:
            return None
        module = self._copy() if config is None else self._plan(config).module
        run = self._compiled(self._fuse, module)
        with self._step.real() as (args, _):
            held = {storage_id(t): t.untyped_storage().nbytes() for t in tensors_in(args)}
            return sum(held.values()) + peak_memory(lambda: self._step.loss_of(run(*args)))

    def _compiled(self, how: Compiles, module: fx.GraphModule) -> nn.Module:
        return _Called(how(module, list(concrete_fakes(self._step.args))))


class _Called(nn.Module):
    """Calls what a graph was compiled into."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        super().__init__()
        self._compiled = compiled

    def forward(self, *inputs: Any) -> Any:
        return self._compiled(*inputs)
