"""Before all: what no rule trains is detached, so that autograd keeps nothing for it.

A rule with ``train: false`` or ``train: bias`` speaks of the parameters that the nodes which it
matches read: a weight or a bias by its place in the call, and any other operand that is a parameter
of a module which the rule matches too, or a view or a cast of one. Such a node reads the parameter
detached; ``requires_grad`` stays as the user has it, the ``.grad`` stays None, which optimisers
skip, and another node's read of the same parameter gives its gradient as before.

What the graph kept before is noted, so that reports compare with the model untouched.

Requires: a graph and fake inputs. Ensures: no node reads undetached what a rule does not train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

from torch import fx, nn

from dropit_fx.capture.provenance import node_module
from dropit_fx.config import ConfigError
from dropit_fx.ops.table import CHECKPOINT, RULES, is_inplace, operands_of, rule_of
from dropit_fx.passes.find_saved import find_saved
from dropit_fx.passes.plan import ParameterRead, Plan
from dropit_fx.private import EXAMPLE_VALUE, parameter_of_input
from dropit_fx.runtime.regions import name_of
from dropit_fx.words import matches

_NAME = "dropit_parameter"  # in the metadata of a region's inputs
_PLACES = {"weight": "weight", "bias": "bias"}  # of a call, that are parameters of its own
_BIASES = {"addmm": "input", "baddbmm": "input"}


def detach_parameters(plan: Plan) -> Plan:
    """Rewrites ``plan.module`` in place; fills ``plan.parameters``, ``untrained``, ``unfused``.

    Raises:
        ConfigError: A rule does not train a module that is one node of the graph.
        FakeRunError: A node cannot run on fake tensors of the example's shapes.
    """
    if not plan.config.training:
        return plan
    graphs = list(_graphs(plan.module))
    found = [(graph, list(_reads(graph, plan))) for graph in graphs]
    plan = replace(plan, parameters=tuple(r.read for _, reads in found for r in reads))
    if all(read.trained for read in plan.parameters):
        return plan
    dense = find_saved(plan).sites
    for graph, reads in found:
        _detach(graph, reads)
    left = {site.name for site in find_saved(plan).sites if site.dense}
    untrained = frozenset(site.name for site in dense if site.dense and site.name not in left)
    return replace(plan, unfused=plan.unfused or dense, untrained=untrained)


def undetached(plan: Plan) -> Iterator[ParameterRead]:
    """Reads of parameters, of this graph alone, that no rule trains and that are not detached.

    Of calls of rows, packed or not.
    """
    rows = {name_of(n) for n in plan.module.graph.nodes if rule_of(n) is not None}
    rows |= {f"packed_{name}" for name in RULES}
    for found in _reads(plan.module, plan) if plan.config.training else ():
        if not found.read.trained and name_of(found.node) in rows:
            yield found.read


class _Read(NamedTuple):
    """A read, the node that reads, and its argument."""

    read: ParameterRead
    node: fx.Node
    argument: fx.Node


def _graphs(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """A graph and those of its checkpointed regions, which are told the names of parameters."""
    yield module
    calls: dict[str, list[fx.Node]] = {}
    for n in module.graph.nodes:
        if rule_of(n) is CHECKPOINT:
            calls.setdefault(str(n.args[0].target), []).append(n)
    for name, nodes in calls.items():
        body: Any = module.get_submodule(name)
        for at, placeholder in enumerate(body.graph.find_nodes(op="placeholder"), 1):
            names = {_name(n.args[at], module) for n in nodes if at < len(n.args)}
            placeholder.meta[_NAME] = names.pop() if len(names) == 1 else ""
        yield from _graphs(body)


def _name(n: Any, module: fx.GraphModule) -> str:
    """Qualified name of the parameter or the module that a node is, or ``""``."""
    if not isinstance(n, fx.Node):
        return ""
    if _NAME in n.meta:
        return str(n.meta[_NAME])
    if n.op == "get_attr":
        value = attrgetter(str(n.target))(module)
        return str(n.target) if isinstance(value, nn.Parameter | nn.Module) else ""
    if n.op != "placeholder":
        return ""
    is_parameter = isinstance(n.meta.get(EXAMPLE_VALUE), nn.Parameter)
    return parameter_of_input(str(n.target)) or (n.name if is_parameter else "")


def _parameter(n: fx.Node, module: fx.GraphModule) -> str:
    """The parameter that a value is, or a view or a cast of; ``""`` where none or detached."""
    while not (name := _name(n, module)):
        if n.op not in ("call_function", "call_method") or len(n.all_input_nodes) != 1:
            return ""
        if _detaches(n) or rule_of(n) is CHECKPOINT:
            return ""
        n = n.all_input_nodes[0]
    return name


def _detaches(n: fx.Node) -> bool:
    return name_of(n) == "detach"


def _reads(module: fx.GraphModule, plan: Plan) -> Iterator[_Read]:
    """Every read of a parameter in one graph, and what the rules say of it."""
    for n in module.graph.nodes:
        row = rule_of(n)
        if n.op in ("placeholder", "get_attr", "output") or row is CHECKPOINT or _detaches(n):
            continue
        bound = operands_of(n)
        op = row.name if row is not None else name_of(n)
        where = node_module(n)
        yield from _inside(module, n, where, op, plan)
        for argument in n.all_input_nodes:
            name = _parameter(argument, module)
            if not name:
                continue
            place = _place(op, bound, argument)
            if not place and is_inplace(n, bound) and argument is n.args[0]:
                continue  # what it writes into
            owner, _, leaf = name.rpartition(".")
            speaking = [
                rule
                for rule in plan.config.training
                if rule.matches(where, op) and (place or matches(owner, rule.module))
            ]
            train = speaking[0].train if speaking else True
            if train == "bias":
                train = place == "bias" or leaf.endswith("bias")
            numbers = tuple(rule.number for rule in speaking)
            read = ParameterRead(
                parameter=name,
                node=n.name,
                module=where,
                op=op,
                rules=numbers,
                trained=bool(train),
            )
            yield _Read(read, n, argument)


def _place(op: str, bound: Mapping[str, Any], argument: fx.Node) -> str:
    """``weight`` or ``bias``, where an argument is that of a call; else ``""``."""
    for operand, value in bound.items():
        if value is argument and (operand in _PLACES or _BIASES.get(op) == operand):
            return _PLACES.get(operand, "bias")
    return ""


def _inside(module: fx.GraphModule, n: fx.Node, where: str, op: str, plan: Plan) -> Iterator[_Read]:
    """Reads inside of a module that stays whole, where no graph shows them.

    Raises:
        ConfigError: A rule does not train it.
    """
    inside = [(str(n.target), module.get_submodule(str(n.target)))] if n.op == "call_module" else []
    for m in n.all_input_nodes:
        value = attrgetter(str(m.target))(module) if m.op == "get_attr" else None
        inside += [(str(m.target), value)] if isinstance(value, nn.Module) else []
    for name, leaf in inside:
        speaking = [r for r in plan.config.training if r.matches(where or name, op)]
        for parameter, _ in leaf.named_parameters(prefix=name):
            if speaking and speaking[0].train is not True:
                raise ConfigError(
                    f"rule {speaking[0].number} {speaking[0]}: module '{name}'"
                    f" ({type(leaf).__name__}) is one node of the graph, in which no parameter can"
                    " be detached. Call requires_grad_(False) on it, and leave it out of the rule:"
                    f" put {{module: {name}, train: true}} before."
                )
            read = ParameterRead(
                parameter=parameter,
                node=n.name,
                module=where or name,
                op=op,
                rules=tuple(r.number for r in speaking),
            )
            yield _Read(read, n, n)


def _detach(module: fx.GraphModule, reads: list[_Read]) -> None:
    """Detaches what is not trained, once for all that read it."""
    made: dict[fx.Node, fx.Node] = {}
    for read, node, argument in reads:
        if read.trained:
            continue
        if argument not in made:
            with module.graph.inserting_before(node):
                made[argument] = module.graph.call_method("detach", (argument,))
            made[argument].meta = {k: v for k, v in node.meta.items() if k != EXAMPLE_VALUE}
        node.replace_input_with(argument, made[argument])
    module.graph.lint()
    module.recompile()
