"""Codec low_rank: near the best factors of its rank, or unbiased with the theory's variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import T, assert_same, case, cotangent, graph_of, pack_graph, packed_and_back, run
from torch import Tensor, fx, nn

import dropit_fx
from dropit_fx import ConfigError, measure
from dropit_fx.codecs import CODEC
from dropit_fx.compile import backend

LOW_RANK = CODEC["low_rank"]
PROJECTIONS = ("range", "random")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
every_projection = pytest.mark.parametrize("projection", PROJECTIONS)


def options_of(width: int, **options: Any) -> dict[str, Any]:
    return LOW_RANK.defaults() | options | {"width": width}


def config(**options: Any) -> dict[str, Any]:
    return {"preset": None, "force": True, "rules": [{"codec": "low_rank", **options}]}


def packed_linear(x: Tensor, w: Tensor, **options: Any) -> fx.GraphModule:
    call = case("linear", T(tuple(x.shape)), T(tuple(w.shape)))
    return pack_graph(graph_of(F.linear, call), [x, w.requires_grad_()], config(**options))[0]


def weight_gradient(layer: Any, x: Tensor, w: Tensor, seed: int = 3) -> Tensor:
    grad = run(layer, [x, w.requires_grad_()], seed)[1][1]
    assert grad is not None
    return grad


def round_trip(x: Tensor, **options: Any) -> Tensor:
    return packed_and_back(LOW_RANK, x, options_of(x.shape[1], **options))


def falling(rows: int, width: int) -> Tensor:
    """A matrix whose singular values fall as those of activations do."""
    u, v = (torch.linalg.qr(torch.randn(n, min(rows, width))).Q for n in (rows, width))
    return u @ torch.diag(10 * 0.8 ** torch.arange(min(rows, width))) @ v.t()


# --- range


@pytest.mark.parametrize("shape", [(200, 48), (48, 200), (64, 64)])
@pytest.mark.parametrize("rank", [1, 6, 0.25])
def test_range_is_near_the_best_that_its_rank_allows(
    shape: tuple[int, int], rank: int | float
) -> None:
    x = falling(*shape)
    count = rank if isinstance(rank, int) else math.ceil(rank * min(shape))
    best = float(torch.linalg.svdvals(x)[count:].norm())
    back = round_trip(x, rank=rank)
    assert torch.linalg.matrix_rank(back) <= count
    assert best <= (back - x).norm() * 1.001 < 1.4 * best


def test_range_gives_back_what_has_no_more_than_its_rank_and_draws_nothing() -> None:
    x = torch.randn(100, 5) @ torch.randn(5, 40)
    torch.testing.assert_close(round_trip(x, rank=5), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(round_trip(x, rank=8), x, rtol=1e-4, atol=1e-4)
    assert_same(round_trip(x, rank=3), round_trip(x, rank=3))
    assert not round_trip(torch.zeros(30, 20)).any()


# --- random


def theory(x: Tensor, dy: Tensor, length: int) -> float:
    """The variance of sums of ``length`` rows of a random permutation, with random signs."""
    x, dy = x.double(), dy.double()
    both = x.square().sum(1)[:, None] * dy.square().sum(1) + (x @ x.t()) * (dy @ dy.t())
    return float(both.sum() - both.diagonal().sum()) * (length - 1) / (len(x) - 1)


def test_in_few_bits_with_stochastic_rounding_random_is_unbiased_too() -> None:
    x, w = torch.randn(48, 8), torch.randn(5, 8)
    coded = {"bits": 3, "block": 8, "rounding": "stochastic"}
    layer = packed_linear(x, w, rank=12, projection="random", **coded)
    exact = weight_gradient(F.linear, x, w)
    away = torch.stack([weight_gradient(layer, x, w, seed) - exact for seed in range(2000)])
    assert away.mean(0).norm() < 3 * math.sqrt(float(away.square().sum((1, 2)).mean()) / 2000)


def test_random_has_the_exact_gradient_in_the_mean_of_2000_draws_and_the_theorys_variance() -> None:
    x, w = torch.randn(48, 6) * torch.logspace(-1, 1, 48)[:, None], torch.randn(5, 6)
    layer = packed_linear(x, w, rank=12, projection="random")
    exact = weight_gradient(F.linear, x, w)
    away = torch.stack([weight_gradient(layer, x, w, seed) - exact for seed in range(2000)])
    variance = float(away.square().sum((1, 2)).mean())
    assert away.mean(0).norm() < 3 * math.sqrt(variance / 2000)
    assert (away.mean(0).abs() < 4 * away.std(0) / math.sqrt(2000)).all()
    expected = theory(x, cotangent(torch.empty(48, 5)), 4)
    assert variance == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("rows", [1, 2, 7, 50])
def test_every_row_is_in_one_of_the_sums(rows: int) -> None:
    for count in range(1, rows + 1):
        seed = torch.tensor([count])
        matrix = torch.ops.dropit.mix_rows(torch.eye(rows), seed, count)
        assert matrix.shape == (count, rows)
        assert (matrix.abs().sum(0) == 1).all()
        sizes = matrix.abs().sum(1)
        assert sizes.max() - sizes.min() <= 1
        assert_same(torch.ops.dropit.unmix_rows(torch.eye(count), seed, rows), matrix.t())


def test_signs_and_places_differ_from_seed_to_seed() -> None:
    made = [torch.ops.dropit.mix_rows(torch.eye(64), torch.tensor([s]), 8) for s in range(200)]
    mean = torch.stack(made).mean(0)
    assert mean.abs().max() < 0.15  # 1 / 8 of the places, half of them with either sign
    share = torch.stack(made).abs().mean(0)
    assert 0.02 < share.min() < share.max() < 0.3


# --- both


@every_projection
@pytest.mark.parametrize("bits", [None, 6])
def test_the_backward_multiplies_as_many_rows_as_the_rank(
    projection: str, bits: int | None
) -> None:
    x, grad = torch.randn(50, 24), torch.randn(50, 7)
    known = options_of(24, projection=projection, bits=bits)
    parts = LOW_RANK.pack(x.view(-1), known)
    dense = LOW_RANK.unpack(parts, known, x.numel(), x.dtype).view_as(x)
    assert LOW_RANK.contract is not None
    rows, kept = LOW_RANK.contract(parts, known, grad, x.dtype)
    rank = 6 if projection == "range" else 13
    assert (rows.shape, kept.shape) == ((rank, 7), (rank, 24))
    torch.testing.assert_close(rows.t() @ kept, grad.t() @ dense, rtol=1e-4, atol=1e-4)


@every_projection
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 1000, 0.5])
@pytest.mark.parametrize("bits", [None, 4])
def test_bytes_are_as_predicted_for_any_shape(
    projection: str, given: torch.dtype, rank: int | float, bits: int | None
) -> None:
    for shape in ((0, 5), (5, 0), (0, 0), (1, 1), (3, 7), (7, 3), (65, 16)):
        x = torch.randn(shape).to(given)
        assert round_trip(x, projection=projection, rank=rank, bits=bits).isfinite().all()


@every_projection
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float64])
def test_lower_precision_has_the_gradient_of_float32(projection: str, given: torch.dtype) -> None:
    x, w = falling(60, 16).to(given), torch.randn(5, 16).to(given)
    found = weight_gradient(packed_linear(x, w, projection=projection), x, w)
    wide = torch.float64 if given == torch.float64 else torch.float32
    x, w = x.to(wide), w.detach().to(wide)
    expected = weight_gradient(packed_linear(x, w, projection=projection), x, w)
    assert found.dtype == given
    torch.testing.assert_close(found.to(wide), expected, rtol=0.05, atol=0.1)


@every_projection
def test_no_finite_half_becomes_nan_or_infinity(projection: str) -> None:
    x = torch.full((64, 16), 60000.0, dtype=torch.float16)
    assert round_trip(x, projection=projection).isfinite().all()


@every_projection
def test_gradients_that_are_not_finite_stay_so(projection: str) -> None:
    w = torch.randn(3, 8)
    for odd in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(40, 8)
        x[5, 2] = odd
        layer = packed_linear(x, w, projection=projection)
        found, exact = weight_gradient(layer, x, w), weight_gradient(F.linear, x, w)
        assert not (found.isfinite() & ~exact.isfinite()).any()
        if projection == "random":
            assert torch.equal(found.isfinite(), exact.isfinite())


def test_autocast_does_not_lower_the_factors() -> None:
    x, known = torch.randn(60 * 24), options_of(24)
    parts = LOW_RANK.pack(x, known)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(LOW_RANK.pack(x, known), parts)
        back = LOW_RANK.unpack(parts, known, x.numel(), x.dtype)
    assert_same(back, LOW_RANK.unpack(parts, known, x.numel(), x.dtype))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.Linear(96, 8))


def rules(**options: Any) -> dict[str, Any]:
    return {"preset": None, "rules": [{"op": "linear", "codec": "low_rank", **options}]}


def gradients(run_it: Callable[..., Any], model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    return torch.autograd.grad(run_it(x).square().sum(), list(model.parameters()))


@every_projection
@pytest.mark.parametrize("way", ["transform", "dropit_eager", "aot_eager", "inductor"])
def test_a_model_saves_what_is_reported_and_has_the_gradient_of_eager_mode(
    projection: str, way: str
) -> None:
    model, chosen = network(), rules(projection=projection)
    eager: Any = dropit_fx.transform(model, chosen, example_args=(torch.randn(100, 64),))
    torch._dynamo.reset()
    name = "dropit_eager" if way == "dropit_eager" else "dropit"
    options = {"config": chosen} | ({} if way == "dropit_eager" else {"inner": way})
    before = len(backend.compiled_graphs())
    ours = eager
    if way != "transform":
        ours = torch.compile(model, backend=name, dynamic=True, options=options)
    for rows in (100, 60, 140):
        x = torch.randn(rows, 64)
        ours(x)
        found, expected = gradients(ours, model, x), gradients(eager, model, x)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=0.1)
        sizes = [tuple(t.shape) for t in measure.saved_tensors(ours, x)]
        rank = rows // 4 if projection == "random" else math.ceil(min(rows, 96) / 4)
        assert sizes.count((rank, 96) if projection == "random" else (rows, rank)) == 2
        assert sizes.count((96, rank)) == (0 if projection == "random" else 2)
    if way == "transform":
        x = torch.randn(100, 64)
        report = dropit_fx.report(eager)
        assert report.kept_bytes == measure.saved_bytes(eager, x) < 0.9 * report.dense_bytes
        assert_same(eager(x), model(x))
    elif way != "dropit_eager":
        (record,) = backend.compiled_graphs()[before:]
        (partition,) = record.partitions
        assert partition.packs_in_backward == partition.unpacks_in_forward == ()


@every_projection
def test_where_it_takes_more_than_dense_it_is_kept_with_the_reason(
    projection: str,
) -> None:
    model, x = network(), torch.randn(100, 64)
    made: Any = dropit_fx.transform(
        model, rules(projection=projection, rank=100), example_args=(x,)
    )
    reasons = {row.reason for row in dropit_fx.report(made).rows if row.shape == (100, 96)}
    most = {"range": 4 * (100 + 96) * 96, "random": 4 * 100 * 96 + 8}[projection]
    assert f"packed it would take {most} bytes, dense 38400" in reasons
    assert_same(gradients(made, model, x), gradients(model, model, x))


def test_what_is_wrong_in_a_rule_is_said() -> None:
    for wrong, said in (
        ({"rank": 0}, "rank = 0 for codec 'low_rank': a whole number, or a share in [0.0001, 1)"),
        ({"rank": 1.5}, "of rows or width, whichever is less, for 'range'"),
        ({"rank": True}, "a whole number"),
        ({"projection": "gaussian"}, "'random' (sums of rows with random signs; unbiased)"),
        ({"op": "bmm"}, "the backward of bmm is no product that sums over its rows"),
    ):
        with pytest.raises(ConfigError) as refused:
            dropit_fx.load_config(config(**wrong))
        assert said in str(refused.value)
