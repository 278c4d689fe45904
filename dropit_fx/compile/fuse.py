"""The pass behind the cut: packing and unpacking become plain tensor ops, for inductor to fuse.

While the joint graph is cut, a pack is one op, so that the partition is that of `partition`. Then
each op of a codec is replaced by the form of it that the codec offers in ops of PyTorch
(``Codec.fused``): inductor schedules these with their neighbours, so that what reads a packed
tensor reads its bytes, and nothing is dispatched from Python. Ops without such a form stay: of
what selects (gamma > 0), or draws random numbers.

What attention reads is written to memory once: inductor would make a copy for each call of it, of
forward and backward. What a call reads and packing too, and an op computes element by element, is
computed in both: inductor would write it for the call, and packing would read that again.

The gradient of a bias is a sum over all rows of what products read as well. Inductor sums some rows
at a time, in loops that no other loop has, and reads that tensor once more for it. Where a backward
unpacks, the rows of one sample are summed first: so a loop over the samples' elements can do both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dropit_fx.codecs import CODECS
from dropit_fx.kernels import Format
from dropit_fx.private import (
    VALUE,
    CustomGraphPass,
    FakeTensor,
    get_hash_for_files,
    hint,
    make_fx,
    pytree,
    select_decomp_table,
    unsafe_view,
)
from dropit_fx.private_inductor import wants_memory, written_as
from dropit_fx.runtime.packed_call import CACHE_VERSION
from dropit_fx.runtime.regions import overload_name

aten = torch.ops.aten

ATTENTION = "::_scaled_dot_product_"  # in the names of ATen's ops of it
RESHAPES = (aten.view.default, aten.reshape.default, unsafe_view.default)
COPIES = (aten.clone.default, aten.cat.default)  # of other values, by a loop as well
UNPACKS = ("dropit::unsparsify", "dropit::unsparsify_channels")
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
        rounded = any(map(_rounds, graph.nodes))
        for node in list(graph.nodes):
            form = FORMS.get(overload_name(node))
            if form is not None and isinstance(node.all_input_nodes[0].meta.get(VALUE), FakeTensor):
                _compute_again(graph, node)
                _replace(graph, node, form, known)
        if rounded:  # else each sum stays as dense has it, to the last bit
            for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
                _sum_where_made(graph, node)


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
    made = _copied(graph, node, traced, nodes)
    attention = [n for n in _readers(node) if ATTENTION in overload_name(n)]
    if isinstance(made, fx.Node) and len(attention) > 1:
        with graph.inserting_before(node):
            made = written_as(made)
    if isinstance(made, fx.Node):
        node.replace_all_uses_with(made)
    else:
        for item in list(node.users):
            item.replace_all_uses_with(made[item.args[1]])
            graph.erase_node(item)
    graph.erase_node(node)


def _copied(graph: fx.Graph, node: fx.Node, traced: fx.Graph, nodes: list[fx.Node]) -> Any:
    """What ``traced`` makes of ``nodes``, in front of ``node``."""
    inputs = dict(zip(traced.find_nodes(op="placeholder"), nodes, strict=True))
    before = set(graph.nodes)
    with graph.inserting_before(node):
        made: Any = graph.graph_copy(traced, inputs)
    for new in set(graph.nodes) - before:
        new.meta = {**node.meta, **new.meta}  # where it comes from
    return made


def _rounds(node: fx.Node) -> bool:
    """Whether a node reads values back that differ from those that were packed."""
    name = overload_name(node)
    if name in UNPACKS:
        form = Format(*node.args[-4:])  # type: ignore[arg-type]
        return not form.full or form.bits > 0
    return name == "dropit::decode_steps"


def _sum_where_made(graph: fx.Graph, node: fx.Node) -> None:
    """Sums over all rows in two steps, of which the first is over one sample's.

    In the dimensions of the tensor as a loop of inductor's writes it, for calls that read it too.
    """
    out, summed = node.meta[VALUE], node.all_input_nodes[0]
    dims: Any = node.args[1]
    shape = summed.meta[VALUE].shape
    while _is_view(summed, in_order=True):
        summed = summed.all_input_nodes[0]
    value = summed.meta[VALUE]
    by_loop = torch.Tag.pointwise in getattr(summed.target, "tags", ()) or summed.target in COPIES
    written = by_loop and any(map(wants_memory, _readers(summed)))
    if not (written and value.is_cuda and out.dtype == value.dtype and dims):
        return
    if sorted(d % len(shape) for d in dims) != [*range(len(dims))]:
        return
    columns = shape[len(dims) :]
    ends = [d for d in range(2, value.dim()) if _same_size(value.shape[d:], columns)]
    if not ends:
        return

    def sums(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.sum([*range(1, ends[0])], dtype=wide).sum(0).to(out.dtype).view(out.shape)

    with value.fake_mode, torch.no_grad():
        traced = make_fx(sums, select_decomp_table())(value).graph
    node.replace_all_uses_with(_copied(graph, node, traced, [summed]))
    graph.erase_node(node)


def _same_size(shape: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether both are known to have as many elements."""
    known = all(isinstance(n, int) for n in (*shape, *other))
    return known and math.prod(shape) == math.prod(other)


def _compute_again(graph: fx.Graph, node: fx.Node) -> None:
    """Lets ``node`` read a copy of the op that makes its input, if a call wants that in memory."""
    views = [node.all_input_nodes[0]]
    while _is_view(views[-1]):
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
        found |= _readers(user) if _is_view(user) else {user}
    return found


def _is_view(node: fx.Node, in_order: bool = False) -> bool:
    """Whether a node is its input in another shape; ``in_order``: with elements in their order."""
    if node.target in RESHAPES:
        return True
    return not in_order and getattr(node.target, "is_view", False)


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
