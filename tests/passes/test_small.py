"""What is kept exactly: storages small beside the rest, and norms over few values."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dropit_fx
from dropit_fx.config import ConfigError, load_config


class Adapter(nn.Module):
    """A frozen layer with a low-rank one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(128, 128).requires_grad_(False)
        self.down, self.up = nn.Linear(128, 4, bias=False), nn.Linear(4, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def test_the_small_input_of_a_low_rank_layer_is_exact_and_can_be_packed_all_the_same() -> None:
    layers = nn.LayerNorm(128), Adapter(), nn.GELU(), nn.LayerNorm(128), Adapter(), nn.GELU()
    model, x = nn.Sequential(*layers), torch.randn(256, 128)

    def codecs(**how: object) -> set[str]:
        made = dropit_fx.transform(model, example_args=(x,), **how)  # type: ignore[arg-type]
        found = dropit_fx.report(made)
        assert found.kept_bytes == dropit_fx.measure.saved_bytes(made, x)
        return {r.codec for r in found.rows if r.module.endswith("up")}

    assert codecs() == {"keep"}
    assert codecs(config={"keep_small": False}) == {"mink(gamma=0.5, bits=4)"}
    own = {"rules": [{"module": "*up", "codec": "quant", "bits": 8}]}
    assert codecs(config=own) == {"quant(bits=8)"}


@pytest.mark.parametrize("inside", [True, False])
def test_under_autocast_the_copy_of_the_weight_is_kept_with_it(inside: bool) -> None:
    layers = nn.LayerNorm(128), Adapter(), nn.GELU(), Adapter(), nn.GELU()
    model, x = nn.Sequential(*layers), torch.randn(256, 128)

    class Lowered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out: Tensor = self.inner(x)
            return out

    if inside:
        torch._dynamo.reset()
        made: Any = torch.compile(Lowered(), backend="dropit_eager")
        made(x)
        found = dropit_fx.compile.backend.compiled_graphs()[-1].report
    else:
        with torch.autocast("cpu", torch.bfloat16):
            packed = dropit_fx.transform(model, example_args=(x,))
        made, found = Lowered(), dropit_fx.report(packed)
        made.inner = packed
    up = [r for r in found.rows if r.module.endswith("up")]
    assert {(r.codec, r.dtype) for r in up} == {("keep", "bfloat16")}
    assert len(up) == 4
    assert dropit_fx.measure.saved_bytes(made, x) == found.kept_bytes


@pytest.mark.parametrize(("batch", "side", "exact"), [(16, 1, True), (31, 1, True), (8, 2, False)])
def test_a_norm_over_few_values_reads_them_exactly(batch: int, side: int, exact: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 1))
    x = torch.randn(batch, 4, side, side)
    rows = dropit_fx.report(dropit_fx.transform(model, example_args=(x,))).rows
    (read,) = [r for r in rows if r.op == "batch_norm" and len(r.shape) == 4]
    assert (read.codec == "keep") == exact
    assert not exact or read.reason.startswith(f"its statistics come from {batch} values each")
    made = dropit_fx.transform(model, {"norm_values": 0}, example_args=(x,))
    rows = dropit_fx.report(made).rows
    assert all("come from" not in r.reason for r in rows)


class Region(nn.Module):
    """A norm in a region of a region, behind other ops, over so many values."""

    def __init__(self, values: int, nested: bool) -> None:
        super().__init__()
        self.values, self.nested, self.inner = values, nested, nn.Linear(16, 64)

    def normed(self, h: Tensor) -> Tensor:
        def norm(h: Tensor) -> Tensor:
            return F.selu(F.layer_norm(F.relu(h + 3), (self.values,)))

        out: Tensor = checkpoint(norm, h, use_reentrant=False) if self.nested else norm(h)
        return out

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.inner(x)).reshape(-1, self.values)
        out: Tensor = checkpoint(self.normed, h, use_reentrant=False)
        return out


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("values", "exact"), [(2, True), (64, False)])
def test_a_region_with_such_a_norm_is_made_again_from_what_is_exact(
    values: int, exact: bool, compiled: bool, nested: bool
) -> None:
    model, x = Region(values, nested), torch.randn(64, 16)
    if compiled:
        torch._dynamo.reset()
        packed: Any = torch.compile(model, backend="dropit_eager")
        packed(x)
        found = dropit_fx.compile.backend.compiled_graphs()[-1].report
    else:
        packed = dropit_fx.transform(model, example_args=(x,))
        found = dropit_fx.report(packed)
    (read,) = [r for r in found.rows if r.op == "checkpoint" and not r.region]
    assert (read.codec == "keep") == exact
    assert not exact or "a norm in the region come from 2 values each" in read.reason
    assert dropit_fx.measure.saved_bytes(packed, x) == found.kept_bytes

    def gradient(run: Any) -> Tensor:
        model.zero_grad()
        (run(x) * torch.linspace(-1, 1, values)).sum().backward()
        assert model.inner.weight.grad is not None
        return model.inner.weight.grad.clone()

    dense = gradient(model)
    assert (gradient(packed) - dense).norm() < 0.1 * dense.norm()


def test_settings_are_checked() -> None:
    assert (load_config().keep_small, load_config({"keep_small": False}).keep_small) == (1, 0)
    assert load_config({"preset": "dropit"}).norm_values == 0
    for value in (-1, 1.5, True, None):
        with pytest.raises(ConfigError, match="'norm_values' is a number of values"):
            load_config({"norm_values": value})


@pytest.mark.slow
def test_what_is_written_to_later_stays_packed_where_others_are_made_from_it() -> None:
    model = timm.create_model("efficientnet_b0", num_classes=10).train()  # SiLU in place
    x = torch.randn(2, 3, 64, 64)
    packed = dropit_fx.transform(model, example_args=(x,))
    assert dropit_fx.measure.saved_bytes(packed, x) == dropit_fx.report(packed).kept_bytes
