"""What waits on the host is not in the forecast: its peak is that of a real step which offloads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from offload_link import connect
from planned_steps import measured
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dropit_fx import forecast, report, transform
from dropit_fx.planner.step import Step

HALVES = {"preset": None, "rules": [{"codec": "cast", "dtype": "bfloat16"}]}


class Link:
    """A device whose host's memory is none of PyTorch's, so that the peak is without it."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.brought = 0

    def ready(self) -> bool:
        return True

    def room(self, nbytes: int) -> Tensor:
        return torch.from_numpy(np.zeros(nbytes, dtype=np.uint8))

    def send(self, x: Tensor, host: Tensor) -> None:
        host.copy_(x)

    def bring(self, host: Tensor) -> tuple[Tensor, None]:
        self.brought += 1
        return torch.empty_like(host).copy_(host), None

    def wait(self, copy: None, x: Tensor) -> None:
        pass


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    made = Link()
    connect(monkeypatch, made)
    return made


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return out


class Recomputed(Block):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().forward, x * 2, use_reentrant=False)
        return out


@pytest.mark.parametrize("count", [1, 2, 12])
def test_the_peak_is_that_of_a_real_step(link: Link, count: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block() for _ in range(count))), torch.randn(512, 32)
    peaks: list[int] = []
    for offloads in (False, True):
        config: dict[str, Any] = HALVES | {"offload": offloads}
        packed = transform(model, config, example_args=(x,))
        told = forecast(model, x, memory="1GiB", config=config, search=False).ways[1].told
        assert told.peak == pytest.approx(measured(Step(model, (x,)), packed), rel=0.01)
        assert told.host == report(packed).host_bytes
        assert bool(told.host) == bool(link.brought) == offloads
        peaks.append(told.peak)
    if count == 12:  # of one and two, all that has come back is there to the end
        assert peaks[1] < 0.6 * peaks[0]


def test_what_checkpointed_regions_save_stays(link: Link) -> None:
    model, x = nn.Sequential(*(Recomputed() for _ in range(3))), torch.randn(512, 32)
    config: dict[str, Any] = HALVES | {"offload": True}
    packed = transform(model, config, example_args=(x,))
    told = forecast(model, x, memory="1GiB", config=config, search=False).ways[1].told
    packed(x).sum().backward()
    assert told.host == report(packed).host_bytes
    assert bool(told.host) == bool(link.brought)


def test_a_checkpointed_model_is_told_as_it_runs() -> None:
    """But for the states of generators that checkpoints keep: 5 kB each."""
    model, x = nn.Sequential(*(Recomputed() for _ in range(6))), torch.randn(512, 32)
    ways = forecast(model, x, memory="1GiB", config=HALVES, search=False).ways
    packed = transform(model, HALVES, example_args=(x,))
    for way, module in zip(ways, (model, packed), strict=True):
        assert way.told.peak == pytest.approx(measured(Step(model, (x,)), module), rel=0.04)


def test_it_is_told_where_no_device_offloads() -> None:
    """On a CPU, of which a forecast for a GPU is asked."""
    model, x = nn.Sequential(*(Block() for _ in range(6))), torch.randn(4096, 32)
    stays, waits = (
        forecast(model, x, memory="4 MiB", config=HALVES | {"offload": offloads}, search=False)
        for offloads in (False, True)
    )
    assert "wait on the host" in str(waits)
    assert waits.ways[1].told.peak < stays.ways[1].told.peak
    assert waits.to_dict()["ways"][1]["host"] == waits.ways[1].told.host > 0
    assert "host" not in str(stays)
    assert waits.ways[0].told.peak == stays.ways[0].told.peak
