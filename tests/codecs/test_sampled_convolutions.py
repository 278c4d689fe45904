"""Codec rows in front of convolutions: samples are kept or dropped, the kept ones multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import LAST, T, case, cotangent, graph_of, pack_graph
from sampled_rows import chances, config, hajek_of
from torch import Tensor, nn

import dropit_fx
from dropit_fx import measure
from dropit_fx.kernels.rows import SELECTIONS

BATCH = 20
CALLS: dict[str, tuple[Callable[..., Tensor], T, T, dict[str, Any]]] = {
    "conv1d": (F.conv1d, T((BATCH, 3, 11)), T((4, 3, 3)), {"padding": 1}),
    "conv2d": (F.conv2d, T((BATCH, 4, 7, 6)), T((6, 2, 3, 3)), {"groups": 2, "stride": 2}),
    "channels_last": (F.conv2d, T((BATCH, 4, 7, 6), format=LAST), T((6, 4, 3, 3)), {}),
    "conv3d": (F.conv3d, T((BATCH, 2, 4, 5, 4)), T((3, 2, 2, 3, 2)), {"dilation": 1}),
    "conv_transpose2d": (F.conv_transpose2d, T((BATCH, 3, 4, 5)), T((3, 4, 2, 3)), {"stride": 2}),
}
every_call = pytest.mark.parametrize("name", CALLS)


def given(name: str) -> tuple[Tensor, Tensor]:
    """Samples, of which some are much larger than others, and a weight."""
    _, x, w, _ = CALLS[name]
    made = torch.randn(x.shape) * torch.logspace(-1, 1, BATCH).view(-1, *[1] * (len(x.shape) - 1))
    return made.contiguous(memory_format=x.format), torch.randn(w.shape, requires_grad=True)


def packed(name: str, **options: Any) -> tuple[Any, Any]:
    run, x, w, how = CALLS[name]
    layer = graph_of(run, case("plain", x, w, **how))
    return pack_graph(layer, list(given(name)), config(**options))


def gradient(run: Callable[..., Tensor], x: Tensor, w: Tensor, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    out = run(x, w)
    return torch.autograd.grad(out, w, cotangent(out))[0]


@every_call
@pytest.mark.parametrize("select", ["uniform", "wta_crs"])
def test_the_mean_of_draws_is_the_exact_gradient_with_the_variance_of_the_theory(
    name: str, select: str
) -> None:
    draws = 2000 if name == "conv2d" else 300
    (x, w), how = given(name), CALLS[name][3]
    layer, _ = packed(name, gamma=0.6, select=select, gradients=False)
    dense = gradient(lambda x, w: CALLS[name][0](x, w, **how), x, w)
    away = torch.stack([gradient(layer, x, w, seed) - dense for seed in range(draws)])
    variance = float(away.square().flatten(1).sum(1).mean())
    assert away.mean(0).norm() < 3 * math.sqrt(variance / draws)
    if draws == 2000:
        assert (away.mean(0).abs() < 3 * away.std(0) / math.sqrt(draws)).all()

    count = math.ceil(0.4 * BATCH)
    each = [gradient(lambda x, w: CALLS[name][0](x, w, **how), x, w) for x in _alone(x)]
    sizes = x.flatten(1).norm(dim=1)
    chance = torch.full((BATCH,), count / BATCH) if select == "uniform" else chances(sizes, count)
    expected = hajek_of(torch.stack(each).flatten(1), chance)
    assert variance == pytest.approx(expected, rel=0.1 if draws == 2000 else 0.3)


def _alone(x: Tensor) -> list[Tensor]:
    """The batch with one sample each, the others 0: a gradient is the sum of theirs."""
    return [
        x * F.one_hot(torch.tensor(i), BATCH).view(-1, *[1] * (x.dim() - 1)) for i in range(BATCH)
    ]


@every_call
def test_samples_are_mixed_to_few_by_low_rank(name: str) -> None:
    (x, w), how = given(name), CALLS[name][3]
    exact = gradient(lambda x, w: CALLS[name][0](x, w, **how), x, w)
    whole, _ = packed(name, codec="low_rank", rank=BATCH)
    torch.testing.assert_close(gradient(whole, x, w), exact, rtol=1e-3, atol=1e-3 * exact.norm())
    some, _ = packed(name, codec="low_rank", rank=8, projection="random")
    away = torch.stack([gradient(some, x, w, seed) - exact for seed in range(300)])
    assert away.abs().max() > 0
    variance = float(away.square().flatten(1).sum(1).mean())
    assert away.mean(0).norm() < 3 * math.sqrt(variance / len(away))
    with Convolutions() as noted:
        gradient(some, x, w)
    assert [n for n, mask in noted.calls if mask[1]] == [8]


class Convolutions(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the samples of each backward of a convolution, and which gradients it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, list[bool]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            self.calls.append((args[1].shape[0], args[-1]))
        return func(*args, **(kwargs or {}))


@every_call
@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("bits", [None, 4])
def test_other_gradients_are_exact_and_only_kept_samples_are_multiplied(
    name: str, select: str, bits: int | None
) -> None:
    (x, w), (run, *_, how) = given(name), CALLS[name]
    x.requires_grad_()
    layer, plan = packed(name, gamma=0.7, select=select, bits=bits, block=8)
    assert any(d.codec == "rows" for d in plan.decisions)
    out, dense = layer(x, w), run(x, w, **how)
    assert torch.equal(out, dense)
    dx, _ = torch.autograd.grad(dense, (x, w), cotangent(dense))
    with Convolutions() as noted:
        found, dw = torch.autograd.grad(out, (x, w), cotangent(out))
    torch.testing.assert_close(found, dx)
    assert found.stride() == dx.stride()
    assert dw.shape == w.shape
    assert [(n, mask) for n, mask in noted.calls] == [
        (BATCH, [True, False, False]),
        (6, [False, True, False]),
    ]


@every_call
def test_all_samples_kept_lose_no_bit(name: str) -> None:
    (x, w), how = given(name), CALLS[name][3]
    layer, _ = packed(name, gamma=0.0)
    exact = gradient(lambda x, w: CALLS[name][0](x, w, **how), x, w)
    assert torch.equal(gradient(layer, x, w), exact)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.GELU(),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(36, 5),
    )


RULES: dict[str, Any] = {
    "preset": None,
    "rules": [{"op": "conv2d", "codec": "rows", "select": "wta_crs"}],
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_saved_bytes_are_as_predicted_and_fall(layout: Any) -> None:
    model, x = network().to(memory_format=layout), torch.randn(BATCH, 3, 8, 8)
    x = x.contiguous(memory_format=layout)
    ours = dropit_fx.transform(model, RULES, example_args=(x,))
    report = dropit_fx.report(ours)
    assert report.kept_bytes == measure.saved_bytes(ours, x) < report.dense_bytes
    kept = [row for row in report.rows if row.codec.startswith("rows")]
    assert len(kept) == 2
    for row in kept:
        assert row.kept_bytes == 6 * (row.dense_bytes // BATCH + 8)


@pytest.mark.parametrize("inner", ["aot_eager_decomp_partition", "inductor"])
def test_compiled_convolutions_multiply_kept_samples(inner: str) -> None:
    model, x = network(), torch.randn(BATCH, 3, 8, 8)
    options = {"config": RULES, "inner": inner}
    ours = torch.compile(model, backend="dropit", options=options)
    ours(x).sum().backward()
    out = ours(x)
    with Convolutions() as noted:
        found = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    assert [n for n, mask in noted.calls if mask[1]].count(6) == 2
    exact = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    sampled = ("2.weight", "4.weight")
    for (name, _), one, other in zip(model.named_parameters(), found, exact, strict=True):
        if name not in sampled:
            torch.testing.assert_close(one, other)


def test_a_batch_of_another_size_and_layout_is_right_in_the_mean() -> None:
    model = network()
    ours = dropit_fx.transform(model, RULES, example_args=(torch.randn(BATCH, 3, 8, 8),))
    for x in (torch.randn(7, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.randn(0, 3, 8, 8)):
        x = x.contiguous(memory_format=torch.channels_last)
        model.zero_grad()
        model(x).sum().backward()
        exact = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        mean = [torch.zeros_like(p) for p in exact]
        for _ in range(200 if len(x) == 7 else 1):
            model.zero_grad()
            ours(x).sum().backward()
            for total, p in zip(mean, model.parameters(), strict=True):
                assert p.grad is not None
                total += p.grad / (200 if len(x) == 7 else 1)
        for total, right in zip(mean, exact, strict=True):
            assert (total - right).norm() <= (0.3 if len(x) == 7 else 1e-5) * right.norm()


def test_calls_whose_gradient_is_no_sum_of_samples_say_so() -> None:
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.then = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding="same")

        def forward(self, x: Tensor) -> Tensor:
            return self.then(self.first(x))

    for x in (torch.randn(3, 8, 8), torch.randn(5, 3, 8, 8)):
        rules = {"preset": None, "rules": [{"op": "conv2d", "codec": "rows"}]}
        ours = dropit_fx.transform(Unbatched(), rules, example_args=(x,))
        reasons = [row.reason for row in dropit_fx.report(ours).rows]
        assert any("conv2d does not sum over its rows" in reason for reason in reasons)
