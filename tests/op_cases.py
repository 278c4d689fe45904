"""The records of all rows, joined; and what a row, or a record, lacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from op_calls import Case, writes
from op_record import RowTests

from dropit_fx.ops import table
from dropit_fx.ops.rule import OpRule, Use
from dropit_fx.ops.table import OP_RULES, SAVES_NOTHING

# The family of each row: of its file in dropit_fx/ops/, and of that of its record in tests/ops/.
HOMES: dict[str, str] = {
    rule.name: family.__name__.rpartition(".")[2]
    for family in table.FAMILIES
    for rule in (*family.ROWS, *getattr(family, "SAVES_NOTHING", ()))
}
FAMILIES: dict[str, Sequence[RowTests]] = {
    family: import_module(f"ops.{family}").RECORDS if find_spec(f"ops.{family}") else ()
    for family in dict.fromkeys(HOMES.values())
}
_BY_NAME = {record.row: record for records in FAMILIES.values() for record in records}

# In the order of the table. A row without a record is left out, and one test says so.
RECORDS: dict[str, RowTests] = {r.name: _BY_NAME[r.name] for r in OP_RULES if r.name in _BY_NAME}
BESIDE: dict[str, RowTests] = {  # of rows that save nothing
    r.name: _BY_NAME[r.name] for r in SAVES_NOTHING if r.name in _BY_NAME
}
CASES: dict[str, list[Case]] = {n: list(r.cases) for n, r in RECORDS.items() if r.cases}
ALL_CASES = [(name, call) for name, calls in CASES.items() for call in calls]


def spellings() -> list[Any]:
    """(rule name, target) for every target of every row."""
    known = [rule for rule in OP_RULES if rule.name in CASES]
    return [(rule.name, target) for rule in known for target in rule.targets]


def spelled(name: str, target: Any) -> Case:
    """The first case of a row, in arguments that this spelling takes."""
    record = RECORDS[name]
    call = record.spell(target, CASES[name][0])
    if record.rounds_in_place and writes(target):
        return replace(call, rounds=record.rounds_in_place)
    return call


# --- what is forgotten

NEEDED = {
    "cases": "calls of it, a plain one first",
    "big": "a call whose operands take more than one block: a product is packed in blocks",
    "entries": "what stands behind it in derivatives.yaml",
    "op_info": "PyTorch's own samples of its arguments",
    "behind": "how it is called behind any other op, or why it cannot be",
}


def needed(rule: OpRule) -> set[str]:
    """The fields that the record of a row must have."""
    if not rule.reads:
        return {"behind"}
    return set(NEEDED) - ({"big"} if all(r.use is not Use.CONTRACT for r in rule.reads) else set())


def complaints(
    fields: Iterable[str],
    rules: Sequence[OpRule] = (*OP_RULES, *SAVES_NOTHING),
    families: Mapping[str, Sequence[RowTests]] = FAMILIES,
) -> list[str]:
    """A sentence for each row whose record lacks one of ``fields``."""
    found = []
    for rule in rules:
        for family, record in records_of(rule.name, families):
            found += [
                f"The record of '{rule.name}' in tests/ops/{family}.py has no `{name}`: {what}."
                for name, what in NEEDED.items()
                if name in needed(rule) & set(fields) and not getattr(record, name)
            ]
    return found


def misplaced(
    rules: Sequence[OpRule] = (*OP_RULES, *SAVES_NOTHING),
    families: Mapping[str, Sequence[RowTests]] = FAMILIES,
) -> list[str]:
    """A sentence for each row without one record in its family, and each record without a row."""
    found = []
    for rule in rules:
        home = HOMES[rule.name]
        here = [family for family, _ in records_of(rule.name, families)]
        if not here:
            found.append(
                f"The row '{rule.name}' has no record: add a RowTests to RECORDS in "
                f"tests/ops/{home}.py."
            )
        elif len(here) > 1:
            found.append(f"The row '{rule.name}' has several records, in {', '.join(here)}.")
        elif here != [home]:
            found.append(
                f"The row '{rule.name}' stands in dropit_fx/ops/{home}.py, and its record in "
                f"tests/ops/{here[0]}.py."
            )
    names = {rule.name for rule in rules}
    for family, records in families.items():
        found += [
            f"tests/ops/{family}.py has a record of '{record.row}', which is no row of the table."
            for record in records
            if record.row not in names
        ]
    return found


def records_of(name: str, families: Mapping[str, Sequence[RowTests]]) -> list[tuple[str, RowTests]]:
    return [(f, r) for f, records in families.items() for r in records if r.row == name]
