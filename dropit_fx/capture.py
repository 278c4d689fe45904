"""nn.Module -> fx.GraphModule: symbolic tracing first, ``torch.export`` where that fails.

Both tracers evaluate Python, so a graph knows one mode only: ``if self.training`` is decided while
it is traced. A model is therefore traced in both modes and the two graphs are laid over each other:
where they differ in constants alone (a dropout's rate), the constant becomes a choice made at run
time (``by_mode``), and ``.train()`` and ``.eval()`` work on the result as on the model. Modules
whose graphs differ in more (BatchNorm counts its batches) stay whole, as leaves.
"""

from __future__ import annotations

import copy
import inspect
import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from dropit_fx.graph_module import RewrittenModule
from dropit_fx.packed_call import by_mode, require_mode, require_shapes

log = logging.getLogger(__name__)

TRAINING_FLAG = "training_flag"


class CaptureError(RuntimeError):
    """No tracer takes the model; the message says which line stopped each of them."""


class TrainingFlag(nn.Module):
    """Returns its own ``training`` attribute, so that a graph can read the mode at run time."""

    def forward(self) -> bool:
        """True in training mode."""
        return self.training


class Tracer(fx.Tracer):
    """Symbolic tracer that sees through ``torch.nn`` modules, down to functions.

    A module stays a leaf where its forward reads ``self.training`` to do more than pass it on:
    normalisation with running statistics, and any module without children whose own code names
    ``training`` (DropPath).
    """

    record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` becomes one ``call_module`` node."""
        if isinstance(m, (nn.modules.batchnorm._NormBase, nn.MultiheadAttention, nn.RNNBase)):
            return True
        if type(m).__module__.startswith("torch.nn"):
            return isinstance(m, fx.GraphModule)
        reads_mode = "training" in _names(type(m).forward)
        return reads_mode and not any(True for _ in m.children())


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_names if code is not None else ()


def capture(
    model: nn.Module,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> fx.GraphModule:
    """Traces ``model``; parameters and buffers are shared with it, not copied.

    Args:
        model: Any module; its mode on return is what it was.
        args: Example inputs; only ``torch.export`` needs them.
        kwargs: Example keyword inputs.

    Returns:
        A graph of functions and leaf modules whose state-dict keys are the model's.

    Raises:
        CaptureError: Neither tracer takes the model.
    """
    if isinstance(model, fx.GraphModule):
        graph_module = fx.GraphModule(model, copy.deepcopy(model.graph), type(model).__name__)
    else:
        try:
            graph_module = _both_modes(model, _symbolic)
        except Exception as error:  # a tracer runs the user's code: anything can be raised
            log.info("symbolic_trace: %s", error)
            graph_module = _exported(model, args, kwargs, error)
    graph_module.graph.lint()
    graph_module = RewrittenModule(graph_module, graph_module.graph, type(model).__name__)
    missing = set(model.state_dict()) ^ set(graph_module.state_dict())
    if missing:
        _adopt(model, graph_module, missing)
    return graph_module


def _exported(
    model: nn.Module,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
    first: Exception,
) -> fx.GraphModule:
    if args is None and kwargs is None:
        raise CaptureError(
            f"torch.fx.symbolic_trace cannot take {type(model).__name__}, stopped at"
            f" {_user_line(first)}:\n  {_first_line(first)}\nGive example_args or example_kwargs,"
            " and torch.export is tried; or use"
            ' torch.compile(model, backend="dropit"), which needs neither.'
        ) from first
    try:
        return _both_modes(model, lambda m: _export(m, args or (), dict(kwargs or {})))
    except Exception as error:
        raise CaptureError(
            f"no tracer takes {type(model).__name__}.\n"
            f"  torch.fx.symbolic_trace stopped at {_user_line(first)}:\n    {_first_line(first)}\n"
            f"  torch.export stopped at {_user_line(error)}:\n    {_first_line(error)}\n"
            'Use torch.compile(model, backend="dropit"), which takes such models piece by piece, or'
            " transform(model, modules=...) for the submodules that can be traced."
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _user_line(error: BaseException) -> str:
    """``file:line: code`` of the innermost frame that is the user's: not of torch, not ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (torch.__path__[0], __file__.rsplit("/", 1)[0])
    theirs = [f for f in frames if not f.filename.startswith(ours) and "<" not in f.filename]
    for line in str(error).splitlines():  # torch.export tells the user's line in its message
        line = line.strip()
        if line.startswith("File ") and not any(o in line for o in ours):
            name, _, rest = line.removeprefix("File ").partition(", line ")
            return f"{name.strip(chr(34))}:{rest.split(',')[0].split()[0]}"
    if not theirs:
        return "no line of the model"
    frame = theirs[-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line}"


def _symbolic(model: nn.Module) -> fx.GraphModule:
    own = set(vars(model))
    try:
        graph = Tracer().trace(model)
        return fx.GraphModule(model, graph, type(model).__name__)
    finally:
        for name in set(vars(model)) - own:  # the tracer leaves tensor constants on the model
            delattr(model, name)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    auto = torch.export.Dim.AUTO

    def every_dimension(x: Any) -> Any:
        return dict.fromkeys(range(x.dim()), auto) if isinstance(x, Tensor) else None

    shapes = pytree.tree_map(every_dimension, (args, kwargs))
    names = list(inspect.signature(model.forward).parameters)
    dynamic = {**dict(zip(names, shapes[0], strict=False)), **shapes[1]}
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        log.info("torch.export with dynamic shapes: %s; retrying with the example's", error)
        program = torch.export.export(model, args, kwargs, strict=False)
    exported = program.module()
    # a plain GraphModule: the exported one refuses train() and eval()
    graph_module = fx.GraphModule(exported, exported.graph, type(model).__name__)
    _check_shapes(graph_module)
    known = set(model.state_dict())
    for name, _ in list(graph_module.named_buffers()):
        if name not in known:  # a constant that export lifted
            parent, _, leaf = name.rpartition(".")
            graph_module.get_submodule(parent)._non_persistent_buffers_set.add(leaf)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        parent, _, leaf = name.rpartition(".")
        try:
            owner = graph_module.get_submodule(parent)
        except AttributeError:
            continue
        if hasattr(owner, leaf):
            setattr(owner, leaf, value)
    return graph_module


def _check_shapes(graph_module: fx.GraphModule) -> None:
    """Puts our own check of input shapes in the place of export's, which does not pickle."""
    for node in graph_module.graph.find_nodes(op="call_module", target="_guards_fn"):
        graph_module.graph.erase_node(node)
    graph_module.delete_submodule("_guards_fn")
    inputs, shapes = [], []
    for node in graph_module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            inputs.append(node)
            shapes.append(tuple(s if isinstance(s, int) else None for s in value.shape))
    with graph_module.graph.inserting_before(_first(graph_module)):
        graph_module.graph.call_function(require_shapes, (tuple(inputs), tuple(shapes)))


def _both_modes(model: nn.Module, trace: Callable[[nn.Module], fx.GraphModule]) -> fx.GraphModule:
    modes = [(m, m.training) for m in model.modules()]
    training = model.training
    try:
        graph_module = trace(model)
        model.train(not training)
        try:
            other = trace(model)
        except Exception as error:
            log.info("tracing in the other mode: %s", error)
            other = None
    finally:
        for m, mode in modes:
            m.training = mode
    differs = "it cannot be traced" if other is None else _overlay(graph_module, other, training)
    if differs:
        log.warning(
            "%s: training and eval differ in more than constants: %s", type(model).__name__, differs
        )
        with graph_module.graph.inserting_before(_first(graph_module)):
            flag = _flag(graph_module, training)
            graph_module.graph.call_function(require_mode, (flag, training, differs))
    return graph_module


def _first(graph_module: fx.GraphModule) -> fx.Node:
    """The first node behind all placeholders (exported graphs look their parameters up before)."""
    last = next((n for n in reversed(graph_module.graph.nodes) if n.op == "placeholder"), None)
    return next(iter(graph_module.graph.nodes)) if last is None else last.next


def _flag(graph_module: fx.GraphModule, training: bool) -> fx.Node:
    graph_module.add_submodule(TRAINING_FLAG, TrainingFlag().train(training))
    return graph_module.graph.call_module(TRAINING_FLAG)


def _overlay(mine: fx.GraphModule, other: fx.GraphModule, training: bool) -> str:
    """Makes ``mine`` serve both modes.

    Returns:
        Where the graphs differ in more than constants, or ``""``.
    """
    for node in (*mine.graph.nodes, *other.graph.nodes):
        _spell_out(node)
    _level(mine.graph, other.graph)
    ours, theirs = list(mine.graph.nodes), list(other.graph.nodes)
    twin = dict(zip(theirs, ours, strict=False))
    for a, b in zip(ours, theirs, strict=False):
        same = (a.op, str(a.target)) == (b.op, str(b.target))
        if not same or not _same_but_constants((a.args, a.kwargs), (b.args, b.kwargs), twin):
            return f"'{a.name}' ({node_where(a) or node_module(a) or a.target})"
    if len(ours) != len(theirs):
        return f"'{ours[-1].name}'"
    flag: list[fx.Node] = []

    def lay(x: Any, y: Any, before: fx.Node) -> Any:
        if isinstance(x, fx.Node) or _equal(x, y):
            return x
        if isinstance(x, slice):
            parts = zip((x.start, x.stop, x.step), (y.start, y.stop, y.step), strict=True)
            return slice(*[lay(p, q, before) for p, q in parts])
        if isinstance(x, tuple | list):
            return type(x)(lay(p, q, before) for p, q in zip(x, y, strict=True))
        if isinstance(x, dict):
            return {k: lay(v, y[k], before) for k, v in x.items()}
        if not flag:
            with mine.graph.inserting_before(_first(mine)):
                flag.append(_flag(mine, training))
        in_training, in_eval = (x, y) if training else (y, x)
        if in_training is True and in_eval is False:
            return flag[0]
        with mine.graph.inserting_before(before):
            return mine.graph.call_function(by_mode, (flag[0], in_training, in_eval))

    for a, b in zip(ours, theirs, strict=True):
        a.args, a.kwargs = (
            lay(tuple(a.args), tuple(b.args), a),
            lay(dict(a.kwargs), dict(b.kwargs), a),
        )
    return ""


def _level(mine: fx.Graph, other: fx.Graph) -> None:
    """Gives each graph the ``contiguous`` calls of the other.

    Export drops those that have nothing to do, which depends on the attention kernel, and that on
    dropout.
    """
    a, b = next(iter(mine.nodes)), next(iter(other.nodes))
    while a.op != "output" and b.op != "output":
        if str(a.target) != str(b.target):
            for node, graph, ahead in ((a, other, b), (b, mine, a)):
                if node.target is torch.ops.aten.contiguous.default:
                    source = ahead.prev
                    with graph.inserting_after(source):
                        added = graph.call_function(node.target, (source,), dict(node.kwargs))
                    added.args = (source, *node.args[1:])
                    added.meta = dict(source.meta)
                    source.replace_all_uses_with(
                        added, delete_user_cb=lambda u, n=added: u is not n
                    )
                    a, b = (a, added) if graph is other else (added, b)
                    break
            else:
                return
        a, b = a.next, b.next


def _spell_out(node: fx.Node) -> None:
    """Gives an aten call its default arguments.

    Export leaves out those that one mode happens to agree with.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    args, kwargs = list(node.args), dict(node.kwargs)
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(args) or argument.name in kwargs or not argument.has_default_value():
            continue
        if argument.kwarg_only or i > len(args):
            kwargs[argument.name] = argument.default_value
        else:
            args.append(argument.default_value)
    for argument in node.target._schema.arguments[len(args) :]:
        if argument.name not in kwargs or argument.kwarg_only:
            break
        args.append(kwargs.pop(argument.name))
    node.args, node.kwargs = tuple(args), kwargs


def _equal(x: Any, y: Any) -> bool:
    """Equal constants; the caller takes containers apart, so that nodes inside are not compared."""
    return not isinstance(x, tuple | list | dict | slice) and type(x) is type(y) and bool(x == y)


def _same_but_constants(x: Any, y: Any, twin: dict[fx.Node, fx.Node]) -> bool:
    """Whether two arguments name the same nodes in the same places."""
    if isinstance(x, fx.Node) or isinstance(y, fx.Node):
        return isinstance(y, fx.Node) and twin.get(y) is x
    if isinstance(x, slice):
        x, y = (
            (x.start, x.stop, x.step),
            (y.start, y.stop, y.step) if isinstance(y, slice) else None,
        )
    if isinstance(x, tuple | list):
        return (
            isinstance(y, tuple | list)
            and len(x) == len(y)
            and all(_same_but_constants(p, q, twin) for p, q in zip(x, y, strict=True))
        )
    if isinstance(x, dict):
        return (
            isinstance(y, dict)
            and list(x) == list(y)
            and all(_same_but_constants(v, y[k], twin) for k, v in x.items())
        )
    return True


def _adopt(model: nn.Module, graph_module: fx.GraphModule, names: set[str]) -> None:
    """Gives the graph module the parameters that no node reads, so that state dicts stay equal."""
    owned = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    for name in sorted(names):
        if name not in owned:
            continue
        *path, leaf = name.split(".")
        owner: nn.Module = graph_module
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        value = owned[name]
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value)


def node_where(node: fx.Node) -> str:
    """``file:line`` of the user's code that made the node, ``""`` where the tracer did not say."""
    trace = node.meta.get("stack_trace") or node.stack_trace or ""
    best = ""
    for line in trace.splitlines():
        line = line.strip()
        if line.startswith("File "):
            name, _, rest = line.removeprefix("File ").partition(", line ")
            name, number = name.strip('"'), rest.split(",")[0]
            if "/torch/" not in name:
                best = f"{name}:{number}"
    return best


def node_module(node: fx.Node) -> str:
    """Qualified name of the module that the node belongs to, ``""`` for the root.

    The tracers write it differently: ``blocks.0.attn``, ``L['self'].blocks.0.attn``,
    ``L['self']._modules['blocks']._modules['0']``.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return str(node.target) if node.op == "call_module" else ""
    name = str(list(stack.values())[-1][0])
    if name.startswith(("L[", "G[")):
        name = name.split("]", 1)[1]
    name = name.replace("._modules['", ".").replace("']", "").replace("['", ".")
    return name.removeprefix("L__self__").strip(".").split("@")[0]
