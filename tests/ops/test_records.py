"""Every row of the op table has its record, and what is forgotten is a sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from op_cases import FAMILIES, NEEDED, RECORDS, complaints, misplaced
from op_record import RowTests

from dropit_fx.ops.table import OP_RULES, SAVES_NOTHING

ROWS = (*OP_RULES, *SAVES_NOTHING)


def test_every_row_has_cases() -> None:
    found = [*misplaced(), *complaints(["cases", "big", "entries"])]
    assert not found, "\n".join(found)


def test_every_file_of_records_is_named_as_a_family() -> None:
    files = {p.stem for p in Path(__file__).parent.glob("[a-z]*.py")}
    assert {name for name in files if not name.startswith("test_")} == set(FAMILIES)


def changed(family: str, *records: RowTests) -> dict[str, tuple[RowTests, ...]]:
    """The families with other records in one of them."""
    return {**FAMILIES, family: records}


def test_a_row_without_a_record_is_told_by_its_name_and_file() -> None:
    without = changed("norms", *(r for r in FAMILIES["norms"] if r.row != "batch_norm"))
    assert misplaced(families=without) == [
        "The row 'batch_norm' has no record: add a RowTests to RECORDS in tests/ops/norms.py."
    ]
    assert complaints(NEEDED, families=without) == []


def test_a_record_in_the_file_of_another_family_is_told() -> None:
    records = [r for r in FAMILIES["indexing"] if r.row != "gather"]
    elsewhere = {
        **changed("indexing", *records),
        "masks": (*FAMILIES["masks"], RECORDS["gather"]),
    }
    assert misplaced(families=elsewhere) == [
        "The row 'gather' stands in dropit_fx/ops/indexing.py, and its record in "
        "tests/ops/masks.py."
    ]


def test_a_record_without_a_row_is_told_by_its_name_and_file() -> None:
    rules = [rule for rule in ROWS if rule.name != "gather"]
    assert misplaced(rules) == [
        "tests/ops/indexing.py has a record of 'gather', which is no row of the table."
    ]


def test_a_row_with_two_records_is_told_by_its_name_and_files() -> None:
    twice = changed("attention", *FAMILIES["attention"], RECORDS["mul"])
    assert misplaced(families=twice) == [
        "The row 'mul' has several records, in arithmetic, attention."
    ]


@pytest.mark.parametrize("field", NEEDED)
def test_what_a_record_lacks_is_told_by_its_name(field: str) -> None:
    empty = replace(RECORDS["mm"], **{field: getattr(RowTests(row="mm"), field)})
    records = [empty if r.row == "mm" else r for r in FAMILIES["matmul"]]
    assert complaints([field], families=changed("matmul", *records)) == [
        f"The record of 'mm' in tests/ops/matmul.py has no `{field}`: {NEEDED[field]}."
    ]


def test_what_saves_nothing_needs_a_place_behind_others_alone() -> None:
    [rule] = [rule for rule in SAVES_NOTHING if rule.name == "add"]
    bare = {"arithmetic": (RowTests(row="add"),)}
    assert complaints(NEEDED, [rule], bare) == [
        f"The record of 'add' in tests/ops/arithmetic.py has no `behind`: {NEEDED['behind']}."
    ]
