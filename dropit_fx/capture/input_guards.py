"""What an exported graph assumes about its inputs, checked in each call.

``torch.export`` follows one branch of ``if x.shape[0] > 8`` and notes the condition. Its own check
of these conditions does not pickle; this one does. Any trace follows one branch of
``if isinstance(x, tuple)``: kinds of inputs are checked as well, and how they are nested, since
``torch.export`` unrolls what a model does with a list. So is the dtype of inputs of which the
model's own code reads it: an exported graph has the example's for good.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from dropit_fx.private import guards_made_by, never_removed, pytree

ASKED = "dropit_asked"  # in ``meta`` of a graph's input: the model asked which kind it is
_NOTHING = object()


@never_removed
class InputGuards(nn.Module):
    """Raises ValueError where an input is not as the graph assumes.

    Attributes:
        conditions: Python expressions over ``args``, the graph's inputs, with the text that names
            them as the user does: ``("args[0].size()[0] >= 9", "x.size()[0] >= 9")``.
    """

    def __init__(self, conditions: tuple[tuple[str, str], ...]) -> None:
        super().__init__()
        self.require(conditions)

    def require(self, conditions: tuple[tuple[str, str], ...]) -> None:
        """Replaces the conditions."""
        self.conditions = tuple(dict.fromkeys(conditions))
        self._check = _function(self.conditions)

    def forward(self, *args: Any) -> None:
        """Checks the graph's inputs."""
        self._check(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_check"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._check = _function(self.conditions)


def _function(conditions: tuple[tuple[str, str], ...]) -> Callable[..., None]:
    from dropit_fx.private import SYMPY_INTERP, dont_skip_tracing  # slow to load, as is sympy

    lines = ["def check(*args):"]
    for condition, told in conditions:
        text = f"the graph was exported for inputs with {told}; transform the model with an"
        text += " example like the inputs given: "
        lines += [f"    if not ({condition}):", f"        raise ValueError({text!r} + given(args))"]
    lines += ["    return None"]
    names: dict[str, Any] = {**SYMPY_INTERP, "math": math, "inf": math.inf, "given": _given}
    names["torch"] = torch
    names["Tensor"] = (Tensor, fx.Proxy)  # who traces the result gives it neither
    exec("\n".join(lines), names)  # expressions that torch.export wrote
    check: Callable[..., None] = dont_skip_tracing(names["check"])
    return check


def _given(args: tuple[Any, ...]) -> str:
    return ", ".join(map(_told, args))


def _told(value: Any) -> str:
    """A tensor by its shape and dtype: ``(4, 8) float32``."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _of_export(
    given: Mapping[str, Any], typed: set[str], guards: list[str], paths: list[pytree.KeyPath]
) -> InputGuards:
    """From export's expressions over ``L['x']`` and the paths of the graph's inputs.

    ``given``: the example by these paths; ``typed``: the paths of those whose dtype was read.
    Export notes nothing of what was None, and of a number that it is equal; a forward that asks
    ``isinstance`` was traced for one kind.
    """
    keys = [pytree.keystr(path) for path in paths]
    names = [_name(path) for path in paths]
    conditions = [
        (kind.format(f"args[{i}]"), kind.format(names[i]))
        for i, key in enumerate(keys)
        if (kind := _kind_of(given[key]) if key in given else "")
    ]
    conditions += [
        (f"args[{i}].dtype == {given[key].dtype}", f"{names[i]}.dtype == {given[key].dtype}")
        for i, key in enumerate(keys)
        if key in typed
    ]
    for guard in guards:
        if "._base." in guard:  # of what an input is a view, which no graph reads
            continue
        condition, told = guard.replace("\n", " "), guard.replace("\n", " ")
        for i, key in enumerate(keys):
            condition = condition.replace("L" + key, f"args[{i}]")
            # what a forward takes as **kw, export finds in a dict of that name
            condition = re.sub(r"L\['\w+'\]" + re.escape(key), f"args[{i}]", condition)
            told = told.replace("L" + key, names[i])
        conditions.append((condition, told))
    return InputGuards(tuple(conditions))


_NUMBERS = (bool, int, float, complex, str)


def _kind_of(value: Any) -> str:
    """The condition, of what stands for ``{}``, that it is of the kind of an example."""
    if value is None:
        return "{} is None"
    if isinstance(value, Tensor):
        return "isinstance({}, Tensor)"
    kind = type(value)
    return f"type({{}}) is {kind.__name__}" if kind in (*_NUMBERS, list, tuple, dict) else ""


def guard_asked(
    graph_module: fx.GraphModule, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Has a symbolic trace check the kinds of inputs of which the model asked ``isinstance``."""
    inputs = graph_module.graph.find_nodes(op="placeholder")
    asked = [n for n in inputs if n.meta.get(ASKED)]
    if not asked:
        return
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    kinds = [_kind_of(bound.arguments.get(n.target, _NOTHING)) for n in asked]
    told = [
        (kind.format(f"args[{i}]"), kind.format(n.target))
        for i, (n, kind) in enumerate(zip(asked, kinds, strict=True))
        if kind
    ]
    graph_module.add_submodule("kinds_of_inputs", InputGuards(tuple(told)))
    with graph_module.graph.inserting_after(inputs[-1]):
        graph_module.graph.call_module("kinds_of_inputs", tuple(asked))
    graph_module.recompile()


def flattened(names: tuple[str, ...], given: Any, spec: Any) -> list[Any]:
    """The inputs of an exported graph, which are the leaves of what a call gives.

    Args:
        names: Of the forward's arguments, in the order of ``given``.
        given: ``(args, kwargs)``.
        spec: Their tree spec in the example.

    Raises:
        TypeError: An argument is nested otherwise than in the example.
    """
    args, kwargs = given
    specs = [one for part in spec.children() for one in part.children()]
    leaves: list[Any] = []
    for name, value, wanted in zip(names, [*args, *kwargs.values()], specs, strict=True):
        found = _leaves(value, wanted)
        if found is None:
            raise TypeError(
                f"the graph was exported for inputs with {name} = {_shape(wanted)}; transform the"
                f" model with an example like the inputs given: {name} = {_shape_of(value)}"
            )
        leaves += found
    return leaves


def _leaves(value: Any, spec: Any) -> list[Any] | None:
    """Of what is nested as ``spec`` says; None of anything else."""
    if spec.type is None:
        return [value]
    parts = _parts(value, spec)
    if parts is None:
        return None
    leaves: list[Any] = []
    for part, wanted in zip(parts, spec.children(), strict=True):
        found = _leaves(part, wanted)
        if found is None:
            return None
        leaves += found
    return leaves


def _parts(value: Any, spec: Any) -> list[Any] | None:
    """What lies in a container of the example's type, or of another mapping with its keys.

    In their order: a model may go through them.
    """
    keys = spec.context[1] if spec.type is defaultdict else spec.context
    is_mapping = spec.type in (dict, OrderedDict, defaultdict)
    if isinstance(value, fx.Proxy):  # of who traces the result
        places = keys if is_mapping else range(spec.num_children)
        return [operator.getitem(value, place) for place in places]
    if is_mapping:
        alike = isinstance(value, Mapping) and list(value) == list(keys)
        return list(value.values()) if alike else None
    parts, found = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
    alike = found.type is spec.type and found.context == spec.context
    return parts if alike and len(parts) == spec.num_children else None


class _Leaf(str):
    """Told as it is in the text of a container."""

    __repr__ = str.__str__


def _shape(spec: Any) -> str:
    try:
        return repr(pytree.tree_unflatten([_Leaf("*")] * spec.num_leaves, spec))
    except Exception:  # a container's own code ran, which may want tensors
        return str(spec)


def _shape_of(value: Any) -> str:
    try:
        return repr(pytree.tree_map(lambda leaf: _Leaf(type(leaf).__name__), value))
    except Exception:
        return str(pytree.tree_structure(value))


def _name(path: pytree.KeyPath) -> str:
    """An input as the user's code has it: ``batch['mask']``."""
    first: Any = path[0]
    return f"{first.key}{pytree.keystr(path[1:])}"


def _by_path(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The example inputs under the names that export has for them, by the paths to their leaves."""
    signature = inspect.signature(model.forward)
    given = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL:
            given |= {f"{name}_{i}": value for i, value in enumerate(given.pop(name, ()))}
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_leaves_with_path(dict(given))}


class _Typed(TorchFunctionMode):
    """Notes the paths of inputs of which code that is not PyTorch's reads the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[int, tuple[Tensor, str]] = {}  # by identity; kept alive
        self.typed: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _, path = self.inputs.get(id(args[0]), (None, "")) if len(args) == 1 else (None, "")
        if path and func in _TYPES and not _asked_by_torch():
            self.typed.add(path)
        return func(*args, **(kwargs or {}))


_TYPES = (
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    *(Tensor.type, Tensor.is_floating_point, Tensor.is_complex),
    *(torch.is_floating_point, torch.is_complex),
)


def _asked_by_torch() -> bool:
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__torch_function__":  # of other modes
        assert frame.f_back is not None
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).startswith(("torch.", "dropit_fx."))


@contextmanager
def noting_dtypes(model: nn.Module) -> Iterator[set[str]]:
    """Yields the paths of the inputs whose dtype the model reads while it is exported."""
    mode = _Typed()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = _by_path(model, args, kwargs)
        mode.inputs |= {id(x): (x, path) for path, x in found.items() if isinstance(x, Tensor)}

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with mode:
            yield mode.typed
    finally:
        hook.remove()


@contextmanager
def exporting_input_guards(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], typed: set[str]
) -> Iterator[None]:
    """Makes ``ExportedProgram.module()`` put :class:`InputGuards` in the place of its own check.

    ``typed``: what :func:`noting_dtypes` has found.
    """
    given = _by_path(model, args, kwargs)
    with guards_made_by(functools.partial(_of_export, given, typed)):
        yield
