"""From a linear layer's logits to the losses that read them: what lies between, op by op.

Between them may stand what can be done to the layer's input instead (views, slices and parts of
rows), and what is done to each logit by itself (casts, scales, a soft cap). ``log_softmax`` may
stand anywhere before ``nll_loss`` and ``gather``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dropit_fx.ops.losses import deprecated_reduction, reduction_enum
from dropit_fx.ops.table import RULES, operands_of, rule_of
from dropit_fx.passes.match_layers import called, is_check
from dropit_fx.runtime.linear_loss import linear_cross_entropy, linear_log_probs, linear_logsumexp

_CASTS = ("float", "double", "half", "bfloat16", "to", "type", "to_copy")
_COPIES = ("contiguous", "clone")
_SCALES = {"mul": "mul", "div": "div", "truediv": "div"}
_SHAPES = ("view", "reshape", "unsafe_view")
_CUTS = {"slice": 1, "narrow": 1, "select": 1}  # the place of the dimension
_PARTS = {"unbind": 1, "chunk": 2, "split": 2, "split_with_sizes": 2}  # several results
_WHOLE = slice(None, None, None)


class NoMatch(Exception):
    """What keeps logits whole; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Path:
    """How a value comes from a layer's logits.

    Attributes:
        steps: What is done to each logit: see ``kernels/logits.py``.
        moves: What is done to the rows: from the layer's input to a node, each.
        log: Whether ``log_softmax`` is among it.
        nodes: The nodes between.
    """

    steps: tuple[tuple[str, float], ...] = ()
    moves: tuple[Callable[[fx.Graph, fx.Node], fx.Node], ...] = ()
    log: bool = False
    nodes: tuple[fx.Node, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A node that reads logits, and the function that takes the place of both.

    ``function(x, weight, bias, *args, steps=..., **kwargs)``.
    """

    node: fx.Node
    path: Path
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Output:
    """A reader of logits that is the graph's output."""

    node: fx.Node
    path: Path


class Matcher:
    """Follows the logits of one layer.

    Args:
        width: Elements of a row of the layer's input.
        values: Node name -> fake value, of the whole graph.
    """

    def __init__(self, width: int, values: Mapping[str, Any]) -> None:
        self.width, self.values = width, values

    def readers(self, node: fx.Node, path: Path = Path()) -> Iterator[Loss | Output]:
        """Every reader of ``node`` that is a loss or the output, however far behind.

        Raises:
            NoMatch: Another op reads them.
        """
        for user in node.users:
            if user.op == "output":
                if path.log:
                    raise NoMatch(f"the model returns '{node.name}'")
                yield Output(node=node, path=path)
            elif is_check(user):
                continue
            elif (loss := self._loss(user, node, path)) is not None:
                yield loss
            elif called(user) in _PARTS:
                for part, move in self._parts(user, node):
                    nodes = (*path.nodes, user, part)
                    yield from self.readers(
                        part, replace(path, moves=(*path.moves, move), nodes=nodes)
                    )
            else:
                further = self._step(user, node, path)
                yield from self.readers(user, replace(further, nodes=(*path.nodes, user)))

    def _loss(self, user: fx.Node, node: fx.Node, path: Path) -> Loss | None:
        """The loss that ``user`` is, or None."""
        name, z = called(user), self.values[node.name]
        if rule_of(user) is RULES["nll_loss" if path.log else "cross_entropy"]:
            return self._cross_entropy(user, node, path)
        if name == "gather" and path.log:
            dim, index = _arguments(user, node, "dim", "index")
            found = self.values[index.name] if isinstance(index, fx.Node) else index
            if dim in (-1, z.dim() - 1) and tuple(found.shape) == (*z.shape[:-1], 1):
                return Loss(
                    node=user, path=path, function=linear_log_probs, args=(index,), kwargs={}
                )
            raise NoMatch(f"'{user.name}' gathers more than one class of each row")
        if name == "logsumexp" and not path.log:
            dim, keepdim = _arguments(user, node, "dim", "keepdim")
            dims = [dim] if isinstance(dim, int) else list(dim)
            if dims in ([-1], [z.dim() - 1]):
                kwargs = {"keepdim": bool(keepdim)}
                return Loss(node=user, path=path, function=linear_logsumexp, kwargs=kwargs)
        return None

    def _cross_entropy(self, user: fx.Node, node: fx.Node, path: Path) -> Loss:
        call = operands_of(user)
        if call.get("input") is not node:
            raise NoMatch(f"'{user.name}' is called otherwise than with logits")
        if deprecated_reduction(call):
            raise NoMatch(f"'{user.name}' is called with deprecated arguments")
        target, z = self.values[call["target"].name], self.values[node.name]
        soft = target.is_floating_point()
        if target.dtype != torch.int64 and (path.log or not soft):
            raise NoMatch(f"the targets of '{user.name}' are no classes")
        if z.dim() != 2 or target.shape != (z.shape if soft else z.shape[:1]):
            raise NoMatch(f"'{user.name}' reads no matrix of rows and classes")
        kwargs = {
            "reduction": reduction_enum(call["reduction"]),
            "ignore_index": call["ignore_index"],
            "label_smoothing": call.get("label_smoothing", 0.0),
            "log_softmax": path.log,
        }
        args = call["target"], call["weight"]
        return Loss(node=user, path=path, function=linear_cross_entropy, args=args, kwargs=kwargs)

    def _step(self, user: fx.Node, node: fx.Node, path: Path) -> Path:
        """The path with one op more."""
        name, before, after = called(user), self.values[node.name], self.values[user.name]
        other = NoMatch(f"'{user.name}' ({name}) reads them")
        if not isinstance(after, Tensor):
            raise other
        if name in _COPIES:
            return path
        move = self._move(user, node, before, after)
        if move is not None:
            return replace(path, moves=(*path.moves, move))
        if path.log:
            raise other
        if name == "log_softmax":
            dim, dtype = _arguments(user, node, "dim", "dtype")
            if dim not in (-1, before.dim() - 1):
                raise other
            cast = ((_dtype(dtype), 0.0),) if isinstance(dtype, torch.dtype) else ()
            return replace(path, steps=(*path.steps, *cast), log=True)
        step = _logit_step(user, node, before, after)
        if step is None:
            raise other
        return replace(path, steps=(*path.steps, step))

    def _parts(
        self, user: fx.Node, node: fx.Node
    ) -> Iterator[tuple[fx.Node, Callable[[fx.Graph, fx.Node], fx.Node]]]:
        """What takes rows apart (a loop over them): each part, and how it comes of the input."""
        at, before = _PARTS[called(user)], self.values[node.name]
        dim = user.kwargs.get("dim", user.args[at] if len(user.args) > at else 0)
        plain = (
            user.args[0] is node and isinstance(dim, int) and dim % before.dim() < before.dim() - 1
        )
        for part in user.users:
            index = part.args[1] if called(part) == "getitem" else None
            if not plain or not isinstance(index, int) or not part.users:
                raise NoMatch(f"'{user.name}' ({called(user)}) reads them")

            def move(graph: fx.Graph, x: fx.Node, index: Any = index) -> fx.Node:
                return graph.call_function(operator.getitem, (_again(graph, user, x), index))

            yield part, move

    def _move(
        self, user: fx.Node, node: fx.Node, before: Tensor, after: Tensor
    ) -> Callable[[fx.Graph, fx.Node], fx.Node] | None:
        """What ``user`` does to rows, as something done to the layer's input; or None."""
        name, last = called(user), before.dim() - 1
        if not after.dim() or after.shape[-1] != before.shape[-1] or user.args[0] is not node:
            return None
        args = user.args[1:]
        if name in _SHAPES and not user.kwargs:
            given = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
            sizes = (*given[:-1], self.width)
            return lambda graph, x: graph.call_method("reshape", (x, sizes))
        if name == "flatten":
            start, end = _arguments(user, node, "start_dim", "end_dim")
            if end is not None and end % before.dim() < last:
                return lambda graph, x: graph.call_method("flatten", (x, start or 0, end))
        elif name in _CUTS:
            dim = user.kwargs.get("dim", args[0] if args else 0)
            if isinstance(dim, int) and dim % before.dim() < last:
                return lambda graph, x: _again(graph, user, x)
        elif name == "getitem" and _leaves_classes(args[0], before.dim(), self.values):
            return lambda graph, x: _again(graph, user, x)
        return None


def _again(graph: fx.Graph, user: fx.Node, x: fx.Node) -> fx.Node:
    """The call of ``user`` with another first argument."""
    return graph.create_node(user.op, user.target, (x, *user.args[1:]), dict(user.kwargs))


def _arguments(user: fx.Node, node: fx.Node, *names: str) -> tuple[Any, ...]:
    """The arguments behind ``node`` by name, None where they are not given."""
    if not user.args or user.args[0] is not node:
        raise NoMatch(f"'{user.name}' ({called(user)}) reads them")
    given = dict(zip(names, user.args[1:], strict=False)) | dict(user.kwargs)
    return tuple(given.get(name) for name in names)


def _leaves_classes(index: Any, dims: int, values: Mapping[str, Any]) -> bool:
    """Whether an index picks rows alone: by numbers and slices, each class of them."""
    parts = index if isinstance(index, tuple | list) else (index,)
    for part in parts:
        value = values.get(part.name) if isinstance(part, fx.Node) else part
        if isinstance(value, Tensor | list | tuple | bool):
            return False
    counted = [p for p in parts if p is not None and p is not Ellipsis]
    if Ellipsis in [p for p in parts if not isinstance(p, fx.Node)]:
        return parts[-1] is Ellipsis or parts[-1] == _WHOLE
    return len(counted) < dims or (len(counted) == dims and parts[-1] == _WHOLE)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _logit_step(
    user: fx.Node, node: fx.Node, before: Tensor, after: Tensor
) -> tuple[str, float] | None:
    """What ``user`` does to each logit by itself, or None."""
    name = called(user)
    others = [n for n in user.all_input_nodes if n is not node]
    if others or before.shape != after.shape or before.device != after.device:
        return None
    if name in _CASTS and after.is_floating_point() and user.args[0] is node:
        return _dtype(after.dtype), 0.0
    if name == "tanh":
        return "tanh", 0.0
    if name in _SCALES and len(user.args) == 2 and not user.kwargs:
        left, right = user.args
        if right is node and _SCALES[name] == "mul":
            left, right = right, left
        if left is node and isinstance(right, int | float):
            return _SCALES[name], float(right)
    return None
