"""torchtitan's graph trainer: a plan as a memory policy, which tags the joint graph of a step.

Nothing of torchtitan is imported: its registry takes a function ``(gm, *, config) -> gm``, which
says of each node of the forward whether its result is saved or computed again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from dropit_fx.capture.provenance import node_module
from dropit_fx.private import BACKWARD, CUSTOM, PLACE, POLICY
from dropit_fx.rules import Config
from dropit_fx.runtime.regions import name_of
from dropit_fx.selective import saved_ops

_IN_BACKWARD = "autograd_backward"  # in the meta of what autograd.grad ran, where that is traced
_MODULE = "module_fqn"  # among the annotations of a node: what torchtitan says of its module
_PARTS = ("getitem", "wait_tensor")  # of what is before: ops by name
_SAVED, _AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE


def memory_policy(
    model: nn.Module,
    config: Config,
    example_args: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Callable[..., fx.GraphModule]:
    """A memory policy that saves what a plan keeps whole; all else is computed again.

    Nothing is lost, and nothing packed. What is random is saved, since the graph cannot draw it
    again. An op is found by its module, its name and its number there; where the joint graph has
    more or fewer of that name in the module than the model, they are computed again.

    ``register_memory_policy("dropit")(memory_policy(model, plan, (batch,)))``, of
    ``torchtitan.experiments.graph_trainer.registry``, is chosen by ``--compile.memory_policy``.

    Args:
        model: As it was before it was split over ranks, in the mode in which it trains.
        config: What ``dropit_fx.plan`` returned for it, or any config.
        example_args: Positional inputs of the model, as for ``transform``.
        example_kwargs: Keyword inputs.

    Returns:
        ``(gm, *, config=None) -> gm``: tags the forward's nodes of a joint graph in place. Of
        torchtitan's ``config`` nothing is read.

    Raises:
        CaptureError: No tracer takes the model.
    """
    planned: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for op in saved_ops(model, config, example_args, example_kwargs):
        planned[op.module, op.name].append(op.saved)

    def policy(gm: fx.GraphModule, *, config: Any = None) -> fx.GraphModule:
        nodes = [n for n in gm.graph.nodes if n.op == "call_function" and not _later(n)]
        counts = Counter(map(_key, nodes))
        seen: Counter[tuple[str, str]] = Counter()
        for node in nodes:
            if name_of(node) in _PARTS and POLICY in node.args[0].meta:
                node.meta[POLICY] = node.args[0].meta[POLICY]
                continue
            key = _key(node)
            known = planned[key] if len(planned[key]) == counts[key] else []
            saved = bool(known) and known[seen[key]]
            seen[key] += 1
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            node.meta[POLICY] = _SAVED if saved or random else _AGAIN
        return gm

    return policy


def _later(node: fx.Node) -> bool:
    """Whether a node is of the backward."""
    return bool(node.meta.get(_IN_BACKWARD)) or node.meta.get(PLACE) in BACKWARD


def _key(node: fx.Node) -> tuple[str, str]:
    """The module and the name of an op."""
    said = (node.meta.get(CUSTOM) or {}).get(_MODULE)
    return node_module(node) if said is None else said, str(node.target)
