"""Every row of the op table, in every spelling, with every codec that serves it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from op_cases import (
    CASES,
    CRASHES_ALONE,
    FROM_ITS_RESULT,
    LOSSLESS,
    ON_CUDA,
    Case,
    T,
    assert_agrees,
    assert_same,
    biases,
    case,
    classes,
    coins,
    cotangent,
    graph_of,
    pack_graph,
    positive,
    run,
    spelled,
    spellings,
    writes,
)
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dropit_fx
from dropit_fx.codecs import CODEC
from dropit_fx.codecs.codec import Codec
from dropit_fx.compile.backend import compiled_graphs
from dropit_fx.measure import saved_bytes
from dropit_fx.ops import step_tables
from dropit_fx.ops.autocasting import asked
from dropit_fx.ops.rule import INSIDE, Read, Use
from dropit_fx.ops.table import OP_RULES, RULES, bind
from dropit_fx.passes.find_saved import NUMBER
from dropit_fx.passes.plan import Plan
from dropit_fx.runtime.packed_call import PACKED_OPS
from dropit_fx.runtime.tensor_spec import flatten, memory_order, unflatten

ALL_CASES = [(name, c) for name, cases in CASES.items() for c in cases]


def case_id(value: Any) -> str:
    if isinstance(value, Case):
        return value.name
    return str(getattr(value, "__name__", value))


def test_every_row_has_cases() -> None:
    assert set(CASES) == {r.name for r in OP_RULES}


# --- found and packed, in every spelling


@pytest.mark.parametrize(("name", "target"), spellings(), ids=case_id)
def test_every_spelling_is_packed_without_changing_a_bit(name: str, target: Any) -> None:
    call = spelled(name, target)
    tensors = call.tensors()
    dense = graph_of(target, call)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    assert reasons(plan) == kept_as_they_are(name, tensors)
    absent = {n for n, a in (bind(RULES[name], call.args, call.kwargs) or {}).items() if a is None}
    every = {r.operand for r in RULES[name].reads}
    assert {d.read.operand for d in plan.decisions} == every - absent - ON_CUDA
    assert_packed(packed, name)
    assert target not in [n.target for n in packed.graph.nodes]
    assert_agrees(call, run(packed, tensors), run(dense, tensors))


def assert_packed(packed: fx.GraphModule, name: str) -> None:
    """The graph has one packed call, of this row."""
    calls = [n.target for n in packed.graph.nodes if n.target in PACKED_OPS.values()]
    assert calls == [PACKED_OPS[name]]


def reasons(plan: Plan) -> list[str]:
    """Why reads are kept, but for statistics and Python numbers: those stay as they are."""
    kept = [d for d in plan.decisions if not d.packed and d.reason != NUMBER]
    return sorted(d.reason for d in kept if d.read.read is None or not d.read.read.exact)


def kept_as_they_are(name: str, tensors: list[Tensor]) -> list[str]:
    """The reason for each tensor argument that is no float, where the row has no codes for it."""
    if any(r.bits is not None and r.like == r.operand for r in RULES[name].reads):
        return []
    kinds = [str(t.dtype).removeprefix("torch.") for t in tensors if not t.is_floating_point()]
    return [f"its dtype is {kind}" for kind in kinds]


# --- in-place spellings run out of place: who reads the written tensor later reads the result


def writing() -> list[Any]:
    """(row, target, settings) of every spelling that writes into its input."""
    by_name = [(name, target, {}) for name, target in spellings() if writes(target)]
    takes = [r for r in OP_RULES if "inplace" in inspect.signature(r.run).parameters]
    rows = [r.name for r in takes if isinstance(r.targets[0], FunctionType)]  # no operators
    return by_name + [(name, RULES[name].targets[0], {"inplace": True}) for name in rows]


def writing_graph(target: Any, call: Case, settings: dict[str, Any], reader: str) -> fx.GraphModule:
    """A call that writes, and a reader: of what it wrote to, of a view of that, or its result."""
    graph = fx.Graph()
    count = sum(isinstance(a, T) for a in call.args)
    leaves = [graph.placeholder(f"t{i}") for i in range(count)]
    copies = [graph.call_method("clone", (leaf,)) for leaf in leaves]
    written, operands = copies[0], iter(copies)
    seen = {"the written tensor": written}
    if reader == "an older view":
        seen[reader] = graph.call_method("flatten", (written,))
    args = tuple(next(operands) if isinstance(a, T) else a for a in call.args)
    create = graph.call_method if isinstance(target, str) else graph.call_function
    seen["the result"] = create(target, args, settings)
    if reader == "a newer view":
        seen[reader] = graph.call_method("flatten", (written,))
    graph.output(graph.call_function(torch.neg, (seen[reader],)))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    "reader", ["the written tensor", "a newer view", "an older view", "the result"]
)
@pytest.mark.parametrize(("name", "target", "settings"), writing(), ids=case_id)
def test_later_readers_of_a_written_tensor_see_the_result(
    name: str, target: Any, settings: dict[str, Any], reader: str
) -> None:
    call = spelled(name, target)
    if name in ("elu", "selu", "celu"):
        call = replace(call, rounds=FROM_ITS_RESULT)
    tensors = call.tensors()
    dense = writing_graph(target, call, settings, reader)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    # a result out of place would not be seen through a view that is there already
    assert any(d.packed for d in plan.decisions) == (reader != "an older view")
    assert_agrees(call, run(packed, tensors), run(dense, tensors))


class Writes(nn.Module):
    """An augmented assignment between two layers, seen through an older view or not."""

    def __init__(self, op: Callable[..., Any], dtype: torch.dtype, viewed: bool) -> None:
        super().__init__()
        self.a, self.b, self.w = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.rand(8) + 1)
        self.op, self.dtype, self.viewed = op, dtype, viewed

    def forward(self, x: Tensor, number: float) -> Tensor:
        h = self.a(x).sigmoid().to(self.dtype).clone()
        view = h.flatten()
        h = self.op(self.op(h, number), self.w.abs() if self.op is not operator.ipow else 3)
        if self.viewed:
            h = h + view.view(h.shape)
        return self.b(F.gelu(h).float())


AUGMENTED = {
    f"{op.__name__}, {dtype}, {'viewed' if viewed else 'alone'}": Writes(op, dtype, viewed)
    for op in (
        *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow),
        operator.imod,
    )
    for dtype in (torch.float32, torch.bfloat16)  # which stays when the other operand is float32
    for viewed in (False, True)
}


class Branches(nn.Module):
    """Layers that all read the input; their results apart."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        return tuple(layer(*args) for layer in self.layers)


def test_augmented_assignments_are_what_they_are_in_the_dense_model() -> None:
    model, args = Branches(AUGMENTED.values()), (torch.randn(4, 8), 2.0)
    lossless, balanced = (
        dropit_fx.transform(model, preset=preset, example_args=args)
        for preset in ("lossless", "balanced")
    )
    dense = model(*args)
    for name, layer, out, *results in zip(
        AUGMENTED, model.layers, dense, lossless(*args), balanced(*args), strict=True
    ):
        assert all(torch.equal(out, other) for other in results), name
        grads = [
            torch.autograd.grad(t.square().sum(), list(layer.parameters()), allow_unused=True)
            for t in (out, results[0])
        ]
        assert all(a is b or torch.equal(a, b) for a, b in zip(*grads, strict=True)), name
    expected = saved_bytes(model, *args)
    for made in (lossless, balanced):
        told = dropit_fx.report(made)
        assert (told.dense_bytes, told.kept_bytes) == (expected, saved_bytes(made, *args))


# --- lossless codecs: every gradient has the same bits


@pytest.mark.parametrize(("name", "call"), ALL_CASES, ids=case_id)
def test_lossless_gradients_have_the_same_bits(name: str, call: Case) -> None:
    tensors = call.tensors()
    dense = graph_of(RULES[name].targets[0], call)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    if call.obstacle:
        assert {d.reason for d in plan.decisions} <= {call.obstacle, NUMBER}
    else:
        assert reasons(plan) == kept_as_they_are(name, tensors)
        dropped = [
            d for d in plan.decisions if d.codec == "drop" and d.read.operand in ("?", INSIDE)
        ]
        assert len(dropped) >= call.copies  # a packed call makes none
    assert_agrees(call, run(packed, tensors), run(dense, tensors))


# Where there is but one gradient, it was alone before; one formula serves one to three dimensions.
SEVERAL = [
    (name, call)
    for name, call in ALL_CASES
    if sum(spec.make is None for spec in call.specs()) > 1
    and not (name.startswith("conv") and name.endswith(("1d", "3d")))
]


@pytest.mark.parametrize(("name", "call"), SEVERAL, ids=case_id)
def test_each_gradient_alone_has_the_same_bits(name: str, call: Case) -> None:
    # a formula computes only what is asked for, and may read only what that needs
    if (name, call.name) in CRASHES_ALONE:
        pytest.skip("this PyTorch crashes in the dense backward of weight or bias alone")
    if (name, call.name) == ("matmul", "broadcast right"):
        pytest.skip("matmul itself folds a batch of one in two ways, which differ in rounding")
    tensors = call.tensors()
    wanted = [t for t in tensors if t.requires_grad]
    for only in wanted:
        for t in wanted:
            t.requires_grad_(t is only)
        dense = graph_of(RULES[name].targets[0], call)
        packed, _ = pack_graph(dense, tensors, LOSSLESS)
        assert_agrees(call, run(packed, tensors), run(dense, tensors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_lossless_gradients_have_the_same_bits_in_other_dtypes(
    name: str, dtype: torch.dtype
) -> None:
    if name == "avg_pool3d" and dtype != torch.float64:
        pytest.skip("PyTorch has no such kernel for CPUs")
    call = CASES[name][0]
    tensors = call.tensors(dtype)
    dense = graph_of(RULES[name].targets[0], call)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    assert reasons(plan) == kept_as_they_are(name, tensors)
    assert_agrees(call, run(packed, tensors), run(dense, tensors))


# --- lossy codecs: only the gradients that read the packed tensor change, and by its loss alone


def contractions() -> list[Any]:
    """(row, read, codec) for every codec that a GEMM or convolution operand can be packed with."""
    return [
        (rule.name, read, codec.name)
        for rule in OP_RULES
        for read in rule.reads
        for codec in CODEC.values()
        if read.use is Use.CONTRACT and codec.can_keep(read) and codec.name not in ("keep", "drop")
    ]


def arguments(name: str, call: Case) -> list[str]:
    """Names of the tensor arguments, in the order of the placeholders."""
    bound = bind(RULES[name], call.args, call.kwargs) or {}
    return [n for n, a in bound.items() if isinstance(a, T)]


def big(name: str) -> Case:
    """A call whose operands take more than one block, and a part of one."""
    if name.startswith("conv"):
        d = int(name.removeprefix("conv_transpose").removeprefix("conv")[0])
        side = {1: 300, 2: 18, 3: 7}[d]
        return case("big", T((2, 8, *[side] * d)), T((8, 8, *[3] * d)), T((8,)))
    shapes = {
        "linear": ((7, 11, 40), (48, 40), (48,)),
        "matmul": ((7, 11, 40), (40, 48)),
        "mm": ((60, 40), (40, 48)),
        "bmm": ((3, 30, 40), (3, 40, 48)),
        "addmm": ((48,), (60, 40), (40, 48)),
        "baddbmm": ((48,), (3, 30, 40), (3, 40, 48)),
    }
    return case("big", *[T(s) for s in shapes[name]])


@pytest.mark.parametrize(
    ("name", "read", "codec"), contractions(), ids=lambda v: getattr(v, "operand", v)
)
def test_only_gradients_that_read_the_packed_tensor_change(
    name: str, read: Read, codec: str
) -> None:
    call = big(name)
    names = arguments(name, call)
    tensors = call.tensors()
    config = {
        "preset": None,
        "force": True,
        "rules": [{"codec": codec}],
    }
    dense = graph_of(RULES[name].targets[0], call)
    packed, plan = pack_graph(dense, tensors, config)
    decided = {d.read.operand: d for d in plan.decisions}
    if not read.lossy:
        assert (
            decided[read.operand].reason
            == f"the gradient of {read.needed_by[0]} depends on it, and stays exact"
        )
        return
    assert decided[read.operand].codec == codec
    seed = 3  # of the random codecs, too
    out, grads = run(packed, tensors, seed)
    exact, exact_grads = run(dense, tensors, seed)
    assert_same(out, exact)
    lossy = {n for d in plan.decisions if d.packed for n in d.read.read.needed_by}
    for n, grad, wanted in zip(names, grads, exact_grads, strict=True):
        if n in lossy:
            assert not torch.equal(grad, wanted)
        else:
            assert_same(grad, wanted)


def dropped(x: Tensor, gamma: float, block: int | None) -> Tensor:
    """DropIT's min-k (section 3.2), written with ``torch.topk``: independent of the kernels."""
    flat = x.detach().reshape(-1)
    pieces = flat.split(block or flat.numel())
    out = []
    for piece in pieces:
        ratio = round((1 - gamma) * 10_000)
        # to the nearest for blocks; the paper floors
        k = (len(piece) * ratio + 5000) // 10_000 if block else len(piece) * ratio // 10_000
        kept = piece.abs().topk(k).indices
        out.append(torch.zeros_like(piece).scatter(0, kept, piece[kept]))
    return torch.cat(out).reshape(x.shape)


@pytest.mark.parametrize("scope", ["block", "tensor"])
@pytest.mark.parametrize("gamma", [0.3, 0.9])
@pytest.mark.parametrize("name", [r.name for r in OP_RULES if r.reads[0].use is Use.CONTRACT])
def test_mink_gradient_is_that_of_the_explicitly_dropped_tensor(
    name: str, gamma: float, scope: str
) -> None:
    call = big(name)
    names, tensors = arguments(name, call), call.tensors()
    config = {
        "preset": None,
        "force": True,
        "rules": [{"codec": "mink", "gamma": gamma, "scope": scope, "block": 256}],
    }
    dense = graph_of(RULES[name].targets[0], call)
    packed, plan = pack_graph(dense, tensors, config)
    _, grads = run(packed, tensors)
    for decision in plan.decisions:
        if not decision.packed:
            continue
        at = names.index(decision.read.operand)
        instead = list(tensors)
        instead[at] = dropped(
            tensors[at], gamma, 256 if scope == "block" else None
        ).requires_grad_()
        _, oracle = run(dense, instead)
        for reader in decision.read.read.needed_by:
            assert_same(grads[names.index(reader)], oracle[names.index(reader)])


def test_mink_drops_in_memory_order_where_the_input_is_channels_last() -> None:
    x, w = T((2, 8, 18, 18), format=torch.channels_last), T((8, 8, 3, 3))
    call = case("channels_last", x, w)
    tensors = call.tensors()
    config = {
        "preset": None,
        "force": True,
        "rules": [{"codec": "mink", "gamma": 0.8, "block": 256}],
    }
    dense = graph_of(torch.conv2d, call)
    packed, _ = pack_graph(dense, tensors, config)
    rows = tensors[0].permute(0, 2, 3, 1)
    instead = dropped(rows, 0.8, 256).permute(0, 3, 1, 2).requires_grad_()
    _, (_, oracle) = run(dense, [instead, tensors[1]])
    _, (_, grad) = run(packed, tensors)
    assert_same(grad, oracle)


def test_random_is_unbiased() -> None:
    call = case("linear", T((32, 64)), T((16, 64)))
    tensors = call.tensors()
    tensors[0].requires_grad_(False)
    config = {
        "preset": None,
        "force": True,
        "rules": [{"codec": "random", "gamma": 0.5, "block": 64}],
    }
    dense = graph_of(F.linear, call)
    packed, _ = pack_graph(dense, tensors, config)
    _, (_, exact) = run(dense, tensors)
    draws = torch.stack([run(packed, tensors, seed)[1][1] for seed in range(150)])
    one = (draws - exact).norm(dim=(1, 2)).mean() / exact.norm()
    mean = (draws.mean(0) - exact).norm() / exact.norm()
    assert 0.5 < one < 2  # a single draw is far off
    assert mean < 1.3 * one / 150**0.5  # and the mean is as near as 150 unbiased draws allow


# --- quant: the gradients are those of the tensors after a round trip

SMOOTH = (
    *("gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "hardswish", "hardsigmoid"),
    *("logsigmoid", "softsign", "sigmoid", "tanh"),
)
_X, _W, _HEADS = T((7, 11, 40)), T((40,)), T((2, 6, 9, 16))
_IMAGE, _CHANNELS = T((5, 8, 9, 6)), T((8,))
_CHANNELS_LAST = T(_IMAGE.shape, format=torch.channels_last)
_RUNNING = T((8,), make=biases), T((8,), make=positive)

QUANTISED: list[tuple[str, Case]] = [
    *[(name, case("plain", _X)) for name in (*SMOOTH, "exp", "sin", "cos")],
    ("gelu", case("tanh", _X, approximate="tanh")),
    ("elu", case("alpha", _X, alpha=0.5)),
    ("softplus", case("beta", _X, beta=3.0)),
    ("silu", case("transposed memory", T((11, 40), lambda v: v.t()))),
    ("tanh", case("channels_last", _CHANNELS_LAST)),
    ("mul", case("same shape", _X, _X)),
    ("mul", case("row", _X, _W)),
    ("mul", case("column first", T((11, 1)), _X)),
    ("div", case("same shape", _X, _X)),
    ("div", case("row", _X, _W)),
    ("pow", case("cube", _X, 3)),
    ("pow", case("square", _X, 2)),
    ("layer_norm", case("affine", _X, (40,), _W, _W)),
    ("layer_norm", case("two dimensions", _X, (11, 40))),
    ("layer_norm", case("batch second", T((11, 7, 40), lambda v: v.transpose(0, 1)), (40,), _W)),
    ("group_norm", case("affine", _IMAGE, 4, _CHANNELS, _CHANNELS)),
    ("group_norm", case("channels_last", _CHANNELS_LAST, 2)),
    ("rms_norm", case("weight", _X, (40,), _W)),
    ("rms_norm", case("two dimensions", _X, (11, 40))),
    ("batch_norm", case("training", _IMAGE, *_RUNNING, _CHANNELS, _CHANNELS, True)),
    ("batch_norm", case("training, alone", _CHANNELS_LAST, None, None, None, None, True)),
    ("batch_norm", case("eval", _IMAGE, *_RUNNING, _CHANNELS, _CHANNELS)),
    ("scaled_dot_product_attention", case("plain", _HEADS, _HEADS, _HEADS)),
    ("scaled_dot_product_attention", case("causal", *[_HEADS] * 3, is_causal=True)),
    ("scaled_dot_product_attention", case("mask", *[_HEADS] * 3, T((9, 9), make=coins))),
    ("scaled_dot_product_attention", case("learned mask", *[_HEADS] * 3, T((6, 9, 9)))),
    (
        "scaled_dot_product_attention",
        case("grouped-query", _HEADS, *[T((2, 2, 9, 16))] * 2, enable_gqa=True),
    ),
    *[(name, case("last", _X, -1)) for name in ("softmax", "log_softmax")],
    *[(name, case("channels", _IMAGE, 1)) for name in ("softmax", "log_softmax")],
    ("cross_entropy", case("mean", T((30, 40)), T((30,), make=classes(40)))),
    (
        "cross_entropy",
        case("sum", T((4, 10, 13)), T((4, 13), make=classes(10, -100)), reduction="sum"),
    ),
    (
        "cross_entropy",
        case("none", T((30, 40)), T((30,), make=classes(40, 0)), ignore_index=0, reduction="none"),
    ),
]
EXACT = "small beside what is packed, it stays exact"


def quantised(x: Tensor, bits: int) -> Tensor:
    """``x`` after a round trip through the kernels, in memory order and blocks of 64."""
    flat = flatten(x.detach())
    parts = torch.ops.dropit.sparsify(flat, 10_000, 64, bits, False, False)
    back = torch.ops.dropit.unsparsify(*parts, len(flat), x.dtype, 10_000, 64, bits, False)
    return unflatten(back, x.shape, memory_order(x))


def by_the_book(name: str, a: Mapping[str, Any], grad: Tensor, bits: int) -> dict[str, Tensor]:
    """The gradients of a row that keeps more than its arguments.

    Args:
        name: The row.
        a: Its arguments.
        grad: The gradient of its result.
        bits: Of what is packed.
    """
    x = a["input"]
    if name == "exp":
        return {"input": grad * quantised(x.exp(), bits)}
    if name in ("sigmoid", "tanh"):
        y = quantised(getattr(torch, name)(x), bits)
        return {"input": grad * (y * (1 - y) if name == "sigmoid" else 1 - y * y)}
    if name == "softmax":
        y = quantised(x.softmax(a["dim"]), bits)
        return {"input": y * (grad - (grad * y).sum(a["dim"], keepdim=True))}
    if name == "log_softmax":
        y = quantised(x.log_softmax(a["dim"]), bits).exp()
        return {"input": grad - y * grad.sum(a["dim"], keepdim=True)}
    if name == "cross_entropy":
        counted = a["target"] != a["ignore_index"]
        share = grad * counted / (counted.sum() if a["reduction"] == "mean" else 1)
        one_hot = torch.zeros_like(x).scatter(1, (a["target"] * counted).unsqueeze(1), 1.0)
        log_probs = quantised(x.log_softmax(1), bits)
        return {"input": (log_probs.exp() - one_hot) * share.unsqueeze(1)}
    if name == "layer_norm":
        return norm_by_the_book(name, a, grad, quantised(x, bits))
    others = [d for d in range(x.dim()) if d != 1]
    deviation, mean = torch.std_mean(x, others, correction=0, keepdim=True)
    packed = quantised((x - mean) / deviation, bits) * deviation + mean
    return norm_by_the_book(name, a, grad, packed)


def norm_by_the_book(
    name: str, a: Mapping[str, Any], grad: Tensor, packed: Tensor
) -> dict[str, Tensor]:
    """``y = (x - mean) * rstd * weight + bias``, with the statistics of the exact ``x``."""
    x = a["input"]
    groups, over, affine = x.shape, (0, *range(2, x.dim())), (1, x.shape[1], *[1] * (x.dim() - 2))
    if name == "layer_norm":
        affine = tuple(a["normalized_shape"])
        over = tuple(range(x.dim() - len(affine), x.dim()))
    if name == "group_norm":
        groups, over = torch.Size((x.shape[0], a["num_groups"], -1)), (2,)
    fixed = name == "batch_norm" and not a["training"]
    if fixed:
        mean, var = a["running_mean"].reshape(affine), a["running_var"].reshape(affine)
    else:
        var, mean = torch.var_mean(x.reshape(groups), over, correction=0, keepdim=True)
    rstd = (var + a["eps"]).rsqrt()
    hat = (packed.reshape(groups) - mean) * rstd
    scaled = grad if a["weight"] is None else grad * a["weight"].reshape(affine)
    dx = scaled.reshape(groups)
    if not fixed:
        both = dx * hat
        dx = dx - dx.mean(over, keepdim=True) - hat * both.mean(over, keepdim=True)
    return {
        "input": (dx * rstd).reshape(x.shape),
        "weight": (grad * hat.reshape(x.shape)).sum_to_size(affine),
        "bias": grad.sum_to_size(affine),
    }


BY_THE_BOOK = (
    *("exp", "sigmoid", "tanh", "softmax", "log_softmax", "cross_entropy"),
    *("layer_norm", "group_norm", "batch_norm"),
)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("name", "call"), QUANTISED, ids=case_id)
def test_quant_gradient_is_that_of_the_explicitly_quantised_tensor(
    name: str, call: Case, bits: int
) -> None:
    names, tensors = arguments(name, call), call.tensors()
    rule = {"codec": "quant", "bits": bits, "block": 64}
    dense = graph_of(RULES[name].targets[0], call)
    packed, plan = pack_graph(dense, tensors, {"preset": None, "force": True, "rules": [rule]})
    out, grads = run(packed, tensors)
    exact, exact_grads = run(dense, tensors)
    assert_same(out, exact)

    lossy = {d.read.operand for d in plan.decisions if d.codec == "quant"}
    if name in BY_THE_BOOK:
        bound = bind(RULES[name], call.args, call.kwargs) or {}
        for n, spec, t in zip(names, call.specs(), tensors, strict=True):
            bound[n] = spec.view(t)
        with torch.no_grad():
            wanted = by_the_book(name, bound, cotangent(out), bits)
        for n, spec, grad in zip(names, call.specs(), grads, strict=True):
            if grad is not None:
                got = spec.view(grad)
                torch.testing.assert_close(got, wanted[n].reshape(got.shape), rtol=1e-4, atol=1e-5)
    else:
        given = zip(names, tensors, strict=True)
        instead = [quantised(t, bits).requires_grad_() if n in lossy else t for n, t in given]
        wanted_grads = run(dense, instead)[1]
        if name == "scaled_dot_product_attention":  # a kernel of our own sums in another order
            torch.testing.assert_close(grads, wanted_grads, rtol=1e-5, atol=1e-6)
        else:
            assert_same(grads, wanted_grads)

    pairs = zip(grads, exact_grads, strict=True)
    assert any(grad is not None and not torch.equal(grad, before) for grad, before in pairs)
    for n, grad, before in zip(names, grads, exact_grads, strict=True):
        if not lossy & {r.operand for r in RULES[name].reads if n in r.needed_by}:
            assert_same(grad, before)


@pytest.mark.parametrize(("name", "call"), QUANTISED, ids=case_id)
def test_what_is_small_stays_exact(name: str, call: Case) -> None:
    tensors = call.tensors()
    dense = graph_of(RULES[name].targets[0], call)
    config = {"preset": None, "force": True, "rules": [{"codec": "quant"}]}
    _, plan = pack_graph(dense, tensors, config)
    large = {"input", "query", "key", "value", "result", "log_probs"}
    if name in ("mul", "div"):
        sizes = zip(("input", "other"), call.specs(), strict=True)
        large = {n for n, s in sizes if len(s.shape) > 2 and (name, n) != ("div", "other")}
    for d in plan.decisions:
        if d.codec != "drop":
            is_large = d.read.operand in large
            assert (d.codec, d.reason) == (("quant", "") if is_large else ("keep", EXACT))


# --- few_bit: the gradient is multiplied by a level of the step table

TABLES = [
    *[(name, case("plain", _X), name) for name in SMOOTH],
    ("gelu", case("tanh", _X, approximate="tanh"), "gelu_tanh"),
    ("silu", case("transposed memory", T((11, 40), lambda v: v.t())), "silu"),
    ("tanh", case("channels_last", _CHANNELS_LAST), "tanh"),
]


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize(("name", "call", "function"), TABLES, ids=case_id)
def test_few_bit_gradient_is_a_level_of_the_step_table(
    name: str, call: Case, function: str, bits: int
) -> None:
    tensors = call.tensors()
    rule = {"codec": "few_bit", "bits": bits}
    dense = graph_of(RULES[name].targets[0], call)
    packed, plan = pack_graph(dense, tensors, {"preset": None, "force": True, "rules": [rule]})
    assert "few_bit" in {d.codec for d in plan.decisions}
    out, (grad,) = run(packed, tensors)
    assert_same(out, run(dense, tensors)[0])

    (spec,) = call.specs()
    steps = step_tables.table(function, bits)
    borders = torch.tensor(steps.borders, dtype=torch.float64)
    if name in ("sigmoid", "tanh"):  # of which the result is kept
        number = torch.bucketize(out, step_tables.FUNCTIONS[name](borders).float(), right=True)
    else:
        number = torch.bucketize(
            spec.view(tensors[0].detach()).contiguous(), borders.float(), right=True
        )
    assert grad is not None
    assert_same(spec.view(grad), cotangent(out) * torch.tensor(steps.levels)[number])


@pytest.mark.parametrize(
    ("name", "settings"),
    [("elu", {"alpha": 0.5}), ("celu", {"alpha": 2.0}), ("softplus", {"beta": 3.0})],
    ids=case_id,
)
def test_few_bit_has_no_table_for_other_parameters(name: str, settings: dict[str, Any]) -> None:
    call = case("other", T((4, 9)), **settings)
    tensors = call.tensors()
    config = {"preset": None, "force": True, "rules": [{"codec": "few_bit"}]}
    dense = graph_of(RULES[name].targets[0], call)
    packed, plan = pack_graph(dense, tensors, config)
    assert [d.reason for d in plan.decisions] == [
        f"no table of slopes for these arguments of {name}"
    ]
    assert_same(run(packed, tensors), run(dense, tensors))


# --- NaN and Inf: the forward shows them as before, and so does the gradient

RULES_FOR: dict[str, Any] = {
    "lossless": LOSSLESS["rules"],
    "quant": [{"codec": "quant", "block": 64}],
    "few_bit": [{"codec": "few_bit"}],
}
SPECIAL = [
    (name, call, codec)
    for name, call in dict(reversed(QUANTISED)).items()  # the first case of each row
    for codec in RULES_FOR
    if codec != "few_bit" or name in SMOOTH
]


@pytest.mark.parametrize(("name", "call", "codec"), SPECIAL, ids=case_id)
def test_nan_and_inf_in_the_input(name: str, call: Case, codec: str) -> None:
    tensors = call.tensors()
    with torch.no_grad():  # in blocks of their own, and some are without
        tensors[0].view(-1)[[70, 140, 270]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    config = LOSSLESS | {"rules": RULES_FOR[codec]}
    dense = graph_of(RULES[name].targets[0], call)
    packed, _ = pack_graph(dense, tensors, config)
    (out, grads), (exact, exact_grads) = run(packed, tensors), run(dense, tensors)
    assert_same(out, exact)
    if codec == "lossless":
        assert_same(grads, exact_grads)
    if codec == "quant":  # a block that holds one of them is NaN when it is unpacked
        for grad, before in zip(grads, exact_grads, strict=True):
            assert grad is None or not (before.isnan() & ~grad.isnan()).any()
    if codec == "few_bit":  # NaN counts as the lowest interval: it shows in the result
        assert all(grad is None or grad.isfinite().all() for grad in grads)


# --- what a row does not cover runs as before


@pytest.mark.parametrize(
    "settings", [{"p": 0.0}, {"p": 1.0}, {"p": 0.5, "training": False}], ids=str
)
def test_dropout_that_needs_no_mask_is_left_alone(settings: dict[str, Any]) -> None:
    call = case("dropout", T((4, 9)), **settings)
    tensors = call.tensors()
    dense = graph_of(F.dropout, call)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    assert {d.reason for d in plan.decisions} <= {"this dropout draws no mask"}
    assert_same(run(packed, tensors), run(dense, tensors))


def _probabilities(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator).softmax(1)


_LOGITS, _LABELS = T((6, 5)), T((6,), make=classes(5))
_KEYS = T((2, 3, 5, 8))
_STATISTICS = T((3,), make=biases), T((3,), make=positive)
OBSTACLES: list[tuple[str, Any, Case, str]] = [
    (
        "max_pool2d",
        F.max_pool2d,
        case("indices", T((2, 3, 8, 8)), 2, return_indices=True),
        "the caller wants the indices themselves",
    ),
    (
        "max_pool2d",
        F.max_pool2d,
        case("17 x 17", T((1, 1, 40, 40)), 17, 1),
        "its window has more than 256 cells",
    ),
    (
        "max_pool1d",
        F.max_pool1d,
        case("257", T((1, 1, 600)), 257, 1),
        "its window has more than 256 cells",
    ),
    (
        "scaled_dot_product_attention",
        F.scaled_dot_product_attention,
        case("dropout", _KEYS, _KEYS, _KEYS, dropout_p=0.3),
        "attention dropout: its random state would have to be replayed in the backward",
    ),
    (
        "cross_entropy",
        F.cross_entropy,
        case("class weights", _LOGITS, _LABELS, T((5,), make=positive)),
        "class weights and label smoothing read more than the logarithms",
    ),
    (
        "cross_entropy",
        F.cross_entropy,
        case("label smoothing", _LOGITS, _LABELS, label_smoothing=0.1),
        "class weights and label smoothing read more than the logarithms",
    ),
    (
        "cross_entropy",
        F.cross_entropy,
        case("soft targets", _LOGITS, T((6, 5), make=_probabilities)),
        "its targets are probabilities",
    ),
    (
        "pow",
        operator.pow,
        case("exponents", _LOGITS, T((5,), make=positive)),
        "its exponent is a tensor",
    ),
    ("pow", operator.pow, case("of a number", 2.0, _LOGITS), "its exponent is a tensor"),
    ("pow", torch.pow, case("of a number", 2.0, _LOGITS), "its exponent is a tensor"),
    (
        "div",
        torch.div,
        case("rounding_mode", _LOGITS, T((5,)), rounding_mode=None),
        "called with arguments that the row of div does not know",
    ),
]


@pytest.mark.parametrize(("name", "target", "call", "reason"), OBSTACLES, ids=case_id)
def test_what_a_row_does_not_cover_is_left_alone(
    name: str, target: Any, call: Case, reason: str
) -> None:
    tensors = call.tensors()
    dense = graph_of(target, call)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    assert {(d.read.op, d.reason) for d in plan.decisions} == {(name, reason)}
    assert [n.target for n in packed.graph.nodes] == [n.target for n in dense.graph.nodes]
    if call.name == "indices":
        assert_same(packed(*tensors), dense(*tensors))
    else:
        assert_same(run(packed, tensors), run(dense, tensors))


def test_deprecated_arguments_of_cross_entropy_are_left_alone() -> None:
    call = case("sum", _LOGITS, _LABELS, size_average=False)
    tensors = call.tensors()
    dense = graph_of(F.cross_entropy, call)
    with pytest.warns(UserWarning, match="deprecated"):
        packed, plan = pack_graph(dense, tensors, LOSSLESS)
    assert {d.reason for d in plan.decisions} == {"it is called with deprecated arguments"}
    assert_same(run(packed, tensors), run(dense, tensors))


def test_batch_norm_counts_each_batch_into_its_statistics_once() -> None:
    call = case("training", T((4, 3, 5, 5)), *_STATISTICS, T((3,)), T((3,)), True, 0.3)
    dense = graph_of(F.batch_norm, call)
    for copy in [n for n in dense.graph.nodes if n.target == "clone"][1:3]:
        copy.replace_all_uses_with(copy.args[0])  # the call updates what the caller holds
    dense.recompile()
    packed, _ = pack_graph(dense, call.tensors(), LOSSLESS)
    assert_packed(packed, "batch_norm")
    results = []
    for function in (packed, dense):
        x, mean, var, *affine = call.tensors()
        function(x, mean, var, *affine).sum().backward()
        results.append((mean, var))
    assert_same(*results)
    assert not torch.equal(results[0][0], call.tensors()[1])


@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "leaky_relu"])
def test_slopes_at_the_kinks_and_at_nan_are_autograds(name: str) -> None:
    special = [-1.0, -0.0, 0.0, 1.0, 6.0, torch.inf, -torch.inf, torch.nan]
    x = torch.tensor(special).requires_grad_()
    dense = graph_of(RULES[name].targets[0], case("special", T((8,))))
    packed, _ = pack_graph(dense, [x], LOSSLESS)
    assert_same(run(packed, [x]), run(dense, [x]))


@pytest.mark.parametrize("fill", [0.0, torch.nan, -torch.inf])
def test_max_pool_picks_the_same_of_equal_values(fill: float) -> None:
    x = torch.full((1, 1, 6, 6), fill).requires_grad_()
    dense = graph_of(F.max_pool2d, case("equal", T((1, 1, 6, 6)), 3, 2, 1))
    packed, _ = pack_graph(dense, [x], LOSSLESS)
    assert_same(run(packed, [x]), run(dense, [x]))


# --- the same ops as modules, as users write them, through the tracers


class Conv1D(nn.Module):
    """Hugging Face's layer of GPT-2: ``addmm`` over the flattened input."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D as Layer

        self.layer = Layer(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def modules() -> list[Any]:
    return [
        ("linear", nn.Linear(8, 5), (2, 6, 8)),
        ("linear", nn.Linear(8, 5, bias=False), (6, 8)),
        ("conv1d", nn.Conv1d(3, 4, 3, padding="same"), (2, 3, 12)),
        ("conv2d", nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 9)),
        ("conv2d", nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9, 9)),
        ("conv3d", nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
        ("conv_transpose1d", nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 8)),
        ("conv_transpose2d", nn.ConvTranspose2d(3, 4, 3, output_padding=1, stride=2), (2, 3, 5, 5)),
        ("conv_transpose3d", nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
        ("addmm", Conv1D(), (2, 6, 8)),
        ("relu", nn.ReLU(), (4, 9)),
        ("relu", nn.ReLU(inplace=True), (4, 9)),
        ("hardtanh", nn.ReLU6(), (4, 9)),  # PyTorch's ReLU6 is a Hardtanh
        ("hardtanh", nn.ReLU6(inplace=True), (4, 9)),
        ("hardtanh", nn.Hardtanh(-0.5, 0.5), (4, 9)),
        ("leaky_relu", nn.LeakyReLU(0.1, inplace=True), (4, 9)),
        ("dropout", nn.Dropout(0.4), (4, 9)),
        ("dropout", nn.Dropout(0.4, inplace=True), (4, 9)),
        ("max_pool1d", nn.MaxPool1d(3), (2, 3, 12)),
        ("max_pool2d", nn.MaxPool2d(3, 2, 1), (2, 3, 9, 9)),
        ("max_pool3d", nn.MaxPool3d(2), (1, 2, 4, 4, 4)),
        ("gelu", nn.GELU(), (4, 9)),
        ("gelu", nn.GELU("tanh"), (4, 9)),
        ("silu", nn.SiLU(inplace=True), (4, 9)),
        ("mish", nn.Mish(), (4, 9)),
        ("elu", nn.ELU(0.5), (4, 9)),
        ("selu", nn.SELU(), (4, 9)),
        ("celu", nn.CELU(2.0), (4, 9)),
        ("softplus", nn.Softplus(2.0, 5.0), (4, 9)),
        ("hardswish", nn.Hardswish(inplace=True), (4, 9)),
        ("hardsigmoid", nn.Hardsigmoid(), (4, 9)),
        ("logsigmoid", nn.LogSigmoid(), (4, 9)),
        ("sigmoid", nn.Sigmoid(), (4, 9)),
        ("tanh", nn.Tanh(), (4, 9)),
        ("layer_norm", nn.LayerNorm(9), (4, 9)),
        ("layer_norm", nn.LayerNorm((4, 9), elementwise_affine=False), (2, 4, 9)),
        ("group_norm", nn.GroupNorm(2, 4), (2, 4, 5, 5)),
        ("rms_norm", nn.RMSNorm(9), (4, 9)),
        ("batch_norm", nn.BatchNorm1d(9), (4, 9)),
        ("batch_norm", nn.BatchNorm2d(3, momentum=0.3), (2, 3, 5, 5)),
        ("batch_norm", nn.BatchNorm2d(3, track_running_stats=False), (2, 3, 5, 5)),
        ("softmax", nn.Softmax(-1), (4, 9)),
        ("log_softmax", nn.LogSoftmax(1), (4, 9)),
        ("avg_pool2d", nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 3, 9, 9)),
        ("scaled_dot_product_attention", Calls(_attend), (2, 3, 6, 8)),
        ("cross_entropy", Calls(_loss), (4, 9)),
        ("mul", Calls(lambda x: x * x), (4, 9)),
        ("div", Calls(lambda x: x / (x + 2.0)), (4, 9)),
        ("pow", Calls(lambda x: x**2), (4, 9)),
    ]


class Calls(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def _loss(x: Tensor) -> Tensor:
    return F.cross_entropy(x, torch.tensor([3, 0, 8, 3]))


class Between(nn.Module):
    """A layer between two products with scalars, so that it reads no model input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * 2.0) * 3.0


def lossless(name: str) -> dict[str, Any]:
    """Only the rule that ``name`` needs: one that matches nothing is an error."""
    read = RULES[name].reads[0]
    rule: dict[str, Any] = {"codec": "quant", "bits": None}
    if read.use is Use.CONTRACT:
        rule = {"codec": "mink", "gamma": 0.0}
    if read.bits is not None:
        rule = {"codec": "bitmask"}
    return LOSSLESS | {"rules": [rule]}


def by_symbolic_trace(model: nn.Module, x: Tensor, name: str) -> Any:
    return dropit_fx.transform(model, lossless(name), example_args=(x,))


def by_export(model: nn.Module, x: Tensor, name: str) -> Any:
    exported = torch.export.export(model, (x,)).module()
    return dropit_fx.transform(exported, lossless(name), example_args=(x,))


def by_dynamo(model: nn.Module, x: Tensor, name: str) -> Any:
    options = {"config": lossless(name)}
    return torch.compile(model, backend="dropit_eager", fullgraph=True, options=options)


@pytest.mark.parametrize("by", [by_symbolic_trace, by_export, by_dynamo])
@pytest.mark.parametrize(("name", "layer", "shape"), modules(), ids=lambda v: type(v).__name__)
def test_module_is_packed_by_every_tracer(
    name: str, layer: nn.Module, shape: tuple[int, ...], by: Any
) -> None:
    model = Between(layer)
    x = torch.randn(shape).requires_grad_()  # a layer without parameters saves nothing else
    packed = by(model, x, name)

    def step(function: Any) -> list[Any]:
        torch.manual_seed(5)
        leaf = x.detach().clone().requires_grad_()
        out = function(leaf)
        return [out, *torch.autograd.grad(out.square().sum(), [leaf, *model.parameters()])]

    assert_same(step(packed), step(model))
    report = compiled_graphs()[-1].report if by is by_dynamo else dropit_fx.report(packed)
    assert {row.op for row in report.rows if not row.reason} == {name}


HALF = Codec(  # as CONTRIBUTING.md writes one: of plain tensor ops
    name="half",
    serves=frozenset({Use.CONTRACT}),
    pack=lambda flat, options: (flat.to(torch.bfloat16),),
    unpack=lambda parts, options, numel, dtype: parts[0].to(dtype),
    nbytes=lambda numel, dtype, options: 2 * numel,
)
SPLIT = Codec(  # of several ops and parts, some of them views
    name="split",
    serves=frozenset({Use.CONTRACT}),
    pack=lambda flat, options: (
        (flat * 16).round().clamp(-128, 127).to(torch.int8),
        flat.abs().amax().view(1),
    ),
    unpack=lambda parts, options, numel, dtype: (parts[0].to(dtype) / 16).minimum(parts[1]),
    nbytes=lambda numel, dtype, options: numel + dtype.itemsize,
    buffers=2,
)
COMPILED_CODECS = [
    ("half", {}),
    ("split", {}),
    ("mink", {"gamma": 0.5, "bits": 4}),
    ("random", {"gamma": 0.5}),
    ("quant", {"bits": 4}),
    ("few_bit", {}),
    ("bitmask", {}),
]


@pytest.mark.parametrize(("codec", "options"), COMPILED_CODECS, ids=lambda v: str(v))
def test_a_compiled_forward_hands_over_what_a_codec_packs(
    codec: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for foreign in (HALF, SPLIT):
        monkeypatch.setitem(CODEC, foreign.name, foreign)
    act = nn.Dropout(0.5) if codec == "bitmask" else nn.GELU()  # a mask that nothing else reads
    model = nn.Sequential(nn.Linear(16, 64), act, nn.Linear(64, 8))
    config = {"preset": None, "force": True, "rules": [{"codec": codec, **options}]}
    torch._dynamo.reset()
    inner = {"config": config, "inner": "aot_eager_decomp_partition"}
    compiled = torch.compile(model, backend="dropit", options=inner)
    compiled(torch.randn(32, 16)).sum().backward()
    record = compiled_graphs()[-1]
    (partition,) = record.partitions
    packed = [r for r in record.report.rows if not r.reason]
    assert packed
    assert partition.packed_bytes == sum(r.kept_bytes for r in packed)
    assert not partition.packs_in_backward
    assert not partition.unpacks_in_forward


# --- autocast: the dtypes and the bits of the dense op, whatever its policy

LOWER = [torch.bfloat16, torch.float16]


def under_autocast(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def call(*leaves: Tensor) -> Any:
        with torch.autocast("cpu", dtype):
            return function(*leaves)

    return call


def assert_agrees_under_autocast(
    target: Any, call: Case, dtype: torch.dtype, source: torch.dtype
) -> None:
    tensors = call.tensors(source)
    dense = graph_of(target, call)
    packed, _ = pack_graph(dense, tensors, LOSSLESS)
    found, wanted = (run(under_autocast(f, dtype), tensors) for f in (packed, dense))
    assert found[0].dtype == wanted[0].dtype
    assert_agrees(call, found, wanted)


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize(("name", "target"), spellings(), ids=case_id)
def test_every_spelling_has_the_dtypes_and_bits_of_dense_under_autocast(
    name: str, target: Any, dtype: torch.dtype
) -> None:
    for source in (torch.float32, dtype):
        assert_agrees_under_autocast(target, spelled(name, target), dtype, source)


@pytest.mark.parametrize(("name", "call"), ALL_CASES, ids=case_id)
def test_every_case_has_the_dtypes_and_bits_of_dense_under_autocast(name: str, call: Case) -> None:
    assert_agrees_under_autocast(RULES[name].targets[0], call, torch.bfloat16, torch.float32)


@contextmanager
def autocast_in(dtype: torch.dtype, device: str) -> Iterator[None]:
    """``torch.autocast``, whose own context refuses a CUDA that is not there."""
    was, before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, was)
        torch.set_autocast_dtype(device, before)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_rows_packed_in_the_lower_precision_are_those_that_autocast_lowers(
    name: str, dtype: torch.dtype, device: str
) -> None:
    rule, call = RULES[name], CASES[name][0]
    bound = bind(rule, call.args, call.kwargs) or {}
    dtypes = iter([t.dtype for t in call.tensors()])
    with FakeTensorMode():
        given = [
            torch.empty(a.shape, device=device, dtype=next(dtypes)) if isinstance(a, T) else a
            for a in bound.values()
        ]
    with autocast_in(dtype, device):
        casts = dict(zip(bound, asked(rule, tuple(given)), strict=True))
    operands = [r.operand for r in rule.reads if casts.get(r.operand)]
    assert (rule.autocast == "lower") == any(casts[n] == dtype for n in operands)


# --- ties and bounds: the formula of the installed PyTorch, in dtypes that cannot hold a bound

BOUNDED: list[tuple[Any, tuple[Any, ...]]] = [
    *[(F.hardtanh, b) for b in ((-0.7, 0.7), (-0.3, 0.8), (-1.0, 1.0), (0.1, 0.7), (-1e-7, 0.7))],
    *[(f, ()) for f in (F.relu, F.relu6, F.leaky_relu, F.hardsigmoid, F.hardswish, F.elu)],
    *[(torch.clamp, b) for b in ((-0.7, 0.7), (-1, 1), (None, 0.1), (-0.3,), (1, -1))],
    *[("clamp_", (-1, 1)), ("clamp_min_", (-1,)), ("clamp_max_", (0.7,)), ("clamp_min", (0,))],
    *[(torch.clamp_min, (-0.3,)), (torch.clamp_max, (0.7,)), (F.threshold, (0.1, 0.2))],
]
NEAR = [-3, -2, -1, -0.7, -0.6992, -0.703125, -0.3, -0.0, 0, 0.1, 0.5, 0.7, 0.8, 1, 2.5, 3, 6]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(("target", "bounds"), BOUNDED, ids=case_id)
def test_gradients_at_and_beside_the_bounds_are_autograds(
    target: Any, bounds: tuple[Any, ...], dtype: torch.dtype
) -> None:
    x = torch.tensor([*NEAR, torch.inf, -torch.inf]).to(dtype)
    # the dtype's own neighbours of each
    x = torch.cat([x, (x.double() * (1 + torch.finfo(dtype).eps)).to(dtype)]).requires_grad_()
    dense = graph_of(target, case("bounded", T(tuple(x.shape)), *bounds))
    packed, _ = pack_graph(dense, [x], LOSSLESS)
    assert_same(run(packed, [x]), run(dense, [x]))


# --- einsum: opened into the products that it runs

SIMILARITIES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda q, k: torch.einsum("b h i d, b h j d -> b h i j", q, k),
    lambda q, k: torch.einsum("bhid,bhjd->bhij", [q, k]),
    lambda q, k: torch.einsum("...id,...jd->...ij", q, k),
    lambda q, k: torch.einsum(q, [0, 1, 2, 3], k, [0, 1, 4, 3], [0, 1, 2, 4]),
    lambda q, k: torch.einsum("bhid,bhjd,bhjd->bhij", q, k, k),
]


class Attends(nn.Module):
    def __init__(self, similarity: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(32, 32) for _ in range(3))
        self.similarity = similarity

    def forward(self, x: Tensor) -> Tensor:
        q, k = (f(x).view(4, 16, 4, 8).transpose(1, 2) for f in (self.q, self.k))
        weights = self.similarity(q, k).softmax(-1)
        out = torch.einsum("bhij,bhjd->bihd", weights, k)
        return self.o(out.reshape(4, 16, 32))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_einsum_keeps_what_products_keep(similarity: Any) -> None:
    model, x = Attends(similarity), torch.randn(4, 16, 32)
    results = []
    for function in (model, dropit_fx.transform(model, example_args=(x,), preset="lossless")):
        out = function(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), model.parameters())])
    assert_same(*results)
    ratio = dropit_fx.report(dropit_fx.transform(model, example_args=(x,))).ratio
    product = Attends(lambda q, k: q @ k.transpose(-1, -2))
    assert ratio < 1.3 * dropit_fx.report(dropit_fx.transform(product, example_args=(x,))).ratio


# --- PyTorch's own samples of arguments


OP_DB = {
    "nn.functional.linear": "linear",
    "nn.functional.conv1d": "conv1d",
    "nn.functional.conv2d": "conv2d",
    "nn.functional.conv3d": "conv3d",
    "nn.functional.conv_transpose1d": "conv_transpose1d",
    "nn.functional.conv_transpose2d": "conv_transpose2d",
    "nn.functional.conv_transpose3d": "conv_transpose3d",
    "matmul": "matmul",
    "mm": "mm",
    "bmm": "bmm",
    "addmm": "addmm",
    "baddbmm": "baddbmm",
    "nn.functional.relu": "relu",
    "nn.functional.relu6": "relu6",
    "nn.functional.leaky_relu": "leaky_relu",
    "nn.functional.hardtanh": "hardtanh",
    "nn.functional.dropout": "dropout",
    "nn.functional.max_pool1d": "max_pool1d",
    "nn.functional.max_pool2d": "max_pool2d",
    "nn.functional.max_pool3d": "max_pool3d",
    **{
        f"nn.functional.{name}": name
        for name in (
            *("gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "hardswish"),
            *("hardsigmoid", "logsigmoid", "softsign", "layer_norm", "group_norm", "rms_norm"),
            *("batch_norm", "scaled_dot_product_attention", "cross_entropy", "nll_loss"),
            *("embedding", "pad"),
            *(f"avg_pool{d}d" for d in (1, 2, 3)),
            *(f"adaptive_avg_pool{d}d" for d in (1, 2, 3)),
        )
    },
    **{n: n for n in ("sigmoid", "tanh", "mul", "div", "pow", "softmax", "log_softmax")},
    **{n: n for n in ("exp", "sin", "cos", "clamp", "where", "masked_fill")},
    **{n: n for n in ("index_select", "gather")},
}


def test_op_db_is_asked_about_every_row() -> None:
    assert set(OP_DB.values()) == {r.name for r in OP_RULES}


def samples(name: str, limit: int) -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    variant = {"div": "no_rounding_mode", "nn.functional.pad": "reflect"}.get(name, "")
    (info,) = [o for o in op_db if o.name == name and o.variant_test_name == variant]
    found = list(info.sample_inputs("cpu", torch.float32, requires_grad=True))
    step = max(1, len(found) // limit)
    # op_db reseeds where an op draws random numbers, in a way that Dynamo cannot follow
    plain = ("dropout", "scaled_dot_product_attention")
    short = name.removeprefix("nn.functional.")
    op = getattr(F, short) if short in plain else info.op
    return [(op, s.input, s.args, s.kwargs) for s in found[::step][:limit]]


@pytest.mark.parametrize(("backend", "limit"), [("dropit_eager", 2), ("aot_eager", 1)])
@pytest.mark.parametrize("name", OP_DB)
def test_op_db_samples_have_the_same_bits(name: str, backend: str, limit: int) -> None:
    eager = backend == "dropit_eager"
    options = {"config": LOSSLESS} if eager else {"config": LOSSLESS, "inner": "aot_eager"}
    seen = len(compiled_graphs())
    for op, *given in samples(name, limit):
        leaves, spec = pytree.tree_flatten(given)
        wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]

        def call(*leaves: Any, op: Any = op, spec: Any = spec) -> Any:
            operands = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
            x, args, kwargs = pytree.tree_unflatten(operands, spec)
            return op(x, *args, **kwargs)

        torch._dynamo.reset()
        compiled = torch.compile(
            call, backend="dropit_eager" if eager else "dropit", options=options, fullgraph=True
        )
        results = []
        for function in (call, compiled):
            torch.manual_seed(5)
            out = pytree.tree_leaves(function(*leaves))[0]
            grads = torch.autograd.grad(out, wanted, cotangent(out), allow_unused=True)
            results.append([out, *grads])
        assert_same(*results)
    assert len(compiled_graphs()) > seen
