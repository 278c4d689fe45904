"""One graph for both modes: a trace in training and one in eval mode, laid over each other.

Both tracers evaluate Python, so a graph knows one mode only: ``if self.training`` is decided while
it is traced. Where the two graphs differ in constants alone (a dropout's rate), the constant
becomes a choice made at run time (``by_mode``), and ``.train()`` and ``.eval()`` work on the result
as on the model. Where they differ in more, the graph says so when it is run in the other mode.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from dropit_fx.capture.input_guards import InputGuards
from dropit_fx.capture.provenance import node_module, node_where
from dropit_fx.capture.regions import REGION
from dropit_fx.private import OpOverload, schema
from dropit_fx.runtime.packed_call import by_mode, require_mode

log = logging.getLogger(__name__)

TRAINING_FLAG = "training_flag"
COUNTER = "num_batches_tracked"  # of batch norm, which counts in training mode only


class TrainingFlag(nn.Module):
    """Returns its own ``training`` attribute, so that a graph can read the mode at run time."""

    def forward(self) -> bool:
        """True in training mode."""
        return self.training


def both_modes(model: nn.Module, trace: Callable[[nn.Module], fx.GraphModule]) -> fx.GraphModule:
    """The graph that ``trace`` makes of ``model``, serving training and eval mode where it can."""
    modes = [(m, m.training) for m in model.modules()]
    training = model.training
    try:
        graph_module = trace(model)
        model.train(not training)
        try:
            other = trace(model)
        except Exception as error:
            log.info("tracing in the other mode: %s", error)
            other = None
    finally:
        for m, mode in modes:
            m.training = mode
    differs = "it cannot be traced" if other is None else _overlay(graph_module, other, training)
    if other is not None and not differs:
        _require_both(graph_module, other)
    if differs:
        one_mode(graph_module, training, differs)
    graph_module.recompile()
    return graph_module


def one_mode(graph_module: fx.GraphModule, training: bool, differs: str) -> None:
    """Lets a graph run in the mode ``training`` only; ``differs`` says where the other differs."""
    name = type(graph_module).__name__
    log.warning("%s: training and eval differ in more than constants: %s", name, differs)
    with graph_module.graph.inserting_before(after_placeholders(graph_module)):
        flag = _flag(graph_module, training)
        graph_module.graph.call_function(require_mode, (flag, training, differs))
    graph_module.recompile()


def is_one_mode(graph_module: fx.GraphModule) -> bool:
    """Whether the graph says so of itself."""
    return any(n.target is require_mode for n in graph_module.graph.nodes)


def _require_both(mine: fx.GraphModule, other: fx.GraphModule) -> None:
    """Gives ``mine`` the conditions that either mode puts on the inputs."""
    for name, guards in other.named_modules():
        if isinstance(guards, InputGuards):
            own = mine.get_submodule(name)
            assert isinstance(own, InputGuards)
            own.require(own.conditions + guards.conditions)


def after_placeholders(graph_module: fx.GraphModule) -> fx.Node:
    """The first node behind all placeholders (exported graphs look their parameters up before)."""
    last = next((n for n in reversed(graph_module.graph.nodes) if n.op == "placeholder"), None)
    first: fx.Node = next(iter(graph_module.graph.nodes)) if last is None else last.next
    return first


def _flag(graph_module: fx.GraphModule, training: bool, path: str = "") -> fx.Node:
    """Reads the mode of the submodule ``path``, so that one layer alone can be put in eval mode."""
    name = f"{path}.{TRAINING_FLAG}".removeprefix(".")
    graph_module.add_submodule(name, TrainingFlag().train(training))
    return graph_module.graph.call_module(name)


def _overlay(mine: fx.GraphModule, other: fx.GraphModule, training: bool) -> str:
    """Makes ``mine`` serve both modes.

    Returns:
        Where the graphs differ in more than constants, or ``""``.
    """
    for node in (*mine.graph.nodes, *other.graph.nodes):
        _spell_out(node)
    _share_buffers(mine, other)
    _share_buffers(other, mine)
    _level(mine.graph, other.graph)
    ours, theirs = list(mine.graph.nodes), list(other.graph.nodes)
    twin = dict(zip(theirs, ours, strict=False))
    for a, b in zip(ours, theirs, strict=False):
        same = (a.op, str(a.target)) == (b.op, str(b.target))
        if not same or not _same_but_constants((a.args, a.kwargs), (b.args, b.kwargs), twin):
            return f"'{a.name}' ({node_where(a) or node_module(a) or a.target})"
    if len(ours) != len(theirs):
        return f"'{ours[-1].name}'"
    flags: dict[str, fx.Node] = {}

    def flag_for(node: fx.Node) -> fx.Node:
        path = node_module(node)
        if path not in flags:
            with mine.graph.inserting_before(after_placeholders(mine)):
                flags[path] = _flag(mine, training, path)
        return flags[path]

    def lay(x: Any, y: Any, before: fx.Node) -> Any:
        if isinstance(x, fx.Node) or _equal(x, y):
            return x
        if isinstance(x, slice):
            parts = zip((x.start, x.stop, x.step), (y.start, y.stop, y.step), strict=True)
            return slice(*[lay(p, q, before) for p, q in parts])
        if isinstance(x, tuple | list):
            return type(x)(lay(p, q, before) for p, q in zip(x, y, strict=True))
        if isinstance(x, dict):
            return {k: lay(v, y[k], before) for k, v in x.items()}
        in_training, in_eval = (x, y) if training else (y, x)
        if in_training is True and in_eval is False:
            return flag_for(before)
        with mine.graph.inserting_before(before):
            return mine.graph.call_function(by_mode, (flag_for(before), in_training, in_eval))

    for a, b in zip(ours, theirs, strict=True):
        if REGION in b.meta:  # some models checkpoint in training mode alone
            a.meta[REGION] = b.meta[REGION]
        a.args, a.kwargs = (
            lay(tuple(a.args), tuple(b.args), a),
            lay(dict(a.kwargs), dict(b.kwargs), a),
        )
    return ""


def _share_buffers(mine: fx.GraphModule, other: fx.GraphModule) -> None:
    """Gives ``mine`` the buffers that only ``other`` reads."""
    own = dict(mine.named_buffers())
    for name, buffer in other.named_buffers():
        if name not in own:
            path, _, leaf = name.rpartition(".")
            if path not in dict(mine.named_modules()):
                mine.add_submodule(path, nn.Module())
            mine.get_submodule(path).register_buffer(leaf, buffer)


def _level(mine: fx.Graph, other: fx.Graph) -> None:
    """Gives each graph what the other has and what changes nothing in it.

    Those are ``contiguous`` calls (export drops those that have nothing to do, which depends on the
    attention kernel, and that on dropout), and in eval mode, a count of batches that adds 0.
    """
    twins: dict[fx.Node, fx.Node] = {}
    a, b = next(iter(mine.nodes)), next(iter(other.nodes))
    while a.op != "output" and b.op != "output":
        if str(a.target) != str(b.target):
            for node, graph, ahead in ((a, other, b), (b, mine, a)):
                added = _copy_of_no_effect(node, graph, ahead, twins)
                if added is not None:
                    a, b = (a, added) if graph is other else (added, b)
                    break
            else:
                return
        twins[a], twins[b] = b, a
        a, b = a.next, b.next


def _copy_of_no_effect(
    node: fx.Node, graph: fx.Graph, ahead: fx.Node, twins: dict[fx.Node, fx.Node]
) -> fx.Node | None:
    """A copy of ``node`` in the other graph, before ``ahead``; None where it would do something."""
    if node.target is torch.ops.aten.contiguous.default:
        source = ahead.prev
        with graph.inserting_after(source):
            added = graph.call_function(node.target, (source,), dict(node.kwargs))
        added.args = (source, *node.args[1:])
        source.replace_all_uses_with(added, delete_user_cb=lambda u: u is not added)
        added.meta = dict(source.meta)
        return added
    counter = node.args[0] if node.args else node
    if not isinstance(counter, fx.Node) or not str(counter.target).endswith(COUNTER):
        return None
    with graph.inserting_before(ahead):
        if node.op == "get_attr":
            added = graph.get_attr(str(node.target))
        elif str(node.target) in ("add_", "aten.add_.Tensor") and node.args[1] == 1:
            added = graph.create_node(
                node.op, node.target, (twins[counter], 0, *node.args[2:]), dict(node.kwargs)
            )
        else:
            return None
    added.meta = dict(node.meta)
    return added


def _spell_out(node: fx.Node) -> None:
    """Gives an aten call its default arguments.

    Export leaves out those that one mode happens to agree with.
    """
    if not isinstance(node.target, OpOverload):
        return
    args, kwargs = list(node.args), dict(node.kwargs)
    for i, argument in enumerate(schema(node.target).arguments):
        if i < len(args) or argument.name in kwargs or not argument.has_default_value():
            continue
        if argument.kwarg_only or i > len(args):
            kwargs[argument.name] = argument.default_value
        else:
            args.append(argument.default_value)
    for argument in schema(node.target).arguments[len(args) :]:
        if argument.name not in kwargs or argument.kwarg_only:
            break
        args.append(kwargs.pop(argument.name))
    node.args, node.kwargs = tuple(args), kwargs


def _equal(x: Any, y: Any) -> bool:
    """Equal constants; the caller takes containers apart, so that nodes inside are not compared."""
    return not isinstance(x, tuple | list | dict | slice) and type(x) is type(y) and bool(x == y)


def _same_but_constants(x: Any, y: Any, twin: dict[fx.Node, fx.Node]) -> bool:
    """Whether two arguments name the same nodes in the same places."""
    if isinstance(x, fx.Node) or isinstance(y, fx.Node):
        return isinstance(y, fx.Node) and twin.get(y) is x
    if isinstance(x, slice):
        x, y = (
            (x.start, x.stop, x.step),
            (y.start, y.stop, y.step) if isinstance(y, slice) else None,
        )
    if isinstance(x, tuple | list):
        return (
            isinstance(y, tuple | list)
            and len(x) == len(y)
            and all(_same_but_constants(p, q, twin) for p, q in zip(x, y, strict=True))
        )
    if isinstance(x, dict):
        return (
            isinstance(y, dict)
            and list(x) == list(y)
            and all(_same_but_constants(v, y[k], twin) for k, v in x.items())
        )
    return True
