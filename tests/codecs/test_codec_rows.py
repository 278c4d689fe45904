"""Codec rows: unbiased with the variance of the theory, and the backward multiplies kept rows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import T, case, cotangent, graph_of, pack_graph
from sampled_rows import (
    chances,
    config,
    hajek,
    packed_linear,
    skewed,
    weight_gradient,
    with_replacement,
)
from torch import Tensor, nn

import dropit_fx
from dropit_fx import ConfigError, measure
from dropit_fx.codecs import CODEC
from dropit_fx.compile import backend
from dropit_fx.kernels.rows import SELECTIONS, select_rows

ROWS = CODEC["rows"]
UNBIASED = ("uniform", "wta_crs")
every_selection = pytest.mark.parametrize("select", SELECTIONS)


# --- unbiased, with the variance of the theory


@pytest.mark.parametrize("select", UNBIASED)
def test_the_mean_of_2000_draws_is_the_exact_gradient_and_their_variance_the_theorys(
    select: str,
) -> None:
    (rows, width, out), gamma, draws = (48, 6, 5), 0.7, 2000
    x, w = skewed(rows, width), torch.randn(out, width)
    layer, _ = packed_linear(x, w, gamma=gamma, select=select, gradients=False)
    exact = weight_gradient(F.linear, x, w)
    away = torch.stack([weight_gradient(layer, x, w, seed) - exact for seed in range(draws)])
    off, errors = away.mean(0).abs(), away.std(0) / math.sqrt(draws)
    assert (off < 3 * errors).all()
    variance = float(away.square().sum((1, 2)).mean())
    assert away.mean(0).norm() < 3 * math.sqrt(variance / draws)

    count, dy = math.ceil((1 - gamma) * rows), cotangent(torch.empty(rows, out))
    sizes = x.norm(dim=1)
    chance = torch.full((rows,), count / rows) if select == "uniform" else chances(sizes, count)
    assert variance == pytest.approx(hajek(x, dy, chance), rel=0.1)
    if select == "wta_crs":
        assert (chance == 1).sum() > 2
        assert variance < 0.9 * with_replacement(x, dy, sizes, count, winners=True)
        assert variance < 0.9 * hajek(x, dy, torch.full((rows,), count / rows))


def test_with_few_bits_and_stochastic_rounding_it_is_unbiased_too() -> None:
    x, w = skewed(48, 8), torch.randn(5, 8)
    layer, _ = packed_linear(x, w, gamma=0.5, bits=3, block=8, rounding="stochastic")
    exact = weight_gradient(F.linear, x, w)
    away = torch.stack([weight_gradient(layer, x, w, seed) - exact for seed in range(2000)])
    assert away.mean(0).norm() < 3 * math.sqrt(float(away.square().sum((1, 2)).mean()) / 2000)


def test_norm_keeps_the_largest_rows_as_they_are() -> None:
    x, w = skewed(50, 8), torch.randn(5, 8)
    layer, _ = packed_linear(x, w, gamma=0.7, select="norm")
    kept = x.norm(dim=1).argsort(descending=True)[:15]
    expected = cotangent(torch.empty(50, 5))[kept].t() @ x[kept]
    torch.testing.assert_close(weight_gradient(layer, x, w), expected)


# --- the backward multiplies kept rows only


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the inner size of each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            self.inner.append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


@every_selection
@pytest.mark.parametrize("bits", [None, 4])
def test_the_product_of_kept_rows_is_that_of_the_operand_with_zeros_in_the_others(
    select: str, bits: int | None
) -> None:
    x, grad = skewed(50, 24), torch.randn(50, 7)
    options = ROWS.defaults() | {"select": select, "bits": bits, "width": 24}
    parts = ROWS.pack(x.view(-1), options)
    dense = ROWS.unpack(parts, options, x.numel(), x.dtype).view_as(x)
    rows, kept = ROWS.contract(parts, options, grad, x.dtype)
    assert rows.shape == (15, 7)
    assert kept.shape == (15, 24)
    torch.testing.assert_close(rows.t() @ kept, grad.t() @ dense)
    assert (dense != 0).any(1).sum() == 15


TIMED = 9


def in_turns(*runs: Callable[[], Any]) -> list[float]:
    """The median processor time of each, one after the other in each round."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(TIMED + 1):
        for run_once, found in zip(runs, times, strict=True):
            start = time.process_time()
            run_once()
            found.append(time.process_time() - start)
    return [statistics.median(found[1:]) for found in times]


@pytest.mark.parametrize("select", UNBIASED)
def test_at_gamma_0_7_the_weight_gradient_takes_less_than_45_hundredths_of_dense(
    select: str,
) -> None:
    x, w, dy = torch.randn(4096, 768), torch.randn(768, 768), torch.randn(4096, 768)
    layer, _ = packed_linear(x, w, gamma=0.7, select=select)
    results = F.linear(x, w), layer(x, w)
    grads = [lambda y=y: torch.autograd.grad(y, w, dy, retain_graph=True) for y in results]
    dense, rows = in_turns(*grads)
    assert rows <= 0.45 * dense


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.Linear(96, 8))


LAYERS = {"preset": None, "rules": [{"op": "linear", "codec": "rows", "gamma": 0.7}]}


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
def test_eager_backwards_multiply_the_kept_rows(way: str) -> None:
    model, x = network(), torch.randn(4, 25, 64)
    if way == "transform":
        ours: Any = dropit_fx.transform(model, LAYERS, example_args=(x,))
        report = dropit_fx.report(ours)
        assert report.kept_bytes == measure.saved_bytes(ours, x) < report.dense_bytes
    else:
        ours = torch.compile(model, backend=way, options={"config": LAYERS})
    out = ours(x)
    torch.testing.assert_close(out, model(x), rtol=0, atol=0)
    with Products() as noted:
        out.sum().backward()
    # the model input stays anyway; of two other inputs 30 of 100 rows are kept
    assert sorted(noted.inner) == [8, 30, 30, 96, 100]


@pytest.mark.parametrize("inner", ["aot_eager_decomp_partition", "inductor"])
@pytest.mark.parametrize("select", UNBIASED)
def test_compiled_backwards_multiply_the_kept_rows_of_any_batch(inner: str, select: str) -> None:
    model = network()
    rules = [LAYERS["rules"][0] | {"select": select}]  # type: ignore[index]
    options = {"config": {"preset": None, "rules": rules}, "inner": inner}
    before = len(backend.compiled_graphs())
    ours = torch.compile(model, backend="dropit", dynamic=True, options=options)
    with torch.compiler.config.patch(force_disable_caches=True):  # whose results tell nothing
        for batch in (4, 3, 7):
            x = torch.randn(batch, 25, 64)
            ours(x).sum().backward()  # compiled without a mode in force
            out = ours(x).sum()
            with Products() as noted:
                out.backward()
            assert noted.inner.count(math.ceil(batch * 25 * 0.3)) == 2
    (record,) = backend.compiled_graphs()[before:]
    (partition,) = record.partitions
    assert partition.packs_in_backward == ()
    assert partition.unpacks_in_forward == ()
    kept = measure.saved_tensors(ours, torch.randn(4, 25, 64))
    assert [tuple(t.shape) for t in kept].count((30, 96)) == 2


def test_gradients_are_the_same_eager_and_compiled() -> None:
    model, x = network(), torch.randn(40, 64)
    rewritten = dropit_fx.transform(model, LAYERS, example_args=(x,))
    options = {"config": LAYERS, "inner": "inductor"}
    compiled = torch.compile(model, backend="dropit", options=options)
    compiled(x)
    grads = []
    for ours in (rewritten, compiled):
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(ours(x).square().sum(), list(model.parameters())))
    torch.testing.assert_close(*grads)


# --- what is hard


@every_selection
def test_rows_that_are_not_finite_are_kept(select: str) -> None:
    x, w = torch.randn(40, 8), torch.randn(3, 8)
    x[5, 2], x[11, 0], x[30] = torch.nan, torch.inf, -torch.inf
    layer, _ = packed_linear(x, w, gamma=0.9, select=select)
    exact, found = weight_gradient(F.linear, x, w), weight_gradient(layer, x, w)
    assert torch.equal(found.isfinite(), exact.isfinite())


@every_selection
@pytest.mark.parametrize("rows", [0, 1, 2, 40])
def test_rows_of_zeros_few_rows_and_none_at_all(select: str, rows: int) -> None:
    w = torch.randn(3, 8)
    layer, _ = packed_linear(torch.randn(40, 8), w, select=select)
    assert torch.equal(weight_gradient(layer, torch.zeros(rows, 8), w), torch.zeros(3, 8))
    if rows == 1:  # what is kept is all there is
        x = torch.randn(1, 8)
        assert torch.equal(weight_gradient(layer, x, w), weight_gradient(F.linear, x, w))


@every_selection
@pytest.mark.parametrize("bits", [None, 4])
def test_rows_without_elements(select: str, bits: int | None) -> None:
    for shape in ((0, 5), (5, 0), (0, 0)):
        options = ROWS.defaults() | {"select": select, "bits": bits, "width": shape[1]}
        parts = ROWS.pack(torch.empty(0), options)
        assert ROWS.unpack(parts, options, 0, torch.float32).shape == (0,)
        assert sum(t.nbytes for t in parts) == ROWS.nbytes(0, torch.float32, options) == 0


@every_selection
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [None, 3])
def test_bytes_are_as_predicted_in_every_dtype(
    select: str, dtype: torch.dtype, bits: int | None
) -> None:
    for rows, width in ((1, 1), (3, 7), (101, 33)):
        options = ROWS.defaults() | {"select": select, "bits": bits, "width": width}
        parts = ROWS.pack(torch.randn(rows * width).to(dtype), options)
        assert sum(t.nbytes for t in parts) == ROWS.nbytes(rows * width, dtype, options)
        assert ROWS.unpack(parts, options, rows * width, dtype).dtype == dtype
        assert len(parts) == ROWS.buffers


@every_selection
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_lower_precision_has_the_gradient_of_float32(select: str, dtype: torch.dtype) -> None:
    x, w = skewed(60, 16).to(dtype), torch.randn(5, 16).to(dtype)
    # without what it would know of the first step in the second
    layer, _ = packed_linear(x, w, gamma=0.5, select=select, gradients=False)
    found = weight_gradient(layer, x, w)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = weight_gradient(layer, x.to(wide), w.detach().to(wide))
    assert found.dtype == dtype
    torch.testing.assert_close(found.to(wide), expected, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_earlier_steps_are_known_in_every_dtype(dtype: torch.dtype) -> None:
    x, w = skewed(60, 16).to(dtype), torch.randn(5, 16).to(dtype)
    layer, _ = packed_linear(x, w, gamma=0.5, select="wta_crs")
    for _ in range(3):
        found = weight_gradient(layer, x, w)
        assert found.dtype == dtype
        assert bool(found.isfinite().all())


def test_norms_that_overflow_are_norms_of_finite_rows_still() -> None:
    x = torch.full((20, 8), 1e30)
    for select in UNBIASED:
        index, weight = select_rows(x, 5, select)
        assert len(index.unique()) == 5
        torch.testing.assert_close(weight, torch.full((5,), 4.0))


def test_all_rows_kept_lose_no_bit() -> None:
    x, w = torch.randn(4, 9, 16), torch.randn(5, 16)
    for select in SELECTIONS:
        layer, _ = packed_linear(x, w, gamma=0.0, select=select)
        assert torch.equal(weight_gradient(layer, x, w), weight_gradient(F.linear, x, w))


class Shared(nn.Module):
    """One value read by three layers as rows of 32, and by one as rows of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.q, self.k = (nn.Linear(32, 32) for _ in range(3))
        self.wide = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return (self.q(h) + self.k(h)).sum() + self.wide(h.view(-1, 64)).sum()


def test_readers_of_other_rows_share_the_copy_and_get_its_gradient() -> None:
    model, x = Shared(), torch.randn(60, 32)
    rules = {"preset": None, "rules": [{"op": "linear", "codec": "rows", "gamma": 0.7}]}
    ours = dropit_fx.transform(model, rules, example_args=(x,))
    report = dropit_fx.report(ours)
    assert report.kept_bytes == measure.saved_bytes(ours, x) < report.dense_bytes
    with Products() as noted:
        ours(x).backward()
    assert noted.inner.count(18) == 2
    grads = {name: p.grad for name, p in model.named_parameters()}
    h = model.first(x).detach()
    found = grads["q.weight"]
    assert found is not None
    mean = torch.zeros_like(found)
    for _ in range(400):
        model.zero_grad()
        ours(x).backward()
        assert model.wide.weight.grad is not None
        mean += model.q.weight.grad / 400
    torch.testing.assert_close(mean, h.sum(0).expand(32, 32), rtol=0.2, atol=3)


def test_what_is_no_row_in_memory_is_kept_with_the_reason() -> None:
    rules = {"preset": None, "rules": [{"codec": "rows"}]}

    def reasons(run_it: Callable[..., Any], *shapes: tuple[int, ...]) -> list[str]:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.w = nn.Linear(12, 12), nn.Parameter(torch.randn(12, 12))

            def forward(self, *given: Tensor) -> Any:
                return run_it(self.a(given[0]), self.w)

        made = dropit_fx.transform(Model(), rules, example_args=tuple(map(torch.randn, shapes)))
        return [row.reason for row in dropit_fx.report(made).rows if "(12, 12)" not in row.name]

    (turned,) = [r for r in reasons(lambda h, w: F.linear(h.t(), w), (12, 12)) if "rows" in r]
    assert "linear does not sum over its rows, or they do not lie one behind the other" in turned
    batches = reasons(lambda h, w: h @ h.transpose(1, 2), (3, 5, 12))
    assert any("matmul does not sum over its rows" in r for r in batches)


def test_batched_products_are_refused_by_name() -> None:
    for op in ("bmm", "relu"):
        with pytest.raises(ConfigError) as refused:
            dropit_fx.load_config({"rules": [{"op": op, "codec": "rows"}]})
        why = "uses it as" if op == "relu" else f"the backward of {op} is no product that sums over"
        assert why in str(refused.value)
    with pytest.raises(ConfigError, match="'norm' keeps the largest"):
        dropit_fx.load_config({"rules": [{"codec": "rows", "select": "largest"}]})
    with pytest.raises(ValueError, match="must be one of norm, uniform, wta_crs"):
        select_rows(torch.ones(3, 3), 1, "largest")


def test_a_layout_that_changes_behind_the_trace_is_read_whole() -> None:
    x, w = torch.randn(20, 20), torch.randn(5, 20)
    call = case("linear", T((20, 20)), T((5, 20)))
    graph = graph_of(F.linear, call)
    for node in graph.graph.find_nodes(op="call_method", target="clone"):
        node.replace_all_uses_with(node.args[0])  # the layout of what is given
        graph.graph.erase_node(node)
    graph.recompile()
    layer, _ = pack_graph(graph, [x, w.requires_grad_()], config(gamma=0.5))
    exact = torch.autograd.grad(F.linear(x.t(), w), w, cotangent(torch.empty(20, 5)))[0]
    mean = torch.zeros_like(exact)
    for _ in range(500):
        out = layer(x.t(), w)
        mean += torch.autograd.grad(out, w, cotangent(out))[0] / 500
    assert (mean - exact).norm() < 0.1 * exact.norm()
