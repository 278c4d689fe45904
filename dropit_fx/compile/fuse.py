"""The pass behind the cut: packing and unpacking become plain tensor ops, for inductor to fuse.

While the joint graph is cut, a pack is one op, so that the partition is that of `partition`. Then
each op of a codec is replaced by the form of it that the codec offers in ops of PyTorch
(``Codec.fused``): inductor schedules these with their neighbours, so that what reads a packed
tensor reads its bytes, and nothing is dispatched from Python. Ops without such a form stay: of
what selects (gamma > 0), or draws random numbers.

What attention reads is written to memory once: inductor would make a copy for each call of it, of
forward and backward. What a call reads and packing too, and an op computes element by element, is
computed in both: inductor would write it for the call, and packing would read that again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dropit_fx.codecs import CODECS
from dropit_fx.private import (
    VALUE,
    CustomGraphPass,
    FakeTensor,
    get_hash_for_files,
    hint,
    make_fx,
    pytree,
    select_decomp_table,
)
from dropit_fx.private_inductor import wants_memory, written_as
from dropit_fx.runtime.packed_call import CACHE_VERSION
from dropit_fx.runtime.regions import overload_name

ATTENTION = "::_scaled_dot_product_"  # in the names of ATen's ops of it
FORMS: dict[str, Callable[..., Any]] = {
    f"dropit::{name}": form for codec in CODECS for name, form in codec.fused.items()
}


class FusePacking(CustomGraphPass):
    """Replaces the codecs' ops by plain tensor ops.

    For a rewritten model, beside the guard: ``torch.compile(rewritten, options={
    "custom_partitioner_fn": KeepPacked(), "post_grad_custom_pre_pass": FusePacking()})``.
    """

    def uuid(self) -> Any:
        """Part of the compile caches' keys."""
        return get_hash_for_files((__file__,)), CACHE_VERSION

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites ``graph`` in place."""
        known: dict[Any, fx.Graph | None] = {}
        for node in list(graph.nodes):
            form = FORMS.get(overload_name(node))
            if form is not None and isinstance(node.all_input_nodes[0].meta.get(VALUE), FakeTensor):
                _compute_again(graph, node)
                _replace(graph, node, form, known)


def _replace(
    graph: fx.Graph, node: fx.Node, form: Callable[..., Any], known: dict[Any, fx.Graph | None]
) -> None:
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    if any(_depends_on_data(n.meta[VALUE]) for n in nodes):
        return
    key = (form, spec, *map(_key, leaves))
    if key not in known:
        known[key] = _traced(form, leaves, spec, [n.meta[VALUE] for n in nodes])
    traced = known[key]
    if traced is None:
        return
    inputs = dict(zip(traced.find_nodes(op="placeholder"), nodes, strict=True))
    before = set(graph.nodes)
    with graph.inserting_before(node):
        made: Any = graph.graph_copy(traced, inputs)
        attention = [n for n in _readers(node) if ATTENTION in overload_name(n)]
        if isinstance(made, fx.Node) and len(attention) > 1:
            made = written_as(made)
    for new in set(graph.nodes) - before:
        new.meta = {**node.meta, **new.meta}  # where it comes from
    if isinstance(made, fx.Node):
        node.replace_all_uses_with(made)
    else:
        for item in list(node.users):
            item.replace_all_uses_with(made[item.args[1]])
            graph.erase_node(item)
    graph.erase_node(node)


def _compute_again(graph: fx.Graph, node: fx.Node) -> None:
    """Lets ``node`` read a copy of the op that makes its input, if a call wants that in memory."""
    views = [node.all_input_nodes[0]]
    while getattr(views[-1].target, "is_view", False):
        views.append(views[-1].all_input_nodes[0])
    made = views[-1]
    if torch.Tag.pointwise not in getattr(made.target, "tags", ()):
        return
    if not any(map(wants_memory, _readers(made))):
        return
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        for one in reversed(views):
            copies[one] = graph.node_copy(one, lambda n: copies.get(n, n))
    node.replace_input_with(views[0], copies[views[0]])
    for view in views[:-1]:
        if not view.users:
            graph.erase_node(view)


def _readers(value: fx.Node) -> set[fx.Node]:
    """What reads a value or a view of it."""
    found: set[fx.Node] = set()
    for user in value.users:
        found |= _readers(user) if getattr(user.target, "is_view", False) else {user}
    return found


def _depends_on_data(value: Any) -> bool:
    """Whether a size, or that of a tensor, is known when it runs and not before."""
    sizes = value.shape if isinstance(value, Tensor) else (value,)
    return any(not isinstance(hint(size), int) for size in sizes)


def _key(leaf: Any) -> Any:
    """What a trace depends on: of a tensor of known sizes the same for all of its like."""
    if not isinstance(leaf, fx.Node):
        return repr(leaf)
    value = leaf.meta[VALUE]
    if not isinstance(value, Tensor):
        return leaf
    sizes = (*value.shape, *value.stride())
    return (value.dtype, value.device, sizes) if all(type(s) is int for s in sizes) else leaf


def _traced(
    form: Callable[..., Any], leaves: list[Any], spec: Any, values: list[Any]
) -> fx.Graph | None:
    """The graph of a form, whose placeholders are the nodes among ``leaves``."""
    made = True

    def run(*inputs: Any) -> Any:
        nonlocal made
        rest = iter(inputs)
        full = [next(rest) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(full, spec)
        out = form(*args, **kwargs)
        made = out is not None
        return out

    mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    with mode, torch.no_grad():
        traced = make_fx(run, select_decomp_table())(*values)
    return traced.graph if made else None
