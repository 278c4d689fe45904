"""Models whose sizes depend on values (experts get the tokens that are routed to them)."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropit_fx
from dropit_fx import measure
from dropit_fx.compile import backend, no_graph
from dropit_fx.passes.find_saved import UNCOUNTED

WIDTH, EXPERTS = 32, 4


class Around(nn.Module):
    """Layers in front of a body and behind it, whose sizes do not depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.weights = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 6)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.gelu(self.first(x)).flatten(0, 1))
        return self.down(F.gelu(self.up(self.norm(x))))


class TopK(Around):
    """A router and a loop over experts."""

    def body(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number in range(EXPERTS):
            token, rank = torch.where(chosen == number)
            made = F.gelu(x[token] @ self.weights[number]) * weights[token, rank, None]
            out.index_add_(0, token, made)
        return out


class Split(Around):
    """Tokens in the order of their experts, taken apart by counts: they have to add up."""

    def body(self, x: Tensor) -> Tensor:
        expert = self.router(x).argmax(-1)
        order, counts = expert.argsort(), F.one_hot(expert, EXPERTS).sum(0)
        parts = x[order].split(counts.tolist())
        made = [F.gelu(part @ w) for part, w in zip(parts, self.weights, strict=True)]
        return torch.zeros_like(x).index_copy(0, order, torch.cat(made))


class Masked(Around):
    """What a mask lets through: an index that a gradient goes through, a write, an einsum."""

    def body(self, x: Tensor) -> Tensor:
        mask, y = x.sum(-1) > 0, x.clone()
        y[mask] = torch.einsum("ni,io->no", self.inner(x[mask]).tanh(), self.weights[0])
        return y * torch.masked_select(x, x > 0).exp().mean()


class Region(Around):
    """Sizes that depend on values inside of a checkpointed region."""

    def inside(self, x: Tensor) -> Tensor:
        mask = x.sum(-1) > 0
        return x.masked_scatter(mask[:, None], self.inner(x[mask]).tanh())

    def body(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inside, x, use_reentrant=False)
        return out


class SomeLogits(Around):
    """The loss of some rows: their logits may not be made block by block."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 5000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x)).flatten(0, 1)
        rows = (x[:, 1] > 0).nonzero()[:, 0]
        labels = torch.arange(len(x))[rows]
        loss = F.cross_entropy(self.head(self.inner(x[rows])), labels)
        return loss + self.down(F.gelu(self.up(self.norm(x)))).mean()


@pytest.fixture
def sizes_by_values() -> Iterator[None]:
    with torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    ):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def gradients(model: nn.Module, call: Any, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    call(x).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model", [TopK, Split, Masked, Region, SomeLogits])
@pytest.mark.usefixtures("sizes_by_values")
def test_only_what_has_such_a_size_stays_dense(model: type[Around]) -> None:
    torch.manual_seed(0)
    dense, x = model(), torch.randn(4, 24, WIDTH)
    expected = gradients(dense, dense, x)
    for preset, bound in (("lossless", 0), ("balanced", 0.1)):
        before = len(backend.compiled_graphs())
        packed = torch.compile(dense, backend="dropit_eager", options={"preset": preset})
        found = gradients(dense, packed, x)
        assert found.keys() == expected.keys()
        wrong = sum((found[n] - expected[n]).square().sum() for n in expected)
        assert wrong <= bound**2 * sum(g.square().sum() for g in expected.values())
        [graph] = backend.compiled_graphs()[before:]
        report = graph.report
        uncounted = measure.saved_bytes(dense, x) - report.dense_bytes
        assert measure.saved_bytes(packed, x) - report.kept_bytes == uncounted
        assert any(r.reason == UNCOUNTED for r in report.rows)
        assert (uncounted > 0) == (model is not Region)  # which is made again
        torch._dynamo.reset()
    assert report.ratio < 0.35, str(report)
    regions = [r for r in report.rows if r.op == "checkpoint"]
    assert all(r.reason == "sizes in its region depend on values" for r in regions)
    assert bool(regions) == (model is Region)


@pytest.mark.usefixtures("sizes_by_values")
def test_a_cut_with_such_sizes_saves_what_is_packed() -> None:
    torch.manual_seed(0)
    dense, x = TopK(), torch.randn(4, 24, WIDTH)
    packed = torch.compile(dense, backend="dropit", options={"inner": "aot_eager"})
    packed(x).sum().backward()
    [partition] = backend.compiled_graphs()[-1].partitions
    assert partition.packed_bytes > 0
    assert not partition.packs_in_backward + partition.unpacks_in_forward
    assert measure.saved_bytes(packed, x) < 0.7 * measure.saved_bytes(dense, x)


class Alone(TopK):
    """Nothing but what Dynamo cannot resume in."""

    forward = TopK.body


def stops_at(line: str) -> str:
    lines, start = inspect.getsourcelines(TopK.body)
    return f"{__file__}:{start + next(i for i, text in enumerate(lines) if line in text)}"


@pytest.mark.parametrize("door", ["dropit", "dropit_eager"])
def test_where_dynamo_gives_no_graph_it_is_said_once(
    door: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(no_graph, "_said", set())
    torch._dynamo.reset()
    model, x = Alone(), torch.randn(96, WIDTH)
    torch.compile(nn.Linear(WIDTH, 2), backend="dropit_eager")(x)  # after a reset it asks again
    before = len(backend.compiled_graphs())

    def messages() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name.startswith("dropit_fx")]

    torch.compile(model, backend="eager")(x)
    with torch.no_grad():
        torch.compile(model, backend=door)(x)
    assert not messages(), "of another backend, or where nothing is trained"
    for _ in range(2):
        torch._dynamo.reset_code_caches()
        torch.compile(model, backend=door)(x).sum().backward()
    [said] = messages()
    assert said.startswith("torch.compile gives no graph of TopK.body (")
    assert f"it stops at {stops_at('torch.where')} (Dynamic shape operator)" in said
    assert "with torch._dynamo.config.capture_dynamic_output_shape_ops = True it may" in said
    assert len(backend.compiled_graphs()) == before
    torch._dynamo.reset()


def test_what_is_between_two_breaks_is_packed_and_nothing_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Around):
        def body(self, x: Tensor) -> Tensor:
            rows = (x[:, 0] > 0).nonzero()[:, 0]
            return x.index_add(0, rows, self.inner(x[rows]))

    torch._dynamo.reset()
    before = len(backend.compiled_graphs())
    caplog.set_level(logging.WARNING, "dropit_fx")
    model, x = Broken(), torch.randn(4, 24, WIDTH)
    packed = torch.compile(model, backend="dropit_eager")
    packed(x).sum().backward()
    reports = [g.report for g in backend.compiled_graphs()[before:]]
    assert not caplog.messages
    assert {row.op for r in reports for row in r.rows if row.codec != "kept dense"} >= {"gelu"}
    assert measure.saved_bytes(packed, x) < 0.5 * measure.saved_bytes(model, x)
    assert not [m for m in caplog.messages if "recompile_limit" in m]
    torch._dynamo.reset()


class Experts(nn.Module):
    def __init__(self, inside: type[Around]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), inside())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def test_transform_refuses_with_module_line_and_way_out(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(dropit_fx.CaptureError) as caught:
        dropit_fx.transform(Experts(TopK), example_args=(torch.randn(4, 24, WIDTH),))
    text = str(caught.value)
    assert "\n" not in text
    assert "module 'layers.1' (TopK) makes a tensor in a size that depends on values" in text
    assert stops_at("torch.where") in text
    assert 'torch.compile(model, backend="dropit")' in text
    assert "modules=" in text
    assert not capfd.readouterr().err
