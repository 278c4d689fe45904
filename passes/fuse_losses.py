"""Pass 0: a linear layer and the loss of its logits become one call, which never holds them whole.

Where all that reads the logits of a linear layer is losses (``match_losses.py`` says what may stand
between), layer and losses become calls of ``runtime/linear_loss.py``: kept is the layer's input, in
the place of the logarithms of all probabilities. That is no packing: nothing is rounded, gradients
differ from dense ones as two orders of a sum in float32 do.

It is done where there are ``config.loss_classes`` classes or more, and fewer bytes are kept
afterwards. Logits that are also an output of the model stay, unless ``config.drop_logits`` says
that a training step need not return them: then they are None while gradients are on. What the graph
kept before is noted, so that reports compare with the model untouched.

Requires: a graph and fake inputs. Ensures: no fused loss has another reader of its logits.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from dropit_fx.capture.fake import propagate, sized_by_values
from dropit_fx.ops.table import is_inplace, rule_of
from dropit_fx.passes.explain_saved import differentiated
from dropit_fx.passes.find_saved import find_saved
from dropit_fx.passes.match_layers import Layer, is_check, layer_of
from dropit_fx.passes.match_losses import Loss, Matcher, NoMatch, Output
from dropit_fx.passes.plan import Plan
from dropit_fx.private import ORIGIN, OpOverload, schema
from dropit_fx.runtime.linear_loss import logits_unless_training
from dropit_fx.runtime.regions import name_of, with_users

log = logging.getLogger(__name__)

FUSED = "its logits are made again from this, and never whole in memory"
DROPPED = "; those that the model returns are None while gradients are on (drop_logits)"
_NUMBERS = 32  # bytes of a row that are kept beside its input, at most
_MODES = ("_enter_", "_exit_", "_set_grad_enabled", "_saved_tensors_hooks")  # between two ops


@dataclass(frozen=True, kw_only=True)
class _Head:
    """A linear layer, and all that reads its logits."""

    layer: Layer
    readers: tuple[Loss | Output, ...]

    @property
    def losses(self) -> tuple[Loss, ...]:
        return tuple(r for r in self.readers if isinstance(r, Loss))


def fuse_losses(plan: Plan) -> Plan:
    """Rewrites ``plan.module`` in place; fills ``plan.unfused`` and ``plan.notes``.

    Raises:
        FakeRunError: A node cannot run on fake tensors of the example's shapes.
    """
    graph = plan.module.graph
    if not plan.config.loss_classes or not any(map(_is_loss, graph.nodes)):
        return plan
    heads: list[_Head] = []
    notes = dict(plan.notes)
    values = propagate(plan.module, plan.inputs)
    for layer in filter(None, (layer_of(n, values) for n in graph.nodes)):
        node = layer.node
        try:
            heads += _head(layer, values, plan)
        except NoMatch as why:
            log.debug("the logits of '%s' stay whole: %s", node.name, why)
            said = f"the logits of '{node.name}' stay whole: {why}"
            notes |= {loss.name: said for loss in _losses_of(node)}
    if not heads:
        return replace(plan, notes=notes)
    dense = plan.unfused or find_saved(plan).sites
    for head in heads:
        notes |= _fuse(graph, head)
    graph.lint()
    plan.module.recompile()
    return replace(plan, unfused=dense, notes=notes)


def _losses_of(node: fx.Node) -> list[fx.Node]:
    """What may be a loss among all that reads a node, directly or behind others."""
    return [user for user in with_users(node.users) if _is_loss(user)]


def _is_loss(node: fx.Node) -> bool:
    rule = rule_of(node)
    return name_of(node) == "logsumexp" or (rule is not None and rule.name in _LOSSES)


_LOSSES = ("cross_entropy", "nll_loss", "log_softmax")


def _head(layer: Layer, values: Mapping[str, Any], plan: Plan) -> list[_Head]:
    """The head that a layer is, or none: it has few classes, or no loss reads it.

    Raises:
        NoMatch: The logits have to stay.
    """
    x, z = values[layer.x.name], values[layer.node.name]
    if z.shape[-1] < plan.config.loss_classes or not _losses_of(layer.node):
        return []
    width, classes = x.shape[-1], z.shape[-1]
    head = _Head(layer=layer, readers=tuple(Matcher(width, values).readers(layer.node)))
    if not head.losses:
        return []
    if sized_by_values(layer.node):
        raise NoMatch("how many rows they have depends on values")
    if layer.node in differentiated(plan.module.graph):
        raise NoMatch("the forward differentiates them (torch.autograd.grad)")
    if width * x.element_size() + _NUMBERS >= classes * z.element_size():
        raise NoMatch("no less would be kept without them")
    if len(head.losses) < len(head.readers) and not plan.config.drop_logits:
        freed = z.numel() * z.element_size()
        raise NoMatch(
            f"the model returns them; 'drop_logits: true' returns None for them while gradients"
            f" are on, and frees {freed:,} bytes"
        )
    _check_between([layer.node, *layer.nodes], [loss.node for loss in head.losses], plan)
    return [head]


def _check_between(layer: Iterable[fx.Node], losses: Iterable[fx.Node], plan: Plan) -> None:
    """Raises NoMatch where a layer may do otherwise in the place of its losses."""
    order = {n: i for i, n in enumerate(plan.module.graph.nodes)}
    first, last = min(order[n] for n in layer), max(order[loss] for loss in losses)
    for node in [n for n, at in order.items() if first < at < last]:
        if name_of(node).startswith(_MODES):
            raise NoMatch(f"'{node.name}' stands between them and their loss")
        if _writes(node):
            raise NoMatch(f"'{node.name}' writes into a tensor between them and their loss")


def _writes(node: fx.Node) -> bool:
    if isinstance(node.target, OpOverload):
        return bool(schema(node.target).is_mutable)
    calls = node.op in ("call_function", "call_method")
    return calls and (is_inplace(node, node.kwargs) or node.target is operator.setitem)


def _fuse(graph: fx.Graph, head: _Head) -> dict[str, str]:
    """Replaces what reads the logits of a head, and erases it; what to say of the new calls."""
    layer = head.layer
    dropped = DROPPED if len(head.losses) < len(head.readers) else ""
    notes: dict[str, str] = {}
    dead = {layer.node, *layer.nodes}
    dead |= {user for n in dead for user in n.users if is_check(user)}
    for reader in head.readers:
        loss = reader if isinstance(reader, Loss) else None
        dead |= {*reader.path.nodes, *([loss.node] if loss else [])}
        dead |= {user for n in reader.path.nodes for user in n.users if is_check(user)}
        output = graph.find_nodes(op="output")[0]
        with graph.inserting_before(loss.node if loss else output):
            rows, weight = layer.x, layer.weight
            for move in reader.path.moves:
                rows = _from(layer.node, move(graph, rows))
            if layer.transposed:
                weight = _from(layer.node, graph.call_method("t", (weight,)))
            args, kwargs = (loss.args, loss.kwargs) if loss else ((), {})
            function = loss.function if loss else logits_unless_training
            kwargs = {**kwargs, "steps": reader.path.steps}
            call = graph.call_function(function, (rows, weight, layer.bias, *args), dict(kwargs))
        _from(reader.node, call)
        if loss:
            loss.node.replace_all_uses_with(call)
            notes[call.name] = FUSED + dropped
        else:
            output.replace_input_with(reader.node, call)
    for node in reversed([*graph.nodes]):
        if node in dead and not node.users:
            graph.erase_node(node)
    return notes


def _from(source: fx.Node, node: fx.Node) -> fx.Node:
    """``node``, as made by the user's line and in the module of another."""
    node.meta |= {key: source.meta[key] for key in ORIGIN if key in source.meta}
    return node
