"""Where a slope jumps at 0, a 0 of the forward is a 0 in the backward, whatever is packed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropit_fx
from dropit_fx.codecs import CODEC


@dropit_fx.pointwise("steeper_below_zero")
def steeper_below_zero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 3 * x)


READERS = {
    "pointwise": steeper_below_zero,
    "selu": F.selu,
    "selu in place": lambda x: F.selu(x, inplace=True),
    "elu": lambda x: F.elu(x, alpha=3.0),
}

PRODUCERS = {
    "batch norm": lambda m, x: m.batch_norm(x),
    "batch norm and its input": lambda m, x: m.batch_norm(x) + x * 0.5,
    "group norm": lambda m, x: m.group_norm(x * 0 + 0.7) * 2,
    "layer norm": lambda m, x: m.layer_norm(x * 0 + 0.7) * 2,
    "square": lambda m, x: m.batch_norm(x * x),
    "read by a norm too": lambda m, x: x,
}


class Model(nn.Module):
    """Zeros and whole numbers, up to a reader whose slope jumps at 0: ``x: (16, 8, 8, 8)``."""

    def __init__(self, producer: str, reader: str, offset: float) -> None:
        super().__init__()
        self.producer, self.reader = producer, reader
        self.batch_norm = nn.BatchNorm2d(8).eval()
        assert self.batch_norm.running_mean is not None
        self.batch_norm.running_mean.fill_(offset)
        self.group_norm, self.layer_norm = nn.GroupNorm(2, 8), nn.LayerNorm(8)
        with torch.no_grad():  # a 0 that comes in goes out as one
            self.batch_norm.bias.copy_(-self.batch_norm(torch.zeros(1, 8, 1, 1)).flatten())
        self.first, self.last = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1)
        nn.init.dirac_(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The gradient of the first weight sums the slopes of all that the reader reads."""
        x = PRODUCERS[self.producer](self, torch.relu(self.first(x)))
        beside = self.batch_norm(x) if self.producer.endswith("too") else 0.0
        return self.last(READERS[self.reader](x) + beside)


def _gradients(run: nn.Module, model: Model, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    run(x).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {n: g for n, g in found.items() if n.endswith("norm.bias")}


@contextmanager
def _lossless_codecs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Codecs that say what they say, and lose nothing: only what is derived is rounded."""
    with monkeypatch.context() as patch:
        for name in ("mink", "quant"):
            codec = CODEC[name]

            def pack(flat: Tensor, options: object, n: int = codec.buffers) -> tuple[Tensor, ...]:
                return flat.clone(), *(flat.new_empty(0) for _ in range(n - 1))

            def unpack(parts: tuple[Tensor, ...], *_: object) -> Tensor:
                return parts[0].clone()

            patch.setitem(
                CODEC,
                name,
                replace(codec, pack=pack, unpack=unpack, pack_channels=None, unpack_channels=None),
            )
        yield


def _packed(model: Model, x: Tensor, preset: str, way: str) -> nn.Module:
    torch._dynamo.reset()
    if way == "transform":
        return dropit_fx.transform(model, preset=preset, example_args=(x,))
    return torch.compile(model, backend="dropit_eager", options={"preset": preset})


def _miss(
    producer: str, reader: str, preset: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> float:
    """The relative error of the gradient that is furthest off."""
    if preset == "exact":
        with _lossless_codecs(monkeypatch):
            return _miss(producer, reader, "balanced", way, monkeypatch)
    worst = 0.0
    for offset in (0.0, 0.3):
        torch.manual_seed(0)
        model, x = Model(producer, reader, offset), torch.randint(-3, 4, (16, 8, 8, 8)).float()
        dense = _gradients(model, model, x)
        packed = _gradients(_packed(model, x, preset, way), model, x)
        for name, grad in dense.items():
            if grad.any():
                worst = max(worst, float((packed[name] - grad).norm() / grad.norm()))
    return worst


@pytest.mark.parametrize("preset", ["balanced", "max", "gact", "exact"])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_a_zero_stays_a_zero(producer: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them on the wrong side moves the sum of the slopes."""
    assert _miss(producer, "selu", preset, "transform", monkeypatch) < 1e-3


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
@pytest.mark.parametrize("reader", READERS)
def test_in_each_spelling(reader: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, and with a slope that jumps for one parameter and not for another."""
    assert _miss("batch norm", reader, "balanced", way, monkeypatch) < 1e-3


@pytest.mark.parametrize(
    ("name", "at", "above"),
    [("selu", 0.0, 1e-3), ("hardswish", -3.0, -2.5)],
)
def test_few_bit_slopes_are_those_of_the_right_side(name: str, at: float, above: float) -> None:
    """At the very place of a jump, the slope is that of the side which PyTorch gives it."""
    f = getattr(F, name)

    class Pointwise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x * 1.0)

    x = torch.tensor([at, at - 1e-3, at, above] * 64, requires_grad=True)
    rules = {"rules": [{"op": "*", "codec": "few_bit", "bits": 4}]}
    packed = dropit_fx.transform(Pointwise(), config=rules, example_args=(x,))
    packed(x).sum().backward()
    assert x.grad is not None
    assert x.grad[0] == x.grad[1] != x.grad[3]


@pytest.mark.parametrize("preset", ["balanced", "max", "gact", "lossless"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "reader", [F.hardsigmoid, lambda x: F.softplus(x, 1.0, 3.0)], ids=["hardsigmoid", "softplus"]
)
def test_jumps_elsewhere_are_those_of_the_exact_value(
    reader: Any, dtype: torch.dtype, preset: str
) -> None:
    """At bounds, and behind a norm whose rounded input would lie beside them."""

    class Joints(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.BatchNorm2d(8).eval(), nn.Conv2d(8, 8, 1)
            self.norm.eps = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return self.last(reader(self.norm(x)))

    model, found = Joints().to(dtype), []
    x = torch.randint(-3, 4, (16, 8, 8, 8)).to(dtype).requires_grad_()
    for run in (model, dropit_fx.transform(model, preset=preset, example_args=(x,))):
        (grad,) = torch.autograd.grad(run(x).sum(), x)
        found.append(grad)
    assert torch.equal(*found)


class Saturated(nn.Module):
    """The gradient of ``x: (16, 8, 8, 8)``, which the norm leaves as it is, is the slope."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm2d(8).eval(), nn.Conv2d(8, 8, 1, bias=False)
        self.norm.eps = 0.0
        nn.init.dirac_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.hardswish(self.norm(x)))


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
@pytest.mark.parametrize("preset", ["balanced", "max", "gact", "lossless", "fewbit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_rounded_stays_on_its_side_of_a_jump(
    dtype: torch.dtype, preset: str, way: str
) -> None:
    """Of hardswish: at its bounds and right beside them."""
    model = Saturated().to(dtype)
    step = 2 * torch.finfo(dtype).eps
    places = [-3.5, -3.0, -3 + 4 * step, -0.5, 0.7, 3 - 4 * step, 3.0, 3.2]
    x = torch.tensor(places * 1024, dtype=dtype).view(16, 8, 8, 8)[:, torch.randperm(8)]
    x.requires_grad_()
    packed = _packed(model, x, preset, way)
    dense, found = (torch.autograd.grad(run(x).sum(), x)[0] for run in (model, packed))
    beyond = x.abs() >= 3
    if preset != "fewbit":  # whose levels are means
        assert torch.equal(found[beyond], dense[beyond])
        assert (found - dense).abs().max() < 0.25  # half of a jump
    bits = [r for r in dropit_fx.report(packed).rows if r.name.endswith(".side") and r.kept_bytes]
    assert bool(bits) is (preset in ("balanced", "max", "gact"))
    assert dropit_fx.measure.saved_bytes(packed, x) == dropit_fx.report(packed).kept_bytes
