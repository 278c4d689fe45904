"""What an exported graph assumes about its inputs, checked in each call.

``torch.export`` follows one branch of ``if x.shape[0] > 8`` and notes the condition. Its own check
of these conditions does not pickle; this one does. Any trace follows one branch of
``if isinstance(x, tuple)``: kinds of inputs are checked as well.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

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
    names["Tensor"] = (Tensor, fx.Proxy)  # who traces the result gives it neither
    exec("\n".join(lines), names)  # expressions that torch.export wrote
    check: Callable[..., None] = dont_skip_tracing(names["check"])
    return check


def _given(args: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else repr(a) for a in args)


def _of_export(
    given: Mapping[str, Any], guards: list[str], paths: list[pytree.KeyPath]
) -> InputGuards:
    """From export's expressions over ``L['x']`` and the paths of the graph's inputs.

    ``given``: the example by these paths. Export notes nothing of what was None, and of a number
    that it is equal; a forward that asks ``isinstance`` was traced for one kind.
    """
    keys = [pytree.keystr(path) for path in paths]
    names = [_name(path) for path in paths]
    conditions = [
        (kind.format(f"args[{i}]"), kind.format(names[i]))
        for i, key in enumerate(keys)
        if (kind := _kind_of(given[key]) if key in given else "")
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


@contextmanager
def exporting_input_guards(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Makes ``ExportedProgram.module()`` put :class:`InputGuards` in the place of its own check."""
    given = _by_path(model, args, kwargs)
    with guards_made_by(functools.partial(_of_export, given)):
        yield
