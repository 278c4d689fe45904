"""The predicted step as files: what PyTorch's visualiser and Perfetto are given is the forecast."""

import copy
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_steps import measured
from torch import Tensor, nn
from torch.cuda import _memory_viz

import dropit_fx
from dropit_fx.cli import main
from dropit_fx.planner.step import Step


def net() -> nn.Sequential:
    layers = nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32), nn.Dropout(0.1)
    return nn.Sequential(*layers)


def packed(x: Tensor) -> Any:
    return dropit_fx.transform(net(), example_args=(x,))


def levels(snapshot: dict[str, Any]) -> list[int]:
    """Bytes in use after each event; blocks are freed as they were allocated."""
    (events,) = snapshot["device_traces"]
    blocks: dict[int, int] = {}
    found = []
    for event in events:
        if event["action"] == "alloc":
            assert event["addr"] not in blocks
            blocks[event["addr"]] = event["size"]
        elif event["action"] == "free_completed":
            assert blocks.pop(event["addr"]) == event["size"]
        found.append(sum(blocks.values()))
    return found


def test_the_snapshot_is_the_step_that_runs(tmp_path: Path) -> None:
    x = torch.randn(256, 32)
    model = packed(x)
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    dropit_fx.report(model).snapshot(tmp_path / "step.pickle", loss=Tensor.sum)
    snapshot = pickle.loads((tmp_path / "step.pickle").read_bytes())
    step = Step(model, (x,), loss=Tensor.sum)
    found = levels(snapshot)
    assert max(found) == pytest.approx(measured(step, model), rel=0.01)
    gradients = sum(p.numel() * p.itemsize for p in model.parameters())
    assert found[-1] == pytest.approx(found[0] + x.nbytes + gradients, abs=64)
    names = Counter(f["name"] for e in snapshot["device_traces"][0] for f in e["frames"])
    assert {"parameters", "inputs", "forward", "backward"} <= names.keys()
    assert any(name.startswith("saved tensors: dropit.sparsify") for name in names)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(p.grad is None for p in model.parameters())


def test_pytorch_reads_the_snapshot(tmp_path: Path) -> None:
    dropit_fx.report(packed(torch.randn(8, 32))).snapshot(tmp_path / "step.pickle")
    snapshot = pickle.loads((tmp_path / "step.pickle").read_bytes())
    assert "TOTAL MEM" in _memory_viz.trace(snapshot)
    assert "<html" in _memory_viz.trace_plot(snapshot).lower()


def test_the_trace_counts_the_same_bytes(tmp_path: Path) -> None:
    x = torch.randn(256, 32)
    report = dropit_fx.report(packed(x))
    optimizer = torch.optim.AdamW(report.model.parameters())  # type: ignore[union-attr]
    report.trace(tmp_path / "step.json", loss=Tensor.sum, optimizer=optimizer)
    report.snapshot(tmp_path / "step.pickle", loss=Tensor.sum, optimizer=optimizer)
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    counted = [sum(e["args"].values()) for e in events if e["ph"] == "C"]
    assert max(counted) == max(levels(pickle.loads((tmp_path / "step.pickle").read_bytes())))
    phases = [e["name"] for e in events if e["ph"] == "X" and e["tid"] == 0]
    assert phases == ["forward", "backward", "optimizer"]
    state = [e["args"]["optimizer state"] for e in events if e["ph"] == "C"]
    parameters = sum(p.numel() * p.itemsize for p in net().parameters())
    assert set(state) == {2 * parameters + 4 * len([*net().parameters()])}
    assert not optimizer.state


def test_a_copy_and_a_pickle_tell_the_same_step(tmp_path: Path) -> None:
    model = packed(torch.randn(8, 32))
    found = []
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        dropit_fx.report(other).snapshot(tmp_path / "step.pickle")
        found.append(levels(pickle.loads((tmp_path / "step.pickle").read_bytes())))
    assert found[0] == found[1] == found[2]


def test_of_several_graphs_there_is_no_step(tmp_path: Path) -> None:
    x = torch.randn(8, 32)
    model = dropit_fx.transform(nn.Sequential(net(), net()), example_args=(x,), modules=["0", "1"])
    with pytest.raises(ValueError, match="one graph of a whole model"):
        dropit_fx.report(model).snapshot(tmp_path / "step.pickle")


def test_the_command_writes_both(tmp_path: Path) -> None:
    files = [tmp_path / "step.pickle", tmp_path / "step.json"]
    model = "dropit_fx.bench.model_spec:small_net"
    options = ["--summary", "--snapshot", str(files[0]), "--trace", str(files[1])]
    assert main(["report", "--model", model, *options]) == 0
    assert levels(pickle.loads(files[0].read_bytes()))
    assert json.loads(files[1].read_text())["traceEvents"]
