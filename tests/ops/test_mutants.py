"""The tests of a row see what is wrong with it: one mutant of each. ``make mutants`` has all."""

from __future__ import annotations

import mutants
import pytest
from op_cases import RECORDS

from dropit_fx.ops.rule import OpRule
from dropit_fx.ops.table import OP_RULES

RECORDED = [rule for rule in OP_RULES if rule.name in RECORDS]


@pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: rule.name)
def test_a_row_that_is_wrong_fails_its_tests(rule: OpRule) -> None:
    found = list(mutants.mutants(rule))
    mutant = found[RECORDED.index(rule) % len(found)]
    assert mutants.seen_by(mutant), mutant


def test_a_row_that_is_right_passes_them() -> None:
    rule = next(r for r in OP_RULES if r.name == "leaky_relu")
    assert not mutants.seen_by(mutants.Mutant("nothing", rule))
