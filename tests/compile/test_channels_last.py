"""Convolutions are laid out as inductor lays them out: its own decision, on fake CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dropit_fx.compile.channels_last import channels_last, inductor_lays_out

Function = Callable[..., Tensor]


def conv(out: int, into: int, kernel: int = 3, **how: Any) -> tuple[Function, tuple[int, ...]]:
    """A convolution, and the shape of its weight."""
    groups = how.get("groups", 1)
    return lambda x, w: F.conv2d(x, w, padding=kernel // 2, **how), (
        *(out, into // groups),
        *(kernel, kernel),
    )


def idle(x: Tensor, count: int) -> Tensor:
    for _ in range(count):
        x = x + 1
    return x


CASES: dict[str, tuple[list[tuple[Function, tuple[int, ...]]], int]] = {
    "wide": ([conv(128, 128), conv(128, 128, 1)], 0),
    "all small": ([conv(32, 32), conv(64, 32)], 0),
    "one of them wide": ([conv(32, 32), conv(128, 32)], 0),
    "grouped": ([conv(128, 128), conv(128, 128, groups=2)], 0),
    "depthwise": ([conv(128, 128), conv(128, 128, groups=128)], 0),
    "narrows": ([conv(128, 128), conv(64, 128)], 0),
    "narrows by a kernel of one": ([conv(128, 128), conv(64, 128, 1)], 0),
    "one among few others": ([conv(128, 128)], 20),
    "one among many others": ([conv(128, 128)], 320),
    "none": ([], 3),
}


def graphs(name: str, device: str, channels: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A case as Dynamo and as inductor see it."""
    layers, others = CASES[name]
    with FakeTensorMode():
        x = torch.empty(2, channels, 8, 8, device=device)
        weights = [torch.empty(shape, device=device) for _, shape in layers]

        def run(x: Tensor, *weights: Tensor) -> Tensor:
            for (layer, _), w in zip(layers, weights, strict=True):
                x = layer(x, w)
            return idle(x, others)

        below = make_fx(run)(x, *weights)
        captured: list[fx.GraphModule] = []

        def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
            captured.append(gm)
            return gm.forward

        torch.compile(run, backend=keep, fullgraph=True)(x, *weights)
    return captured[0], below


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_a_graph_is_laid_out_where_inductor_does_it(name: str, device: str) -> None:
    layers, _ = CASES[name]
    channels = 128 if not layers else layers[0][1][1]
    dynamo, below = graphs(name, device, channels)
    expected = GraphLowering.decide_layout_opt(below, is_inference=False)
    assert expected == (
        name
        in (
            "wide",
            "one of them wide",
            "depthwise",
            "narrows by a kernel of one",
            "one among few others",
        )
        or (device == "cpu" and name != "none")
    )
    assert inductor_lays_out(dynamo) == expected
    channels_last(dynamo)
    asked = [n for n in dynamo.graph.nodes if n.target == "contiguous"]
    assert len(asked) == (len(layers) if expected else 0)
    convolutions = [n for n in dynamo.graph.nodes if n.target is torch.conv2d]
    assert all(set(n.users) <= set(asked) for n in convolutions) or not expected


def test_inductors_own_options_decide_it_too() -> None:
    for option, expected in (("layout_optimization", 0), ("force_layout_optimization", 2)):
        dynamo, _ = graphs("all small", "cuda", 32)
        channels_last(dynamo, {option: option.startswith("force")})
        assert len([n for n in dynamo.graph.nodes if n.target == "contiguous"]) == expected


def test_symbolic_sizes_stay_as_they_are_on_a_gpu() -> None:
    layer, shape = conv(128, 128)
    captured: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        captured.append(gm)
        return gm.forward

    with FakeTensorMode():
        x, w = torch.empty(2, 128, 8, 8, device="cuda"), torch.empty(shape, device="cuda")
        torch.compile(lambda x, w: layer(x, w), backend=keep, dynamic=True)(x, w)
    assert not inductor_lays_out(captured[0])
