"""The pass behind the cut: of tied weights, the lookup's gradient is added to that of the head.

An embedding that is the head as well has two gradients, each as large as the weight: that of the
head, which the fused loss makes first, and that of the lookup, the last of the backward. Compiled
as autograd adds them, the second is made whole beside the first: where nothing else is left of
the step but gradients, that is its peak. Here the rows that were looked up are added to the first
instead, in its memory.

The sum is rounded in another order, so it is done in float32 and float64 alone, and with fused
losses alone, whose gradients are what dense ones are but for such roundings.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from dropit_fx.private import VALUE, CustomGraphPass, OpOverload, get_hash_for_files, pytree
from dropit_fx.runtime.regions import overload_name

aten = torch.ops.aten

# of the gradient of a lookup; the mask leaves out the rows of the padding
_PUTS = ("aten::index_put", "aten::_unsafe_index_put")
_MASKED_PUT = "aten::_unsafe_masked_index_put_accumulate"
_FUSED = "dropit::linear_rows_backward"
_EXACT = (torch.float32, torch.float64)


class AddLookups(CustomGraphPass):
    """Adds the gradients of lookups into those of heads that share their weight."""

    def uuid(self) -> Any:
        """Part of the compile caches' keys."""
        return get_hash_for_files((__file__,))

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites ``graph`` in place."""
        summed: set[fx.Node] = set()
        for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            are_nodes = all(isinstance(a, fx.Node) for a in node.args)
            if len(node.args) != 2 or node.kwargs or not are_nodes:
                continue
            for head, lookup in (node.args, node.args[::-1]):
                found = _rows_of(lookup)
                if found is not None and _is_free(head, summed) and _alike(head, lookup, node):
                    summed.add(_add(graph, node, head, *found))
                    break


def _is_free(node: fx.Node, summed: set[fx.Node]) -> bool:
    """Whether it is the gradient of a fused head, and nothing else reads it."""
    item = node.target is operator.getitem and overload_name(node.args[0]) == _FUSED
    return len(node.users) == 1 and (item or node in summed)


def _alike(*nodes: fx.Node) -> bool:
    values: list[Any] = [n.meta.get(VALUE) for n in nodes]
    if not all(isinstance(v, Tensor) and v.dtype in _EXACT for v in values):
        return False
    return len({(v.dtype, v.device, tuple(v.shape)) for v in values}) == 1


def _rows_of(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Index, values and mask of rows that are added up on zeros for this reader alone; or None."""
    name = overload_name(node)
    if len(node.users) != 1 or name not in (*_PUTS, _MASKED_PUT):
        return None
    given: list[Any] = [*node.args]
    zeros = given.pop(0)
    if overload_name(zeros) != "aten::full" or zeros.args[1] != 0:
        return None
    mask = given.pop(0) if name == _MASKED_PUT else None
    indices, values, *accumulate = given
    if not (name == _MASKED_PUT or any(accumulate) or node.kwargs.get("accumulate")):
        return None
    if len(indices) != 1:
        return None
    return indices[0], values, mask


def _add(
    graph: fx.Graph,
    add: fx.Node,
    head: fx.Node,
    index: fx.Node,
    values: fx.Node,
    mask: fx.Node | None,
) -> fx.Node:
    """Replaces ``add`` by ``head`` with rows added; inductor does that in place."""
    with graph.inserting_before(add):
        if mask is not None:  # (*index.shape, 1); what it leaves out adds nothing to the first row
            zero = _call(graph, add, aten.full.default, [], 0, dtype=values.meta[VALUE].dtype)
            values = _call(graph, add, aten.where.self, mask, values, zero)
            rows = _call(graph, add, aten.squeeze.dim, mask, -1)
            first = _call(graph, add, aten.full.default, [], 0, dtype=index.meta[VALUE].dtype)
            index = _call(graph, add, aten.where.self, rows, index, first)
        put = _call(graph, add, aten.index_put.default, head, [index], values, True)
    add.replace_all_uses_with(put)
    lookup = next(a for a in add.args if a is not head)
    graph.erase_node(add)
    if isinstance(lookup, fx.Node) and not lookup.users:
        graph.erase_node(lookup)
    return put


def _call(graph: fx.Graph, near: fx.Node, target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
    """A node, with its value and where it comes from."""
    fake = near.meta[VALUE]
    if target is aten.full.default:
        kwargs |= {"device": fake.device, "layout": torch.strided, "pin_memory": False}
    node = graph.call_function(target, args, kwargs)
    flat = pytree.tree_map_only(fx.Node, lambda n: n.meta[VALUE], args)
    with fake.fake_mode, torch.no_grad():
        node.meta = {**near.meta, VALUE: target(*flat, **kwargs)}
    return node
