"""A peak as an option of the plug-in: the compiled step keeps it, or the error says what can be."""

import copy
from typing import Any

import pytest
import torch
from planned_steps import measured, resident
from torch import Tensor, nn
from torch.fx import symbolic_trace

from dropit_fx import ConfigError, measure
from dropit_fx.compile import backend, planned
from dropit_fx.compile.inner import INNER
from dropit_fx.planner import PlannedConfig
from dropit_fx.planner.step import Step
from dropit_fx.private import FakeTensorMode


class Net(nn.Module):
    """Blocks of a transformer without attention, and their loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32), nn.Dropout(0.1)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return (x**2).mean()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def compiled(model: nn.Module, peak: Any, inner: str, **more: Any) -> Any:
    torch._dynamo.reset()
    options = {"peak": peak, "inner": inner, **more}
    return torch.compile(model, backend="dropit", options=options)


def last_plan() -> PlannedConfig:
    found = backend.compiled_graphs()[-1].planned
    assert found is not None
    return found


NUMBERS = 64  # bytes of single numbers, of which PyTorch makes tensors


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_the_compiled_step_keeps_the_peak(inner: str) -> None:
    step = Step(Net(), (torch.randn(1024, 32),))
    dense = measured(step, torch.compile(step.model, backend=inner))
    predicted, errors = [], []
    for peak in ("100%", int(0.7 * dense)):
        real = measured(step, compiled(step.model, peak, inner))
        found = last_plan()
        assert found.dense == pytest.approx(dense, abs=NUMBERS)
        assert real == pytest.approx(found.predicted, abs=NUMBERS)
        assert found.predicted <= found.asked
        predicted.append(found.predicted)
        errors.append(found.error)
    assert predicted == sorted(predicted, reverse=True)
    assert errors == sorted(errors)
    assert errors[-1] > errors[0] == 0


def test_a_model_with_buffers_is_left_as_it_was_but_for_the_step_itself() -> None:
    layers = nn.Linear(32, 128), nn.BatchNorm1d(128), nn.SiLU(), nn.Linear(128, 128), nn.Dropout()
    model = nn.Sequential(*layers)
    dense, x = copy.deepcopy(model), torch.randn(512, 32)
    run = compiled(model, "90%", "aot_eager")
    with torch.no_grad():  # nothing is trained: nothing is planned
        count = len(backend.compiled_graphs())
        run.eval()(x)
    assert len(backend.compiled_graphs()) == count
    given = x.clone()
    torch.manual_seed(1)
    y = run.train()(x)
    assert last_plan().predicted <= last_plan().asked
    torch.manual_seed(1)
    assert torch.equal(y, dense(given))
    assert torch.equal(x, given)
    for n, t in dense.state_dict().items():  # statistics were updated once
        assert torch.equal(t, model.state_dict()[n])
    assert all(p.grad is None for p in model.parameters())


def test_a_peak_that_cannot_be_kept_is_an_error_that_names_the_least() -> None:
    x = torch.randn(256, 32)
    with pytest.raises(Exception, match="PlanError") as caught:
        compiled(Net(), "5%", "aot_eager")(x)
    least = int(str(caught.value).partition(" bytes")[0].rpartition("(")[2])
    assert "at the peak, in the " in str(caught.value)
    step = Step(Net(), (x,))
    assert measured(step, compiled(step.model, least, "aot_eager")) <= least + NUMBERS


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"preset": "max"}, "peak= plans the whole config"),
        ({"gamma": 0.5}, "peak= plans the whole config"),
        ({"peak": "much"}, "peak = 'much': write bytes"),
    ],
)
def test_options_beside_a_peak_are_refused(more: dict[str, Any], message: str) -> None:
    options = {"peak": "80%", "inner": "aot_eager"} | more
    with pytest.raises(Exception, match=message):
        torch.compile(Net(), backend="dropit", options=options)(torch.randn(64, 32))


def test_options_say_more_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPIT_INNER", "aot_eager")
    monkeypatch.setenv("DROPIT_PRESET", "max")
    x = torch.randn(256, 32)
    torch.compile(Net(), backend="dropit", options={"peak": "200%"})(x)
    assert not backend.compiled_graphs()[-1].report.ratio < 1
    monkeypatch.delenv("DROPIT_PRESET")
    monkeypatch.setenv("DROPIT_PEAK", "200%")
    torch._dynamo.reset()
    torch.compile(Net(), backend="dropit")(x)
    assert last_plan().asked > last_plan().dense
    torch._dynamo.reset()
    torch.compile(Net(), backend="dropit", options={"preset": "max"})(x)
    assert backend.compiled_graphs()[-1].planned is None


def test_fake_inputs_cannot_be_planned_with() -> None:
    with FakeTensorMode():
        fake = torch.randn(4, 4, requires_grad=True)
    with pytest.raises(ConfigError, match="peak= needs real inputs"):
        backend.dropit(symbolic_trace(nn.ReLU()), [fake], options={"peak": "80%"})


def test_a_fused_step_is_planned_for_less_until_it_keeps_the_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What runs takes an eighth more than is told, as where a compiler orders ops anew."""
    peak = measure.peak_memory
    monkeypatch.setattr(planned, "peak_memory", lambda run: peak(run) * 9 // 8)
    monkeypatch.setitem(INNER, "inductor", INNER["aot_eager"])
    step = Step(Net(), (torch.randn(1024, 32),))
    real = measured(step, compiled(step.model, "85%", "inductor"))
    assert last_plan().predicted <= last_plan().asked
    measured_there = real + (real - resident(step)) // 8
    assert last_plan().predicted == pytest.approx(measured_there, abs=2 * NUMBERS)
