"""Pass 0, too: weights that are computed are made again in the backward, not kept.

Weight norm, spectral norm, standardised and modulated convolutions compute the weight that a layer
multiplies by: of parameters, and of what is small beside it (a style). A layer keeps it, and the
ops that compute it keep as much again. So these ops become one call, ``computed``, which keeps what
it reads alone; ``derive_values`` then makes the weight again for the layer. The same ops run on the
very same tensors, so that nothing loses a bit, under whatever rules. That costs one or two passes
over each weight, and its products, if there are some, again.

A weight stays as it is where its ops write, draw random numbers or run graphs of their own, where
something else reads what is between, where a parameter is written to before the backward, and where
its gradient would be summed in another order.

Requires: a graph and fake inputs. Ensures: nothing is kept inside of what became a call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import fx

from dropit_fx.capture.regions import REGION, body_of
from dropit_fx.ops.rule import Use
from dropit_fx.ops.table import DRAWING, derivable_rule_of, is_inplace, operands_of, rule_of
from dropit_fx.passes.explain_saved import differentiated
from dropit_fx.passes.find_saved import find_saved
from dropit_fx.passes.plan import Elements, Keeper, Plan, Values
from dropit_fx.passes.storages import is_state
from dropit_fx.runtime.regions import bodies_of, computed, name_of

SMALL = 8  # a weight is at least as many times as large as what it is made of beside parameters
READERS = 2  # that make it again, each by itself
THOUSANDTH = 1000  # of all that is kept: nothing below is worth a call
_PASSES = (  # over memory, beside those of rows: by name
    *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "expand_as"),
    *("repeat", "transpose", "t", "permute", "getitem", "contiguous", "clone", "neg", "abs"),
    *("sum", "mean", "var", "std", "var_mean", "rsqrt", "sqrt", "reciprocal", "rsub", "norm"),
    *("vector_norm", "linalg_vector_norm", "stack", "cat", "sigmoid", "tanh", "exp"),
    *("mv", "dot", "vdot"),  # with vectors, as spectral norm has them
)
_COSTLY = ("matrix_exp", "linalg_")  # of parameters alone or not: not to be run again


def repeat_weights(plan: Plan) -> Plan:
    """Rewrites ``plan.module`` in place; fills ``plan.repeated`` and ``plan.unfused``.

    Raises:
        FakeRunError: A node cannot run on fake tensors of the example's shapes.
    """
    graph = plan.module.graph
    made = _Made(plan.module)
    weights = list(dict.fromkeys(made.weights()))
    if not plan.config.derive or not weights:
        return plan
    found = find_saved(plan)
    total = sum(site.nbytes for site in found.sites)
    gone: set[str] = set()
    for number, weight in enumerate(weights):
        part = made.part(weight, found.values)
        if part is None or not _pays(weight, part, found.values, total):
            continue
        names = {n.name for n in part}
        mine = [s.name for s in found.sites if any(r.source == weight.name for r in s.reads)]
        gone |= {s.name for s in found.sites if any(r.node in names for r in s.reads)} - {*mine}
        name = next((n for n in mine if n in names), weight.name)  # as reports have it
        _call(plan.module, f"computed_weight_{number}", weight, part).name = name
    graph.lint()
    plan.module.recompile()
    unfused = plan.unfused or found.sites
    return replace(plan, unfused=unfused, repeated=plan.repeated | gone)


class _Made:
    """What the values of a graph are made of, so far as the graph itself says it."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        graph = self.graph
        self._exact = differentiated(graph)
        self._fixed: set[fx.Node] = set()
        for n in graph.nodes:
            state = n.op == "get_attr" or (n.op == "placeholder" and is_state(n))
            inputs = n.all_input_nodes
            if state or (self._computes(n) and inputs and self._fixed.issuperset(inputs)):
                self._fixed.add(n)

    def weights(self) -> Iterator[fx.Node]:
        """What is computed, and is the weight of a layer or made of parameters alone."""
        for n in self.graph.nodes:
            rule = rule_of(n)
            reads = [r for r in rule.reads if r.use is Use.CONTRACT] if rule is not None else []
            operands = operands_of(n) if reads and n not in self._exact else {}
            for read in reads:
                value = operands.get(read.operand)
                if not isinstance(value, fx.Node) or not self._computes(value):
                    continue
                if value in self._fixed or read.lossy is False:
                    yield value

    def part(self, weight: fx.Node, values: Values) -> dict[fx.Node, None] | None:
        """The ops that compute a weight, in their order; None where it has to stay as it is."""
        if weight.name in values.alive or weight.name not in values.shapes:
            return None
        stop: set[fx.Node] = set()
        while True:
            part = self._behind(weight, stop)
            shared = {n for n in part if n is not weight and not part.keys() >= n.users.keys()}
            shared |= {n for n, m in _edges(part) if _is_written(n, m, values)}
            if weight in shared:
                return None
            if not shared:
                break
            stop |= shared  # what others read too, or what the next forward would change
        readers = [(u, weight) for u in weight.users]
        seen = [values.seen.get((n.name, m.name)) for n, m in [*readers, *_edges(part)]]
        stays = all(elements is None or values.stays(elements) for elements in seen)
        known = all(m.name in values.shapes or m.name in values.alive for m in _inputs(part))
        few = len(readers) <= READERS
        return part if stays and known and few and _sums_alike(part, values, self.graph) else None

    def _behind(self, weight: fx.Node, stop: Collection[fx.Node]) -> dict[fx.Node, None]:
        found, todo = set[fx.Node](), [weight]
        while todo:
            n = todo.pop()
            if n is weight or (n not in stop and self._computes(n) and self._is_cheap(n)):
                found.add(n)
                todo += [m for m in n.all_input_nodes if m not in found]
        return dict.fromkeys(n for n in self.graph.nodes if n in found)

    def _computes(self, n: fx.Node) -> bool:
        """Whether a node computes tensors, and does nothing else: the same in each run."""
        if n.op not in ("call_function", "call_method") or n in self._exact or REGION in n.meta:
            return False
        name = name_of(n)
        draws = name.rstrip("_") in DRAWING or name.startswith("rand")
        runs_graph = bool(bodies_of(self.module, n))
        if name == "getitem" and n.all_input_nodes[0].op.startswith("call"):  # one of several
            runs_graph = not self._computes(n.all_input_nodes[0])
        costly = name.startswith(_COSTLY) and name not in _PASSES
        writes = is_inplace(n, {}) or n.kwargs.get("out") or n.kwargs.get("inplace")
        return not (draws or runs_graph or costly or writes)

    def _is_cheap(self, n: fx.Node) -> bool:
        return n in self._fixed or derivable_rule_of(n) is not None or name_of(n) in _PASSES


def _edges(part: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    return ((n, m) for n in part for m in n.all_input_nodes)


def _is_written(reader: fx.Node, value: fx.Node, values: Values) -> bool:
    """Whether each forward writes into what outlives it (spectral norm's vectors), or may."""
    elements, keeper = values.seen.get((reader.name, value.name)), values.alive.get(value.name)
    if elements is None or keeper is None:
        return False
    handed_on = keeper is Keeper.BUFFER and value.op.startswith("call")  # in one mode, written
    return handed_on or elements.version > 0


def _inputs(part: Collection[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(m for _, m in _edges(part) if m not in part))


def _sums_alike(part: Collection[fx.Node], values: Values, graph: fx.Graph) -> bool:
    """Whether the gradient of each parameter is a sum in the same order.

    One that the call alone reads, through one of its inputs, is summed inside of it as ever; and
    two summands have no order.
    """
    storages = [
        {e.storage for n in part if (e := values.seen.get((n.name, m.name))) is not None}
        for m in _inputs(part)
        if m.name in values.alive and (next(iter(m.users)).name, m.name) in values.differentiable
    ]
    once = Counter(storage for found in storages for storage in found)
    for storage, inputs in once.items():
        readers = [
            n
            for n in graph.nodes
            for m in n.all_input_nodes
            if (n.name, m.name) in values.differentiable
            and values.seen[n.name, m.name].storage == storage
            and (n in part or (n.name not in values.alive and _has_gradient(n, values)))
        ]
        outside = [n for n in readers if n not in part]
        if (outside or inputs > 1) and len(readers) > 2:
            return False
    return True


def _has_gradient(n: fx.Node, values: Values) -> bool:
    """Whether what reads the result of a node, or a part of it, reads it with a gradient."""
    if n.name in values.shapes:
        return any((user.name, n.name) in values.differentiable for user in n.users)
    return any(_has_gradient(user, values) for user in n.users)


def _pays(weight: fx.Node, part: Collection[fx.Node], values: Values, total: int) -> bool:
    """Whether a weight is large beside what its call keeps, and not small beside all."""
    reader = next(iter(weight.users))
    own = _nbytes(values.seen[reader.name, weight.name])
    kept = {
        e.storage: _nbytes(e)
        for n, m in _edges(part)
        if m not in part and m.name not in values.alive
        for e in [values.seen[n.name, m.name]]
    }
    return own * THOUSANDTH >= total and own >= SMALL * sum(kept.values())


def _nbytes(elements: Elements) -> int:
    return elements.numel * elements.dtype.itemsize


def _call(module: fx.GraphModule, name: str, weight: fx.Node, part: dict[fx.Node, None]) -> fx.Node:
    """Puts one call in the place of the ops that compute a weight."""
    graph = module.graph
    inputs, body = body_of(graph, part, [weight])
    out: Any = body.graph.output_node()
    out.args = out.args[0]  # itself, not a tuple
    body.recompile()
    module.add_submodule(name, body)
    with graph.inserting_before(weight):
        call = graph.call_function(computed, (graph.get_attr(name), *inputs))
    call.meta = dict(weight.meta)
    weight.replace_all_uses_with(call)
    for node in reversed(part):
        graph.erase_node(node)
    return call
