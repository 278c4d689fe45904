"""A linear layer, whatever it is spelled as: a product of rows with a matrix, and its bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from dropit_fx.ops.table import RULES, operands_of, rule_of
from dropit_fx.runtime.regions import name_of

_PRODUCTS = {
    "linear": ("input", "weight", "bias"),
    "matmul": ("input", "other", "bias"),
    "mm": ("input", "mat2", "bias"),
    "addmm": ("mat1", "mat2", "input"),
}
_TURNS = ("t", "transpose", "swapaxes", "swapdims", "permute", "numpy_T", "getattr")
_CHECKS = ("assert_tensor_metadata",)  # of torch.export: they read no value


def called(node: fx.Node) -> str:
    """What a node calls, without overload and underscores: ``mul`` of ``__mul__``."""
    return name_of(node).strip("_")


def is_check(node: fx.Node) -> bool:
    """Whether a node reads only what kind of tensor it is given."""
    return called(node) in _CHECKS and not node.users


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A product of rows with a matrix, whatever it is spelled as: ``F.linear(x, weight, bias)``.

    Attributes:
        node: What makes the logits.
        nodes: What else goes with it.
        x, weight, bias: The operands; ``weight`` is (classes, width).
        transposed: Whether ``weight`` stands in the graph as (width, classes).
    """

    node: fx.Node
    nodes: tuple[fx.Node, ...] = ()
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None
    transposed: bool = False


def layer_of(node: fx.Node, values: Mapping[str, Any]) -> Layer | None:
    """The layer that ``node`` is, of float tensors: ``linear``, ``x @ w.t()``, ``addmm``; or None.

    A bias that is added to a product belongs to it.
    """
    rule = rule_of(node)
    if rule is None or rule.name not in _PRODUCTS:
        return None
    call = operands_of(node)
    if call.get("beta", 1) != 1 or call.get("alpha", 1) != 1:
        return None
    operands: list[Any] = [call.get(name) for name in _PRODUCTS[rule.name]]
    x, weight, bias = operands
    given = operands if bias is not None else operands[:2]
    if not all(_is_float(n, values) for n in (node, *given)):
        return None
    made = Layer(node=node, x=x, weight=weight, bias=bias, transposed=rule is not RULES["linear"])
    if values[weight.name].dim() != 2 or values[node.name].dim() < 2:
        return None
    if made.transposed:
        source = _turned(weight, values)
        made = replace(made, weight=source or weight, transposed=source is None)
        made = _with_bias(made, values)
    classes = values[node.name].shape[-1:]
    if made.bias is not None and values[made.bias.name].shape != classes:
        return None
    return made


def _is_float(node: Any, values: Mapping[str, Any]) -> bool:
    value = values.get(node.name) if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_floating_point()


def _turned(node: fx.Node, values: Mapping[str, Any]) -> fx.Node | None:
    """The matrix of which ``node`` is the transpose, or None."""
    sources = node.all_input_nodes
    if called(node) not in _TURNS or len(sources) != 1 or not _is_float(sources[0], values):
        return None
    before, after = values[sources[0].name], values[node.name]
    turned = before.dim() == 2 and (before.shape, before.stride()) == (
        after.shape[::-1],
        after.stride()[::-1],
    )
    return sources[0] if turned else None


def _with_bias(layer: Layer, values: Mapping[str, Any]) -> Layer:
    """The layer with what is added to its product, where that is a bias and all that reads it."""
    users = [user for user in layer.node.users if not is_check(user)]
    if layer.bias is not None or len(users) != 1 or called(users[0]) != "add":
        return layer
    (add,) = users
    others = [n for n in add.all_input_nodes if n is not layer.node]
    if len(add.args) != 2 or len(others) != 1 or add.kwargs not in ({}, {"alpha": 1}):
        return layer
    (bias,) = others
    logits = values[layer.node.name]
    if not _is_float(bias, values) or values[bias.name].shape != logits.shape[-1:]:
        return layer
    if values[add.name].dtype != logits.dtype:
        return layer
    return replace(layer, node=add, nodes=(*layer.nodes, layer.node), bias=bias)
