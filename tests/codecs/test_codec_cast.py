"""Codec cast: the nearest value of the dtype, NaN and infinity as they were, its bytes exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import T, assert_same, case, graph_of, pack_graph, packed_and_back, run
from torch import Tensor, nn

import dropit_fx
from dropit_fx import ConfigError, measure
from dropit_fx.codecs import CODEC
from dropit_fx.compile import backend

CAST = CODEC["cast"]
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
INPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
every_float8 = pytest.mark.parametrize("dtype", FLOAT8)
every_dtype = pytest.mark.parametrize("dtype", [*FLOAT8, "bfloat16"])


def options_of(**options: Any) -> dict[str, Any]:
    return CAST.defaults() | options


def round_trip(x: Tensor, **options: Any) -> Tensor:
    return packed_and_back(CAST, x, options_of(**options))


def values_of(dtype: str) -> Tensor:
    """Every finite value of a dtype of 8 bits but its greatest, in double precision."""
    every = torch.arange(256).to(torch.uint8).view(getattr(torch, dtype)).double()
    finite = every[every.isfinite()].unique()
    return finite[finite.abs() < finite.max()]


def nearest(x: Tensor, dtype: str) -> Tensor:
    """One block with the least power of two that brings it into the range of the dtype."""
    table, most = values_of(dtype), float(x.double().abs().max())
    scale = 2.0**-100
    while table.max() * scale < most:
        scale *= 2
    return table[(x.double()[:, None] / scale - table).abs().argmin(1)] * scale


@every_float8
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("block", [8, 64, 128, None])
def test_each_value_becomes_the_nearest_in_the_scale_of_its_block(
    dtype: str, given: torch.dtype, block: int | None
) -> None:
    x = (torch.randn(1000) * torch.logspace(-3, 3, 1000)).to(given)
    back = round_trip(x, dtype=dtype, block=block)
    expected = torch.cat([nearest(part, dtype) for part in x.split(block or len(x))])
    # of two that are as near, the table names the lower one
    ties = (x.double() - back.double()).abs() == (x.double() - expected).abs()
    assert ((back.double() == expected) | ties).all()
    error = ((back.double() - x.double()).norm() / x.double().norm()).item()
    assert 0.01 < error < (0.03 if dtype == "float8_e4m3fn" else 0.06)


@pytest.mark.parametrize("given", INPUTS)
def test_bfloat16_is_what_pytorch_rounds_to(given: torch.dtype) -> None:
    x = torch.randn(1000).to(given)
    assert_same(round_trip(x, dtype="bfloat16"), x.bfloat16().to(given))


@every_dtype
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("block", [8, None])
def test_no_finite_value_becomes_nan_or_infinity(
    dtype: str, given: torch.dtype, block: int | None
) -> None:
    info = torch.finfo(given)
    ends = [info.max, info.max * 0.99, info.max * 0.87, info.tiny, info.smallest_normal / 4, 0.0]
    x = torch.tensor([sign * e for e in ends for sign in (1, -1)], dtype=given)
    back = round_trip(x, dtype=dtype, block=block)
    assert back.isfinite().all()
    assert (back * x >= 0).all()
    assert (back[:6].sign() == x[:6].sign()).all()
    if given != torch.float64:
        torch.testing.assert_close(back[:6], x[:6], rtol=0.15, atol=0)


@every_dtype
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("block", [64, None])
def test_nan_and_infinity_come_back_and_leave_the_others_alone(
    dtype: str, given: torch.dtype, block: int | None
) -> None:
    x = torch.randn(500).to(given)
    clean = x.clone()
    clean[[3, 70, 71, 499]] = 0.0
    x[[3, 70, 71, 499]] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.inf], dtype=given)
    back, without = (round_trip(t, dtype=dtype, block=block) for t in (x, clean))
    special = ~x.isfinite()
    assert_same(back[special], x[special])
    assert_same(back[~special], without[~special])
    for odd in (torch.nan, torch.inf, -torch.inf):  # alone in their block
        assert_same(
            round_trip(torch.full((9,), odd), dtype=dtype, block=block), torch.full((9,), odd)
        )


@every_dtype
def test_zeros_stay_zeros_with_their_sign(dtype: str) -> None:
    x = torch.tensor([0.0, -0.0] * 100)
    back = round_trip(x, dtype=dtype)
    assert torch.equal(back.signbit(), x.signbit())
    assert not back.any()


@every_dtype
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("block", [8, 128, None])
def test_bytes_are_as_predicted_for_any_size(
    dtype: str, given: torch.dtype, block: int | None
) -> None:
    for numel in (0, 1, 7, 8, 127, 128, 129, 1000):
        round_trip(torch.randn(numel).to(given), dtype=dtype, block=block)


def test_a_block_costs_one_byte() -> None:
    assert CAST.nbytes(1024, torch.float32, options_of()) == 1024 + 8
    assert CAST.nbytes(1024, torch.float32, options_of(block=None)) == 1024 + 1
    assert CAST.nbytes(1024, torch.float32, options_of(dtype="bfloat16")) == 2048


# --- in graphs


def config(**options: Any) -> dict[str, Any]:
    return {"preset": None, "rules": [{"codec": "cast", **options}]}


@every_dtype
@pytest.mark.parametrize("given", [torch.float32, torch.float16])
def test_the_gradient_is_that_of_the_tensor_that_was_cast(dtype: str, given: torch.dtype) -> None:
    call = case("turned", T((24, 40), lambda x: x.t()), T((5, 24)))  # elements in another order
    tensors = call.tensors(given)
    forced = config(dtype=dtype, block=64) | {"force": True}
    graph = graph_of(F.linear, call)
    packed, _ = pack_graph(graph, tensors, forced)
    instead = [round_trip(tensors[0].detach(), dtype=dtype, block=64), tensors[1]]
    (out, grads), (exact, exact_grads) = run(packed, tensors), run(graph, tensors)
    assert_same(out, exact)
    assert_same(grads[0], exact_grads[0])
    assert_same(grads[1], run(graph, instead)[1][1])
    assert not torch.equal(grads[1], exact_grads[1])


def network() -> nn.Module:
    layers = nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 96), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(96, 8))


RULES = {
    dtype: {"preset": None, "rules": [{"codec": "cast", "dtype": dtype, "block": block}]}
    for dtype, block in (("float8_e4m3fn", 128), ("float8_e5m2", None), ("bfloat16", None))
}


def step(run_it: Any, model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    out = run_it(x)
    return out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))


@pytest.mark.parametrize(
    ("dtype", "way"),
    [
        *((dtype, way) for dtype in RULES for way in ("transform", "dropit_eager", "aot_eager")),
        ("float8_e4m3fn", "inductor"),
    ],
)
def test_a_model_saves_what_is_reported_and_trains_the_same_each_time(dtype: str, way: str) -> None:
    model, x = network(), torch.randn(40, 64)
    dense = step(model, model, x)
    rewritten: Any = dropit_fx.transform(model, RULES[dtype], example_args=(x,))
    torch._dynamo.reset()
    if way == "transform":
        ours, report = rewritten, dropit_fx.report(rewritten)
    else:
        options = {"config": RULES[dtype], "inner": way}
        options = options if way != "dropit_eager" else {"config": RULES[dtype]}
        name = way if way == "dropit_eager" else "dropit"
        ours = torch.compile(model, backend=name, options=options)
        ours(x)
        report = backend.compiled_graphs()[-1].report
    first, again = step(ours, model, x), step(ours, model, x)
    assert_same(first, again)
    torch.testing.assert_close(first[0], dense[0])
    torch.testing.assert_close(first, step(rewritten, model, x), rtol=1e-4, atol=1e-3)
    within = {"float8_e4m3fn": 0.05, "float8_e5m2": 0.1, "bfloat16": 0.01}[dtype]
    for grad, exact in zip(first[1:], dense[1:], strict=True):
        assert (grad - exact).norm() <= within * exact.norm()
    assert any(not torch.equal(a, b) for a, b in zip(first[1:], dense[1:], strict=True))
    assert report.kept_bytes < 0.6 * report.dense_bytes
    if way in ("transform", "dropit_eager"):
        assert report.kept_bytes == measure.saved_bytes(ours, x)
    else:
        (partition,) = backend.compiled_graphs()[-1].partitions
        cast = [row for row in report.rows if row.codec == f"cast(dtype={dtype})"]
        assert partition.packed_bytes == sum(row.kept_bytes for row in cast)
        assert partition.packs_in_backward == partition.unpacks_in_forward == ()


def test_inductor_packs_any_batch_and_whatever_is_in_it() -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8))
    with torch.no_grad():
        model[0].weight[0], model[0].weight[1] = torch.nan, 1e3
    rules = [{"op": "linear", "codec": "cast", "dtype": "float8_e5m2"}]
    chosen = {"preset": None, "force": True, "rules": rules}
    torch._dynamo.reset()
    ours = torch.compile(
        model, backend="dropit", dynamic=True, options={"config": chosen, "inner": "inductor"}
    )
    eager: Any = dropit_fx.transform(model, chosen, example_args=(torch.randn(4, 24),))
    for batch in (4, 3, 70):
        x = torch.randn(batch, 24)
        found, expected = (
            torch.autograd.grad(run_it(x), list(model.parameters()), torch.ones(batch, 8))
            for run_it in (ours, eager)
        )
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
        assert found[2].isnan().tolist() == [[True] + [False] * 39] * 8


def test_what_gets_no_smaller_is_kept_with_the_reason() -> None:
    model, x = network().bfloat16(), torch.randn(40, 64).bfloat16()
    made: Any = dropit_fx.transform(model, RULES["bfloat16"], example_args=(x,))
    reasons = {row.reason for row in dropit_fx.report(made).rows if row.shape == (40, 96)}
    assert reasons == {"packed it would take 7680 bytes, dense 7680"}
    assert_same(step(made, model, x), step(model, model, x))


def test_what_is_wrong_in_a_rule_is_said() -> None:
    for wrong, said in (
        ({"dtype": "float8"}, "dtype = 'float8' for codec 'cast': 'float8_e4m3fn', 'float8_e5m2'"),
        ({"dtype": torch.bfloat16}, "or 'bfloat16'"),
        (
            {"block": 100},
            "block = 100 for codec 'cast': elements that share a scale, a",
        ),
        ({"block": True}, "or null for the whole tensor"),
        ({"bits": 8}, "no key 'bits' for codec 'cast'"),
        ({"op": "dropout"}, "dropout.mask cannot be saved as 'cast'"),
    ):
        with pytest.raises(ConfigError) as refused:
            dropit_fx.load_config(config(**wrong))
        assert said in str(refused.value)
