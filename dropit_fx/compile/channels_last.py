"""Convolutions laid out as inductor lays them out, before anything is packed.

Inductor computes two-dimensional convolutions channels-last, whatever the model says: on CPUs
wherever oneDNN is there (those of three dimensions too), on GPUs where it expects it to be faster.
Tensors are packed in memory order, so a graph traced channels-first would have every one of them
transposed on its way into the packed form and back. What draws random numbers for each element
draws them in memory order too: it reads the layout of the model, for the dense model's masks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dropit_fx.capture.fake import concrete_fakes, propagate
from dropit_fx.ops.table import DRAWING_EACH, is_inplace, operands_of, rule_of
from dropit_fx.private import EXAMPLE_VALUE, VALUE, storage_id
from dropit_fx.private_inductor import decides_layout, inductor_config
from dropit_fx.runtime.regions import bodies_of, name_of, with_users
from dropit_fx.runtime.tensor_spec import memory_order

_FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
_DIMS: dict[str, int] = {f"conv{kind}{d}d": d for kind in ("", "_transpose") for d in (1, 2, 3)}

# Functions and methods that give a view or an error, and one of elements by their place in memory
AS_STRIDED = "as_strided"
_VIEWING = frozenset(("view", "view_as", "view_as_complex", AS_STRIDED))

# Nodes of the forward graph that inductor sees for each node of Dynamo's, packing included:
# 2.3 in a ConvNeXt, 3.0 in a DeiT, 4.3 in a ResNet.
_NODES_FOR_ONE = 3


def channels_last(graph_module: fx.GraphModule, options: Mapping[str, Any] | None = None) -> None:
    """Asks for channels-last results of convolutions, in place; they are views where they are so.

    The graph's own results keep the layout that they had.

    Args:
        graph_module: Dynamo's graph.
        options: What inductor's config is patched with when it compiles the graph.
    """
    with inductor_config(**dict(options or {})):
        if not inductor_lays_out(graph_module):
            return
    graph = graph_module.graph
    drawing = {n: drawn for n in graph.nodes if (drawn := _drawn(graph_module, n))}
    if any(_writes(n) for drawn in drawing.values() for n in drawn):
        return  # what they write into is the tensor in the order that it has
    convolutions = list(_convolutions(graph))
    viewing = _viewing(graph_module, [node for node, _, _ in convolutions])
    if any(_written_later(graph_module, node) for node in viewing):
        return  # a view of a copy is not written with the original
    orders = {n: memory_order(v) for n in graph.nodes if (v := _value(n)) is not None}
    changed: list[fx.Node] = []
    for node, dims, value in convolutions:
        layout = _layout(value, dims)
        if layout is not None and value.dim() == dims + 2:
            after = _laid_out(node, layout)
            orders[after] = orders[node]
            if not value.is_contiguous(memory_format=layout):
                changed.append(after)
    behind = with_users(changed)
    for node in drawing:
        for operand in node.all_input_nodes:
            if operand in behind and operand in orders:
                _as_in_the_model(node, operand, orders[operand])
        made = _value(node)
        if node in behind and made is not None and made.is_contiguous():
            layout = _layout(made, made.dim() - 2)
            if layout is not None:
                _laid_out(node, layout)
    graph.lint()
    graph_module.recompile()
    if changed:
        _restore(graph_module, viewing, orders)


def _viewing(graph_module: fx.GraphModule, convolutions: list[fx.Node]) -> list[fx.Node]:
    """Behind the convolutions: nodes, and calls of regions, that ask for strides to be as they are.

    ``view`` ends in an error where the strides do not fit; ``as_strided`` gives other elements.
    """
    behind = with_users(convolutions)
    nodes = [n for n in graph_module.graph.nodes if n in behind]
    return [n for n in nodes if _calls(graph_module, n, _VIEWING)]


def _calls(graph_module: fx.GraphModule, node: fx.Node, names: Collection[str]) -> bool:
    """Whether a node, or one of a region that it calls, calls one of these."""
    if bodies := bodies_of(graph_module, node):
        return any(_calls(body, inner, names) for body in bodies for inner in body.graph.nodes)
    return name_of(node) in names


def _written_later(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether something behind a node writes into what it views."""
    seen = {storage_id(v) for n in node.all_input_nodes if (v := _value(n)) is not None}
    nodes = list(graph_module.graph.nodes)
    return any(
        storage_id(v) in seen
        for later in nodes[nodes.index(node) :]
        if _writes_any(graph_module, later)
        for n in later.all_input_nodes
        if (v := _value(n)) is not None
    )


def _writes_any(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node, or one of a region that it calls, writes into one of its inputs."""
    if bodies := bodies_of(graph_module, node):
        return any(_writes_any(body, inner) for body in bodies for inner in body.graph.nodes)
    bound = {**node.kwargs, **operands_of(node)}
    return is_inplace(node, bound) or "out" in node.kwargs or name_of(node) == "setitem"


def _restore(
    graph_module: fx.GraphModule, viewing: list[fx.Node], orders: Mapping[fx.Node, list[int]]
) -> None:
    """Has the views read the layout of the model, wherever theirs is another by now."""
    inputs = concrete_fakes(map(_value, graph_module.graph.find_nodes(op="placeholder")))
    wrong: Any = True
    while wrong:
        found = propagate(graph_module, inputs)  # up to the first view that does not run
        wrong = [
            (node, operand)
            for node in viewing
            if node.name not in found or _calls(graph_module, node, (AS_STRIDED,))
            for operand in node.all_input_nodes
            if operand in orders and isinstance(found.get(operand.name), Tensor)
            if memory_order(found[operand.name]) != orders[operand]
        ]
        for node, operand in wrong:
            _as_in_the_model(node, operand, orders[operand])
        graph_module.recompile()


def _layout(value: Tensor, dims: int) -> torch.memory_format | None:
    """What inductor makes of a tensor with so many dimensions behind its channels, if it does."""
    return None if dims == 3 and value.device.type != "cpu" else _FORMATS.get(dims)


def _laid_out(node: fx.Node, layout: torch.memory_format) -> fx.Node:
    """What reads a node reads it in a layout; the node that gives it."""
    with node.graph.inserting_after(node):
        after = node.graph.call_method("contiguous", (node,), {"memory_format": layout})
    after.meta = {k: v for k, v in node.meta.items() if k != EXAMPLE_VALUE}
    node.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    return after


def _drawn(graph_module: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The nodes that draw a number for each element of a tensor: this one, or those of a region."""
    if node.op not in ("call_function", "call_method"):
        return []
    if bodies := bodies_of(graph_module, node):
        return [n for body in bodies for inner in body.graph.nodes for n in _drawn(body, inner)]
    drawn = name_of(node).rstrip("_") in DRAWING_EACH and any(
        (value := _value(n)) is None or value.dim() > 2 for n in node.all_input_nodes
    )
    return [node] if drawn else []


def _writes(node: fx.Node) -> bool:
    at = 4 if name_of(node) == "rrelu" else 3
    inplace = node.args[at] if len(node.args) > at else node.kwargs.get("inplace")
    return name_of(node).endswith("_") or inplace is True


def _value(node: fx.Node) -> Tensor | None:
    """A node's result as Dynamo saw it, if it is a tensor."""
    value = node.meta.get(EXAMPLE_VALUE)
    return value if isinstance(value, Tensor) else None


def _as_in_the_model(node: fx.Node, operand: fx.Node, order: list[int]) -> None:
    """Has a node read an operand in the order of memory that the model gives it."""
    graph, back = node.graph, [order.index(d) for d in range(len(order))]
    with graph.inserting_before(node):
        made = graph.call_method("permute", (operand, order))
        made = graph.call_method("contiguous", (made,))
        made = graph.call_method("permute", (made, back))
    node.replace_input_with(operand, made)


def _convolutions(graph: fx.Graph) -> Iterator[tuple[fx.Node, int, Tensor]]:
    """Each convolution, the number of its dimensions, and its result as Dynamo saw it."""
    for node in graph.nodes:
        rule, value = rule_of(node), _value(node)
        if rule is not None and rule.name in _DIMS and value is not None:
            yield node, _DIMS[rule.name], value


def inductor_lays_out(graph_module: fx.GraphModule) -> bool:
    """Whether inductor will lay out the convolutions of a graph of Dynamo's.

    Its own decision function is asked, about a graph of the same convolutions and about as many
    nodes as it is going to see.
    """
    question, nodes = fx.Graph(), 0
    for part in graph_module.modules():  # the bodies of checkpoints run inside the graph
        if isinstance(part, fx.GraphModule):
            nodes += len(part.graph.nodes)
            for node, _, _ in _convolutions(part.graph):
                _ask(question, node)
    for _ in range(_NODES_FOR_ONE * nodes - len(question.nodes)):
        question.placeholder("other")
    return decides_layout(question, is_inference=not torch.is_grad_enabled())


def _ask(question: fx.Graph, node: fx.Node) -> None:
    """Adds a convolution as inductor sees it: an ATen call of ``input, weight, ..., groups``."""
    bound = operands_of(node)
    tensors = [bound.get(name) for name in ("input", "weight")]
    values = [n.meta.get(EXAMPLE_VALUE) if isinstance(n, fx.Node) else None for n in tensors]
    if not all(isinstance(v, Tensor) for v in values):
        return
    operands = []
    for value in values:
        operands.append(question.placeholder("operand"))
        operands[-1].meta[VALUE] = value
    question.call_function(torch.ops.aten.convolution.default, (*operands, bound["groups"]))
