"""What is told of inputs whose class has a say in what ops do: packed calls run dense for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropit_fx
from dropit_fx.compile.backend import compiled_graphs
from dropit_fx.measure import saved_bytes


class Named(Tensor):
    """A name, and nothing else."""


class Seen(Tensor):
    """Sees each op."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Quantised(Tensor):
    """A frozen weight in eight bits, which linear layers read in full precision."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Quantised:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        return made

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, meta: None, size: Any, stride: Any) -> Quantised:
        return cls(**inner)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            weight = args[1].codes.to(args[1].scale.dtype) * args[1].scale
            return F.linear(args[0], weight, *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.detach.default, func
        return cls(args[0].codes, args[0].scale)


class Block(nn.Module):
    """A small block: one part reads ``x``, one reads ``y`` alone, and one may be checkpointed."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(64, 128), nn.Linear(64, 128)
        self.rest = nn.Sequential(nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 8))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both parts."""
        h = self.first(x)
        h = checkpoint(self.rest, h, use_reentrant=False) if self.checkpointed else self.rest(h)
        return h, self.rest(self.other(y))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("preset", ["balanced", "lossless"])
@pytest.mark.parametrize("kind", [Named, Seen])
def test_the_report_says_that_they_stay_dense(
    kind: type[Tensor], preset: str, checkpointed: bool
) -> None:
    model = Block(checkpointed)
    x, y = torch.randn(256, 64).as_subclass(kind), torch.randn(256, 64)
    made = dropit_fx.transform(model, preset=preset, example_args=(x, y))
    report = dropit_fx.report(made)
    assert report.kept_bytes == saved_bytes(made, x, y)
    assert report.dense_bytes == saved_bytes(model, x, y)
    assert any(kind.__name__ in row.reason for row in report.rows)
    if preset == "balanced":
        assert any(row.codec != "keep" for row in report.rows)  # what is made of `y` alone
    for a, b in zip(made(x, y), model(x, y), strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b)


class Adapted(nn.Module):
    """A quantised layer with two thin factors beside it."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.randint(-127, 128, (64, 64), dtype=torch.int8)
        self.weight = nn.Parameter(Quantised(codes, torch.rand(64, 1) / 500), requires_grad=False)
        self.lora_A, self.lora_B = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, self.weight) + self.lora_B(self.lora_A(x)))


@pytest.mark.parametrize("preset", ["adapters", "lossless"])
@pytest.mark.parametrize("door", ["transform", "dropit_eager"])
def test_the_report_counts_what_layers_save_of_quantised_weights(door: str, preset: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(64), Adapted(), Adapted()), torch.randn(128, 64)
    if door == "transform":
        run: Any = dropit_fx.transform(model, preset=preset, example_args=(x,))
        report = dropit_fx.report(run)
    else:
        torch.compiler.reset()
        run = torch.compile(model, backend=door, options={"preset": preset})
        run(x)
        report = compiled_graphs()[-1].report
    assert report.dense_bytes == saved_bytes(model, x)
    assert report.kept_bytes == saved_bytes(run, x)
    kept = [r.kept_bytes for r in report.rows if "Quantised" in r.reason]
    assert kept == [4 * 64 * 64] * 2  # in full precision, as PyTorch does
    assert torch.equal(run(x), model(x))


def test_the_report_counts_what_torchao_saves() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).requires_grad_(False)
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    model, x = nn.Sequential(nn.LayerNorm(64), base), torch.randn(128, 64)
    made = dropit_fx.transform(model, preset="adapters", example_args=(x,))
    assert dropit_fx.report(made).kept_bytes == saved_bytes(made, x)
    assert torch.equal(made(x), model(x))
