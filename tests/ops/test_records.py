"""Every row of the op table is known to the tests."""

from __future__ import annotations

from op_cases import (
    CASES,
)

from dropit_fx.ops.table import OP_RULES


def test_every_row_has_cases() -> None:
    assert set(CASES) == {r.name for r in OP_RULES}
