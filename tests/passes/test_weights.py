"""What is no activation is never kept lossily: the gradient of the input stays exact."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropit_fx
from dropit_fx import measure

N = 128


class Weights(nn.Module):
    """A product with something that is made of a parameter, a buffer or nothing at all."""

    def __init__(self, product: Callable[[Any, Tensor], Tensor], region: bool = False) -> None:
        super().__init__()
        self.product, self.region = product, region
        self.w, self.g = nn.Parameter(torch.randn(N, N) / 16), nn.Parameter(torch.rand(N))
        self.register_buffer("b", torch.randn(N, N) / 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.region:
            out: Tensor = checkpoint(self.product, self, x, use_reentrant=False)
            return out
        return self.product(self, x)


PRODUCTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "addmm": lambda m, x: torch.addmm(m.g, x, m.w),
    "mm": lambda m, x: torch.mm(x, m.w),
    "bmm": lambda m, x: torch.bmm(x[None], m.w[None])[0],
    "baddbmm": lambda m, x: torch.baddbmm(m.g[None, None], x[None], m.w[None])[0],
    "einsum": lambda m, x: torch.einsum("bi,ij->bj", x, m.w),
    "transposed": lambda m, x: x @ m.w.T,
    "part": lambda m, x: x @ m.w[:, ::2],
    "on the left": lambda m, x: (m.w @ x.T).T,
    "normalised": lambda m, x: x @ F.normalize(m.w, dim=0),
    "softmax": lambda m, x: x @ torch.softmax(m.w, 0),
    "low rank": lambda m, x: x @ (m.w[:, :8] @ m.w[:8]),
    "masked": lambda m, x: x @ (m.w * (m.b > 0)),
    "buffer": lambda m, x: x @ m.b,
    "of a buffer": lambda m, x: x @ torch.cos(m.b),
    "constant": lambda m, x: x @ torch.linspace(-1, 1, N * N).view(N, N),
    "factor": lambda m, x: x * torch.cos(torch.arange(N) * m.g),
    "written by it": lambda m, x: table(512, N).mul_(x),
    "written by its transpose": lambda m, x: table(N, 512).mul_(x.T),
    "of a parameter, written by it": lambda m, x: m.w.exp().mul_(x[:N]),
}


def table(*shape: int) -> Tensor:
    return torch.cos(torch.arange(shape[0] * shape[1])).view(shape)


def gradients(run: Callable[[Tensor], Tensor], x: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        out = run(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    (grad,) = torch.autograd.grad(out, x, cotangent)
    return out.detach(), grad


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("door", ["transform", "dropit_eager", "region"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_gradient_of_the_input_has_the_bits_of_dense(
    name: str, door: str, autocast: bool
) -> None:
    model = Weights(PRODUCTS[name], region=door == "region")
    x = torch.randn(512, N, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        if door == "transform":
            packed: Any = dropit_fx.transform(model, example_args=(x,), preset="max")
            assert dropit_fx.report(packed).kept_bytes == measure.saved_bytes(packed, x)
        else:
            packed = torch.compile(model, backend="dropit_eager", options={"preset": "max"})
    for mine, theirs in zip(
        gradients(packed, x, autocast), gradients(model, x, autocast), strict=True
    ):
        assert torch.equal(mine, theirs)


class Handed(nn.Module):
    """A checkpointed region that is given part of a parameter."""

    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.w, self.first = part, nn.Parameter(torch.randn(N, N)), nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        def product(x: Tensor, w: Tensor) -> Tensor:
            return torch.tanh(x @ w)

        out: Tensor = checkpoint(product, self.first(x), self.part(self.w), use_reentrant=False)
        return out


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("door", ["transform", "dropit_eager"])
@pytest.mark.parametrize(
    "part", [lambda w: w.T, lambda w: w[:, :8], lambda w: w.chunk(2)[0].T], ids=["T", "8", "half"]
)
def test_a_region_is_made_again_from_part_of_a_parameter(
    part: Callable[[Tensor], Tensor], door: str, autocast: bool
) -> None:
    model, x = Handed(part), torch.randn(64, N, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        packed: Any = (
            dropit_fx.transform(model, example_args=(x,), preset="lossless")
            if door == "transform"
            else torch.compile(model, backend="dropit_eager", options={"preset": "lossless"})
        )
    for mine, theirs in zip(
        gradients(packed, x, autocast), gradients(model, x, autocast), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_what_is_made_of_chance_or_of_the_input_is_an_activation() -> None:
    class Activations(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.randn(N, N) + x @ torch.tanh(x.T @ x)

    x = torch.randn(512, N, requires_grad=True)
    packed = dropit_fx.transform(Activations(), example_args=(x,), preset="balanced")
    codecs = {row.name: row.codec for row in dropit_fx.report(packed).rows}
    assert codecs["randn"].startswith("mink"), codecs
    assert codecs["tanh"].startswith("quant"), codecs


def test_what_an_activation_is_written_into_is_an_activation_afterwards() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(N, N), nn.Linear(2 * N, N)

        def forward(self, x: Tensor) -> Tensor:
            wider = torch.zeros(512, 2 * N)
            wider[:, :N].copy_(self.first(x))
            out: Tensor = self.last(torch.sin(wider))
            return out

    model, x = Written(), torch.randn(512, N, requires_grad=True)
    packed = dropit_fx.transform(model, example_args=(x,), preset="balanced")
    report = dropit_fx.report(packed)
    assert {row.op: row.codec.split("(")[0] for row in report.rows} == {
        "sin": "quant",
        "linear": "mink",
    }
    assert report.kept_bytes == measure.saved_bytes(packed, x)


@pytest.mark.parametrize("rules", [[], [{"op": "mul", "codec": "keep"}]], ids=["", "kept"])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_made_of_a_table_that_is_written_to(rules: list[Any], transposed: bool) -> None:
    """Nothing can be made from what it was: later values are, from what it is."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(N, N)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).T if transposed else self.first(x)
            t = table(N, N)
            t.mul_(h)
            return F.hardswish(h * t)

    model, x = Written(), torch.randn(N, N)
    config = {"preset": "balanced", "rules": rules}
    packed = dropit_fx.transform(model, config, example_args=(x,))
    report = dropit_fx.report(packed)
    assert torch.equal(packed(x), model(x))
    assert report.dense_bytes == measure.saved_bytes(model, x)
    assert report.kept_bytes == measure.saved_bytes(packed, x)
    codecs = {row.name: row.codec for row in report.rows}
    assert codecs["mul_.input"] == "keep"
    assert "derived" in codecs.values()
