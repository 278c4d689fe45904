"""The tables of slopes: the best ones there are, on a grid of their own, and clear errors."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dropit_fx.ops import step_tables
from dropit_fx.ops.step_tables import BITS, FUNCTIONS, StepTable, TableError, register, table

STORED = [(name, bits) for name in FUNCTIONS for bits in BITS]

# f' at minus and plus infinity
FAR = {
    **dict.fromkeys(FUNCTIONS, (0.0, 1.0)),
    **dict.fromkeys(("sigmoid", "tanh", "softsign"), (0.0, 0.0)),
    "selu": (0.0, 1.0507),
    "logsigmoid": (1.0, 0.0),
}

# gelu, 3 bits, of the library published with the paper: no density, a much wider range
PUBLISHED_BORDERS = (-2.417, -0.710, -0.326, 0.0, 0.326, 0.710, 2.415)
PUBLISHED_LEVELS = (-0.0002, -0.0883, 0.1257, 0.3723, 0.6279, 0.8745, 1.0883, 1.0002)


def grid(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, f' by central differences, and the density: nothing of it from the module."""
    x = torch.linspace(-8, 8, 30_001, dtype=torch.float64)
    x, half = (x[1:] + x[:-1]) / 2, 1e-5
    slope = (FUNCTIONS[name](x + half) - FUNCTIONS[name](x - half)) / (2 * half)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(x).exp()
    weight = 0.7 * normal + 0.3 / 16
    return x, slope, weight / weight.sum()


def rms(found: StepTable, x: Tensor, slope: Tensor, weight: Tensor) -> float:
    step = torch.tensor(found.levels)[torch.bucketize(x, torch.tensor(found.borders).double())]
    return (weight * (step - slope) ** 2).sum().sqrt().item()


def lloyd(found: StepTable, x: Tensor, slope: Tensor, weight: Tensor) -> float:
    """The error after 20 rounds of: best levels for the borders, best borders for the levels."""
    ends = torch.bucketize(torch.tensor(found.borders).double(), x).tolist()
    for _ in range(20):
        parts = zip(weight.tensor_split(ends), slope.tensor_split(ends), strict=True)
        levels = [((w * s).sum() / w.sum()).item() for w, s in parts]
        for i, (left, right) in enumerate(itertools.pairwise(levels)):
            low = ends[i - 1] + 1 if i else 1
            high = ends[i + 1] - 1 if i + 1 < len(ends) else len(x) - 1
            part = slope[low:high]
            gain = (weight[low:high] * ((part - left) ** 2 - (part - right) ** 2)).cumsum(0)
            if len(gain) and gain.min() < 0:
                ends[i] = low + int(gain.argmin()) + 1
    parts = zip(weight.tensor_split(ends), slope.tensor_split(ends), strict=True)
    return sum((w * (s - (w * s).sum() / w.sum()) ** 2).sum().item() for w, s in parts) ** 0.5


def solve(
    f: Callable[[Tensor], Tensor],
    bits: int,
    density: Callable[[Tensor], Tensor] = step_tables._normal,
) -> StepTable:
    return step_tables._solve(f, density, (bits,))[bits]


def test_every_function_has_every_table() -> None:
    stored = json.loads(Path(step_tables.__file__).with_suffix(".json").read_text())
    assert [(name, int(bits)) for name in stored for bits in stored[name]] == STORED


@pytest.mark.parametrize(("name", "bits"), STORED)
def test_a_stored_table_is_in_order_and_float32(name: str, bits: int) -> None:
    found = table(name, bits)
    assert len(found.levels) == len(found.borders) + 1 == 2**bits
    assert all(a < b for a, b in itertools.pairwise(found.borders))
    for values in (found.borders, found.levels):
        assert torch.tensor(values).tolist() == list(values)


@pytest.mark.parametrize(("name", "bits"), STORED)
def test_a_stored_table_cannot_be_improved(name: str, bits: int) -> None:
    found, inputs = table(name, bits), grid(name)
    assert rms(found, *inputs) == pytest.approx(found.error, rel=2e-3, abs=1e-3)
    # the differences straddle the jumps of hardswish: an error where the table has none
    assert lloyd(found, *inputs) >= 0.99 * min(found.error, rms(found, *inputs))


@pytest.mark.parametrize("bits", BITS)
def test_a_stored_table_is_what_solve_finds(bits: int) -> None:
    assert solve(F.gelu, bits) == table("gelu", bits)


@pytest.mark.parametrize("intervals", [2, 4])
def test_the_borders_are_the_best_of_all(intervals: int) -> None:
    for _ in range(20):
        weight, slope = torch.rand(11, dtype=torch.float64), torch.randn(11, dtype=torch.float64)

        def cost(starts: tuple[int, ...], w: Tensor = weight, s: Tensor = slope) -> float:
            parts = zip(w.tensor_split(starts), s.tensor_split(starts), strict=True)
            return sum((a * (b - (a * b).sum() / a.sum()) ** 2).sum().item() for a, b in parts)

        best = min(itertools.combinations(range(1, 11), intervals - 1), key=cost)
        moments = [weight, weight * slope, weight * slope**2]
        (found,) = step_tables._best_starts(moments, [intervals])
        assert found.tolist() == list(best)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_bit_makes_the_error_smaller(name: str) -> None:
    errors = [table(name, bits).error for bits in BITS]
    assert all(b < 0.7 * a or b < 1e-8 for a, b in itertools.pairwise(errors))
    assert errors[3] < 0.04


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_outer_levels_hold_far_outside(name: str) -> None:
    for bits, near in ((3, 0.08), (4, 0.04)):
        levels = table(name, bits).levels
        assert (levels[0], levels[-1]) == pytest.approx(FAR[name], abs=near)


def test_of_two_mirror_images_the_one_better_below_zero_is_taken() -> None:
    found = table("gelu", 3)
    mirrored = step_tables.measure(
        [-b for b in reversed(found.borders)], [1 - y for y in reversed(found.levels)], F.gelu
    )
    assert mirrored.error == pytest.approx(found.error, rel=1e-5)
    assert abs(found.levels[0]) < 0.01 < abs(found.levels[-1] - 1)


def test_gelu_without_a_density_is_the_published_table() -> None:
    found = solve(F.gelu, 3, density=torch.ones_like)
    assert found.borders == pytest.approx(PUBLISHED_BORDERS, abs=0.05)
    assert found.levels == pytest.approx(PUBLISHED_LEVELS, abs=0.01)
    published = step_tables.measure(PUBLISHED_BORDERS, PUBLISHED_LEVELS, F.gelu)
    assert 0.9 * published.error < table("gelu", 3).error < published.error


def test_jumps_of_the_slope_are_borders() -> None:
    assert {-3.0, 3.0} <= set(table("hardswish", 4).borders)
    found = table("selu", 4)
    assert 0.0 in found.borders
    zero = torch.zeros(1, requires_grad=True)
    (slope,) = torch.autograd.grad(F.selu(zero).sum(), zero)  # that of the left side
    index = torch.bucketize(zero.detach(), torch.tensor(found.borders))
    assert found.levels[int(index)] == pytest.approx(slope.item(), abs=0.1)


def test_a_density_moves_the_intervals() -> None:
    def moved(x: Tensor) -> Tensor:
        return torch.exp(-((x + 2) ** 2) / 0.5)

    found, usual = solve(F.gelu, 2, moved), table("gelu", 2)
    assert found.error < 0.8 * step_tables.measure(usual.borders, usual.levels, F.gelu, moved).error
    assert found.borders[0] < -2


@pytest.mark.parametrize("density", [torch.sin, torch.zeros_like, torch.log, torch.sum])
def test_a_density_is_checked(density: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TableError, match="the density gives a number for each element"):
        solve(F.gelu, 1, density)


def test_a_function_of_ones_own() -> None:
    def quick_gelu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)

    register("quick_gelu", quick_gelu)
    found = table("quick_gelu", 2)
    assert found == solve(quick_gelu, 2)
    assert found is table("quick_gelu", 2)
    assert found.levels == pytest.approx(table("gelu", 2).levels, abs=0.05)

    register("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x))  # the same slope
    with pytest.raises(TableError, match="'quick_gelu' is registered with another function"):
        register("quick_gelu", F.silu)
    with pytest.raises(TableError, match="'gelu' has a table already"):
        register("gelu", quick_gelu)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_table_is_solved_when_gradients_are_off(mode: Callable[[], Any]) -> None:
    with mode():
        assert solve(F.silu, 1) == table("silu", 1)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: x.softmax(0), "is not pointwise"),
        (lambda x: x.cumsum(0), "is not pointwise"),
        (lambda x: x - x.mean(), "is not pointwise"),
        (lambda x: F.dropout(x, 0.5), "is not pointwise"),
        (torch.sum, "is not pointwise"),
        (torch.round, "is not differentiable"),
        (lambda x: x > 0, "is not differentiable"),
        (lambda x: x.detach().exp(), "is not differentiable"),
        (torch.sqrt, r"the derivative of 'mine' is not finite at x = -7\.999"),
        (lambda x: x.no_such_method(), "fails on a 1-D float64 tensor: .*no_such_method"),
        (lambda x: torch.nn.Linear(8, 8)(x), "fails on a 1-D float64 tensor"),
    ],
)
def test_a_function_without_a_table_says_why(f: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(TableError, match=message):
        register("mine", f)
    with pytest.raises(TableError, match="no step table for 'mine'"):
        table("mine", 3)


def test_an_unknown_name_and_wrong_bits() -> None:
    with pytest.raises(
        TableError, match=r"'geul'\. Did you mean 'gelu'\? Choose one of: gelu, gelu_"
    ):
        table("geul", 3)
    for bits in (0, 5):
        with pytest.raises(TableError, match=f"1 to 4 bits, not {bits}"):
            table("gelu", bits)


def test_the_command_writes_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = {name: {b: table(name, b) for b in (1, 2)} for name in ("gelu", "tanh")}
    monkeypatch.setattr(step_tables, "FUNCTIONS", {name: FUNCTIONS[name] for name in stored})
    monkeypatch.setattr(step_tables, "BITS", (1, 2))

    monkeypatch.setattr(step_tables, "__file__", str(tmp_path / "step_tables.py"))
    assert step_tables.main(["--write"]) == 0
    assert json.loads((tmp_path / "step_tables.json").read_text()) == json.loads(
        json.dumps({n: {b: vars(t) for b, t in tables.items()} for n, tables in stored.items()})
    )

    assert step_tables.main(["--check"]) == 0
    assert capsys.readouterr().out == "all right\n"
    right = stored["tanh"][2]
    stored["tanh"][2] = step_tables.measure((-1.0, 0.0, 1.0), right.levels, torch.tanh)
    monkeypatch.setattr(step_tables, "_stored", lambda: stored)
    assert step_tables.main(["--check"]) == 1
    assert capsys.readouterr().out == "tanh, 2 bits: the stored table is not the best\n"
