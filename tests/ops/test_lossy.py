"""Lossy codecs: only gradients that read what is packed change, and by its loss alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from op_calls import (
    BLOCKS,
    CHANNELS,
    IMAGE,
    LOSSLESS,
    Case,
    T,
    arguments,
    assert_same,
    case,
    case_id,
    cotangent,
    graph_of,
    pack_graph,
    run,
)
from op_cases import RECORDS
from torch import Tensor

from dropit_fx.codecs import CODEC
from dropit_fx.ops import step_tables
from dropit_fx.ops.rule import Read, Use
from dropit_fx.ops.table import RULES, bind
from dropit_fx.runtime.tensor_spec import flatten, memory_order, unflatten

BIG = {name: record.big for name, record in RECORDS.items() if record.big}


def contractions() -> list[Any]:
    """(row, read, codec) for every codec that a GEMM or convolution operand can be packed with."""
    return [
        (name, read, codec.name)
        for name in BIG
        for read in RULES[name].reads
        for codec in CODEC.values()
        if read.use is Use.CONTRACT and codec.can_keep(read) and codec.name not in ("keep", "drop")
    ]


@pytest.mark.parametrize(
    ("name", "read", "codec"), contractions(), ids=lambda v: getattr(v, "operand", v)
)
def test_only_gradients_that_read_the_packed_tensor_change(
    name: str, read: Read, codec: str
) -> None:
    call = BIG[name]
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
@pytest.mark.parametrize("name", BIG)
def test_mink_gradient_is_that_of_the_explicitly_dropped_tensor(
    name: str, gamma: float, scope: str
) -> None:
    call = BIG[name]
    names, tensors = arguments(name, call), call.tensors()
    if tensors[0].dtype == torch.bfloat16:
        pytest.skip("among few magnitudes several are the smallest that is kept, and any may be")
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


# --- quant: the gradients are those of the tensors after a round trip

QUANTISED = [(name, call) for name, record in RECORDS.items() for call in record.quantised]
BITS = {"codec": "bitmask"}
EXACT = "small beside what is packed, it stays exact"
LARGE = {"input", "query", "key", "value", "result", "log_probs"}


def quantised(x: Tensor, bits: int) -> Tensor:
    """``x`` after a round trip through the kernels, in memory order and blocks of 64."""
    flat = flatten(x.detach())
    parts = torch.ops.dropit.sparsify(flat, 10_000, 64, bits, False, False)
    back = torch.ops.dropit.unsparsify(*parts, len(flat), x.dtype, 10_000, 64, bits, False)
    return unflatten(back, x.shape, memory_order(x))


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
    record = RECORDS[name]
    if record.by_the_book:
        bound = bind(RULES[name], call.args, call.kwargs) or {}
        for n, spec, t in zip(names, call.specs(), tensors, strict=True):
            bound[n] = spec.view(t)
        with torch.no_grad():
            wanted = record.by_the_book(bound, cotangent(out), partial(quantised, bits=bits))
        for n, spec, grad in zip(names, call.specs(), grads, strict=True):
            if grad is not None:
                got = spec.view(grad)
                torch.testing.assert_close(got, wanted[n].reshape(got.shape), rtol=1e-4, atol=1e-5)
    else:
        given = zip(names, tensors, strict=True)
        instead = [quantised(t, bits).requires_grad_() if n in lossy else t for n, t in given]
        wanted_grads = run(dense, instead)[1]
        if record.rounds_quantised:
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
    rules = [{"codec": "quant"}, {"codec": "bitmask"}]
    _, plan = pack_graph(dense, tensors, {"preset": None, "force": True, "rules": rules})
    large = RECORDS[name].large
    names = large(call) if large else LARGE
    for d in plan.decisions:
        if d.codec not in ("drop", "bitmask"):
            is_large = d.read.operand in names
            assert (d.codec, d.reason) == (("quant", "") if is_large else ("keep", EXACT))


KINKED = [case("one slope", BLOCKS, T((1,))), case("channels", IMAGE, CHANNELS)]


@pytest.mark.parametrize("values", ["symmetric", "uniform", "affine"])
@pytest.mark.parametrize("call", KINKED, ids=case_id)
def test_the_slope_of_prelu_is_exact_however_its_input_is_rounded(call: Case, values: str) -> None:
    tensors = call.tensors()
    rule = {"codec": "quant", "bits": 2, "block": 64, "range": values}
    dense = graph_of(torch.prelu, call)
    config = {"preset": None, "force": True, "rules": [rule, BITS]}
    packed, plan = pack_graph(dense, tensors, config)
    assert {d.codec for d in plan.decisions} >= {"quant", "bitmask"}
    (_, (dx, dw)), (_, (exact, weight)) = run(packed, tensors), run(dense, tensors)
    assert_same(dx, exact)
    assert not torch.equal(dw, weight)
    tensors[1].requires_grad_(False)
    assert_same(run(pack_graph(dense, tensors, config)[0], tensors)[1][0], exact)


# --- few_bit: the gradient is multiplied by a level of the step table

TABLES = [
    (name, call, function) for name, record in RECORDS.items() for function, call in record.tables
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
    if RULES[name].read("result"):
        number = torch.bucketize(out, step_tables.FUNCTIONS[name](borders).float(), right=True)
    else:
        number = torch.bucketize(
            spec.view(tensors[0].detach()).contiguous(), borders.float(), right=True
        )
    assert grad is not None
    assert_same(spec.view(grad), cotangent(out) * torch.tensor(steps.levels)[number])


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, record.no_table) for name, record in RECORDS.items() if record.no_table],
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
    (name, record.quantised[0], codec)
    for name, record in RECORDS.items()
    if record.quantised
    for codec in RULES_FOR
    if codec != "few_bit" or record.tables
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
    if codec == "quant":
        for grad, before in zip(grads, exact_grads, strict=True):
            assert grad is None or torch.equal(grad.isfinite(), before.isfinite())
    if codec == "few_bit":  # NaN counts as the lowest interval: it shows in the result
        assert all(grad is None or grad.isfinite().all() for grad in grads)
