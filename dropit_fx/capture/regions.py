"""Checkpointed regions of a model that is traced: seen by the tracer, then graphs of their own.

``torch.utils.checkpoint`` decides what autograd keeps, and computes nothing: a tracer sees through
it, and what the model made again the graph would keep. So the ops of a region are marked while it
is traced, and :func:`outline` makes of them one call of a nested graph, as Dynamo does.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import fx, nn
from torch.fx.node import map_arg
from torch.fx.traceback import annotate

from dropit_fx.capture.graph_module import RewrittenModule
from dropit_fx.private import CUSTOM, MODULES, TRACE, tag_activation_checkpoint
from dropit_fx.private_hooks import checkpoints_run_by
from dropit_fx.runtime.regions import EACH_TIME, run_regions

REGION = "dropit_region"  # in the metadata of a node: the regions that it is in, outermost first


class Mark(NamedTuple):
    """One call of ``checkpoint``."""

    number: int  # in the order of the trace
    options: tuple[tuple[str, Any], ...]  # that are not its defaults


_open: list[Mark] = []  # of the trace at hand


@contextmanager
def marking() -> Iterator[None]:
    """Has the regions of one trace marked, in the metadata of their nodes.

    ``torch.fx`` asks :func:`mark`, ``torch.export`` hands on what is annotated.
    """
    numbers = itertools.count()
    _open.clear()

    def around(options: dict[str, Any], usual: object) -> Iterator[None]:
        if "context_fn" in options:
            raise fx.proxy.TraceError("a selective checkpoint (context_fn=...) decides op by op")
        _open.append(Mark(next(numbers), tuple(options.items())))
        try:
            with annotate({REGION: tuple(_open)}):
                yield
        finally:
            _open.pop()

    with checkpoints_run_by(around):
        yield


def mark(node: fx.Node) -> fx.Node:
    """Marks a node that is made now, while its region is traced."""
    if _open:
        node.meta[REGION] = tuple(_open)
    return node


def from_annotations(graph_module: fx.GraphModule) -> None:
    """Marks what was annotated, which is how marks come through ``torch.export``."""
    for node, found in _annotated(graph_module):
        node.meta.pop(CUSTOM, None)
        if found:
            node.meta[REGION] = found


def _annotated(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, tuple[Mark, ...]]]:
    """The regions that each node is in.

    Export makes a nested graph of a block under autocast or ``no_grad``, and annotates what is in
    it, not its call: that is in the regions that all of the block is in.
    """
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    for node in graph_module.graph.nodes:
        blocks = [modules.get(str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
        marks = [
            found
            for block in blocks
            if isinstance(block, fx.GraphModule)
            for inner, found in _annotated(block)
            if not _is_lookup(inner)
        ]
        yield node, node.meta.get(CUSTOM, {}).get(REGION) or tuple(_in_common(marks))


def _in_common(paths: Iterable[Sequence[Any]]) -> list[Any]:
    """Of several ways from the outermost to the innermost, what all have at the same place."""
    levels = zip(*paths, strict=False)
    return [level[0] for level in levels if all(other == level[0] for other in level)]


def checkpointing(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same, or where there are regions, a copy that checkpoints them."""
    if not any(REGION in n.meta for n in graph_module.graph.nodes):
        return graph_module
    made = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    outline(made)
    run_regions(made)
    return made


def outline(graph_module: fx.GraphModule, depth: int = 0) -> None:
    """Makes each marked region a nested graph, called by a node as Dynamo writes it.

    Parameters, buffers and leaf modules are inputs of the region: it has no state of its own.
    """
    spans = _spans(graph_module.graph, depth)
    for i, (region, span) in enumerate(spans):
        outputs = [n for n in span if any(u not in span for u in n.users)]
        if outputs:  # else nothing of it is read
            _nest(graph_module, f"checkpointed_region_{i}", region, span, outputs)
            nested: Any = graph_module.get_submodule(f"checkpointed_region_{i}")
            outline(nested, depth + 1)
    if spans:
        graph_module.graph.lint()
        graph_module.recompile()


def _nest(
    graph_module: fx.GraphModule,
    name: str,
    region: Mark,
    span: dict[fx.Node, None],
    outputs: list[fx.Node],
) -> None:
    """Puts a call in the place of the nodes of one region."""
    graph = graph_module.graph
    inputs, body = body_of(graph, span, outputs)
    graph_module.add_submodule(name, body)
    body.meta[EACH_TIME] = True
    with graph.inserting_before(next(iter(span))):
        args = (graph.get_attr(name), *inputs)
        call = graph.call_function(tag_activation_checkpoint, args, dict(region.options))
        call.meta = _meta(list(span))
        for i, output in enumerate(outputs):
            item = graph.call_function(operator.getitem, (call, i))
            item.meta = {k: v for k, v in output.meta.items() if k != REGION}
            output.replace_all_uses_with(item, delete_user_cb=lambda user: user not in span)
    for node in reversed(span):
        graph.erase_node(node)


def call_leaf(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a leaf module inside of a region, which is given the module."""
    return module(*args, **kwargs)


def _spans(graph: fx.Graph, depth: int) -> list[tuple[Mark, dict[fx.Node, None]]]:
    """The nodes of each region; what reads nothing of the graph is put before it."""
    nodes = list(graph.nodes)
    ends: dict[Mark, list[int]] = {}
    for i, node in enumerate(nodes):
        marks = node.meta.get(REGION, ())
        if len(marks) > depth and not _is_lookup(node):
            ends.setdefault(marks[depth], [i, i])[1] = i
    found = []
    for region, (first, last) in ends.items():
        span = nodes[first : last + 1]
        for node in filter(_is_lookup, span):
            nodes[first].prepend(node)
        found.append((region, {n: None for n in span if not _is_lookup(n)}))
    return found


def _is_lookup(node: fx.Node) -> bool:
    """Whether a node reads an attribute, or the mode of a module."""
    module = node.op == "call_module" and not node.all_input_nodes
    return module or node.op in ("get_attr", "placeholder", "output")


def body_of(
    graph: fx.Graph, span: dict[fx.Node, None], outputs: list[fx.Node]
) -> tuple[list[fx.Node], fx.GraphModule]:
    """The inputs of some nodes, in the order in which they are read, and their graph."""
    made = fx.Graph()
    leaves = [n for n in span if n.op == "call_module"]
    with graph.inserting_before(next(iter(span))):
        modules = {n: graph.get_attr(str(n.target)) for n in leaves}
    outside = dict.fromkeys(m for n in span for m in n.all_input_nodes if m not in span)
    inputs = [*outside, *modules.values()]
    copied = {n: made.placeholder(n.name) for n in inputs}
    for node in span:
        if node in modules:
            args, kwargs = map_arg((node.args, node.kwargs), copied.__getitem__)
            copied[node] = made.call_function(call_leaf, (copied[modules[node]], *args), kwargs)
            copied[node].meta = dict(node.meta)
        else:
            copied[node] = made.node_copy(node, copied.__getitem__)
    made.output(tuple(copied[n] for n in outputs))
    return inputs, RewrittenModule(nn.Module(), made, "CheckpointedRegion")


def _meta(span: list[fx.Node]) -> dict[str, Any]:
    """Where a region comes from: the innermost module that it is all in, and its first line."""
    stacks = [list(n.meta.get(MODULES, {}).items()) for n in span]
    found: dict[str, Any] = {MODULES: dict(_in_common(stacks))}
    trace = next((n.meta[TRACE] for n in span if TRACE in n.meta), None)
    return found if trace is None else found | {TRACE: trace}
