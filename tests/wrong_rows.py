"""Puts a row that is wrong into the op table, for a test that shows that it is seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dropit_fx.ops import table as op_table
from dropit_fx.ops.rule import OpRule


def replace_row(monkeypatch: pytest.MonkeyPatch, row: OpRule) -> None:
    """Puts ``row`` in the place of that of the same name."""
    monkeypatch.setitem(op_table.RULES, row.name, row)
    for target in row.targets:
        monkeypatch.setitem(op_table._BY_TARGET, target, row)


def turn_gradients(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Turns the sign of all gradients that a row's own backward gives."""
    row = op_table.RULES[name]
    right = row.backward
    assert right is not None

    def wrong(grad: Any, saved: Any, call: Any) -> Any:
        return {k: g if g is None else -g for k, g in right(grad, saved, call).items()}

    replace_row(monkeypatch, replace(row, backward=wrong))
