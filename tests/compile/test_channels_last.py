"""Convolutions are laid out as inductor lays them out: its own decision, on fake CUDA graphs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import BEFORE_2_14
from torch import Tensor, fx, nn
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from dropit_fx.compile.channels_last import channels_last, inductor_lays_out
from dropit_fx.ops.table import DRAWING
from dropit_fx.private_inductor import inductor_config

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


# Of those, attention and recurrent layers draw inside of kernels of their own; the others are of
# no tensor, or stand behind a name of the list
INSIDE = r".*(attention|_sdp_|softmax|rnn|lstm|gru|dropout_(mask|state)).*"
ELSEWHERE = r"rand|randn|randint|randperm|fused_dropout|.*_functional|rrelu_with_noise"
DISTRIBUTIONS = r"standard_gamma|sample_dirichlet"


def test_every_op_that_pytorch_tags_as_drawing_has_its_name() -> None:
    names = {s.name.removeprefix("aten::") for s in torch._C._jit_get_all_schemas()}
    packets = [p for n in names if hasattr(p := getattr(torch.ops.aten, n, None), "overloads")]
    seeded = torch.Tag.nondeterministic_seeded
    drawing = {
        packet.__name__.strip("_")
        for packet in packets
        if any(seeded in getattr(packet, overload).tags for overload in packet.overloads())
    }
    known = re.compile("|".join((INSIDE, ELSEWHERE, DISTRIBUTIONS)))
    assert {n for n in drawing if not known.fullmatch(n)} == DRAWING


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


def captured(run: Function, *args: Tensor, **how: Any) -> fx.GraphModule:
    """The graph that Dynamo makes."""
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(gm)
        return gm.forward

    torch.compile(run, backend=keep, fullgraph=True, **how)(*args)
    return found[0]


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
        return captured(run, x, *weights), below


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
    with FakeTensorMode():
        x, w = torch.empty(2, 128, 8, 8, device="cuda"), torch.empty(shape, device="cuda")
        graph = captured(lambda x, w: layer(x, w), x, w, dynamic=True)
    assert not inductor_lays_out(graph)


def views(h: Tensor) -> Tensor:
    return h.view(h.shape[0], -1) * 2


def pooled_views(h: Tensor) -> tuple[Tensor, Tensor]:
    return F.max_pool2d(F.relu(h), 2).view(2, -1) * 2, F.avg_pool2d(h, 2).view(2, 4, -1) * 3


def view_in_region(h: Tensor) -> Tensor:
    found: Tensor = checkpoint(lambda h: h.view(2, -1).sin(), h, use_reentrant=False)
    return found


def strided(h: Tensor) -> Tensor:
    return torch.as_strided(h, (2, 4, 8), (256, 64, 1)) * 2


def complex_view(h: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(h.view(2, 4, 8, 4, 2)) * 2)


def written_views(h: Tensor) -> Tensor:
    h.view(-1).mul_(2)
    return h + 1


def set_views(h: Tensor) -> Tensor:
    h.view(2, -1)[0] = 3.0
    return h + 1


@pytest.mark.parametrize(
    "read",
    [views, pooled_views, view_in_region, strided, complex_view, written_views, set_views],
    ids=lambda f: f.__name__,
)
def test_what_reads_strides_reads_those_of_the_model(read: Callable[[Tensor], Any]) -> None:
    def run(x: Tensor, w: Tensor) -> Any:
        return read(F.conv2d(x, w, padding=1))

    x, w = torch.randn(2, 4, 8, 8), torch.randn(4, 4, 3, 3)
    graph = captured(run, x, w)
    asks = bool(graph.graph.find_nodes(op="call_method", target="contiguous"))
    assert not asks
    channels_last(graph, {"force_layout_optimization": True})
    asked = graph.graph.find_nodes(op="call_method", target="contiguous")
    assert bool(asked) == (read not in (written_views, set_views))  # else as it was
    (found,) = (graph(x, w),)
    expected = run(x, w)
    for a, b in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(a, b)


def test_views_that_fit_stay_as_they_are() -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        h = F.conv2d(x, w, stride=8).flatten(2).transpose(1, 2)  # as a ViT's patches
        return (h * 2).view(2, 4, 2, 32).sin()

    graph = captured(run, torch.randn(2, 3, 16, 16), torch.randn(64, 3, 8, 8))
    channels_last(graph, {"force_layout_optimization": True})
    asked = graph.graph.find_nodes(op="call_method", target="contiguous")
    assert [n.kwargs for n in asked] == [{"memory_format": torch.channels_last}]


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(torch.relu(self.first(x)), 2)
        out: Tensor = self.last(h.view(h.size(0), -1))
        return out


def test_a_view_behind_convolutions_compiles() -> None:
    model, x = LeNet(), torch.randn(2, 3, 16, 16)
    packed = torch.compile(model, backend="dropit", options={"force_layout_optimization": True})
    expected = model(x)
    torch.testing.assert_close(packed(x), expected)
    packed(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Draws(nn.Module):
    """A dropout of what a convolution gave, and numbers in another order of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ConvTranspose2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding="same")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = F.dropout(F.relu(self.first(x)), 0.3)
        return h, torch.rand_like(h.permute(0, 2, 3, 1)), self.second(h)


class DrawsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.first(x)
        return h, F.dropout(h, 0.3, inplace=True), torch.zeros_like(h).uniform_()


def drawn(run: Callable[..., tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    return tuple(t.detach() for t in run(x))


@pytest.mark.skipif(BEFORE_2_14, reason="dense, inductor draws masks in layouts of its own")
@pytest.mark.parametrize(
    ("model", "as_in_eager"),
    [(Draws, True), (Draws, False), (DrawsInPlace, True)],
)
def test_chance_is_that_of_the_dense_model(model: type[nn.Module], as_in_eager: bool) -> None:
    x, dense = torch.randn(2, 4, 6, 10), model()
    with inductor_config(fallback_random=as_in_eager):
        expected = drawn(torch.compile(dense), x)
        torch._dynamo.reset()
        found = drawn(torch.compile(dense, backend="dropit"), x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def dropped(h: Tensor) -> Tensor:
    return F.dropout(h, 0.5)


def in_region(h: Tensor) -> Tensor:
    found: Tensor = checkpoint(lambda h: F.dropout(h.sin(), 0.5), h, use_reentrant=False)
    return found


LAID_OUT = {"memory_format": torch.channels_last}


@pytest.mark.parametrize(
    ("drawing", "layouts"),
    [(dropped, [LAID_OUT, {}, LAID_OUT, LAID_OUT]), (in_region, [LAID_OUT, {}, LAID_OUT])],
)
def test_what_draws_reads_the_layout_of_the_model(drawing: Function, layouts: list[Any]) -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(drawing(F.conv2d(x, w)), w)

    graph = captured(run, torch.randn(2, 4, 6, 10), torch.randn(4, 4, 1, 1))
    channels_last(graph, {"force_layout_optimization": True})
    asked = graph.graph.find_nodes(op="call_method", target="contiguous")
    assert [n.kwargs for n in asked] == layouts
