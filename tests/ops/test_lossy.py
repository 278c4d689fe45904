"""Lossy codecs: only gradients that read what is packed change, and by its loss alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    LOSSLESS,
    Case,
    T,
    arguments,
    assert_same,
    biases,
    case,
    case_id,
    classes,
    coins,
    cotangent,
    graph_of,
    pack_graph,
    positive,
    run,
)
from torch import Tensor

from dropit_fx.codecs import CODEC
from dropit_fx.config import serves
from dropit_fx.ops import step_tables
from dropit_fx.ops.rule import Read, Use
from dropit_fx.ops.table import OP_RULES, RULES, bind
from dropit_fx.runtime.packed_call import flatten, memory_order, unflatten


def contractions() -> list[Any]:
    """(row, read, codec) for every codec that a GEMM or convolution operand can be packed with."""
    return [
        (rule.name, read, codec.name)
        for rule in OP_RULES
        for read in rule.reads
        for codec in CODEC.values()
        if read.use is Use.CONTRACT and serves(codec, read) and codec.name not in ("keep", "drop")
    ]


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
