"""Convolutions laid out as inductor lays them out, before anything is packed.

Inductor computes two-dimensional convolutions channels-last, whatever the model says: on CPUs
wherever oneDNN is there (those of three dimensions too), on GPUs where it expects it to be faster.
Tensors are packed in memory order, so a graph traced channels-first would have every one of them
transposed on its way into the packed form and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dropit_fx.ops.table import bind, rule_of
from dropit_fx.private import EXAMPLE_VALUE, VALUE, decides_layout, inductor_config

_FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
_DIMS: dict[str, int] = {f"conv{kind}{d}d": d for kind in ("", "_transpose") for d in (1, 2, 3)}

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
    for node, dims, value in list(_convolutions(graph)):
        layout = _FORMATS.get(dims)
        if layout is None or value.dim() != dims + 2:
            continue
        if dims == 3 and value.device.type != "cpu":
            continue
        with graph.inserting_after(node):
            after = graph.call_method("contiguous", (node,), {"memory_format": layout})
        after.meta = {k: v for k, v in node.meta.items() if k != EXAMPLE_VALUE}
        node.replace_all_uses_with(after, delete_user_cb=after.__ne__)
    graph.lint()
    graph_module.recompile()


def _convolutions(graph: fx.Graph) -> Iterator[tuple[fx.Node, int, Tensor]]:
    """Each convolution, the number of its dimensions, and its result as Dynamo saw it."""
    for node in graph.nodes:
        rule, value = rule_of(node), node.meta.get(EXAMPLE_VALUE)
        if rule is not None and rule.name in _DIMS and isinstance(value, Tensor):
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
    rule = rule_of(node)
    bound = (bind(rule, node.args, node.kwargs, node.target) if rule is not None else None) or {}
    tensors = [bound.get(name) for name in ("input", "weight")]
    values = [n.meta.get(EXAMPLE_VALUE) if isinstance(n, fx.Node) else None for n in tensors]
    if not all(isinstance(v, Tensor) for v in values):
        return
    operands = []
    for value in values:
        operands.append(question.placeholder("operand"))
        operands[-1].meta[VALUE] = value
    question.call_function(torch.ops.aten.convolution.default, (*operands, bound["groups"]))
