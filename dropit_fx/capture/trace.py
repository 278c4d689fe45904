"""nn.Module -> fx.GraphModule: symbolic tracing first, ``torch.export`` where that fails.

A model is traced in training and in eval mode, and the two graphs are made one (``modes.py``).
Modules whose graphs differ in more than constants (BatchNorm counts its batches) stay whole, as
leaves. No graph is believed before it is shown to do what the model does (``faithful/``); what
no graph can do is refused before anything is traced.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.traceback import preserve_node_meta

from dropit_fx.capture.around import hooked
from dropit_fx.capture.bounded import TooLong, sympy_bounded
from dropit_fx.capture.faithful import Study
from dropit_fx.capture.faithful.hooks import (
    NotCarried,
    own_hooks,
    refuse_hooks,
    refuse_overrides,
    torchs_hooks_inside,
)
from dropit_fx.capture.faithful.one_run import named
from dropit_fx.capture.graph_module import (
    Nested,
    RewrittenModule,
    adopt,
    keep_blocks,
    returning,
)
from dropit_fx.capture.input_guards import (
    exporting_input_guards,
    guard_asked,
    noting_dtypes,
)
from dropit_fx.capture.modes import both_modes, is_one_mode, one_mode
from dropit_fx.capture.provenance import error_line, first_line, transformed_in
from dropit_fx.capture.regions import checkpointing, from_annotations, mark, marking
from dropit_fx.capture.saving import save_as
from dropit_fx.capture.symbolic import OwnNodes, SymbolicProxy, as_in_eager
from dropit_fx.capture.untouched import has_own_train, untouched
from dropit_fx.logs import without_dumps
from dropit_fx.private import (
    HOOK_DICTS,
    MODULE_DICTS,
    BatchNorm,
    NormBase,
    codegen,
    leave_unsaved,
    pytree,
    traced_assert,
    unchecked_dimensions,
    unsaved_buffers,
)
from dropit_fx.runtime.packed_call import PACKED_OPS, pack

log = logging.getLogger(__name__)
Trace = Callable[[nn.Module], fx.GraphModule]

# tracers patch classes for as long as they run: one model at a time
LOCK = threading.RLock()


class CaptureError(RuntimeError):
    """No graph stands for the model; the message says what stopped each tracer, and where."""


class Tracer(fx.Tracer):
    """Symbolic tracer that sees through ``torch.nn`` modules, down to functions.

    A module stays a leaf where its forward reads ``self.training`` to do more than pass it on:
    batch norm with a cumulative average, instance norm, and any module without children whose own
    code names ``training`` (DropPath). One that has parameters (an adapter) is a leaf only where
    it is not ``opened``: what it saves can be packed in a graph alone.
    """

    record_stack_traces = True
    # what is computed from a buffer is computed in each step, not once while tracing
    proxy_buffer_attributes = True

    def __init__(self, opened: bool = False) -> None:
        super().__init__()
        self.opened = opened
        self.own = OwnNodes()
        self._thread = threading.get_ident()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Proxies that write in place where a tensor does."""
        return SymbolicProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """A tensor that was computed while tracing is the node that computes it."""
        node = self.own.get(a)
        return super().create_arg(a) if node is None else node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` becomes one ``call_module`` node."""
        if isinstance(m, NormBase):
            if type(m) in _INSTANCE_NORMS:
                return m.track_running_stats
            seen_through = isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
            return not seen_through or m.momentum is None
        if isinstance(m, (nn.MultiheadAttention, nn.RNNBase)):
            return True
        if type(m).__module__.startswith("torch.nn"):
            return isinstance(m, fx.GraphModule)
        return _reads_mode(m) and not (self.opened and any(True for _ in m.parameters()))

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A graph of functions does not know what ran under ``no_grad``: that is for export."""
        if not torch.is_grad_enabled():
            raise fx.proxy.TraceError("gradients are switched off for a part of the model")
        return mark(super().create_node(*args, **kwargs))

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Norms' checks of the number of dimensions come later: proxies have none."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)  # another thread trains meanwhile
        if type(m) in _INSTANCE_NORMS:
            forward = partial(_instance_norm, m)
        with unchecked_dimensions(m) if isinstance(m, BatchNorm) else nullcontext():
            return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers become proxies, in the thread that traces."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


_INSTANCE_NORMS = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}


def _instance_norm(m: Any, input: Tensor) -> Tensor:
    """An instance norm of a batch, as a graph has it."""
    dims = _INSTANCE_NORMS[type(m)]
    traced_assert(input.dim() == dims, f"{type(m).__name__} was traced with {dims} dimensions")
    return F.instance_norm(input, None, None, m.weight, m.bias, True, m.momentum, m.eps)


def _reads_mode(m: nn.Module) -> bool:
    """Whether a module without children may do something else in each mode."""
    forward: Any = getattr(type(m), "forward", None)  # scripted classes have none
    return "training" in _names(forward) and not any(True for _ in m.children())


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
        model: Any module; on return, and after an error, it is what it was.
        args: Example inputs of a call, of which shapes and dtypes are read. ``torch.export`` needs
            them, and so does the proof that the graph does what the model does: without them, a
            symbolic trace is returned unproven.
        kwargs: Example keyword inputs.

    Returns:
        A graph of functions and leaf modules whose state-dict keys are the model's, with the
        model's own hooks.

    Raises:
        CaptureError: Neither tracer takes the model, no graph can do what it does, or it is packed
            already.
    """
    with LOCK, torchs_hooks_inside(model):
        graph_module = _captured(model, args, kwargs)
    if transformed := transformed_in(graph_module):
        raise CaptureError(_refusal(model, transformed))
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
    # what no node reads, so that state dicts stay equal
    missing = dict(named(model)).keys() - dict(named(graph_module)).keys() - unsaved
    adopt(graph_module, [pair for pair in sorted(dict(named(model)).items()) if pair[0] in missing])
    save_as(graph_module, model)
    leave_unsaved(graph_module, unsaved)
    _reorder(model, graph_module)
    for kind in HOOK_DICTS:
        if vars(model).get(kind):  # they run around the forward, whatever that is
            setattr(graph_module, kind, own_hooks(model, kind))
    return graph_module


def _captured(
    model: nn.Module, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None
) -> fx.GraphModule:
    """The graph of a tracer that is shown to be faithful."""
    if isinstance(model, fx.GraphModule):
        return fx.GraphModule(model, copy.deepcopy(model.graph), type(model).__name__)
    known = args is not None or kwargs is not None
    given = hooked(model, tuple(args or ()), dict(kwargs or {})) if known else ((), {})
    if known:
        _check_fit(model, *given)
    try:
        refuse_hooks(model)
        refuse_overrides(model)
        study = Study(model, *given) if known else None
    except NotCarried as error:
        raise CaptureError(_refusal(model, str(error))) from error
    opened = _opened(model, study)
    if opened is not None:
        return opened
    stopped: list[tuple[str, Exception]] = []
    tracers: dict[str, Trace] = {"torch.fx.symbolic_trace": _symbolic}
    if study is not None:
        tracers["torch.export"] = lambda m: _export(m, study.args, study.kwargs)
    for name, trace in tracers.items():
        try:
            return _proved(model, trace, study, exported=name == "torch.export")
        except Exception as error:  # a tracer runs the user's code: anything can be raised
            log.info("%s: %s", name, error)
            stopped.append((name, error))
    if study is None:
        raise CaptureError(
            f"torch.fx.symbolic_trace cannot take {type(model).__name__}, stopped at"
            f" {error_line(stopped[0][1])}:\n  {first_line(stopped[0][1])}\nGive example_args or"
            " example_kwargs, and torch.export is tried; or use"
            ' torch.compile(model, backend="dropit"), which needs neither.'
        ) from stopped[0][1]
    told = "".join(
        f"  the graph of {name} {error}\n"
        if isinstance(error, NotCarried)
        else f"  {name} stopped at {error_line(error)}:\n    {first_line(error)}\n"
        for name, error in stopped
    )
    raise CaptureError(
        f"no tracer takes {type(model).__name__}.\n{told}"
        'Use torch.compile(model, backend="dropit"), which takes such models piece by piece, or'
        " transform(model, modules=...) for the submodules that can be traced."
    ) from stopped[-1][1]


def _proved(
    model: nn.Module, trace: Trace, study: Study | None, exported: bool = False
) -> fx.GraphModule:
    """A tracer's graph for both modes, shown to be faithful where there are inputs for that."""
    with untouched(model, values=has_own_train(model)):
        graph_module = both_modes(model, trace)
    if study is not None:
        _prove(graph_module, study, exported)
        guard_asked(graph_module, model, study.args, study.kwargs)
        if (structure := study.structure()) is not None:
            returning(graph_module, structure)
    return graph_module


def _opened(model: nn.Module, study: Study | None) -> fx.GraphModule | None:
    """A symbolic trace through modules that may stay leaves; None where it knows one mode alone.

    As leaves they do in each mode what they do, but what they save is not packed.
    """
    whole, through = Tracer(), Tracer(opened=True)
    names = [
        n
        for n, m in model.named_modules()
        if n and whole.is_leaf_module(m, n) and not through.is_leaf_module(m, n)
    ]
    if not names:
        return None
    try:
        graph_module = _proved(model, lambda m: _symbolic(m, opened=True), study)
    except Exception as error:  # a tracer runs the user's code: anything can be raised
        log.info("torch.fx.symbolic_trace through %s: %s", ", ".join(names), error)
        return None
    if not is_one_mode(graph_module):
        return graph_module
    log.warning(
        "%s: so that the graph serves both modes, what these save is not packed: %s",
        type(model).__name__,
        ", ".join(names),
    )
    return None


def _refusal(model: nn.Module, reason: str) -> str:
    return (
        f"no graph can do all that {type(model).__name__} does: {reason}; use"
        ' torch.compile(model, backend="dropit"), which keeps it, or transform(model, modules=...)'
        " for submodules that do without."
    )


def _prove(graph_module: fx.GraphModule, study: Study, exported: bool) -> None:
    """Raises NotCarried where the graph does not do what the model does, in the model's mode.

    Where it does not in the other mode, it says so when it is run in that.
    """
    runs = checkpointing(graph_module)
    wrong = study.difference(runs, study.training, exported)
    if wrong:
        raise NotCarried(wrong)
    if not is_one_mode(graph_module):
        wrong = study.difference(runs, not study.training, exported)
        if wrong:
            one_mode(graph_module, study.training, f"the start (the graph {wrong})")


def _check_fit(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises CaptureError where the model's forward does not take the example."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"example_args does not fit the model's inputs ({', '.join(signature.parameters)}):"
            f" {error}"
        ) from error


def _symbolic(model: nn.Module, opened: bool = False) -> fx.GraphModule:
    own = set(vars(model))
    tracer = Tracer(opened)
    with torch.enable_grad(), as_in_eager(tracer, tracer.own), marking():
        graph = tracer.trace(model)
    tracer.own.erase_unread(graph)
    graph_module = fx.GraphModule(model, graph, type(model).__name__)
    leave_unsaved(graph_module, set(vars(model)) - own)  # constants, which are no part of the state
    return graph_module


# CPU seconds for sizes, and more for each module; BERT takes 0.02 for each
_SECONDS, _SECONDS_PER_MODULE = 8.0, 0.04
# In the second mode a model gets more if the first one came back, and none if it did not, so that
# both are traced in the same way.
_granted: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()
_WAYS = {"every dimension": None, "the first dimension of each input": 1, "no dimension": 0}


def _exported_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram:
    """Exports with every size dynamic; where that fails or does not come back, with fewer."""
    signature = inspect.signature(model.forward)
    tried: list[str] = []
    failed: Exception | None = None
    usual = _SECONDS + _SECONDS_PER_MODULE * sum(1 for _ in model.modules())
    for way, count in _WAYS.items():

        def dynamic(x: Any, count: int | None = count) -> Any:
            dims = range(x.dim())[:count] if isinstance(x, Tensor) else ()
            return dict.fromkeys(dims, torch.export.Dim.AUTO) or None

        shapes = pytree.tree_map(dynamic, (args, kwargs))
        named = signature.bind(*shapes[0], **shapes[1]).arguments
        seconds = _granted.get(model, usual) if count is None else 4 * usual
        if not seconds:  # it did not come back in the other mode
            tried.append(f"with {way} dynamic was given up in the other mode")
            continue
        try:
            with sympy_bounded(seconds), preserve_node_meta(), marking(), without_dumps(log):
                program = torch.export.export(
                    model, args, kwargs, dynamic_shapes=named if count != 0 else None, strict=False
                )
        except Exception as error:
            failed = error
            tried.append(f"with {way} dynamic: {first_line(error)}")
            log.info("torch.export of %s %s", type(model).__name__, tried[-1])
            if isinstance(error, TooLong) and count is None:
                _granted[model] = 0.0
            continue
        if count is None:
            _granted[model] = 4 * usual
        elif any("TooLong" in t for t in tried):
            log.warning(
                "torch.export of %s %s; it is exported with %s dynamic, other sizes must be the"
                " example's",
                type(model).__name__,
                tried[0],
                way,
            )
        return program
    assert failed is not None
    failed.args = (f"{failed}\n(torch.export was tried {'; '.join(tried)})",)
    raise failed


def _to_export(inputs: Any) -> Any:
    """Inputs as they are before a backward, and each a tensor of its own.

    Export would ask for sizes of a gradient, and would read one of two inputs that are the same
    tensor for both, also where they are none any more.
    """
    seen: set[int] = set()

    def own(x: Tensor) -> Tensor:
        fresh = id(x) not in seen and (not x.is_leaf or x.grad is None)
        seen.add(id(x))
        return x if fresh else x.detach().requires_grad_(x.requires_grad)

    return pytree.tree_map_only(Tensor, own, inputs)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    args, kwargs = _to_export((args, kwargs))
    with noting_dtypes(model) as typed:
        program = _exported_program(model, args, kwargs)
    with exporting_input_guards(model, args, kwargs, typed):
        exported = program.module()
    # a plain GraphModule: the exported one refuses train() and eval()
    graph_module = fx.GraphModule(exported, exported.graph, type(model).__name__)
    from_annotations(graph_module)
    keep_blocks(graph_module)
    graph_module.graph.set_codegen(Nested(codegen(exported.graph).pytree_info))
    known = dict(named(model))
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
