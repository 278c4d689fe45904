"""Calls of every op of the table, as graphs whose operands are intermediate tensors.

Autograd's saved tensors count only where they are not the model's inputs, so each tensor argument
comes from a placeholder through a copy, which keeps its strides, and then through a view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, fx

from dropit_fx.api import rewrite
from dropit_fx.config import load_config
from dropit_fx.ops.table import OP_RULES, RULES, bind
from dropit_fx.passes.find_saved import NUMBER
from dropit_fx.passes.plan import Plan
from dropit_fx.private import minor
from dropit_fx.runtime.packed_call import PACKED_OPS

LOSSLESS: dict[str, Any] = {
    "preset": None,
    "force": True,
    "rules": [
        {"codec": "mink", "gamma": 0.0},
        {"codec": "bitmask"},
        {"codec": "quant", "bits": None},
    ],
}


@dataclass(frozen=True)
class T:
    """A tensor argument: its shape in memory, and the view of it that the op gets.

    ``make`` is for what has no gradient: class indices, masks, statistics. It gets the shape and a
    random generator; of what it returns, only floats take the dtype of the call.
    """

    shape: tuple[int, ...]
    view: Callable[[Any], Any] = lambda x: x
    format: torch.memory_format = torch.contiguous_format
    make: Callable[[tuple[int, ...], torch.Generator], Tensor] | None = None

    def tensor(self, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """A fresh leaf."""
        if self.make is not None:
            made = self.make(self.shape, generator)
            return made.to(dtype) if made.is_floating_point() else made
        x = torch.randn(self.shape, generator=generator).to(dtype)
        return x.contiguous(memory_format=self.format).requires_grad_()


@dataclass(frozen=True)
class Case:
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    copies: int = 0  # operands of which the op keeps a copy that it made inside
    rounds: str = ""  # why the last bits of its gradients may differ
    obstacle: str = ""  # why the row does not cover it

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Fresh leaves for the graph's placeholders, the same at every call."""
        generator = torch.Generator().manual_seed(7)
        return [spec.tensor(dtype, generator) for spec in self.specs()]

    def specs(self) -> list[T]:
        """Its tensor arguments, in the order of the graph's placeholders."""
        return [s for s in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(s, T)]


def case(name: str, *args: Any, **kwargs: Any) -> Case:
    return Case(name, args, kwargs)


def graph_of(target: Any, case: Case) -> fx.GraphModule:
    """A graph of one call of ``target``: a function, an overload, or the name of a method."""
    graph = fx.Graph()
    count = iter(range(99))

    def operand(spec: T) -> fx.Node:
        leaf = fx.Proxy(graph.placeholder(f"t{next(count)}"))
        return spec.view(leaf.clone()).node

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
    grads = iter(torch.autograd.grad(out, wanted, cotangent(out), allow_unused=True))
    return out.detach(), [next(grads) if t.requires_grad else None for t in leaves]


def cotangent(out: Tensor) -> Tensor:
    """The random gradient of ``out`` that :func:`run` begins with."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(out.shape, generator=generator).to(out)


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit (NaN equals NaN)."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_agrees(call: Case, packed: Any, dense: Any) -> None:
    """Results to the last bit; gradients too, unless the case says why they are rounded anew."""
    assert_same(packed[0], dense[0])
    if call.rounds:
        eps = torch.finfo(dense[0].dtype).eps if dense[0].is_floating_point() else 0.0
        within = {"rtol": 2 * eps, "atol": eps} if eps > 1e-4 else {}  # of half precision, two ulps
        torch.testing.assert_close(packed[1], dense[1], equal_nan=True, **within)
    else:
        assert_same(packed[1], dense[1])


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


GATHERED = "what is unpacked has no gaps, and its elements are taken in vectors"


def _pointwise(*settings: dict[str, Any], rounds: str = "") -> list[Case]:
    out = [
        case("1-D", T((33,))),
        case("4-D", T((2, 3, 5, 7))),
        case("scalar", T(())),
        case("transposed memory", T((6, 9), _t)),
        case("channels_last", T((2, 3, 5, 7), format=LAST)),
        Case("slice", (T((6, 9), lambda v: v[:, ::2]),), rounds=rounds),
        case("empty", T((0, 5))),
    ]
    return out + [case(f"{s}", T((4, 9)), **s) for s in settings]


def _arithmetic(number_first: str = "") -> list[Case]:
    x = T((2, 3, 5, 7))
    return [
        case("same shape", x, x),
        case("row", x, T((7,))),
        case("channel", x, T((1, 3, 1, 1))),
        case("row first", T((5, 1)), x),
        case("both broadcast", T((2, 1, 5, 1)), T((3, 1, 7))),
        case("scalar", x, T(())),
        case("scalar first", T(()), x),
        case("scalars", T(()), T(())),
        case("number", x, 3.0),
        case("integer", x, 3),
        Case("number first", (3.0, x), obstacle=number_first),
        case("transposed memory", T((6, 9), _t), T((9, 6))),
        case("transposed twice", T((6, 9), _t), T((6, 9), _t)),
        case("channels_last", T(x.shape, format=LAST), T((3, 1, 1))),
        case("slice", T((6, 9), lambda v: v[:, ::2]), T((6, 5))),
        case("expanded", T((1, 5), lambda v: v.expand(6, 5)), T((6, 5))),
        case("empty", T((0, 5)), T((5,))),
        case("constant", x, T(x.shape, make=positive)),
        case("constant first", T((5, 7), make=positive), x),
    ]


def positive(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) + 0.5


def coins(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A mask that lets about two of three through, and the first of each row."""
    mask = torch.rand(shape, generator=generator) < 0.67
    mask[..., 0] = True
    return mask


def biases(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def classes(count: int, ignored: int | None = None) -> Any:
    """Indices of classes; with ``ignored``, every third is that number."""

    def make(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        found = torch.randint(count, shape, generator=generator)
        if ignored is not None:
            found.view(-1)[::3] = ignored
        return found

    return make


def _norm() -> list[Case]:
    """Calls of layer_norm or rms_norm without a bias."""
    x, w = T((2, 6, 5)), T((5,))
    return [
        case("no affine", x, (5,)),
        case("weight alone", x, (5,), w),
        case("eps", x, (5,), w, eps=0.3),
        case("1-D", T((5,)), [5], w),
        case("two dimensions", x, (6, 5), T((6, 5))),
        case("every dimension", x, (2, 6, 5)),
        case("transposed memory", T((2, 5, 6), _t), (5,), w),
        case("batch second", T((6, 2, 5), lambda v: v.transpose(0, 1)), (5,), w),
        case("channels_last", T((2, 3, 6, 5), format=LAST), (5,), w),
        case("channels last permuted", T((2, 5, 3, 4), lambda v: v.permute(0, 2, 3, 1)), (5,), w),
        case("slice", T((2, 6, 10), lambda v: v[..., ::2]), (5,), w),
        case("first token", T((2, 6, 5), lambda v: v[:, 0]), (5,), w),
        case("expanded", T((1, 6, 5), lambda v: v.expand(3, 6, 5)), (5,), w),
        case("one element", T((4, 1)), (1,), T((1,))),
        case("empty batch", T((0, 5)), (5,), w),
    ]


def _group_norm() -> list[Case]:
    x, w, b = T((2, 4, 5, 3)), T((4,)), T((4,))
    return [
        case("affine", x, 2, w, b),
        case("no affine", x, 2),
        case("weight alone", x, 2, w),
        case("bias alone", x, 2, None, b),
        case("eps", x, 2, w, b, eps=0.3),
        case("one group", x, 1, w, b),
        case("a group for each channel", x, 4, w, b),
        case("2-D", T((6, 4)), 2, w, b),
        case("3-D", T((2, 4, 7)), 2, w, b),
        case("5-D", T((2, 4, 2, 3, 2)), 2, w, b),
        case("channels_last", T(x.shape, format=LAST), 2, w, b),
        case("channels_last, no affine", T(x.shape, format=LAST), 2),
        case("transposed memory", T(x.shape, _t), 2, w, b),
        case("slice", T((2, 8, 5, 3), lambda v: v[:, ::2]), 2, w, b),
        case("empty batch", T((0, 4, 5, 3)), 2, w, b),
    ]


EMPTY = "its batch is empty"


def _batch_norm() -> list[Case]:
    x, w, b = T((4, 3, 5, 4)), T((3,)), T((3,))
    statistics = T((3,), make=biases), T((3,), make=positive)
    none = None, None
    part, none_of_it = T((4, 6, 5, 4), lambda v: v[:, ::2]), T((0, 3, 5, 4))
    return [
        case("training", x, *statistics, w, b, True),
        case("training, no statistics", x, *none, w, b, True),
        case("training, no affine", x, *statistics, None, None, True),
        case("training, weight alone", x, *statistics, w, None, True),
        case("training, bias alone", x, *statistics, None, b, True),
        case("training, momentum and eps", x, *statistics, w, b, True, 0.3, 0.2),
        case("training, keywords", x, *statistics, weight=w, bias=b, training=True),
        case("training, 2-D", T((6, 3)), *statistics, w, b, True),
        case("training, 3-D", T((4, 3, 7)), *statistics, w, b, True),
        case("training, 5-D", T((2, 3, 2, 3, 2)), *statistics, w, b, True),
        case("training, channels_last", T(x.shape, format=LAST), *statistics, w, b, True),
        case("training, transposed memory", T(x.shape, _t), *none, w, b, True),
        Case("training, slice", (part, *statistics, w, b, True), rounds=GATHERED),
        Case("training, empty batch", (none_of_it, *statistics, w, b, True), obstacle=EMPTY),
        case("eval", x, *statistics, w, b, False),
        case("eval, no affine", x, *statistics),
        case("eval, weight alone", x, *statistics, w),
        case("eval, 2-D", T((6, 3)), *statistics, w, b),
        case("eval, channels_last", T(x.shape, format=LAST), *statistics, w, b),
        Case("eval, slice", (part, *statistics, w, b), rounds=GATHERED),
        Case("eval, empty batch", (none_of_it, *statistics, w, b), obstacle=EMPTY),
    ]


OTHER_KERNEL = "PyTorch chooses the kernel by the strides, and what is unpacked has no gaps"


def _attention() -> list[Case]:
    q, k, v = T((2, 4, 6, 8)), T((2, 4, 5, 8)), T((2, 4, 5, 8))

    def heads(x: Any) -> Any:
        return x.transpose(1, 2)

    return [
        case("plain", q, k, v),
        case("causal", q, q, q, is_causal=True),
        case("causal, longer queries", q, k, v, is_causal=True),
        case("bool mask", q, k, v, T((6, 5), make=coins)),
        case("bool mask of a batch", q, k, v, T((2, 1, 6, 5), make=coins)),
        case("float mask", q, k, v, T((2, 4, 6, 5), make=biases)),
        case("float mask, broadcast", q, k, v, T((1, 1, 6, 5), make=biases)),
        case("learned mask", q, k, v, T((4, 6, 5))),
        case("scale", q, k, v, scale=0.2),
        case("scale and causal", q, q, q, None, 0.0, True, scale=0.2),
        case("grouped-query", q, T((2, 2, 5, 8)), T((2, 2, 5, 8)), enable_gqa=True),
        case("grouped-query, causal", q, *[T((2, 2, 6, 8))] * 2, is_causal=True, enable_gqa=True),
        case("wider values", q, k, T((2, 4, 5, 12))),
        case("3-D", T((4, 6, 8)), T((4, 5, 8)), T((4, 5, 8))),
        case("2-D", T((6, 8)), T((5, 8)), T((5, 8))),
        case("heads second", *[T((2, 6, 4, 8), heads)] * 3),
        case("heads second, causal", *[T((2, 6, 4, 8), heads)] * 3, is_causal=True),
        case("keys transposed", q, T((2, 4, 8, 5), _t), v),
        Case("slice", (T((2, 4, 6, 16), lambda x: x[..., ::2]), k, v), rounds=OTHER_KERNEL),
        case("one key for all heads", q, T((2, 1, 5, 8), lambda x: x.expand(2, 4, 5, 8)), v),
        case("one query", T((2, 4, 1, 8)), k, v),
        case("empty batch", *[T((0, 4, 6, 8))] * 3),
    ]


def _softmax() -> list[Case]:
    x = T((2, 3, 5, 7))
    return [
        case("last", x, -1),
        case("last by number", x, 3),
        case("first", x, 0),
        case("channels", x, 1),
        case("1-D", T((33,)), 0),
        case("scalar", T(()), 0),
        case("keyword", x, dim=2),
        case("dtype", x, -1, dtype=torch.float64),
        case("dtype as it is", x, -1, dtype=torch.float32),
        case("transposed memory", T((6, 9), _t), -1),
        case("channels_last", T(x.shape, format=LAST), 1),
        case("slice", T((6, 9), lambda v: v[:, ::2]), -1),
        case("expanded", T((1, 5), lambda v: v.expand(3, 5)), -1),
        case("one class", T((4, 1)), -1),
        case("empty batch", T((0, 5)), -1),
    ]


def _cross_entropy() -> list[Case]:
    x, y = T((6, 5)), T((6,), make=classes(5))
    ignored = T((6,), make=classes(5, -100))
    zeros = T((6,), make=classes(5, 0))
    image, labels = T((2, 5, 3, 4)), T((2, 3, 4), make=classes(5, -100))
    out = [
        case("2-D", x, y),
        case("1-D", T((5,)), T((), make=classes(5))),
        case("3-D", T((2, 5, 7)), T((2, 7), make=classes(5))),
        case("4-D", image, labels),
        case("classes last", T((2, 7, 5), _t), T((2, 7), make=classes(5))),
        case("channels_last", T(image.shape, format=LAST), labels),
        case("transposed memory", T((5, 6), _t), y),
        case("slice", T((6, 10), lambda v: v[:, ::2]), y),
        case("shifted tokens", T((7, 5), lambda v: v[:-1]), y),
        case("one class", T((6, 1)), T((6,), make=classes(1))),
        case("all ignored", x, T((6,), make=lambda shape, _: torch.full(shape, -100))),
    ]
    for reduction in ("none", "mean", "sum"):
        out += [
            case(f"2-D, {reduction}", x, ignored, reduction=reduction),
            case(f"ignoring 0, {reduction}", x, zeros, ignore_index=0, reduction=reduction),
            case(f"4-D, {reduction}", image, labels, reduction=reduction),
            case(
                f"empty batch, {reduction}",
                T((0, 5)),
                T((0,), make=classes(5)),
                reduction=reduction,
            ),
        ]
    return out


def _avg_pool2d() -> list[Case]:
    x = T((2, 3, 9, 8))
    return [
        case("plain", x, 2),
        case("overlapping", x, 3, 1),
        case("per dimension", x, (3, 2), (1, 2)),
        case("one-tuples", x, (2,), (1,), (1,)),
        case("padding", x, 3, 2, 1),
        case("padding not counted", x, 3, 2, 1, count_include_pad=False),
        case("ceil_mode", x, 3, 2, ceil_mode=True),
        case("ceil_mode, padding", x, 3, 2, 1, True, False),
        case("divisor_override", x, 3, 2, 1, divisor_override=5),
        case("global", x, (9, 8)),
        case("unbatched", T((3, 9, 8)), 2),
        case("channels_last", T(x.shape, format=LAST), 3, 2, 1),
        case("transposed memory", T(x.shape, _t), 2),
        case("slice", T((2, 6, 9, 8), lambda v: v[:, ::2]), 2),
        case("empty batch", T((0, 3, 9, 8)), 2),
    ]


def _where() -> list[Case]:
    mask, x = T((2, 3, 5), make=coins), T((2, 3, 5))
    return [
        case("same shape", mask, x, x),
        case("condition of a row", T((5,), make=coins), x, x),
        case("all broadcast", T((3, 1), make=coins), T((5,)), T((2, 1, 1))),
        case("number", mask, x, 0.5),
        case("number first", mask, -math.inf, x),
        case("transposed memory", T((9, 6), make=coins), T((6, 9), _t), T((9, 6))),
        case("slice", T((6, 5), make=coins), T((6, 10), lambda v: v[:, ::2]), T((6, 5))),
        case("empty", T((5,), make=coins), T((0, 5)), T((0, 5))),
        Case(
            "two dtypes",
            (mask, x, T((2, 3, 5), lambda v: v.double())),
            obstacle="it joins two dtypes",
        ),
    ]


FROM_THE_END = "its padding index is negative, which its spellings read differently"


def _embedding() -> list[Case]:
    out = [
        case(f"{rows} rows", T((4, 7), make=classes(rows)), T((rows, 3)))
        for rows in (300, 1, 2, 7, 256, 257, 65536, 65537)
    ]
    words, table = T((4, 7), make=classes(9)), T((9, 3))
    return [
        *out,
        case("padding_idx", words, table, 2),
        Case("padding_idx from the end", (words, table, -1), obstacle=FROM_THE_END),
        case("scale_grad_by_freq", words, table, scale_grad_by_freq=True),
        case("sparse", words, table, sparse=True),
        case("one word", T((), make=classes(9)), table),
        case("int32", T((4, 7), make=lambda s, g: classes(9)(s, g).int()), table),
        case("no words", T((0, 7), make=classes(9)), table),
        Case("max_norm", (words, table, None, 1.0), obstacle="it renormalises its weight"),
    ]


def _pad() -> list[Case]:
    x = T((2, 3, 5, 6))
    return [
        *[case(f"{m}, 2-D", x, (1, 2, 0, 1), m) for m in ("reflect", "replicate")],
        *[case(f"{m}, 1-D", T((2, 5, 6)), (1, 2), m) for m in ("reflect", "replicate")],
        case("reflect, transposed", T((3, 5, 6), _t), (1, 2), "reflect"),
        case("replicate, 3-D", T((2, 3, 4, 5, 6)), (1, 2, 0, 1, 2, 2), "replicate"),
        case("constant", x, (1, 2, 0, -1), "constant", 0.5),
    ]


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
        case("columns by a matrix", T((2, 5, 6), _t), T((5, 4))),
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


ON_CUDA = {"reserve"}  # operands that kernels of CUDA alone make
FROM_ITS_RESULT = "written in place, PyTorch computes the slope from the result"

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
    "gelu": _pointwise({"approximate": "tanh"}, rounds=GATHERED),
    "silu": _pointwise({"inplace": True}),
    "mish": _pointwise({"inplace": True}, rounds=GATHERED),
    "selu": [
        *_pointwise(),
        Case("in place", (T((4, 9)),), {"inplace": True}, rounds=FROM_ITS_RESULT),
    ],
    **{n: _pointwise({"inplace": True}) for n in ("hardswish", "hardsigmoid")},
    "elu": _pointwise({"alpha": 0.5}, {"alpha": 2.0}),
    "celu": _pointwise({"alpha": 0.5}, {"alpha": 2.0}),
    "softplus": _pointwise({"beta": 3.0}, {"beta": 2, "threshold": 1}),
    **{n: _pointwise() for n in ("logsigmoid", "softsign", "sigmoid", "tanh")},
    "mul": _arithmetic(),
    "div": _arithmetic("a number over a tensor is computed, and saved, through the reciprocal"),
    "pow": [
        *[Case(f"{c.name}, squared", (*c.args, 2), c.kwargs) for c in _pointwise()],
        *[case(f"exponent {e}", T((4, 9)), e) for e in (0, 1, 3, 0.5, -1, -0.5, 2.5)],
    ],
    "layer_norm": [
        case("affine", T((2, 6, 5)), (5,), T((5,)), T((5,))),
        case("affine, two dimensions", T((2, 6, 5)), (6, 5), T((6, 5)), T((6, 5))),
        case("affine, transposed memory", T((2, 5, 6), _t), (5,), T((5,)), T((5,))),
        case("bias alone", T((2, 6, 5)), (5,), None, T((5,))),
        *_norm(),
    ],
    "group_norm": _group_norm(),
    "rms_norm": [case("weight", T((2, 6, 5)), (5,), T((5,))), *_norm()],
    "batch_norm": _batch_norm(),
    "scaled_dot_product_attention": _attention(),
    "softmax": _softmax(),
    "log_softmax": _softmax(),
    "nll_loss": [
        # PyTorch's own backward refuses channels_last
        *(c for c in _cross_entropy() if c.name not in ("1-D", "channels_last")),
        case("class weights", T((6, 5)), T((6,), make=classes(5)), T((5,), make=positive)),
        case("one", T((5,)), T((), make=classes(5)), reduction="sum"),
    ],
    "cross_entropy": _cross_entropy(),
    "avg_pool2d": _avg_pool2d(),
    "exp": _pointwise(),
    "sin": _pointwise(),
    "cos": _pointwise(),
    "clamp": [
        *[Case(f"{c.name}, both", (*c.args, -0.3, 0.8), c.kwargs) for c in _pointwise()],
        case("least", T((4, 9)), -0.3),
        case("greatest", T((4, 9)), max=0.8),
        case("on the bounds", T((4, 9), lambda v: v.round()), -1, 1),
        Case("tensors", (T((4, 9)), T((9,)), None), obstacle="its bounds are tensors"),
    ],
    "where": _where(),
    "masked_fill": [
        case("same shape", T((2, 3, 5)), T((2, 3, 5), make=coins), -1.0),
        case("row", T((2, 3, 5)), T((5,), make=coins), -math.inf),
        case("broadcast input", T((3, 5)), T((2, 3, 5), make=coins), 0),
        case("transposed memory", T((6, 9), _t), T((9, 6), make=coins), 2.0),
        case("slice", T((6, 10), lambda v: v[:, ::2]), T((6, 5), make=coins), 2.0),
        case("empty", T((0, 5)), T((5,), make=coins), 2.0),
        Case(
            "tensor",
            (T((4, 9)), T((4, 9), make=coins), T(())),
            obstacle="its value is a tensor",
        ),
    ],
    "embedding": _embedding(),
    "index_select": [
        case("rows", T((6, 5)), 0, T((9,), make=classes(6))),
        case("columns", T((2, 6, 5)), -1, T((3,), make=classes(5))),
        case("transposed memory", T((5, 6), _t), 0, T((9,), make=classes(6))),
        case("none", T((6, 5)), 0, T((0,), make=classes(6))),
    ],
    "gather": [
        case("rows", T((6, 5)), 0, T((4, 5), make=classes(6))),
        case("last", T((2, 6, 5)), -1, T((2, 6, 3), make=classes(5))),
        case("sparse_grad", T((6, 5)), 0, T((4, 5), make=classes(6)), sparse_grad=True),
        case("transposed memory", T((5, 6), _t), 1, T((6, 2), make=classes(5))),
        case("none", T((6, 5)), 0, T((0, 5), make=classes(6))),
    ],
    "pad": _pad(),
    "avg_pool1d": [
        case("plain", T((2, 3, 9)), 2),
        case("padding", T((2, 3, 9)), 3, 1, 1, True, False),
        case("unbatched", T((3, 9)), 2),
        case("slice", T((2, 3, 18), lambda v: v[..., ::2]), 2),
        case("empty batch", T((0, 3, 9)), 2),
    ],
    "avg_pool3d": [
        case("plain", T((2, 3, 5, 4, 6)), 2),
        case("padding", T((2, 3, 5, 4, 6)), 3, 1, 1, True, False, 5),
        case("unbatched", T((3, 5, 4, 6)), 2),
        case("transposed memory", T((2, 3, 4, 5, 6), _t), 2),
    ],
    **{
        f"adaptive_avg_pool{d}d": [
            case("smaller", T((2, 3, *(9, 8, 7)[:d])), (4, 3, 2)[:d]),
            case("unbatched", T((3, *(9, 8, 7)[:d])), (4, 3, 2)[:d]),
            case("larger", T((2, 3, *(3, 2, 2)[:d])), (4, 3, 5)[:d]),
            case("transposed memory", T((2, 3, *(9, 8, 7)[:d]), _t), (4, 3, 2)[:d]),
        ]
        for d in (1, 2, 3)
    },
}


# What PyTorch itself cannot do before 2.14: it refuses the first, and the second ends the process.
BEFORE_2_14 = minor(torch.__version__) < (2, 14)
CRASHES_ALONE = {("group_norm", "channels_last")} if BEFORE_2_14 else set()
if BEFORE_2_14:
    CASES["group_norm"] = [c for c in CASES["group_norm"] if c.name != "bias alone"]


def spellings() -> list[Any]:
    """(rule name, target) for every target of every row."""
    return [(rule.name, target) for rule in OP_RULES for target in rule.targets]


def spelled(name: str, target: Any) -> Case:
    """The first case of a row, in arguments that this spelling takes."""
    first = CASES[name][0]
    if isinstance(target, torch._ops.OpOverload) and target._overloadname == "padding":
        d = int(name[4])
        return case("padding", first.args[0], T((6, 4, *[3] * d)), T((6,)), [1] * d, "same")
    if name == "dropout":
        return case("p, train", T((4, 9)), 0.5, True)
    if name == "batch_norm" and target is not F.batch_norm:
        x, mean, var, w, b, training = first.args
        return case("other order", x, w, b, mean, var, training, 0.1, 1e-5, False)
    if name == "embedding" and target is not F.embedding:
        return case("other order", first.args[1], first.args[0])
    if name == "clamp" and "clamp_m" in str(target):
        return case("one bound", T((4, 9)), 0.2)
    if target == "where":
        condition, x, y = first.args
        return case("other order", x, condition, y)
    if name in ("elu", "selu", "celu") and writes(target):
        return replace(first, rounds=FROM_ITS_RESULT)
    return first


def writes(target: Any) -> bool:
    """Whether a spelling writes into its first argument, going by its name."""
    name = target if isinstance(target, str) else target.__name__.split(".")[0]
    augmented = name.strip("_") in ("iadd", "isub", "imul", "itruediv", "ipow")
    return augmented or (name.endswith("_") and not name.endswith("__"))


ALL_CASES = [(name, c) for name, cases in CASES.items() for c in cases]


def case_id(value: Any) -> str:
    if isinstance(value, Case):
        return value.name
    return str(getattr(value, "__name__", value))


def assert_packed(packed: fx.GraphModule, name: str) -> None:
    """The graph has one packed call, of this row."""
    calls = [n.target for n in packed.graph.nodes if n.target in PACKED_OPS.values()]
    assert calls == [PACKED_OPS[name]]


def reasons(plan: Plan) -> list[str]:
    """Why reads are kept, but for statistics and Python numbers: those stay as they are."""
    kept = [d for d in plan.decisions if not d.packed and d.reason != NUMBER]
    return sorted(d.reason for d in kept if d.read.read is None or d.read.read.like)


def kept_as_they_are(name: str, tensors: list[Tensor]) -> list[str]:
    """The reason for each tensor argument that is no float, where the row has no codes for it."""
    if any(r.bits is not None and r.like == r.operand for r in RULES[name].reads):
        return []
    kinds = [str(t.dtype).removeprefix("torch.") for t in tensors if not t.is_floating_point()]
    return [f"its dtype is {kind}" for kind in kinds]


def arguments(name: str, call: Case) -> list[str]:
    """Names of the tensor arguments, in the order of the placeholders."""
    bound = bind(RULES[name], call.args, call.kwargs) or {}
    return [n for n, a in bound.items() if isinstance(a, T)]
