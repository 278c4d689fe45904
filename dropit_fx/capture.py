"""nn.Module -> fx.GraphModule: symbolic tracing first, ``torch.export`` where that fails.

A model is traced in training and in eval mode, and the two graphs are made one (``modes.py``).
Modules whose graphs differ in more than constants (BatchNorm counts its batches) stay whole, as
leaves.
"""

from __future__ import annotations

import copy
import inspect
import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropit_fx.graph_module import RewrittenModule
from dropit_fx.input_guards import exporting_input_guards
from dropit_fx.modes import both_modes
from dropit_fx.packed_call import PACKED_OPS, pack
from dropit_fx.private import (
    MODULE_DICTS,
    BatchNorm,
    NormBase,
    leave_unsaved,
    pytree,
    unchecked_dimensions,
    unsaved_buffers,
)

log = logging.getLogger(__name__)


class CaptureError(RuntimeError):
    """No tracer takes the model; the message says which line stopped each of them."""


class Tracer(fx.Tracer):
    """Symbolic tracer that sees through ``torch.nn`` modules, down to functions.

    A module stays a leaf where its forward reads ``self.training`` to do more than pass it on:
    batch norm with a cumulative average, instance norm, and any module without children whose own
    code names ``training`` (DropPath).
    """

    record_stack_traces = True
    # what is computed from a buffer is computed in each step, not once while tracing
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` becomes one ``call_module`` node."""
        if isinstance(m, NormBase):
            seen_through = isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
            return not seen_through or m.momentum is None
        if isinstance(m, (nn.MultiheadAttention, nn.RNNBase)):
            return True
        if type(m).__module__.startswith("torch.nn"):
            return isinstance(m, fx.GraphModule)
        reads_mode = "training" in _names(type(m).forward)
        return reads_mode and not any(True for _ in m.children())

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A graph of functions does not know what ran under ``no_grad``: that is for export."""
        if not torch.is_grad_enabled():
            raise fx.proxy.TraceError("gradients are switched off for a part of the model")
        return super().create_node(*args, **kwargs)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Batch norm's check of the number of dimensions is left out: proxies have none."""
        if not isinstance(m, BatchNorm):
            return super().call_module(m, forward, args, kwargs)
        with unchecked_dimensions(m):
            return super().call_module(m, forward, args, kwargs)


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
        CaptureError: Neither tracer takes the model, or it is packed already.
    """
    if isinstance(model, fx.GraphModule):
        graph_module = fx.GraphModule(model, copy.deepcopy(model.graph), type(model).__name__)
    else:
        try:
            graph_module = both_modes(model, _symbolic)
        except Exception as error:  # a tracer runs the user's code: anything can be raised
            log.info("symbolic_trace: %s", error)
            graph_module = _exported(model, args, kwargs, error)
    for node in graph_module.graph.nodes:
        if node.target is pack or node.target in PACKED_OPS.values():
            raise CaptureError(
                f"'{node.name}' of {type(model).__name__} is packed already: transform the"
                " model that dropit_fx has not rewritten yet, or name its other submodules with"
                " modules=..."
            )
    graph_module.graph.lint()
    unsaved = unsaved_buffers(model) | unsaved_buffers(graph_module)
    graph_module = RewrittenModule(graph_module, graph_module.graph, type(model).__name__)
    leave_unsaved(graph_module, unsaved)  # of its own, fx forgets it before PyTorch 2.14
    missing = set(model.state_dict()) ^ set(graph_module.state_dict())
    if missing:
        _adopt(model, graph_module, missing)
    _reorder(model, graph_module)
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
        return both_modes(model, lambda m: _export(m, args or (), dict(kwargs or {})))
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
        with torch.enable_grad():
            graph = Tracer().trace(model)
        graph_module = fx.GraphModule(model, graph, type(model).__name__)
        constants = set(vars(model)) - own
        leave_unsaved(graph_module, constants)
        return graph_module
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
    with exporting_input_guards():
        exported = program.module()
    # a plain GraphModule: the exported one refuses train() and eval()
    graph_module = fx.GraphModule(exported, exported.graph, type(model).__name__)
    known = set(model.state_dict())
    for name, _ in list(graph_module.named_buffers()):
        if name not in known:  # a constant that export lifted
            leave_unsaved(graph_module, [name])
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        parent, _, leaf = name.rpartition(".")
        try:
            owner = graph_module.get_submodule(parent)
        except AttributeError:
            continue
        if hasattr(owner, leaf):
            setattr(owner, leaf, value)
    return graph_module


def _reorder(theirs: nn.Module, ours: nn.Module) -> None:
    """Gives parameters the model's order: saved optimizer states know them by number alone."""
    for kind in MODULE_DICTS:
        held = getattr(ours, kind)
        for name in [n for n in getattr(theirs, kind) if n in held]:
            held[name] = held.pop(name)
    for name, child in ours.named_children():
        original = getattr(theirs, name, None)
        if isinstance(original, nn.Module) and original is not child:
            _reorder(original, child)


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
