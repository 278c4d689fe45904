"""One graph for both modes: a trace in training and one in eval mode, laid over each other.

Both tracers evaluate Python, so a graph knows one mode only: ``if self.training`` is decided while
it is traced. Where the two graphs differ in constants alone (a dropout's rate), the constant
becomes a choice made at run time (``by_mode``), and ``.train()`` and ``.eval()`` work on the result
as on the model. So does a block without gradients of one mode alone, as spectral norm moves its
vectors in (``in_mode``), for which the other mode reads buffers. Where they differ in more, the
graph says so when it is run in the other mode.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.fx.operator_schemas import get_signature_for_torch_op

from dropit_fx.capture.graph_module import adopt, with_grad
from dropit_fx.capture.input_guards import InputGuards
from dropit_fx.capture.provenance import node_module, node_where
from dropit_fx.capture.regions import REGION
from dropit_fx.ops.masks import DROPOUT
from dropit_fx.ops.table import operands_of, rule_of
from dropit_fx.private import OpOverload
from dropit_fx.runtime.packed_call import by_mode, in_mode, require_mode

log = logging.getLogger(__name__)

TRAINING_FLAG = "training_flag"
COUNTER = "num_batches_tracked"  # of batch norm, which counts in training mode only
CONSTANT = "_tensor_constant"  # as fx begins the names of tensors that it finds
_COUNTS = ("add_", "aten.add_.Tensor")


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
    for m in graph_module.modules():  # an exported graph is in training mode at first
        m.training = training
    graph_module.recompile()
    return graph_module


def one_mode(graph_module: fx.GraphModule, training: bool, differs: str) -> None:
    """Lets a graph run in the mode ``training`` only; ``differs`` says where the other differs."""
    name = type(graph_module).__name__
    log.warning("%s: training and eval differ in more than constants: %s", name, differs)
    with graph_module.graph.inserting_before(after_placeholders(graph_module)):
        flag = mode_flag(graph_module, training)
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


def mode_flag(graph_module: fx.GraphModule, training: bool, path: str = "") -> fx.Node:
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
    _name_alike(mine, other)
    for one, another in ((mine, other), (other, mine)):  # buffers that only one of them reads
        own = dict(one.named_buffers())
        adopt(one, [(n, b) for n, b in another.named_buffers() if n not in own])
    _level(mine, other, training)
    flags: dict[str, fx.Node] = {}

    def flag_for(node: fx.Node) -> fx.Node:
        path = node_module(node)
        if path not in flags:
            with mine.graph.inserting_before(after_placeholders(mine)):
                flags[path] = mode_flag(mine, training, path)
        return flags[path]

    def choice(node: fx.Node, ours: Any, theirs: Any) -> fx.Node:
        in_training, in_eval = (ours, theirs) if training else (theirs, ours)
        if in_training is True and in_eval is False:
            return flag_for(node)
        with mine.graph.inserting_before(node):
            return mine.graph.call_function(by_mode, (flag_for(node), in_training, in_eval))

    try:
        lay_over(mine.graph, other.graph, choice)
    except Differs as where:
        return str(where)
    return ""


def _name_alike(mine: fx.GraphModule, other: fx.GraphModule) -> None:
    """Lets ``other`` read the constants of ``mine`` that it has of its own, with the same bits.

    What a model computes of tensors that are no inputs of it, each trace computes once.
    """
    pairs = [*zip(*(m.graph.find_nodes(op="get_attr") for m in (mine, other)), strict=False)]
    for read, again in pairs:
        a, b = str(read.target), str(again.target)
        if a == b or not (a.startswith(CONSTANT) and b.startswith(CONSTANT)):
            continue
        ours, theirs = getattr(mine, a), getattr(other, b)
        if ours.dtype == theirs.dtype and torch.equal(ours, theirs):
            again.target = a
            other.register_buffer(a, ours, persistent=False)
    for name in {n for n, _ in other.named_buffers() if n.startswith(CONSTANT)}:
        if not any(n.target == name for n in other.graph.find_nodes(op="get_attr")):
            delattr(other, name)


class Differs(RuntimeError):
    """Two graphs differ in more than constants; the message says where."""


def lay_over(
    mine: fx.Graph, other: fx.Graph, choice: Callable[[fx.Node, Any, Any], fx.Node]
) -> None:
    """Puts ``choice(node, ours, theirs)`` where ``other`` has another constant than ``mine``.

    Raises:
        Differs: They differ in more than constants; ``mine`` is as it was.
    """
    ours, theirs = list(mine.nodes), list(other.nodes)
    twin = dict(zip(theirs, ours, strict=False))
    pairs = []
    for a, b in zip(ours, theirs, strict=False):
        (left, nesting), (right, nesting_too) = (_flat((n.args, n.kwargs)) for n in (a, b))
        same = (a.op, str(a.target), nesting) == (b.op, str(b.target), nesting_too)
        if not same or any(not _is_twin(x, y, twin) for x, y in zip(left, right, strict=True)):
            raise Differs(f"'{a.name}' ({node_where(a) or node_module(a) or a.target})")
        pairs.append((a, b, right))
    if len(ours) != len(theirs):
        raise Differs(f"'{ours[-1].name}'")
    for a, b, right in pairs:
        constants = iter(right)
        if REGION in b.meta:  # some models checkpoint in training mode alone
            a.meta[REGION] = b.meta[REGION]

        def laid(x: Any, a: fx.Node = a, constants: Iterator[Any] = constants) -> Any:
            y = next(constants)
            same = isinstance(x, fx.Node) or (type(x) is type(y) and bool(x == y))
            return x if same else choice(a, x, y)

        a.args, a.kwargs = map_aggregate(a.args, laid), map_aggregate(a.kwargs, laid)


def _flat(arguments: Any) -> tuple[list[Any], str]:
    """What stands in nested arguments, and how they are nested."""
    leaves: list[Any] = []
    return leaves, repr(map_aggregate(arguments, leaves.append))


def _is_twin(x: Any, y: Any, twin: dict[fx.Node, fx.Node]) -> bool:
    """Whether two arguments are constants, or the same node."""
    return twin.get(y) is x if isinstance(y, fx.Node) else not isinstance(x, fx.Node)


class _Blocks:
    """The blocks without gradients that one of two graphs alone has, laid into the other as well.

    Args:
        modes: Of each graph.
    """

    def __init__(self, modes: dict[fx.Graph, bool]) -> None:
        self.modes = modes
        self._results: dict[fx.Node, tuple[fx.Node, int]] = {}  # the call in its own graph, which
        self._calls: dict[fx.Node, fx.Node] = {}  # and in the other

    def lay_in(
        self, read: fx.Node, ahead: fx.Node, twins: dict[fx.Node, fx.Node]
    ) -> tuple[fx.Node, fx.Node] | None:
        """Lays the block that ``read`` looks up before ``ahead``, in the other graph.

        Returns:
            The nodes from which both go on; None where there is no such block.
        """
        call: Any = read.next
        own, graph = read.graph, ahead.graph
        if read.op != "get_attr" or call.target is not with_grad:
            return None
        enabled, block, *inputs = call.args
        if enabled is not False or block is not read or not twins.keys() >= {*_nodes(inputs)}:
            return None
        items: list[Any] = [n for n in call.users if n.target is operator.getitem]
        if len(items) != len(call.users):
            return None
        name = new = str(read.target)
        while hasattr(graph.owning_module, new):
            new += "_"
        homes: list[Any] = [graph.owning_module, own.owning_module]
        for home in homes:
            home.add_submodule(new, homes[1].get_submodule(name))
        traced, none = self.modes[own], (None,) * len(items)
        read.target, call.target = new, in_mode
        call.args, call.kwargs = (traced, traced, read, (*inputs,), none), {}
        with graph.inserting_before(ahead):
            there = graph.get_attr(new)
            given = tuple(twins[n] if isinstance(n, fx.Node) else n for n in inputs)
            args = (self.modes[graph], traced, there, given, none)
            again = graph.call_function(in_mode, args)
            pairs = [(read, there), (call, again)]
            pairs += [(n, graph.call_function(n.target, (again, *n.args[1:]))) for n in items]
        self._calls[call] = again
        for node, added in pairs:
            added.meta = dict(node.meta)
            twins[node], twins[added] = added, node
        last = call
        for node in items:
            self._results[node] = call, int(node.args[1])
            last.append(node)
            last = node
        return last, twins[last]

    def stands_for(self, x: Any, y: Any, twins: dict[fx.Node, fx.Node]) -> fx.Node | None:
        """Notes that the other graph reads the buffer ``y`` where a block's result ``x`` is read.

        Returns:
            What it is to read: the twin of ``x``. None where ``x`` is none, or ``y`` no buffer.
        """
        if x not in self._results or not isinstance(y, fx.Node) or y.op != "get_attr":
            return None
        call, at = self._results[x]
        for node, value in ((call, twins.get(y)), (self._calls[call], y)):
            instead: list[Any] = [*cast(Any, node.args[-1])]
            if value is None or instead[at] not in (None, value):
                return None
            instead[at] = value
            node.args = (*node.args[:-1], tuple(instead))
        return twins[x]


def _nodes(arguments: Any) -> list[fx.Node]:
    return [n for n in _flat(arguments)[0] if isinstance(n, fx.Node)]


def _level(mine: fx.GraphModule, other: fx.GraphModule, training: bool) -> None:
    """Gives each graph what the other has and what changes nothing in it.

    Those are ``contiguous`` calls (export drops those that have nothing to do, which depends on the
    attention kernel, and that on dropout), and in eval mode, a count of batches that adds 0 and
    dropout behind ``if self.training``. There dropout returns its input, and export takes the one
    for the other: both graphs read what the one reads in which it drops something.
    """
    twins: dict[fx.Node, fx.Node] = {}
    blocks = _Blocks({mine.graph: training, other.graph: not training})
    a, b = next(iter(mine.graph.nodes)), next(iter(other.graph.nodes))
    while a.op != "output" and b.op != "output":
        if str(a.target) != str(b.target):
            for node, ahead in ((a, b), (b, a)):
                if (laid := blocks.lay_in(node, ahead, twins)) is not None:
                    a, b = laid if node is a else laid[::-1]
                    break
                added = _copy_of_no_effect(node, ahead, twins)
                if added is not None:
                    a, b = (a, added) if node is a else (added, b)
                    break
            else:
                return
        _read_alike(a, b, twins, blocks)
        twins[a], twins[b] = b, a
        a, b = a.next, b.next
    _read_alike(a, b, twins, blocks)


def _read_alike(a: fx.Node, b: fx.Node, twins: dict[fx.Node, fx.Node], blocks: _Blocks) -> None:
    """Lets a node of either graph read the twins of what the other reads, where that is equal."""
    for node, other in ((a, b), (b, a)):
        (mine, nesting), (theirs, nesting_too) = (_flat((n.args, n.kwargs)) for n in (node, other))
        if nesting != nesting_too:
            return
        pairs = zip(mine, theirs, strict=True)
        read = [
            blocks.stands_for(y, x, twins)
            or _as_read(x, twins.get(y) if isinstance(y, fx.Node) else None)
            for x, y in pairs
        ]
        if any(x is not y for x, y in zip(mine, read, strict=True)):
            node.args, node.kwargs = _laid_in((node.args, node.kwargs), read)


def _laid_in(nested: Any, leaves: list[Any]) -> Any:
    """Nested arguments with others in their places, in the same order."""
    left = iter(leaves)
    return map_aggregate(nested, lambda _: next(left))


def _as_read(x: Any, twin: fx.Node | None) -> Any:
    """``twin`` in the place of ``x``, where dropout that drops nothing is all between them."""
    return twin if isinstance(x, fx.Node) and twin and _behind(x) is _behind(twin) else x


def _behind(node: fx.Node) -> fx.Node:
    """The value that a node returns: dropout that drops nothing returns its input."""
    while (bound := _dropout_of(node)) and bound["training"] is False:
        node = bound["input"]
    return node


def _dropout_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of dropout by name; none of any other."""
    return operands_of(node) if rule_of(node) is DROPOUT else {}


def _copy_of_no_effect(
    node: fx.Node, ahead: fx.Node, twins: dict[fx.Node, fx.Node]
) -> fx.Node | None:
    """A copy of ``node`` in the other graph, before ``ahead``; None where it would do something."""
    graph = ahead.graph
    if node.target is torch.ops.aten.contiguous.default:
        source = ahead.prev
        with graph.inserting_after(source):
            added = graph.call_function(node.target, (source,), dict(node.kwargs))
        added.args = (source, *node.args[1:])
        source.replace_all_uses_with(added, delete_user_cb=lambda u: u is not added)
        added.meta = dict(source.meta)
        return added
    if bound := _dropout_of(node):
        return _idle_dropout(node, bound, ahead, twins)
    counter = counted = node.args[0] if node.args else node
    while isinstance(counted, fx.Node) and str(counted.target) in _COUNTS:  # once more
        counted = counted.args[0]
    if not isinstance(counter, fx.Node) or not isinstance(counted, fx.Node):
        return None
    if not str(counted.target).endswith(COUNTER):
        return None
    with graph.inserting_before(ahead):
        if node.op == "get_attr":
            added = graph.get_attr(str(node.target))
        elif str(node.target) in _COUNTS and node.args[1] == 1:
            added = graph.create_node(
                node.op, node.target, (twins[counter], 0, *node.args[2:]), dict(node.kwargs)
            )
        else:
            return None
    added.meta = dict(node.meta)
    return added


def _idle_dropout(
    node: fx.Node,
    bound: dict[str, Any],
    ahead: fx.Node,
    twins: dict[fx.Node, fx.Node],
) -> fx.Node | None:
    """A dropout before ``ahead`` that drops nothing, for a graph in whose mode there is none."""
    source = twins.get(bound["input"])
    if source is None:
        return None
    order = DROPOUT.orders.get(node.target, DROPOUT.inputs)
    node.args, node.kwargs = tuple(bound[name] for name in order), {}
    idle = bound | {"input": source, "training": False}
    with ahead.graph.inserting_before(ahead):
        added = ahead.graph.create_node(node.op, node.target, tuple(idle[name] for name in order))
    added.meta = dict(source.meta)
    return added


def _spell_out(node: fx.Node) -> None:
    """Gives an aten call its default arguments.

    Export leaves out those that one mode happens to agree with.
    """
    if isinstance(node.target, OpOverload):
        signatures: Any = get_signature_for_torch_op(node.target)
        bound = signatures[0].bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        node.args, node.kwargs = bound.args, bound.kwargs
