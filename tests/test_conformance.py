"""PyTorch's own tables of ops and modules, packed: a few of them. ``make conformance`` has all."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import conformance
import pytest
import survey
from survey import Result
from wrong_rows import turn_gradients

# a row, one of half precision, complex results without one, a module with buffers
ITEMS = (
    "op/nn.functional.gelu/float32",
    "op/matmul/bfloat16",
    "op/fft.rfft/float32",
    "module/nn.BatchNorm1d/float32",
)


@pytest.mark.parametrize("item", ITEMS)
def test_packed_samples_are_those_of_dense(item: str) -> None:
    results = list(conformance.check(item, thorough=False))
    assert results
    assert {r.outcome for r in results} == {"passed"}, results


def test_every_entry_with_a_gradient_is_asked_about() -> None:
    items = conformance.items()
    assert len(items) == len(set(items)) > 800
    rows = {item.split("/")[1] for item in items if item.endswith("/bfloat16")}
    assert {"nn.functional.gelu", "matmul", "nn.functional.layer_norm"} <= rows
    assert "logcumsumexp" not in rows


def test_small_and_enlarged_samples_stand_as_inputs_and_behind_others() -> None:
    found = dict(conformance.subjects("op/addmm/float32", thorough=True))
    assert {subject.behind for subject in found.values()} == {False, True}
    most = [max(t.numel() for t in subject.inputs()) for subject in found.values()]
    assert min(most) < 256 < max(most)  # one block of codec quant


def test_a_wrong_formula_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    turn_gradients(monkeypatch, "gelu")
    (result,) = conformance.check(ITEMS[0], thorough=False)
    assert (result.outcome, result.why.split(":")[1]) == ("failed", " gradient")


# --- many items, one after another

DYING = """
import os
from survey import Result

def begin():
    pass

def check(item, thorough):
    if item == "b/dies":
        os._exit(3)
    yield Result(item, item[0], "passed" if thorough else "refused", "" if thorough else "quick")
"""


def test_a_death_is_a_result_and_what_is_known_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying_items.py").write_text(DYING)
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "results" / "all.jsonl"
    known = Result("a/known", "a", "stock", "from before")
    file.parent.mkdir()
    file.write_text(json.dumps({"of": "a/known", "results": [vars(known)]}) + "\n")
    given = argparse.Namespace(file=file, minutes=math.inf, quick=False)
    results = survey.run("dying_items", ["a/known", "b/dies", "c/lives"], given)
    assert [r.outcome for r in results] == ["stock", "failed", "passed"]
    assert results[1].why == "the process died with exit code 3"
    assert len(file.read_text().splitlines()) == 3
    given.minutes = 0.0  # all is known: no process is needed
    assert survey.run("dying_items", ["a/known", "b/dies", "c/lives"], given) == results


def test_the_summary_names_what_did_not_pass(capsys: pytest.CaptureFixture[str]) -> None:
    results = [Result(f"x{i}", "gelu", "passed") for i in range(3)]
    results += [Result("y", "mul", "failed", "wrong"), Result("z", "eig", "stock", "raises")]
    assert survey.tell(results, {"ops": results}, "samples of") == 1
    said = capsys.readouterr().out
    assert "| all | 3 | 0 | 1 | 1 |" in said
    assert "- 1 of mul: wrong" in said
    assert "3 of 4 that PyTorch runs pass: 75.00%" in said
