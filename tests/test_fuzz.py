"""Random models have the gradients of dense, and no crash of their own. ``make fuzz`` has more.

The same programs in each run. ``fuzz_programs`` draws them, ``fuzz_check`` says what is compared.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuzz_check import Verdict, check
from fuzz_programs import HEADER, ROWS, Program, programs
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor
from wrong_rows import replace_row, turn_gradients

from dropit_fx.ops import table as op_table
from dropit_fx.ops.table import OP_RULES

SETTINGS: dict[str, Any] = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate, Phase.shrink],
}
OUTCOMES: dict[str, Counter[str]] = {}


def counts(program: Program) -> bool:
    """Bytes are counted for one program in four: that takes as long as the rest."""
    return zlib.crc32(program.source.encode()) % 4 == 0


def assert_right(verdict: Verdict, way: str) -> None:
    """No fault; what was refused, or cannot run dense, is counted for the test below."""
    outcomes = OUTCOMES.setdefault(way, Counter())
    outcomes["passed"] += bool(verdict.passed)
    outcomes["other"] += not verdict.passed
    assert not verdict.faults, "\n".join(map(str, verdict.faults))


@settings(max_examples=30, **SETTINGS)
@given(programs())
@pytest.mark.slow
def test_transform_gives_the_gradients_of_dense(program: Program) -> None:
    verdict = check(program, ("transform",), {"transform": ("exact", "balanced")}, counts(program))
    assert_right(verdict, "transform")


@settings(max_examples=16, **SETTINGS)
@given(programs())
def test_dropit_eager_gives_the_gradients_of_dense(program: Program) -> None:
    verdict = check(
        program, ("dropit_eager",), {"dropit_eager": ("exact", "balanced")}, counts(program)
    )
    assert_right(verdict, "dropit_eager")


@settings(max_examples=4, **SETTINGS)
@given(programs())
def test_what_is_partitioned_gives_the_gradients_of_dense(program: Program) -> None:
    assert_right(check(program, ("aot",), {"aot": ("formulas",)}), "aot")


def test_most_programs_are_rewritten() -> None:
    if not OUTCOMES:
        pytest.skip("the tests above did not run in this process")
    for way, outcomes in OUTCOMES.items():
        assert outcomes["passed"] > 0.7 * outcomes.total(), (way, outcomes)


def test_every_row_of_the_op_table_is_drawn() -> None:
    missing = [rule.name for rule in OP_RULES if rule.name not in ROWS]
    assert not missing, f"tests/fuzz_programs.py has no template (`row`) of {', '.join(missing)}."


# --- a wrong gradient, a crash and a changed value would be seen


def program(body: str, init: str = "self.fc = nn.Linear(8, 8)") -> Program:
    lines = [HEADER, "class Program(nn.Module):", "    def __init__(self):"]
    lines += ["        super().__init__()", f"        {init}", "", "    def forward(self, x):"]
    lines += [f"        {line}" for line in body.splitlines()]
    lines += ["", "def inputs():", "    return (torch.randn(16, 8),)", ""]
    return Program("\n".join(lines), training=True)


GELU = program("h = self.fc(x)\nreturn F.gelu(h) * 1.0")


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
def test_a_wrong_formula_is_seen(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not check(GELU, (way,), count_bytes=False).faults
    turn_gradients(monkeypatch, "gelu")
    faults = check(GELU, (way,), count_bytes=False).faults
    assert {fault.kind for fault in faults} == {"gradient"}
    assert {fault.config for fault in faults} == {"formulas", "exact", "balanced"}


def test_a_wrong_output_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(input: Tensor, approximate: str = "none") -> Tensor:
        return F.gelu(input) + 1

    replace_row(monkeypatch, replace(op_table.RULES["gelu"], run=shifted))
    faults = check(GELU, ("transform",), count_bytes=False).faults
    assert "output" in {fault.kind for fault in faults}


NEARLY_EQUAL = program(
    "h = torch.erfinv(self.fc(x)[:2] * 0.01 + 0.5)\nreturn self.out(h) * 1.0",
    "self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 8)",
)


def test_what_dropping_takes_of_nearly_equal_values_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configs = {"transform": ("balanced",)}
    verdict = check(NEARLY_EQUAL, ("transform",), configs, count_bytes=False)
    assert verdict.rounded == [("transform", "balanced", "dropped")]
    turn_gradients(monkeypatch, "linear")
    (fault,) = check(NEARLY_EQUAL, ("transform",), configs, count_bytes=False).faults
    assert fault.kind == "gradient"


def test_sharp_attention_is_as_near_to_the_true_gradient_as_dense() -> None:
    body = "h = torch.erf(self.fc(x)).view(1, 2, 8, 8) * 20\n"
    sharp = program(body + "return F.scaled_dot_product_attention(h, h, h)")
    verdict = check(sharp, ("transform",), {"transform": ("exact",)}, count_bytes=False)
    assert verdict.rounded == [("transform", "exact", "attention")]


def test_what_dense_cannot_run_is_skipped() -> None:
    verdict = check(program("h = torch.exp(self.fc(x))\nh.mul_(2)\nreturn h"))
    assert verdict.skipped == "dense raises RuntimeError"


def test_a_program_runs_by_itself() -> None:
    space: dict[str, Any] = {}
    exec(GELU.source, space)
    assert space["Program"]()(*space["inputs"]()).shape == torch.Size([16, 8])
