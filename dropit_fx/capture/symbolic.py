"""What makes a symbolic trace do as eager mode does: writes, own tensors, custom functions.

``torch.fx`` turns ``v *= 2`` into a new value, computes what the model makes of no input once and
for all, and traces a custom ``autograd.Function`` through its forward alone. Here each becomes a
node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from dropit_fx.ops.table import AUGMENTED, DRAWING
from dropit_fx.private import buffers, pytree

_WRITES = (*AUGMENTED, "imatmul")

# What makes a tensor of numbers alone.
MAKERS = frozenset(
    getattr(torch, name)
    for name in (
        *("zeros", "ones", "full", "empty", "empty_strided", "arange", "linspace", "logspace"),
        *("eye", "tensor", "scalar_tensor", "tril_indices", "triu_indices", "complex", "polar"),
        *("rand", "randn", "randint", "randperm", "normal", "bartlett_window", "blackman_window"),
        *("hamming_window", "hann_window", "kaiser_window", "range"),
    )
)


class SymbolicProxy(fx.Proxy):
    """A proxy that is written to where a tensor is."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise fx.proxy.TraceError(f"an attribute of a tensor is assigned: {name}")
        super().__setattr__(name, value)


def _writing(op: Callable[..., Any]) -> Callable[[SymbolicProxy, Any], fx.Proxy]:
    def write(self: SymbolicProxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", op, (self, other), {})

    return write


for _name in _WRITES:
    setattr(SymbolicProxy, f"__{_name}__", _writing(getattr(operator, _name)))


class CustomFunction:
    """``apply`` of a custom ``torch.autograd.Function``, as the target of a node."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = function.__name__
        self.__qualname__ = function.__qualname__
        self.__module__ = function.__module__

    def __call__(self, *args: Any) -> Any:
        """Runs it."""
        return self.function.apply(*args)

    def __repr__(self) -> str:
        return f"<custom function {self.__module__}.{self.__qualname__}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CustomFunction) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)


class _OwnTensors(TorchFunctionMode):
    """Makes nodes of what the model makes of numbers, draws, or writes into a tensor of its own."""

    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = pytree.tree_leaves((args, kwargs))
        name = getattr(func, "__name__", "")
        own = any(isinstance(a, Tensor) for a in given)
        if any(isinstance(a, fx.Proxy) for a in given) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in MAKERS and not own and all(_plain(a) for a in given):
            return self.tracer.create_proxy("call_function", func, tuple(args), dict(kwargs))
        if own and (name in DRAWING or _writes(name)):
            kind = "call_method" if hasattr(Tensor, name) else "call_function"
            target = name if kind == "call_method" else func
            return self.tracer.create_proxy(kind, target, tuple(args), dict(kwargs))
        return func(*args, **kwargs)


def _plain(value: Any) -> bool:
    kinds = (int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
    return value is None or isinstance(value, kinds)


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return (in_place and name != "requires_grad_") or name == "__setitem__"


@contextmanager
def as_in_eager(tracer: fx.Tracer) -> Iterator[None]:
    """For the time of a trace."""
    apply = vars(torch.autograd.Function)["apply"]
    assign = nn.Module.__setattr__

    def traced_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        proxies = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, fx.Proxy)]
        if not proxies:
            return apply.__get__(None, cls)(*args, **kwargs)
        if kwargs:
            raise fx.proxy.TraceError(f"{cls.__name__}.apply has keyword arguments")
        return tracer.create_proxy("call_function", CustomFunction(cls), args, {})

    def traced_assign(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, fx.Proxy) and name in buffers(module):
            if _is_written(value.node, name):
                return  # `self.count += 1` has written into the buffer, and assigns what it is
            raise fx.proxy.TraceError(f"another tensor is assigned to the buffer '{name}'")
        assign(module, name, value)

    with (
        mock.patch.object(torch.autograd.Function, "apply", classmethod(traced_apply)),
        mock.patch.object(nn.Module, "__setattr__", traced_assign),
        _OwnTensors(tracer),
    ):
        yield


def _is_written(node: fx.Node, buffer: str) -> bool:
    """Whether ``node`` is a chain of writes into the buffer of this name."""
    while node.op == "call_function" and getattr(node.target, "__name__", "") in _WRITES:
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "get_attr" and str(node.target).rpartition(".")[2] == buffer
