"""Opens ops that hide others: multi-head attention becomes its linears, products and softmax.

So does ``einsum``: it is a ``bmm`` of operands that are permuted and reshaped.

The ops inside are those that PyTorch itself runs: its own function is traced to aten calls, with
symbolic batch and sequence sizes, and the trace takes the place of the one opaque node.
"""

from __future__ import annotations

import copy
import functools
import logging
import operator
import re
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from dropit_fx.capture.faithful import difference, meaning
from dropit_fx.capture.fake import blank, sized_by_values
from dropit_fx.capture.input_guards import InputGuards
from dropit_fx.capture.modes import TRAINING_FLAG, lay_over, mode_flag
from dropit_fx.capture.regions import REGION
from dropit_fx.capture.untouched import untouched
from dropit_fx.ops.table import rule_of
from dropit_fx.private import (
    ORIGIN,
    DimDynamic,
    FakeTensorMode,
    PythonPrinter,
    ShapeEnv,
    StatelessSymbolicContext,
    make_fx,
    pytree,
    tracing,
)
from dropit_fx.runtime.packed_call import by_mode

log = logging.getLogger(__name__)

EINSUM = (torch.einsum, torch.ops.aten.einsum.default)  # of Dynamo and fx, and of export


def opaque_nodes(graph_module: fx.GraphModule, wrapped: bool = False) -> list[fx.Node]:
    """The nodes that :func:`expand` would open; ``wrapped``: functions under torch.fx.wrap too."""
    return [
        n
        for n in graph_module.graph.nodes
        if (
            n.target in (F.multi_head_attention_forward, *EINSUM)
            or _attention_module(graph_module, n)
            or (wrapped and _is_wrapped(n))
        )
        and not sized_by_values(n)
    ]


def _is_wrapped(node: fx.Node) -> bool:
    """Whether a node calls a Python function that is neither PyTorch's nor ours, nor has a row."""
    home = str(getattr(node.target, "__module__", "")).partition(".")[0]
    known = ("torch", "torch_xla", "functorch", "builtins", "math", "dropit_fx")
    theirs = isinstance(node.target, FunctionType) and home not in known
    return node.op == "call_function" and theirs and rule_of(node) is None


def _attention_module(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    if node.op != "call_module":
        return None
    module = graph_module.get_submodule(str(node.target))
    return module if isinstance(module, nn.MultiheadAttention) else None


def expand(graph_module: fx.GraphModule, values: dict[str, Any], wrapped: bool = False) -> None:
    """Replaces each opaque node by the aten ops inside it, in place.

    Args:
        graph_module: The graph.
        values: Node name -> fake tensor, for the nodes that feed an opaque one.
        wrapped: Functions under torch.fx.wrap too.
    """
    for node in opaque_nodes(graph_module, wrapped):
        try:
            if _is_wrapped(node):
                _open_function(graph_module, node, values)
            else:
                _expand_node(graph_module, node, values)
        except Exception as error:  # it then stays whole, counted exactly and kept dense
            log.warning("%s stays opaque: %s", node.name, error)
    graph_module.recompile()


def _expand_node(graph_module: fx.GraphModule, node: fx.Node, values: dict[str, Any]) -> None:
    graph = graph_module.graph
    sources = list(dict.fromkeys(node.all_input_nodes))
    parameters: dict[str, Tensor] = {}
    module = _attention_module(graph_module, node)
    if module is not None:
        # with the same parameters; in eval mode it asks for more than a graph decides
        module = copy.deepcopy(module, {id(p): p for p in module.parameters()}).train()
        parameters = dict(module.named_parameters())
    names = list(parameters)

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(sources, tensors, strict=False))
        args, kwargs = pytree.tree_map_only(fx.Node, given.__getitem__, (node.args, node.kwargs))
        if module is None:
            assert callable(node.target)
            return node.target(*args, **kwargs)
        state = dict(zip(names, tensors[len(sources) :], strict=True))
        return torch.func.functional_call(module, state, args, kwargs)

    tensors = [values[s.name] for s in sources] + list(parameters.values())
    # before dispatch, einsum is one op still
    inner = _trace(run, tensors, pre_dispatch=node.target not in EINSUM)
    drawing = [] if module is None else _drawing(inner)
    result = inner.graph.find_nodes(op="output")[0].args[0]
    apart = all(user.target is operator.getitem for user in node.users)
    if not isinstance(result, fx.Node) and not apart:
        raise RuntimeError("its result is not taken apart")
    copied: dict[fx.Node, fx.Node] = {}
    placeholders = inner.graph.find_nodes(op="placeholder")
    with graph.inserting_before(node):
        for i, placeholder in enumerate(placeholders):
            if i < len(sources):
                copied[placeholder] = sources[i]
            else:
                copied[placeholder] = graph.get_attr(f"{node.target}.{names[i - len(sources)]}")
        _copy_ops(inner, node, copied)
    if drawing:
        assert module is not None
        _draw_in_training(graph_module, str(node.target), module, [copied[n] for n in drawing])
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(copied[result])
        values[copied[result].name] = values[node.name]
    for user in list(node.users):
        chosen = result[user.args[1]]
        if chosen is not None:
            user.replace_all_uses_with(copied[chosen])
            values[copied[chosen].name] = values.get(user.name)
        for reader in list(user.users):  # of weights that are not asked for
            swapped = {n: n for n in reader.all_input_nodes} | {user: None}
            reader.args = map_arg(reader.args, swapped.__getitem__)
            reader.kwargs = map_arg(reader.kwargs, swapped.__getitem__)
        graph.erase_node(user)
    graph.erase_node(node)


def _drawing(inner: fx.GraphModule) -> list[fx.Node]:
    """The nodes that drop out; RuntimeError where another draws."""
    found = []
    for n in inner.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()):
            at = _RATES.get(n.target)
            if at is None:
                raise RuntimeError(f"{n.target} draws")
            if at < len(n.args) and n.args[at]:
                found.append(n)
    return found


_RATES = {torch.ops.aten.dropout.default: 1, torch.ops.aten.scaled_dot_product_attention.default: 4}


def _draw_in_training(
    graph_module: fx.GraphModule, path: str, module: nn.Module, drawing: list[fx.Node]
) -> None:
    """Nodes that were traced in training mode drop nothing in eval mode.

    Args:
        graph_module: Their graph.
        path: Of the module that they come from.
        module: A copy of it, which is put in its place: it holds the mode, as the model's own does.
        drawing: The nodes.
    """
    training = graph_module.get_submodule(path).training
    if TRAINING_FLAG not in dict(graph_module.get_submodule(path).named_children()):
        graph_module.set_submodule(path, module.train(training))
    with graph_module.graph.inserting_before(drawing[0]):
        flag = mode_flag(graph_module, training, path)
    for node in drawing:
        at = _RATES[node.target]  # type: ignore[index]
        with graph_module.graph.inserting_before(node):
            rate = graph_module.graph.call_function(by_mode, (flag, node.args[at], 0.0))
        node.update_arg(at, rate)


def _copy_ops(inner: fx.GraphModule, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> None:
    """Copies the ops of ``inner`` to where ``node``'s graph inserts; ``copied`` has its inputs."""
    for other in inner.graph.find_nodes(op="get_attr"):
        raise RuntimeError(f"a constant inside ({other.target})")
    for other in inner.graph.nodes:
        if other.op in ("placeholder", "output"):
            continue
        copied[other] = node.graph.node_copy(other, copied.__getitem__)
        copied[other].meta = {k: v for k, v in node.meta.items() if k in (*ORIGIN, REGION)}


def _open_function(graph_module: fx.GraphModule, node: fx.Node, values: dict[str, Any]) -> None:
    """Replaces a call of a Python function by the aten ops that it runs.

    The first size of each activation is symbolic; the others are the example's, and what the
    function has decided by either is checked in each call. The ops are shown to do what the
    function does (``faithful/``); where it draws in Python, or is another one in eval mode in
    more than a flag, it stays whole.
    """
    graph, function = graph_module.graph, node.target
    assert callable(function)
    sources = list(dict.fromkeys(node.all_input_nodes))
    tensors = {s: values[s.name] for s in sources if isinstance(values[s.name], Tensor)}
    flags = [s for s in sources if s not in tensors]
    if len(flags) > 1 or any(type(values[s.name]) is not bool for s in flags):
        raise RuntimeError("it is called with numbers that other nodes make")

    def runs(flag: bool) -> Callable[..., Any]:
        def run(*given: Tensor) -> Any:
            known = dict(zip(tensors, given, strict=True)) | dict.fromkeys(flags, flag)
            args, kwargs = pytree.tree_map_only(
                fx.Node, known.__getitem__, (_plain(node.args), _plain(node.kwargs))
            )
            return function(*args, **kwargs)

        return run

    empty, blanks = nn.Module(), [blank(t) for t in tensors.values()]
    traces = []
    for flag in (True, False) if flags else (True,):
        with untouched(empty, generators=True) as seen:  # not around tracers, which draw names
            expected = meaning(empty, runs(flag), tuple(blanks), {})
        with untouched(empty):
            fixed = [s.op == "get_attr" for s in tensors]
            inner, conditions = _trace_first_size(runs(flag), blanks, fixed)
            wrong = difference(expected, meaning(inner, inner, tuple(blanks), {}, ()))
        if wrong or seen.chance:
            raise RuntimeError(wrong or f"it draws from {seen.chance[0]}")
        traces.append((inner, _needed(conditions, inner, runs(flag), blanks)))
    inner = traces[0][0]
    copied = dict(zip(inner.graph.find_nodes(op="placeholder"), tensors, strict=True))

    @functools.cache
    def switch() -> fx.Node:
        """A placeholder of the trace for the flag, once the two traces are known to be alike."""
        made = inner.graph.placeholder("switch")
        copied[made] = flags[0]
        return made

    if flags:
        lay_over(inner.graph, traces[1][0].graph, functools.partial(_switched, switch))
    _fill_with_numbers(inner)
    result = inner.graph.find_nodes(op="output")[0].args[0]
    if not isinstance(result, fx.Node):
        raise RuntimeError("it returns more than one tensor")
    told = tuple(
        (c, f"{c.replace('args', 'inputs')} of {getattr(function, '__name__', function)}")
        for _, conditions in traces
        for c in conditions
    )
    with graph.inserting_before(node):
        if told:
            name = f"sizes_of_{node.name}"
            graph_module.add_submodule(name, InputGuards(told))
            graph.call_module(name, tuple(tensors))
        _copy_ops(inner, node, copied)
    node.replace_all_uses_with(copied[result])
    values[copied[result].name] = values[node.name]
    graph.erase_node(node)


def _switched(
    switch: Callable[[], fx.Node], node: fx.Node, in_training: Any, in_eval: Any
) -> fx.Node:
    """``switch()`` in the place of a constant that is what the mode is."""
    if in_training is True and in_eval is False:
        return switch()
    raise RuntimeError("in eval mode it does other things than in training")


def _fill_with_numbers(inner: fx.GraphModule) -> None:
    """``mask[:4] = 1`` writes a number; a tracer writes a constant tensor."""
    for node in inner.graph.find_nodes(op="call_function", target=torch.ops.aten.fill_.Tensor):
        source = node.args[1]
        while isinstance(source, fx.Node) and source.target in _LIFTS:
            source = source.args[0]
        if isinstance(source, fx.Node) and source.op == "get_attr":
            value = inner.get_buffer(str(source.target)).item()
            node.target, node.args = torch.ops.aten.fill_.Scalar, (node.args[0], value)
    for node in [
        n for n in reversed(inner.graph.nodes) if n.target in _LIFTS or n.op == "get_attr"
    ]:
        if not node.users:
            inner.graph.erase_node(node)


_LIFTS = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default)


def _plain(value: Any) -> Any:
    """Arguments in lists and dicts of their own: fx's are immutable, and functions copy them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return tuple(map(_plain, value)) if type(value) is tuple else value


def _trace_first_size(
    run: Callable[..., Any], tensors: list[Tensor], fixed: list[bool]
) -> tuple[fx.GraphModule, list[str]]:
    """Aten graph of ``run`` and what it assumes of its inputs, as expressions over ``args``."""
    env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
    mode = FakeTensorMode(shape_env=env)
    fakes, conditions, names = [], [], {}
    for i, (tensor, static) in enumerate(zip(tensors, fixed, strict=True)):
        first = DimDynamic.STATIC if static else DimDynamic.DYNAMIC
        sizes = [first, *[DimDynamic.STATIC] * (tensor.dim() - 1)][: tensor.dim()]
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
        fakes.append(mode.from_tensor(tensor.detach(), symbolic_context=context))
        if not static and tensor.dim():
            names[str(fakes[-1].shape[0])] = f"args[{i}].size()[0]"
            sizes_of = enumerate(tensor.shape[1:], 1)
            conditions += [f"args[{i}].size()[{d}] == {n}" for d, n in sizes_of]
    inner = _aten(run, fakes)
    printer = PythonPrinter()
    for guard in env.guards:
        text = printer.doprint(guard.expr)
        conditions.append(re.sub(r"\bs\d+\b", lambda found: names[found[0]], text))
    for other in inner.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
        if other.args[1] == 0:  # it returns its input
            other.replace_all_uses_with(other.args[0])
            inner.graph.erase_node(other)
    inner.graph.eliminate_dead_code()
    inner.recompile()
    return inner, conditions


def _needed(
    conditions: list[str], inner: fx.GraphModule, run: Callable[..., Any], blanks: list[Tensor]
) -> list[str]:
    """The conditions less those that a size is not 1, where the ops serve that size as well.

    Tracers ask it for layouts and broadcasts, and a last batch may well have one element.
    """
    ones = {i for i in range(len(blanks)) if f"args[{i}].size()[0] != 1" in conditions}
    given = tuple(blank(t[:1]) if i in ones else t for i, t in enumerate(blanks))
    empty = nn.Module()
    with untouched(empty):
        try:
            wrong = difference(meaning(empty, run, given, {}), meaning(inner, inner, given, {}, ()))
        except Exception as error:
            wrong = str(error)
    log.info("for sizes of 1: %s", wrong or "the same ops")
    unneeded = set() if wrong else {f"args[{i}].size()[0] != 1" for i in ones}
    return [c for c in dict.fromkeys(conditions) if c not in unneeded]


def _trace(
    run: Callable[..., Any], tensors: list[Tensor], pre_dispatch: bool = True
) -> fx.GraphModule:
    """Aten graph of ``run``; activations have symbolic sizes, parameters their own."""
    mode = FakeTensorMode(shape_env=ShapeEnv(specialize_zero_one=False, duck_shape=True))
    fakes = []
    for tensor in tensors:
        dynamic = DimDynamic.STATIC if isinstance(tensor, nn.Parameter) else DimDynamic.DUCK
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
            dynamic_sizes=[dynamic] * tensor.dim()
        )
        fakes.append(mode.from_tensor(blank(tensor).detach(), symbolic_context=context))
    return _aten(run, fakes, pre_dispatch)


def _aten(
    run: Callable[..., Any], fakes: Sequence[Tensor], pre_dispatch: bool = True
) -> fx.GraphModule:
    """What ``run`` does to fake tensors, in their own mode.

    While Dynamo compiles, a tracer would take its mode in place of theirs, and Dynamo would find
    conditions on sizes that no input has.
    """
    with tracing(None):
        return make_fx(run, tracing_mode="symbolic", pre_dispatch=pre_dispatch)(*fakes)
