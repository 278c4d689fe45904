"""Every row of the op table, in every spelling: the bits of dense, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import (
    LOSSLESS,
    Case,
    T,
    assert_agrees,
    assert_packed,
    assert_same,
    biases,
    case,
    case_id,
    classes,
    graph_of,
    kept_as_they_are,
    pack_graph,
    positive,
    reasons,
    run,
)
from op_cases import ALL_CASES, CASES, RECORDS, spelled, spellings
from torch import Tensor, nn

import dropit_fx
from dropit_fx.ops.rule import INSIDE
from dropit_fx.ops.table import RULES, bind
from dropit_fx.passes.find_saved import NUMBER

# --- found and packed, in every spelling


@pytest.mark.parametrize(("name", "target"), spellings(), ids=case_id)
def test_every_spelling_is_packed_without_changing_a_bit(name: str, target: Any) -> None:
    call = spelled(name, target)
    tensors = call.tensors()
    dense = graph_of(target, call)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    assert reasons(plan) == kept_as_they_are(name, tensors)
    bound = bind(RULES[name], call.args, call.kwargs) or {}
    absent = {n for n, a in bound.items() if a is None}
    every = {r.operand for r in RULES[name].reads if r.is_of(bound)}
    assert {d.read.operand for d in plan.decisions} == every - absent - set(RECORDS[name].on_cuda)
    assert_packed(packed, name)
    assert target not in [n.target for n in packed.graph.nodes]
    assert_agrees(call, run(packed, tensors), run(dense, tensors))


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


# Where there is but one gradient, it was alone before.
SEVERAL = [
    (name, call)
    for name, call in ALL_CASES
    if sum(spec.make is None for spec in call.specs()) > 1 and not RECORDS[name].one_for_all
]


@pytest.mark.parametrize(("name", "call"), SEVERAL, ids=case_id)
def test_each_gradient_alone_has_the_same_bits(name: str, call: Case) -> None:
    # a formula computes only what is asked for, and may read only what that needs
    if call.not_alone:
        pytest.skip(call.not_alone)
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
    if not RECORDS[name].half_on_cpu and dtype != torch.float64:
        pytest.skip("PyTorch has no such kernel for CPUs")
    call = CASES[name][0]
    tensors = call.tensors(dtype)
    dense = graph_of(RULES[name].targets[0], call)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    assert reasons(plan) == kept_as_they_are(name, tensors)
    assert_agrees(call, run(packed, tensors), run(dense, tensors))


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


_LOGITS, _LABELS = T((6, 5)), T((6,), make=classes(5))
_STATISTICS = T((3,), make=biases), T((3,), make=positive)
OBSTACLES: list[tuple[str, Any, Case, str]] = [
    (name, target, call, call.obstacle)
    for name, record in RECORDS.items()
    for target, call in record.obstacles
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
    if isinstance(dense(*tensors), tuple):  # the indices too, which have no gradient
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


# --- ties and bounds: the formula of the installed PyTorch, in dtypes that cannot hold a bound

BOUNDED: list[tuple[Any, tuple[Any, ...]]] = [
    *[(F.hardtanh, b) for b in ((-0.7, 0.7), (-0.3, 0.8), (-1.0, 1.0), (0.1, 0.7), (-1e-7, 0.7))],
    *[(f, ()) for f in (F.relu, F.relu6, F.leaky_relu, F.hardsigmoid, F.hardswish, F.elu)],
    *[(torch.clamp, b) for b in ((-0.7, 0.7), (-1, 1), (None, 0.1), (-0.3,), (1, -1))],
    *[("clamp_", (-1, 1)), ("clamp_min_", (-1,)), ("clamp_max_", (0.7,)), ("clamp_min", (0,))],
    *[(torch.clamp_min, (-0.3,)), (torch.clamp_max, (0.7,)), (F.threshold, (0.1, 0.2))],
]
NEAR = [-3, -2, -1, -0.7, -0.6992, -0.703125, -0.3, -0.0, 0, 0.1, 0.5, 0.7, 0.8, 1, 2.5, 3, 5.9, 6]


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


class Exported(Attends):
    """One that ``torch.export`` alone takes, for it decides by a size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[1] > 8 else x.flip(1))


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("attends", [Attends, Exported])
def test_einsum_keeps_what_products_keep(attends: type[Attends], similarity: Any) -> None:
    model, x = attends(similarity), torch.randn(4, 16, 32)
    results = []
    for function in (model, dropit_fx.transform(model, example_args=(x,), preset="lossless")):
        out = function(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), model.parameters())])
    assert_same(*results)
    ratio = dropit_fx.report(dropit_fx.transform(model, example_args=(x,))).ratio
    product = Attends(lambda q, k: q @ k.transpose(-1, -2))
    assert ratio < 1.3 * dropit_fx.report(dropit_fx.transform(product, example_args=(x,))).ratio
