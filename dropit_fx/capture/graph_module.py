"""What ``transform`` returns: an ordinary GraphModule whose copies and pickles lose nothing."""

from __future__ import annotations

import builtins
import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.fx.node import map_aggregate, map_arg

from dropit_fx.capture.input_guards import flattened
from dropit_fx.capture.saving import STANDS_FOR, SavesAs
from dropit_fx.capture.symbolic import CustomFunction
from dropit_fx.private import (
    FLATTENING,
    MODULE_STATE,
    OpOverload,
    PyTreeCodeGen,
    codegen,
    get_qualified_name,
    pytree,
    wrap_with_set_grad_enabled,
)
from dropit_fx.private_lookup import look_up


class _Ref(int):
    """Stands for the node with this index in a pickled graph."""


class RewrittenModule(SavesAs, fx.GraphModule):
    """A rewritten model.

    fx pickles a graph as source code and traces it again, which cannot be done to aten calls with
    symbolic sizes, and which drops parameters that no node reads. Here the nodes themselves are
    pickled.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("__"):
                raise
            raise AttributeError(
                f"{error}: a rewritten model has the forward, parameters and buffers of the"
                " original, not its other methods and attributes, nor the types of its submodules;"
                " ask the original, whose parameters are the same tensors"
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        nodes = list(self.graph.nodes)
        index = {n: _Ref(i) for i, n in enumerate(nodes)}
        specs = [
            (n.op, n.name, _spell(n), *map_arg((n.args, n.kwargs), index.__getitem__))
            for n in nodes
        ]
        writer = codegen(self.graph)
        kept = (*MODULE_STATE, STANDS_FOR)
        state = {name: self.__dict__[name] for name in kept if name in self.__dict__}
        info = getattr(writer, "pytree_info", None)
        return _restore, (type(self).__name__, state, specs, type(writer), info, self.meta)

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        restore, args = self.__reduce__()
        made: RewrittenModule = restore(*copy.deepcopy(args, memo))
        memo[id(self)] = made
        return made


def adopt(graph_module: fx.GraphModule, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Gives a graph module parameters and buffers, under names of modules that it may not have."""
    for name, tensor in tensors:
        path, _, leaf = name.rpartition(".")
        if path not in dict(graph_module.named_modules(remove_duplicate=False)):
            graph_module.add_submodule(path, nn.Module())
        owner: Any = graph_module.get_submodule(path)
        is_parameter = isinstance(tensor, nn.Parameter)
        (owner.register_parameter if is_parameter else owner.register_buffer)(leaf, tensor)


class Returned(CodeGen):
    """Writes a graph whose results come in containers that fx does not know.

    fx traces lists, tuples and plain dictionaries; an ``OrderedDict`` would come out as one.
    """

    def __init__(self, pytree_info: Any) -> None:
        super().__init__()
        self.pytree_info = pytree_info

    def process_outputs(self, outputs: Any) -> Any:
        """For interpreters."""
        return pytree.tree_unflatten(pytree.tree_leaves(outputs), self.pytree_info.out_spec)

    def generate_output(self, output_args: Any, **how: Any) -> str:
        """The ``return`` of the code."""
        value = super().generate_output(output_args, **how).removeprefix("return ")
        return f"return _returned({value})"

    def additional_globals(self) -> list[tuple[str, Any]]:
        """What it reads."""

        def returned(value: Any) -> Any:
            return self.process_outputs(value)

        return [*super().additional_globals(), ("_returned", returned)]


class Nested(PyTreeCodeGen):
    """Writes an exported graph that takes inputs nested as the example's, and no others.

    fx takes of a list as many elements as the example had, and drops the rest without a word.
    """

    def gen_fn_def(self, *args: Any, **kwargs: Any) -> str:
        """The ``def`` of the code."""
        return super().gen_fn_def(*args, **kwargs).replace(FLATTENING, "_flattened(")

    def additional_globals(self) -> list[tuple[str, Any]]:
        """What it reads."""
        names = tuple(self.pytree_info.orig_args)

        def own(given: Any, spec: Any) -> list[Any]:
            return flattened(names, given, spec)

        return [*super().additional_globals(), ("_flattened", own)]


class OutSpec(NamedTuple):
    """What a graph gives back; its inputs are not nested."""

    out_spec: Any
    in_spec: None = None


def returning(graph_module: fx.GraphModule, spec: Any) -> None:
    """Has a graph that was traced by symbols give back the containers of this tree spec."""
    if type(codegen(graph_module.graph)) is CodeGen and not _is_known(spec):
        graph_module.graph.set_codegen(Returned(OutSpec(spec)))
        graph_module.recompile()


def _is_known(spec: Any) -> bool:
    kind = spec.type
    known = kind in (None, tuple, list, dict) or hasattr(kind, "_fields")
    return known and all(map(_is_known, spec.children()))


def with_grad(enabled: bool, block: Callable[..., Any], *args: Any) -> Any:
    """A block of an exported graph, with gradients on or off; then as they were, in any case."""
    with torch.set_grad_enabled(enabled):
        return block(*args)


def keep_blocks(graph_module: fx.GraphModule) -> None:
    """Lets the graphs nested in an exported one be pickled as they are, too.

    They are blocks under autocast or ``no_grad``. To trace one again is to run what it calls: of a
    block in a block, the inner one's autocast would be lost. PyTorch's own call of a block under
    ``no_grad`` leaves gradients switched off where the block raises; `with_grad` does not.
    """
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    for node in graph_module.graph.find_nodes(
        op="call_function", target=wrap_with_set_grad_enabled
    ):
        node.target = with_grad
    for node in graph_module.graph.find_nodes(op="get_attr"):
        block = modules.get(str(node.target))
        if isinstance(block, fx.GraphModule):
            keep_blocks(block)
            kept = RewrittenModule(block, block.graph, type(block).__name__)
            graph_module.add_submodule(str(node.target), kept)


def _spell(node: fx.Node) -> str:
    """A name that :func:`_resolve` finds again."""
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, OpOverload):
        return "torch.ops." + str(node.target)
    return get_qualified_name(node.target)  # type: ignore[arg-type]


def _resolve(name: str) -> Any:
    if "." not in name:  # getattr, of which fx says no module
        return getattr(builtins, name)
    found = look_up(name)
    custom = isinstance(found, type) and issubclass(found, torch.autograd.Function)
    return CustomFunction(found) if custom else found


def _restore(
    name: str,
    state: dict[str, Any],
    specs: list[tuple[str, str, str, Any, Any]],
    writer: type[CodeGen],
    info: Any,
    meta: dict[str, Any],
) -> RewrittenModule:
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def linked(value: Any) -> Any:
        return nodes[value] if isinstance(value, _Ref) else value

    for op, label, target, args, kwargs in specs:
        callee = _resolve(target) if op == "call_function" else target
        args, kwargs = map_aggregate((args, kwargs), linked)
        nodes.append(graph.create_node(op, callee, args, kwargs, label))
        nodes[-1].name = label
    if info is not None:
        graph.set_codegen(writer(info))  # type: ignore[call-arg]
    root = nn.Module()
    root.__dict__.update(state)
    module = RewrittenModule(root, graph, name)
    module.__dict__.update(state)  # also what no node reads
    module.meta.update(meta)
    return module
