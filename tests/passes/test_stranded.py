"""What a checkpointed region holds for nothing: graphs behind inputs that get no gradient.

As long as a region of PyTorch is to be made again, it holds what is behind each of its inputs, also
of one that it only compares. The report counts that as dense; a rewritten graph lets it go.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d
from torch.utils.checkpoint import checkpoint

import dropit_fx
from dropit_fx.compile import backend
from dropit_fx.measure import saved_bytes
from dropit_fx.passes.choose_codecs import STRANDED
from dropit_fx.report.rows import Report

WAYS = ("transform", "dropit_eager")
PRESETS = ("lossless", "balanced")


def without_gradients(b: Tensor) -> Tensor:
    with torch.no_grad():
        return b * 2 + b.exp()


def unused(b: Tensor) -> Tensor:
    b.sin()
    return torch.ones_like(b)


DEAD: dict[str, Callable[[Tensor], Tensor]] = {
    "detached": lambda b: b.detach(),
    "detached late": lambda b: b.exp().detach(),
    "compared": lambda b: (b > 0.5).to(b.dtype),
    "chosen by": lambda b: torch.where(b > 0.5, 1.0, 2.0),
    "an integer": lambda b: (b * 4).long().to(b.dtype),
    "the largest": lambda b: b.argmax(-1, keepdim=True).float(),
    "without gradients": without_gradients,
    "of zeros": lambda b: torch.zeros_like(b) + 1,
    "unused": unused,
}


def region(a: Tensor, b: Tensor, use: Callable[[Tensor], Tensor]) -> Tensor:
    return a.tanh() * use(b)


def nothing_to_read(a: Tensor, b: Tensor, use: Callable[[Tensor], Tensor]) -> Tensor:
    return a + use(b)


def shape_alone(a: Tensor, b: Tensor, use: Callable[[Tensor], Tensor]) -> Tensor:
    return avg_pool1d(a * 1, 2) + use(b)[..., ::2]


def swapped(a: Tensor, b: Tensor, use: Callable[[Tensor], Tensor]) -> Tensor:
    return b.tanh() * use(a)


def inner(a: Tensor, b: Tensor, use: Callable[[Tensor], Tensor]) -> Tensor:
    """The same use in a region of its own."""
    made: Tensor = checkpoint(region, a.sin(), b, use, use_reentrant=False)
    return made


def inner_of_its_own(a: Tensor, b: Tensor, use: Callable[[Tensor], Tensor]) -> Tensor:
    """What is behind the dead input of the inner region is made in the outer one."""
    made: Tensor = checkpoint(region, a.sin(), b.sigmoid().cos(), use, use_reentrant=False)
    return made * 2


REGIONS = (region, nothing_to_read, shape_alone, swapped, inner, inner_of_its_own)


class Base(nn.Module):
    def __init__(self, use: Callable[[Tensor], Tensor], body: Callable[..., Tensor] = region):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(16, 32)
        self.last = nn.Linear(16 if body is shape_alone else 32, 8)
        self.use, self.body = use, body

    def made_again(self, a: Tensor, b: Tensor) -> Tensor:
        return self.body(a, b, self.use)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).sin(), self.second(x).sigmoid() + 1
        out: Tensor = self.last(checkpoint(self.made_again, a, b, use_reentrant=False))
        return out


class AnotherReader(Base):
    """What is behind the dead input gets its gradient from elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).sin(), self.second(x).sigmoid() + 1
        out: Tensor = self.last(checkpoint(self.made_again, a, b, use_reentrant=False) + b.cos())
        return out


class SharedStorage(Base):
    """One tensor that is read on the way to a dead input and on the way to the loss."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(x).sigmoid() + 1
        a, b = self.first(h[:, :16]), h * h
        out: Tensor = self.last(checkpoint(self.made_again, a, b, use_reentrant=False) + h)
        return out


class Returned(Base):
    """The dead input is an output as well, without its graph."""

    def forward(self, x: Tensor) -> Any:
        a, b = self.first(x).sin(), self.second(x).sigmoid() + 1
        made = checkpoint(self.made_again, a, b, use_reentrant=False)
        return self.last(made), b.detach()


class RegionBehind(Base):
    """A region behind the dead input of another, and one behind its own."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.first(x).sin(), self.second(x).sigmoid() + 1, self.second(x).exp() + 1
        b = checkpoint(self.made_again, b, c, use_reentrant=False)
        b = checkpoint(lambda h: h.sigmoid().exp(), b, use_reentrant=False)
        out: Tensor = self.last(checkpoint(self.made_again, a, b, use_reentrant=False))
        return out


class HeldTwice(Base):
    """Two regions that hold the same; no gradient comes back to one of them."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).sin(), self.second(x).sigmoid() + 1
        made = checkpoint(self.made_again, a, b, use_reentrant=False).detach()
        made = made + checkpoint(self.made_again, a, b, use_reentrant=False)
        out: Tensor = self.last(made)
        return out


class IntegersFirst(Base):
    """The first input of the region is none that autograd knows of."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).sin(), self.second(x).sigmoid() + 1
        i = (x[:, :1] > 0).long()
        made = checkpoint(lambda i, *ab: self.made_again(*ab) * i, i, a, b, use_reentrant=False)
        out: Tensor = self.last(made)
        return out


def rewritten(model: nn.Module, way: str, preset: str, x: Tensor) -> tuple[Any, Report]:
    if way == "transform":
        made: Any = dropit_fx.transform(model, preset=preset, example_args=(x,))
        return made, dropit_fx.report(made)
    torch._dynamo.reset()
    made = torch.compile(model, backend="dropit_eager", fullgraph=True, options={"preset": preset})
    made(x)
    return made, backend.compiled_graphs()[-1].report


def gradients(run: Callable[..., Any], model: nn.Module, x: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    out = run(x)
    (out if isinstance(out, Tensor) else out[0]).square().sum().backward()
    return [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_said_is_kept(model: nn.Module, way: str, preset: str) -> Report:
    x = torch.randn(6, 16)
    run, report = rewritten(model, way, preset, x)
    assert report.dense_bytes == saved_bytes(model, x)
    assert report.kept_bytes == saved_bytes(run, x)
    if preset == "lossless":
        found = gradients(run, run if way == "transform" else model, x)
        for a, b in zip(found, gradients(model, model, x), strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)
    return report


def let_go(report: Report) -> list[str]:
    """The ops of what only regions would hold, the outermost; nothing of it is kept."""
    rows = [row for row in report.rows if row.note == STRANDED and row.codec == "unread"]
    assert all(row.dense_bytes > 0 == row.kept_bytes for row in rows)
    return [row.op for row in rows if not row.region]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("use", DEAD.values(), ids=DEAD)
def test_what_is_behind_an_input_without_gradient_is_counted(
    use: Any, preset: str, way: str
) -> None:
    report = assert_said_is_kept(Base(use), way, preset)
    assert let_go(report) == ["sigmoid"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("body", REGIONS)
def test_whatever_the_region_does(body: Any, preset: str, way: str) -> None:
    report = assert_said_is_kept(Base(DEAD["compared"], body), way, preset)
    # a region that reads nothing is not made again, and holds nothing
    expected = {nothing_to_read: [], swapped: ["sin"]}.get(body, ["sigmoid"])
    assert let_go(report) == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("kind", "stranded"),
    [
        (AnotherReader, 0),
        (SharedStorage, 0),
        (Returned, 1),
        (RegionBehind, 5),
        (HeldTwice, 1),
        (IntegersFirst, 1),
    ],
)
def test_whatever_is_behind_it(kind: Any, stranded: int, preset: str, way: str) -> None:
    report = assert_said_is_kept(kind(DEAD["detached late"]), way, preset)
    assert len(let_go(report)) == stranded


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_compiled_the_partition_says_what_is_kept(inner: str) -> None:
    x, model = torch.randn(6, 16), Base(DEAD["compared"])
    torch._dynamo.reset()
    options = {"preset": "balanced", "inner": inner}
    run: Any = torch.compile(model, backend="dropit", fullgraph=True, options=options)
    run(x)
    assert backend.compiled_graphs()[-1].report.kept_bytes == saved_bytes(run, x)
