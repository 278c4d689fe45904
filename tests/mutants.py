"""Rows of the op table that are wrong on purpose, and the tests that see it: ``make mutants``.

One thing is wrong with each: a read is forgotten, or the gradient that needs it; a gradient has the
wrong sign; bits are too few, or too many; a bound lies elsewhere; what the op makes itself is the
contrary. A mutant that no test of its row sees is told by its name.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from op_calls import case_id
from op_cases import CASES, RECORDS
from ops import test_lossy, test_ops, test_rows
from torch import Tensor
from tqdm import tqdm
from wrong_rows import replace_row

from dropit_fx.ops import backwards
from dropit_fx.ops.rule import OpRule, Read, Use
from dropit_fx.ops.table import OP_RULES, RULES
from dropit_fx.runtime import packed_call


@dataclass(frozen=True)
class Mutant:
    """A row, and what is wrong with it."""

    what: str
    row: OpRule

    def __str__(self) -> str:
        return f"{self.row.name}: {self.what}"


def mutants(rule: OpRule) -> Iterator[Mutant]:
    """All there are of one row."""
    for at, read in enumerate(rule.reads):
        rest = (*rule.reads[:at], *rule.reads[at + 1 :])
        yield Mutant(f"it does not read {read.operand}", replace(rule, reads=rest))
        for what, other in _other_reads(read):
            reads = (*rule.reads[:at], other, *rule.reads[at + 1 :])
            yield Mutant(f"{what} of {read.operand}", replace(rule, reads=reads))
    for name in {n: None for r in rule.reads if r.use is not Use.SHAPE for n in r.needed_by}:
        wrong = _turned(rule.backward or backwards.vjp, name)
        yield Mutant(f"the gradient of {name} has another sign", replace(rule, backward=wrong))
    if rule.run_saving is not None:
        yield Mutant("what it makes itself is the contrary", _saving_turned(rule))


def _other_reads(read: Read) -> Iterator[tuple[str, Read]]:
    if len(read.needed_by) > 1:
        for name in read.needed_by:
            rest = tuple(n for n in read.needed_by if n != name)
            yield f"the gradient of {name} goes without the value", replace(read, needed_by=rest)
    if read.bits is not None and (bits := read.bits):
        yield "bits are too few or too many", replace(read, bits=lambda args: bits(args) // 2 or 2)
    if read.between is not None and (between := read.between):
        yield "a bound is moved", replace(read, between=lambda args: _moved(between(args)))


def _moved(bounds: tuple[Any, Any]) -> tuple[Any, Any]:
    low, high = bounds
    return (None if low is None else low - 0.2, high) if high is None else (low, high - 0.2)


def _turned(formula: backwards.Formula, name: str) -> backwards.Formula:
    def wrong(grad: Tensor, saved: Any, call: Any) -> Any:
        return {
            n: -g if n == name and g is not None else g
            for n, g in formula(grad, saved, call).items()
        }

    return wrong


def _saving_turned(rule: OpRule) -> OpRule:
    right = rule.run_saving
    assert right is not None

    def wrong(*args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        out, made = right(*args)
        return out, {n: ~t if t.dtype == torch.bool else t + 1 for n, t in made.items()}

    return replace(rule, run_saving=wrong)


@contextmanager
def in_the_table(row: OpRule) -> Iterator[None]:
    """Has the passes and the packed calls read this row, for the time of a block."""
    with pytest.MonkeyPatch.context() as patch:
        replace_row(patch, row)
        patch.setitem(packed_call.PACKED_OPS, row.name, packed_call._packed_op(row))
        yield


Check = tuple[str, Callable[[], None]]


def checks(name: str) -> Iterator[Check]:
    """The tests of one row, the fastest first."""
    record = RECORDS[name]

    def of(test: Callable[..., None], *args: Any) -> Check:
        return f"{test.__name__}[{'-'.join(map(case_id, args))}]", partial(test, *args)

    if record.entries:
        yield of(test_rows.test_row_reads_what_the_formulas_of_pytorch_mention, name)
    yield of(test_rows.test_every_lossless_bit_width_is_that_of_a_mask_or_of_a_window)
    for wanted in test_rows.wanted():
        if wanted[0] == name:
            yield of(test_rows.test_autograd_keeps_what_the_row_says_for_these_gradients, *wanted)
    for call in CASES[name]:
        yield of(test_ops.test_lossless_gradients_have_the_same_bits, name, call)
    for target in RULES[name].targets:
        yield of(test_ops.test_every_spelling_is_packed_without_changing_a_bit, name, target)
    for target, bounds in test_ops.BOUNDED:
        if target in RULES[name].targets:
            for dtype in (torch.float32, torch.bfloat16):
                test = test_ops.test_gradients_at_and_beside_the_bounds_are_autograds
                yield of(test, target, bounds, dtype)
    for row, call in test_ops.SEVERAL:
        if row == name:
            yield of(test_ops.test_each_gradient_alone_has_the_same_bits, name, call)
    if name == "prelu":
        for call, values in itertools.product(test_lossy.KINKED, ("uniform", "affine")):
            test = test_lossy.test_the_slope_of_prelu_is_exact_however_its_input_is_rounded
            yield of(test, call, values)
    for call in record.quantised:
        test = test_lossy.test_quant_gradient_is_that_of_the_explicitly_quantised_tensor
        yield of(test, name, call, 4)


def seen_by(mutant: Mutant) -> str:
    """The first test that fails with it, or ``""``."""
    every = list(checks(mutant.row.name))
    with in_the_table(mutant.row):
        for name, check in every:
            try:
                check()
            except pytest.skip.Exception:
                continue
            except (Exception, pytest.fail.Exception):
                return name
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="rows to try")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    made = [m for rule in OP_RULES if re.search(given.only, rule.name) for m in mutants(rule)]
    missed = []
    for mutant in tqdm(made, file=sys.stderr):
        if not seen_by(mutant):
            missed.append(mutant)
    print(f"{len(made) - len(missed)} of {len(made)} mutants are seen.")
    for mutant in missed:
        print(f"- not seen: {mutant}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
