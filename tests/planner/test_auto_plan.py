"""AutoPlan: plans follow the gradients of training, of one trace, and touch nothing else."""

from collections.abc import Iterator

import pytest
import torch
from planned_steps import measured
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropit_fx
from dropit_fx import rewriting
from dropit_fx.planner.step import Step


def branch(out: int) -> nn.Sequential:
    layers = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.Tanh(), nn.LayerNorm(64))]
    return nn.Sequential(*layers, nn.Linear(64, out))


class Branches(nn.Module):
    """Two branches alike, whose part in the result training changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = branch(16), branch(16)
        self.share = nn.Parameter(torch.tensor([1.0, 1e-3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.share[0] * self.one(x) + self.share[1] * self.two(x)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The model of each trace."""
    seen: list[str] = []
    capture = rewriting.capture

    def counted(model: nn.Module, *given: object) -> object:
        seen.append(type(model).__name__)
        return capture(model, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(rewriting, "capture", counted)
    return seen


def batches(count: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(512, 64) for _ in range(count)]


def bits_of(auto: dropit_fx.AutoPlan) -> dict[str, int]:
    """Bytes that each branch keeps."""
    kept = {"one": 0, "two": 0}
    for row in dropit_fx.report(auto.packed).rows:
        name = row.module.partition(".")[0]
        if name in kept:
            kept[name] += row.kept_bytes
    return kept


def test_the_plan_follows_the_gradients_of_one_trace(traces: list[str]) -> None:
    model, data = Branches(), batches(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    auto = dropit_fx.AutoPlan(
        model,
        data[0],
        peak="60%",
        every=2,
        loss=lambda y: y.square().mean(),
        optimizer=optimizer,
        device="h100",
    )
    packed, parameters = auto.packed, [*model.parameters()]
    before = bits_of(auto)
    assert before["one"] > before["two"]
    news = []
    for number, x in enumerate(data):
        packed(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 1:  # the other branch is what counts from here on
            with torch.no_grad():
                model.share.copy_(torch.tensor([1e-3, 1.0]))
        state = {id(t): t.clone() for s in optimizer.state.values() for t in s.values()}
        values = [p.detach().clone() for p in parameters]
        news.append(auto.after_step(x))
        assert all(map(torch.equal, values, parameters))
        now = {id(t): t for s in optimizer.state.values() for t in s.values()}
        assert now.keys() == state.keys()
        assert all(torch.equal(now[key], t) for key, t in state.items())
    assert news == [False, True, False]
    after = bits_of(auto)
    assert after["two"] > after["one"]
    assert auto.packed is packed
    assert auto.plans == 2
    assert traces == ["Branches"]
    assert all(p is q for p, q in zip(packed.parameters(), parameters, strict=True))
    step = Step(model, (data[0],), {}, lambda y: y.square().mean())
    assert measured(step, packed) <= auto.planned.asked


def test_a_new_plan_is_what_transform_makes_of_it() -> None:
    model, data = Branches(), batches(2)
    auto = dropit_fx.AutoPlan(model, data[0], peak="60%", every=1, loss=torch.sum, device="h100")
    with torch.no_grad():
        model.share.copy_(torch.tensor([1e-3, 1.0]))
    auto.packed.eval()
    calls = []
    auto.packed.register_forward_hook(lambda *_: calls.append(1))
    assert auto.after_step(data[1])
    assert not auto.packed.training
    auto.packed.train()
    other = dropit_fx.transform(model, auto.planned, example_args=(data[0],))
    assert str(auto.packed.graph) == str(other.graph)
    assert str(dropit_fx.report(auto.packed)) == str(dropit_fx.report(other))
    gradients = []
    for module in (auto.packed, other):
        model.zero_grad()
        module(data[0]).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))
    assert calls == [1]


class Nested(nn.Module):
    """A region of its own in the graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Sequential(nn.Linear(64, 64), nn.Tanh()), branch(16)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.inner, x, use_reentrant=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.outer(y).float()


def test_graphs_within_the_graph_are_not_traced_again(traces: list[str]) -> None:
    model, data = Nested(), batches(2)
    auto = dropit_fx.AutoPlan(model, data[0], peak="96%", every=1, loss=torch.sum, device="h100")
    assert auto.after_step(data[1])
    assert traces == ["Nested"]
    assert {id(p) for p in auto.packed.parameters()} == {id(p) for p in model.parameters()}
    auto.packed(data[0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_no_plan_can_be_made_of_leaves_the_last_one() -> None:
    model, data = Branches(), batches(1)
    auto = dropit_fx.AutoPlan(model, data[0], peak="70%", every=1, loss=torch.sum, device="h100")
    planned, graph = auto.planned, str(auto.packed.graph)
    assert not auto.after_step(data[0][:100])  # of other shapes: it waits
    with pytest.warns(UserWarning, match="the plan before stays: the gradient of this batch"):
        assert not auto.after_step(data[0] * float("nan"))
    assert auto.planned is planned
    assert str(auto.packed.graph) == graph
    assert auto.after_step(data[0])
    for every in (0, 1.5, True):
        with pytest.raises(ValueError, match="every="):
            dropit_fx.AutoPlan(model, data[0], peak="70%", every=every, device="h100")  # type: ignore[arg-type]
