"""Calls of every op of the table, as graphs whose operands are intermediate tensors.

Autograd's saved tensors count only where they are not the model's inputs, so each tensor argument
comes from a placeholder through ``* 1``, which keeps its strides, and then through a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from dropit_fx.api import rewrite
from dropit_fx.config import load_config
from dropit_fx.core_types import Plan
from dropit_fx.op_table import RULES

LOSSLESS: dict[str, Any] = {
    "preset": None,
    "force": True,
    "rules": [{"codec": "mink", "gamma": 0.0}, {"codec": "bitmask"}],
}


@dataclass(frozen=True)
class T:
    """A tensor argument: its shape in memory, and the view of it that the op gets."""

    shape: tuple[int, ...]
    view: Callable[[Any], Any] = lambda x: x
    format: torch.memory_format = torch.contiguous_format


@dataclass(frozen=True)
class Case:
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    copies: int = 0  # operands of which the op keeps a copy that it made inside

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Fresh leaves for the graph's placeholders, the same at every call."""
        generator = torch.Generator().manual_seed(7)
        return [
            torch.randn(s.shape, generator=generator)
            .to(dtype)
            .contiguous(memory_format=s.format)
            .requires_grad_()
            for s in pytree.tree_leaves((self.args, self.kwargs))
            if isinstance(s, T)
        ]


def case(name: str, *args: Any, **kwargs: Any) -> Case:
    return Case(name, args, kwargs)


def graph_of(target: Any, case: Case) -> fx.GraphModule:
    """A graph of one call of ``target``: a function, an overload, or the name of a method."""
    graph = fx.Graph()
    count = iter(range(99))

    def operand(spec: T) -> fx.Node:
        leaf = fx.Proxy(graph.placeholder(f"t{next(count)}"))
        return spec.view(leaf * 1).node

    args, kwargs = pytree.tree_map_only(T, operand, (case.args, dict(case.kwargs)))
    call = graph.call_method if isinstance(target, str) else graph.call_function
    graph.output(call(target, args, kwargs))
    return fx.GraphModule({}, graph)


def pack_graph(
    graph: fx.GraphModule, tensors: list[Tensor], config: Mapping[str, Any]
) -> tuple[fx.GraphModule, Plan]:
    """A rewritten copy of ``graph``, and the plan behind it."""
    copy = fx.GraphModule(graph, fx.Graph())
    copy.graph.output(copy.graph.graph_copy(graph.graph, {}))
    plan = rewrite(copy, load_config(config), tuple(tensors), {})
    return copy, plan


def run(
    function: Callable[..., Any], tensors: list[Tensor], seed: int = 3
) -> tuple[Tensor, list[Tensor | None]]:
    """The result and the gradients of every tensor, for a random cotangent."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    torch.manual_seed(seed)
    out = function(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    generator = torch.Generator().manual_seed(11)
    cotangent = torch.randn(out.shape, generator=generator).to(out.dtype)
    grads = iter(torch.autograd.grad(out, wanted, cotangent, allow_unused=True))
    return out.detach(), [next(grads) if t.requires_grad else None for t in leaves]


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit (NaN equals NaN)."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _t(x: Any) -> Any:
    return x.transpose(-1, -2)


LAST = torch.channels_last
LAST3D = torch.channels_last_3d


def _conv(d: int, transposed: bool) -> list[Case]:
    size = {1: (12,), 2: (9, 8), 3: (6, 5, 6)}[d]
    kernel = (3, 2, 3)[:d]
    x, w = T((2, 4, *size)), T((4, 6, *kernel) if transposed else (6, 4, *kernel))
    b = T((6,))
    grouped = T((4, 3, *kernel) if transposed else (6, 2, *kernel))
    out = [
        case("plain", x, w, b),
        case("no bias", x, w),
        case("stride, padding", x, w, b, stride=2, padding=1),
        case("per dimension", x, w, b, stride=(2, 1, 1)[:d], padding=(1, 0, 1)[:d]),
        case("one-tuples", x, w, b, stride=(2,), padding=(1,)),
        case("dilation", x, w, b, dilation=2),
        case("groups", x, grouped, b, groups=2),
        case("kernel of one", x, T((4, 6, *[1] * d) if transposed else (6, 4, *[1] * d)), b),
        case("unbatched", T(x.shape[1:]), w, b),
        case("transposed memory", T(x.shape, _t if d > 1 else lambda v: v), w, b),
        case("one channel of a batch of one", T((1, 1, *size)), T((1, 1, *kernel))),
        case("empty batch", T((0, 4, *size)), w, b),
        case("slice", T((2, 8, *size), lambda v: v[:, ::2]), w, b),
        case("expanded", T((1, 4, *size), lambda v: v.expand(2, *[-1] * (d + 1))), w, b),
    ]
    if d > 1:
        last = LAST if d == 2 else LAST3D
        out.append(case("channels_last", T(x.shape, format=last), T(w.shape, format=last), b))
        out.append(case("channels_last input", T(x.shape, format=last), w, b, padding=1))
    if transposed:
        out.append(case("output_padding", x, w, b, stride=2, output_padding=1))
    else:
        odd = T((6, 4, *[3] * d))
        out.append(case("same", x, odd, b, padding="same"))
        even = T((6, 4, *[2] * d))
        out.append(Case("same, even kernel", (x, even, b), {"padding": "same"}, copies=1))
        out.append(case("same, dilated", x, odd, b, padding="same", dilation=2))
        out.append(case("valid", x, w, b, stride=2, padding="valid"))
        out.append(case("depthwise", x, T((4, 1, *kernel)), T((4,)), groups=4))
    return out


def _pool(d: int) -> list[Case]:
    size = (9, 8, 7)[:d] if d > 1 else (13,)
    x = T((2, 3, *size))
    out = [
        case("plain", x, 2),
        case("overlapping", x, 3, 1),
        case("padding", x, 3, 2, 1),
        case("dilation", x, 2, 1, 0, 2),
        case("ceil_mode", x, 3, 2, ceil_mode=True),
        case("ceil_mode, padding, dilation", x, 3, 2, 1, 2, ceil_mode=True),
        case("stride zero is kernel", x, 2, None, 1),
        case("per dimension", x, (3, 2, 1)[:d], (1, 2, 1)[:d]),
        case("one-tuple", x, (2,), (1,)),
        case("window of one", x, 1, 2),
        case("unbatched", T((3, *size)), 2),
        case("transposed memory", T(x.shape, _t), 2),
    ]
    if d > 1:
        out.append(case("channels_last", T(x.shape, format=LAST if d == 2 else LAST3D), 3, 2, 1))
        out.append(case("empty batch", T((0, 3, *size)), 2))
    return out


def _pointwise(*settings: dict[str, Any]) -> list[Case]:
    out = [
        case("1-D", T((33,))),
        case("4-D", T((2, 3, 5, 7))),
        case("scalar", T(())),
        case("transposed memory", T((6, 9), _t)),
        case("channels_last", T((2, 3, 5, 7), format=LAST)),
        case("slice", T((6, 9), lambda v: v[:, ::2])),
        case("empty", T((0, 5))),
    ]
    return out + [case(f"{s}", T((4, 9)), **s) for s in settings]


def _matmul() -> list[Case]:
    ranks = {
        "1x1": ((5,), (5,)),
        "1x2": ((5,), (5, 4)),
        "1x3": ((5,), (3, 5, 4)),
        "1x4": ((5,), (2, 3, 5, 4)),
        "2x1": ((6, 5), (5,)),
        "2x2": ((6, 5), (5, 4)),
        "2x3": ((6, 5), (3, 5, 4)),
        "2x4": ((6, 5), (2, 3, 5, 4)),
        "3x1": ((3, 6, 5), (5,)),
        "3x2": ((3, 6, 5), (5, 4)),
        "3x3": ((3, 6, 5), (3, 5, 4)),
        "3x4": ((3, 6, 5), (2, 3, 5, 4)),
        "4x1": ((2, 3, 6, 5), (5,)),
        "4x2": ((2, 3, 6, 5), (5, 4)),
        "4x3": ((2, 3, 6, 5), (3, 5, 4)),
        "4x4": ((2, 3, 6, 5), (2, 3, 5, 4)),
        "broadcast left": ((1, 6, 5), (3, 5, 4)),
        "broadcast right": ((3, 6, 5), (1, 5, 4)),
        "broadcast both": ((2, 1, 6, 5), (1, 3, 5, 4)),
        "no rows": ((0, 5), (5, 4)),
        "nothing to sum": ((6, 0), (0, 4)),
        "batch of one": ((1, 6, 5), (1, 5, 4)),
        "batches of one": ((1, 1, 6, 5), (1, 1, 5, 4)),
        "no batch": ((0, 6, 5), (0, 5, 4)),
    }
    # expanded and folded inside
    copies = dict.fromkeys(("1x3", "1x4", "2x3", "2x4", "3x4", "4x3", "broadcast left"), 1)
    copies["broadcast both"] = 2
    out = [Case(name, (T(a), T(b)), copies=copies.get(name, 0)) for name, (a, b) in ranks.items()]
    out += [
        case("transposed left", T((5, 6), _t), T((5, 4))),
        case("transposed right", T((6, 5)), T((4, 5), _t)),
        case("q @ k^T", T((2, 3, 6, 5)), T((2, 3, 6, 5), _t)),
        case("expanded", T((1, 6, 5), lambda v: v.expand(3, 6, 5)), T((3, 5, 4))),
        case("slice", T((3, 6, 10), lambda v: v[..., ::2]), T((5, 4))),
        case(
            "heads",
            T((2, 6, 3, 5), lambda v: v.transpose(1, 2)),
            T((2, 6, 3, 5), lambda v: v.permute(0, 2, 3, 1)),
        ),
    ]
    return out


def _bmm(*front: T) -> list[Case]:
    return [
        case("plain", *front, T((3, 6, 5)), T((3, 5, 4))),
        case("transposed left", *front, T((3, 5, 6), _t), T((3, 5, 4))),
        case("transposed right", *front, T((3, 6, 5)), T((3, 4, 5), _t)),
        case("expanded", *front, T((1, 6, 5), lambda v: v.expand(3, 6, 5)), T((3, 5, 4))),
    ]


def _mm(*front: T) -> list[Case]:
    return [
        case("plain", *front, T((6, 5)), T((5, 4))),
        case("transposed left", *front, T((5, 6), _t), T((5, 4))),
        case("transposed right", *front, T((6, 5)), T((4, 5), _t)),
        case("transposed both", *front, T((5, 6), _t), T((4, 5), _t)),
        case("slice", *front, T((6, 10), lambda v: v[:, ::2]), T((5, 4))),
    ]


CASES: dict[str, list[Case]] = {
    "linear": [
        case("2-D", T((6, 5)), T((4, 5)), T((4,))),
        case("2-D no bias", T((6, 5)), T((4, 5))),
        case("1-D", T((5,)), T((4, 5)), T((4,))),
        case("1-D no bias", T((5,)), T((4, 5))),
        case("3-D", T((2, 6, 5)), T((4, 5)), T((4,))),
        case("3-D no bias", T((2, 6, 5)), T((4, 5))),
        case("4-D", T((2, 3, 6, 5)), T((4, 5)), T((4,))),
        case("transposed", T((5, 6), _t), T((4, 5)), T((4,))),
        case("transposed no bias", T((5, 6), _t), T((4, 5))),
        case("3-D transposed", T((2, 5, 6), _t), T((4, 5)), T((4,))),
        case("batch second", T((6, 2, 5), lambda v: v.transpose(0, 1)), T((4, 5)), T((4,))),
        case("slice", T((2, 6, 10), lambda v: v[..., ::2]), T((4, 5)), T((4,))),
        case("first token", T((2, 6, 5), lambda v: v[:, 0]), T((4, 5)), T((4,))),
        case("expanded", T((1, 6, 5), lambda v: v.expand(3, 6, 5)), T((4, 5)), T((4,))),
        case("transposed weight", T((6, 5)), T((5, 4), _t), T((4,))),
        case("one row", T((1, 5)), T((4, 5)), T((4,))),
        case("one column", T((6, 1)), T((4, 1)), T((4,))),
        case("nothing to sum", T((6, 0)), T((4, 0)), T((4,))),
        case("no output", T((6, 5)), T((0, 5)), T((0,))),
        case("one output", T((6, 5)), T((1, 5)), T((1,))),
        case("empty batch", T((0, 5)), T((4, 5)), T((4,))),
        case("empty 3-D", T((2, 0, 5)), T((4, 5)), T((4,))),
        case("vector weight", T((6, 5)), T((5,))),
    ],
    **{f"conv{d}d": _conv(d, transposed=False) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _conv(d, transposed=True) for d in (1, 2, 3)},
    "matmul": _matmul(),
    "mm": _mm(),
    "bmm": _bmm(),
    "addmm": [
        *_mm(T((4,))),
        case("full", T((6, 4)), T((6, 5)), T((5, 4))),
        case("column", T((6, 1)), T((6, 5)), T((5, 4))),
        case("scalar", T(()), T((6, 5)), T((5, 4))),
        case("alpha, beta", T((4,)), T((6, 5)), T((5, 4)), beta=0.5, alpha=3.0),
        case("beta zero", T((4,)), T((6, 5)), T((5, 4)), beta=0),
    ],
    "baddbmm": [
        *_bmm(T((3, 6, 4))),
        case("row", T((4,)), T((3, 6, 5)), T((3, 5, 4))),
        case("alpha, beta", T((6, 4)), T((3, 6, 5)), T((3, 5, 4)), beta=2, alpha=0.25),
        case("beta zero", T((1, 6, 4)), T((3, 6, 5)), T((3, 5, 4)), beta=0),
    ],
    "relu": _pointwise(),
    "relu6": _pointwise(),
    "hardtanh": _pointwise({"min_val": -0.3, "max_val": 0.8}),
    "leaky_relu": _pointwise({"negative_slope": 0.2}, {"negative_slope": 0.0}),
    "dropout": _pointwise({"p": 0.1}, {"p": 0.3}, {"p": 0.9}),
    **{f"max_pool{d}d": _pool(d) for d in (1, 2, 3)},
}


def spellings() -> list[Any]:
    """(rule name, target) for every target of every row."""
    return [(name, target) for name, rule in RULES.items() for target in rule.targets]


def spelled(name: str, target: Any) -> Case:
    """The first case of a row, in arguments that this spelling takes."""
    first = CASES[name][0]
    if isinstance(target, torch._ops.OpOverload) and target._overloadname == "padding":
        d = int(name[4])
        return case("padding", first.args[0], T((6, 4, *[3] * d)), T((6,)), [1] * d, "same")
    if name == "dropout":
        return case("p, train", T((4, 9)), 0.5, True)
    return first
