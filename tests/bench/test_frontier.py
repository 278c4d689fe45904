"""The frontier of a step: plans for peak after peak, and what others take and lose."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_steps import measured, state_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropit_fx
from dropit_fx.bench.frontier import KINDS, draw, frontier_of
from dropit_fx.cli import main
from dropit_fx.config import presets
from dropit_fx.planner.asked import plan_frontier
from dropit_fx.planner.step import Step


class Blocks(nn.Module):
    again = False

    def __init__(self) -> None:
        super().__init__()
        layers = [(nn.LayerNorm(32), nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32))] * 2
        self.blocks = nn.ModuleList(nn.Sequential(*of) for of in layers)

    def set_grad_checkpointing(self) -> None:
        self.again = True

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.again else block(x))
        return x


def test_a_frontier_is_measured_in_real_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    step = Step(Blocks(), (torch.randn(256, 32),))
    before = state_of(step.model)
    found = frontier_of(step, 3, "aot_eager")
    assert all(torch.equal(before[n], t) for n, t in state_of(step.model).items())
    assert not found.skipped
    points = {p.name: p for p in found.points}
    assert {p.kind for p in found.points} == {*KINDS}
    assert points.keys() >= {"dense", "checkpoint", "compiled", "budget=0.1", *presets()}
    assert points["dense"].peak == measured(step, step.model)
    for lossless in ("dense", "lossless", "checkpoint", "compiled", "budget=0.1"):
        assert points[lossless].error < 1e-5
    assert points["checkpoint"].peak < points["dense"].peak
    assert points["balanced"].error > 0

    plans = [p for p in found.points if p.plan is not None]
    assert {p.kind for p in plans} == {"planned"}
    assert [p.peak for p in plans] == sorted({p.peak for p in plans}, reverse=True)
    assert [p.error for p in plans] == sorted(p.error for p in plans)
    for number, p in enumerate(plans):
        assert p.plan is not None
        assert p.peak <= p.plan["peak"]
        file = tmp_path / f"{number}.yaml"
        file.write_text(p.plan["file"])
        packed = dropit_fx.transform(step.model, file, example_args=step.args)
        assert measured(step, packed) == p.peak

    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["dense", "plan"]
    assert len(lines) == 1 + len(found.points)
    draw(found, "blocks", tmp_path / "frontier.svg")
    assert "budget=0.1" in (tmp_path / "frontier.svg").read_text()


def test_no_plan_of_a_frontier_is_beaten_by_another() -> None:
    torch.manual_seed(0)
    plans = plan_frontier(Step(Blocks(), (torch.randn(256, 32),)), 6)
    assert len(plans) > 2
    peaks, errors = [p.predicted for p in plans], [p.error for p in plans]
    assert peaks == sorted({*peaks}, reverse=True)
    assert errors == sorted({*errors})
    assert all(p.predicted <= p.asked < p.dense for p in plans)


def test_a_step_that_keeps_nothing_has_no_frontier() -> None:
    model = nn.Linear(4, 4, bias=False)  # nothing but its input is kept
    with pytest.raises(dropit_fx.PlanError, match="keeps nothing"):
        frontier_of(Step(model, (torch.randn(2, 4),)))


FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 8)), (torch.ones(64, 32),)
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "frontier_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "frontier_factory:net"


def test_the_command_writes_table_json_and_picture(
    spec: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def found(step: Step, progress: Any, device: str, timed: bool) -> Any:
        asked.append(step)
        return frontier_of(step, 2, "no such backend", progress, device, timed)

    monkeypatch.setattr("dropit_fx.bench.frontier.frontier_of", found)
    files = ["--json", "f.json", "--plot", "f.svg", "--time", "--device", "1,0.05"]
    assert main(["plan", "--model", spec, "--batch", "64", "--frontier", *files]) == 0
    assert asked[0].args[0].shape == (64, 32)
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].startswith("dense ")
    assert "checkpoint is left out: Sequential has neither" in printed
    assert "budget=0.5 is left out: " in printed
    told = json.loads(Path("f.json").read_text())
    assert told["batch"] == 64
    assert {p["name"] for p in told["points"]} >= {"dense", *presets()}
    assert "planned, measured" in Path("f.svg").read_text()
    timed = {p["name"]: (p["told"], p["seconds"]) for p in told["points"]}
    assert all(seconds > 0 for _, seconds in timed.values())
    assert timed["balanced"][0] is None
    plans = [p for p in told["points"] if p["plan"]]
    assert all(p["told"] == timed["dense"][0] + p["plan"]["seconds_more"] for p in plans)
    assert "time told" in printed
    assert "measured" in printed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--frontier", "-o", "plan.yaml"], "--out goes with --peak"),
        (["--frontier", "--error-limit", "0.1"], "--error-limit goes with --peak"),
        (["--peak", "50%", "--json", "f.json"], "--json goes with --frontier"),
        (["--peak", "50%", "--plot", "f.png"], "--plot goes with --frontier"),
        (["--peak", "50%", "--time"], "--time goes with --frontier"),
        (["--frontier", "--time-limit", "1"], "--time-limit goes with --peak"),
    ],
)
def test_options_of_the_other_kind_of_plan_are_refused(
    spec: str, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert main(["plan", "--model", spec, *given]) == 2
    assert said in capsys.readouterr().err
