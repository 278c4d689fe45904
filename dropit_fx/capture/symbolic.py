"""What makes a symbolic trace do as eager mode does: writes, own tensors, custom functions.

``torch.fx`` turns ``v *= 2`` into a new value, computes what the model makes of no input once and
for all, and traces a custom ``autograd.Function`` through its forward alone. Here each becomes a
node.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from dropit_fx.capture.input_guards import ASKED
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
    """A proxy that is written to where a tensor is, and notes who asks for its class."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What ``isinstance`` reads of an object that is none of the class by its type."""
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if self.node.op == "placeholder" and not asker.startswith(("torch.", "dropit_fx.")):
            self.node.meta[ASKED] = True
        return SymbolicProxy

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


class OwnNodes:
    """The nodes that stand for tensors which a trace has computed."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, fx.Node]] = {}  # by identity; kept alive
        self._made: set[fx.Node] = set()

    def add(self, node: fx.Node, tensor: Tensor | None = None) -> None:
        """Has a node stand for a tensor, if none does; or for what is on the way to some."""
        self._made.add(node)
        if tensor is not None:
            self._found.setdefault(id(tensor), (tensor, node))

    def get(self, value: Any) -> fx.Node | None:
        """The node of a tensor, None of anything else."""
        return self._found[id(value)][1] if id(value) in self._found else None

    def erase_unread(self, graph: fx.Graph) -> None:
        """Takes out of the graph what was made for tensors that nothing reads."""
        graph.eliminate_dead_code(lambda n: n not in self._made and n.op != "get_attr")


class _OwnTensors(TorchFunctionMode):
    """Makes nodes of what the model makes of numbers, draws, or computes of tensors of its own.

    What is computed of tensors that are no inputs, parameters or buffers (``self.table.exp()``)
    stays a tensor while tracing, so that its sizes are at hand; ``nodes`` knows the node that it
    stands for, which computes it in each call.
    """

    def __init__(self, tracer: fx.Tracer, nodes: OwnNodes) -> None:
        super().__init__()
        self.tracer = tracer
        self.nodes = nodes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = pytree.tree_leaves((args, kwargs))
        name = getattr(func, "__name__", "")
        tensors = [a for a in given if isinstance(a, Tensor)]
        recorded = torch.is_grad_enabled() or not any(t.requires_grad for t in tensors)
        if not recorded or any(isinstance(a, fx.Proxy) for a in given):
            return func(*args, **kwargs)
        made = func in MAKERS and not tensors and all(_plain(a) for a in given)
        if made and torch.is_grad_enabled():
            return self._proxy(func, args, kwargs)
        if tensors and (name in DRAWING or _writes(name)):
            return self._proxy(name if hasattr(Tensor, name) else func, args, kwargs)
        result = func(*args, **kwargs)
        if made or (tensors and name not in _NO_VALUES):
            self._remember(result, func, args, kwargs)
        return result

    def _remember(self, result: Any, func: Any, args: Any, kwargs: Any) -> None:
        """Makes the node of a computed tensor, or of each of a list of them."""
        several = isinstance(result, (tuple, list))
        results = list(result) if several else [result]
        if not results or not all(isinstance(r, Tensor) for r in results):
            return
        target = func
        if getattr(func, "__name__", "") == "__get__":  # of a property: `table.T`
            target, args = getattr, (*args[:1], func.__self__.__name__)
        elif is_tensor_method_or_property(func):
            target = func.__name__
        try:
            proxy = self._proxy(target, args, kwargs)
        except (NameError, NotImplementedError):  # of what no graph can be given
            return
        self.nodes.add(proxy.node)
        for i, tensor in enumerate(results):
            item = self._proxy(operator.getitem, (proxy, i), {}) if several else proxy
            self.nodes.add(item.node, tensor)

    def _proxy(self, target: Any, args: Any, kwargs: Any) -> fx.Proxy:
        kind = "call_method" if isinstance(target, str) else "call_function"
        with torch.enable_grad():  # nothing here requires a gradient where none are recorded
            return self.tracer.create_proxy(kind, target, tuple(args), dict(kwargs))


# They give back a tensor that they were given
_NO_VALUES = frozenset(("requires_grad_", "retain_grad", "register_hook", "backward"))


def _plain(value: Any) -> bool:
    kinds = (int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
    return value is None or isinstance(value, kinds)


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return (in_place and name != "requires_grad_") or name == "__setitem__"


@contextmanager
def as_in_eager(tracer: fx.Tracer, nodes: OwnNodes) -> Iterator[None]:
    """For the time of a trace, whose ``create_arg`` asks ``nodes`` first."""
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
        _OwnTensors(tracer, nodes),
    ):
        yield


def _is_written(node: fx.Node, buffer: str) -> bool:
    """Whether ``node`` is a chain of writes into the buffer of this name."""
    while node.op == "call_function" and getattr(node.target, "__name__", "") in _WRITES:
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "get_attr" and str(node.target).rpartition(".")[2] == buffer
