"""Which values of a graph a mask's constant may stand among: -1e9, the least number of the dtype.

Scores are masked with a number that no other comes near. A block of few bits that has it has no
levels left for the values beside it: they would all read as the same. An infinity is told apart by
the codecs, a number is not; so what may hold one is kept exactly.

What puts it there is seen in the graph: a fill with a large number, or a sum with what is made of
masks and such a number alone. What comes with the input is not.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator

from torch import Tensor, fx, nn

from dropit_fx.ops.table import is_inplace, operands_of
from dropit_fx.passes.plan import Plan
from dropit_fx.private import pytree
from dropit_fx.runtime.regions import name_of

LARGE = 1e4  # BERT's masks are made of -10000
_FILLS = {
    *("masked_fill", "index_fill", "fill", "where", "full", "full_like", "new_full"),
    *("scalar_tensor", "tensor", "index_put", "setitem", "masked_scatter", "scatter"),
    *("slice_scatter", "select_scatter", "copy", "pad", "constant_pad_nd"),
}
_SUMS = {
    *("add", "sub", "rsub", "iadd", "isub", "mul", "imul", "neg", "maximum", "minimum"),
    "log_softmax",
}
_ASKS = {"getattr", "size", "dim", "numel"}  # what gives no tensor
_CLAMPS = {"clamp", "clip", "clamp_min", "clamp_max"}
_MOVES = {
    *("view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("permute", "transpose", "swapaxes", "movedim", "t", "flip", "roll"),
    *("contiguous", "clone", "detach", "lift_fresh_copy", "alias", "requires_grad"),
    *("to", "float", "half", "bfloat16", "double", "type", "type_as", "to_copy"),
    *("expand", "expand_as", "repeat", "repeat_interleave", "cat", "concat", "stack"),
    *("getitem", "narrow", "slice", "select", "split", "chunk", "unbind"),
    *("gather", "index", "index_select", "take_along_dim"),
}


def mask_constants(plan: Plan) -> dict[str, float]:
    """The constant of greatest magnitude that may stand among a node's values, by its name.

    Only nodes whose values have one of at least ``LARGE``.
    """
    found: dict[fx.Node, float] = {}
    trained: set[fx.Node] = set()  # made of what gets a gradient
    inputs = iter(plan.inputs)
    for n in plan.module.graph.nodes:
        if n.op == "placeholder":
            value = next(inputs, None)
            if isinstance(value, Tensor) and value.requires_grad:
                trained.add(n)
            continue
        if n.op == "get_attr":
            value = operator.attrgetter(str(n.target))(plan.module)
            if isinstance(value, nn.Parameter):
                trained.add(n)
            elif (number := _number_of(value)) is not None:
                found[n] = number
            continue
        if name_of(n) not in _ASKS and not trained.isdisjoint(n.all_input_nodes):
            trained.add(n)
        if (constant := _constant(n, found, n in trained)) is not None:
            found[n] = constant
            if is_inplace(n, {}) or name_of(n) == "setitem":
                found[n.all_input_nodes[0]] = constant
    return {n.name: c for n, c in found.items() if n.op not in ("placeholder", "get_attr")}


def _constant(n: fx.Node, found: dict[fx.Node, float], trained: bool) -> float | None:
    name = name_of(n).rstrip("_").removeprefix("_")
    given = [found[m] for m in n.all_input_nodes if m in found]
    if name in _CLAMPS:
        bounds = operands_of(n)
        low, high = (bounds.get(end) for end in ("min", "max"))
        low = low if isinstance(low, int | float) else -math.inf
        high = high if isinstance(high, int | float) else math.inf
        given = [min(max(c, low), high) for c in given]
        given += [] if trained else [low, high]
    elif name in _FILLS or (name in _SUMS and not trained):
        given += _numbers(n)
    elif name not in _SUMS | _MOVES:
        return None
    large = [c for c in given if LARGE <= abs(c) < math.inf]
    return max(large, key=abs) if large else None


def _numbers(n: fx.Node) -> Iterator[float]:
    """The numbers among its arguments, which are no sizes."""
    for value in pytree.tree_leaves((n.args, n.kwargs)):
        if isinstance(value, float):
            yield value
        elif isinstance(value, int) and not isinstance(value, bool) and value < 0:
            yield float(value)


def _number_of(value: object) -> float | None:
    """What a constant of one element holds."""
    known = isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
    if not known or type(value) is not Tensor or value.device.type == "meta":
        return None
    return float(value.detach())
