"""What autocast makes of a call is asked of PyTorch: which policy an op has, no table here says.

A row whose backward is the generic one runs under autocast as it is, and so does its backward:
every cast inside is PyTorch's own. Other rows have formulas for given dtypes. Their operands are
cast first, to what autocast hands to the op: the op is run once on fake tensors of the same dtypes,
with autocast and without, and the casts are read off. That works for CUDA on a machine without one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from dropit_fx.ops.rule import OpRule
from dropit_fx.ops.table import RULES
from dropit_fx.private import (
    FakeTensorMode,
    TorchDispatchMode,
    constant_to_dynamo,
    hint,
    pytree,
    to_copy,
)

R = TypeVar("R")
Casts = tuple[torch.dtype | None, ...]  # of each argument; None: it is handed over as it is
_States = tuple[tuple[str, torch.dtype], ...]  # device types under autocast, with its dtype there
_ANSWERS: dict[Any, Casts] = {}
_NAMED_AS_THEY_ARE = frozenset({bool, int, str})  # in a key; a NaN is equal to none


def under_autocast(values: Mapping[str, Any]) -> bool:
    """Whether autocast is on for a device of one of the tensors."""
    return any(map(autocast_on, {v.device.type for v in values.values() if isinstance(v, Tensor)}))


def autocast_on(device: str) -> bool:
    """Whether autocast is on for a type of device; some know none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on a type of device; None: it is off."""
    return torch.get_autocast_dtype(device) if autocast_on(device) else None


def autocast_as(dtype: torch.dtype | None, device: str) -> AbstractContextManager[Any]:
    """Autocast with ``dtype``, or none; to enter a context takes time."""
    if dtype is None and not autocast_on(device):
        return nullcontext()
    return torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context without autocast on a type of device, where it is on.

    PyTorch's own takes ten times as long, for what a switch inside of autocast does not need.
    """
    if torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)
    return _Off(device)


class _Off:
    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.was = torch.is_autocast_enabled(self.device)
        torch.set_autocast_enabled(self.device, False)

    def __exit__(self, *exception: object) -> None:
        torch.set_autocast_enabled(self.device, self.was)


def runs_as_it_is(rule: OpRule) -> bool:
    """Whether a row leaves the casts to autocast, in the forward and in the backward."""
    return rule.backward is None and rule.run_saving is None


def cast_operands(rule: OpRule, values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a row's call, its tensors as autocast would hand them to the op."""
    if torch.compiler.is_dynamo_compiling():
        _let_dynamo_pass()
    tensors = iter(_cast(rule.name, *values.values()))
    return {n: next(tensors) if isinstance(v, Tensor) else v for n, v in values.items()}


def _cast(rule_name: str, *values: Any) -> tuple[Tensor, ...]:
    """The tensors among ``values``, cast; what a graph of Dynamo's calls and does not look into."""
    casts = asked(RULES[rule_name], values)
    return tuple(
        v if dtype is None else v.to(dtype)
        for v, dtype in zip(values, casts, strict=True)
        if isinstance(v, Tensor)
    )


@constant_to_dynamo
def _let_dynamo_pass() -> None:
    """Dynamo is not to be loaded before it is used: this runs while it traces a packed call."""
    torch.compiler.allow_in_graph(_cast)  # type: ignore[no-untyped-call]


def asked(rule: OpRule, values: tuple[Any, ...]) -> Casts:
    """The dtype to which autocast, as it is now, casts each argument of a call."""
    devices = {v.device.type for v in values if isinstance(v, Tensor)}
    states = tuple((d, torch.get_autocast_dtype(d)) for d in sorted(devices) if autocast_on(d))
    key = rule.name, states, tuple(map(_described, values))
    if key not in _ANSWERS:
        _ANSWERS[key] = elsewhere(lambda: _ask(rule, values, states))
    return _ANSWERS[key]


def _described(value: Any) -> Any:
    """What of an argument the casts may depend on; the size of a tensor is none of it."""
    if isinstance(value, Tensor):
        return value.device.type, value.dtype, value.dim()
    if value is None or type(value) in _NAMED_AS_THEY_ARE:
        return type(value), value  # True is 1 to a dictionary
    if type(value) is float:
        return repr(value)
    if type(value) in (tuple, torch.Size) and all(type(v) is int for v in value):
        return tuple, tuple(value)
    return str(pytree.tree_map_only(torch.SymInt, hint, value))


def elsewhere(function: Callable[[], R]) -> R:
    """The result of ``function`` in a thread of its own.

    Modes, transforms and autocast belong to a thread: whatever the caller is in, here is nothing.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _ask(rule: OpRule, values: tuple[Any, ...], states: _States) -> Casts:
    floats = [isinstance(v, Tensor) and v.is_floating_point() for v in values]
    with FakeTensorMode(), torch.no_grad():
        fakes = [_fake(v) for v in values]
        plain, dtype = _observed_plain(rule, fakes)
        with _autocast_of(states):
            found, result = _observed(rule, fakes)
    casts = tuple(a if a != b else None for a, b in zip(found, plain, strict=True))
    if dtype not in (None, result) and not any(casts):
        # it told the op what to return: from operands of that dtype, the op returns it by itself
        return tuple(result if given else None for given in floats)
    return casts


def _fake(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return pytree.tree_map_only(torch.SymInt, hint, value)
    sizes, strides = map(hint, value.shape), map(hint, value.stride())
    return torch.empty_strided(tuple(sizes), tuple(strides), dtype=value.dtype, device=value.device)


def _observed_plain(rule: OpRule, values: list[Any]) -> tuple[Casts, torch.dtype | None]:
    """As :func:`_observed`; of dtypes that only autocast lets meet in the op, nothing."""
    try:
        with _unlogged():
            return _observed(rule, values)
    except RuntimeError:
        return (None,) * len(values), None


@contextmanager
def _unlogged() -> Iterator[None]:
    """An op that refuses its operands is an answer here; PyTorch logs it as an error."""
    logger, here = logging.getLogger(FakeTensorMode.__module__), threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != here

    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


def _observed(rule: OpRule, values: list[Any]) -> tuple[Casts, torch.dtype]:
    """To what each argument is cast at first, and the dtype of the result."""
    with _Casts(values) as seen:
        result = pytree.tree_leaves(rule.run(*values))[0]
    return tuple(seen.casts.get(id(v)) for v in values), result.dtype


class _Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes to what tensors are cast."""

    def __init__(self, values: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of = {id(v) for v in values if isinstance(v, Tensor)}
        self.casts: dict[int, torch.dtype] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is to_copy.default and id(args[0]) in self.of:
            self.casts.setdefault(id(args[0]), result.dtype)
        return result


@contextmanager
def _autocast_of(states: _States) -> Iterator[None]:
    """Autocast in this thread; its own context refuses a device that is not there."""
    was = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d, _ in states]
    for device, dtype in states:
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        for device, enabled, dtype in was:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
