"""Matrix products: what the tests know of them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from op_calls import Case, T, case, turned
from op_record import Behind, Entry, Given, OpInfo, RowTests
from torch import Tensor, nn

FOLDED = "matmul itself folds a batch of one in two ways, which differ in rounding"
OF_ITS_OWN = "its other operand has a shape of its own"


class Conv1D(nn.Module):
    """Hugging Face's layer of GPT-2: ``addmm`` over the flattened input."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D as Layer

        self.layer = Layer(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


LINEAR = RowTests(
    row="linear",
    cases=[
        case("2-D", T((6, 5)), T((4, 5)), T((4,))),
        case("2-D no bias", T((6, 5)), T((4, 5))),
        case("1-D", T((5,)), T((4, 5)), T((4,))),
        case("1-D no bias", T((5,)), T((4, 5))),
        case("3-D", T((2, 6, 5)), T((4, 5)), T((4,))),
        case("3-D no bias", T((2, 6, 5)), T((4, 5))),
        case("4-D", T((2, 3, 6, 5)), T((4, 5)), T((4,))),
        case("transposed", T((5, 6), turned), T((4, 5)), T((4,))),
        case("transposed no bias", T((5, 6), turned), T((4, 5))),
        case("3-D transposed", T((2, 5, 6), turned), T((4, 5)), T((4,))),
        case("batch second", T((6, 2, 5), lambda v: v.transpose(0, 1)), T((4, 5)), T((4,))),
        case("slice", T((2, 6, 10), lambda v: v[..., ::2]), T((4, 5)), T((4,))),
        case("first token", T((2, 6, 5), lambda v: v[:, 0]), T((4, 5)), T((4,))),
        case("expanded", T((1, 6, 5), lambda v: v.expand(3, 6, 5)), T((4, 5)), T((4,))),
        case("transposed weight", T((6, 5)), T((5, 4), turned), T((4,))),
        case("one row", T((1, 5)), T((4, 5)), T((4,))),
        case("one column", T((6, 1)), T((4, 1)), T((4,))),
        case("nothing to sum", T((6, 0)), T((4, 0)), T((4,))),
        case("no output", T((6, 5)), T((0, 5)), T((0,))),
        case("one output", T((6, 5)), T((1, 5)), T((1,))),
        case("empty batch", T((0, 5)), T((4, 5)), T((4,))),
        case("empty 3-D", T((2, 0, 5)), T((4, 5)), T((4,))),
        case("vector weight", T((6, 5)), T((5,))),
    ],
    big=case("big", T((7, 11, 40)), T((48, 40)), T((48,))),
    modules=lambda: [(nn.Linear(8, 5), (2, 6, 8)), (nn.Linear(8, 5, bias=False), (6, 8))],
    op_info=OpInfo("nn.functional.linear"),
    behind=OF_ITS_OWN,
    entries=(
        Entry("mm", {"self": "input", "mat2": "weight"}),
        Entry("addmm", {"mat1": "input", "mat2": "weight", "self": "bias"}),
    ),
    added="bias",
)


def _ranks() -> list[Case]:
    """Operands of every pair of ranks."""
    shapes = {
        "1x1": ((5,), (5,)),
        "1x2": ((5,), (5, 4)),
        "1x3": ((5,), (3, 5, 4)),
        "1x4": ((5,), (2, 3, 5, 4)),
        "2x1": ((6, 5), (5,)),
        "2x2": ((6, 5), (5, 4)),
        "2x3": ((6, 5), (3, 5, 4)),
        "2x4": ((6, 5), (2, 3, 5, 4)),
        "3x1": ((3, 6, 5), (5,)),
        "3x2": ((3, 6, 5), (5, 4)),
        "3x3": ((3, 6, 5), (3, 5, 4)),
        "3x4": ((3, 6, 5), (2, 3, 5, 4)),
        "4x1": ((2, 3, 6, 5), (5,)),
        "4x2": ((2, 3, 6, 5), (5, 4)),
        "4x3": ((2, 3, 6, 5), (3, 5, 4)),
        "4x4": ((2, 3, 6, 5), (2, 3, 5, 4)),
        "broadcast left": ((1, 6, 5), (3, 5, 4)),
        "broadcast right": ((3, 6, 5), (1, 5, 4)),
        "broadcast both": ((2, 1, 6, 5), (1, 3, 5, 4)),
        "no rows": ((0, 5), (5, 4)),
        "nothing to sum": ((6, 0), (0, 4)),
        "batch of one": ((1, 6, 5), (1, 5, 4)),
        "batches of one": ((1, 1, 6, 5), (1, 1, 5, 4)),
        "no batch": ((0, 6, 5), (0, 5, 4)),
    }
    # expanded and folded inside
    copies = dict.fromkeys(("1x3", "1x4", "2x3", "2x4", "3x4", "4x3", "broadcast left"), 1)
    copies["broadcast both"] = 2
    alone = {"broadcast right": FOLDED}
    return [
        Case(name, (T(a), T(b)), copies=copies.get(name, 0), not_alone=alone.get(name, ""))
        for name, (a, b) in shapes.items()
    ]


MATMUL = RowTests(
    row="matmul",
    cases=[
        *_ranks(),
        case("transposed left", T((5, 6), turned), T((5, 4))),
        case("transposed right", T((6, 5)), T((4, 5), turned)),
        case("columns by a matrix", T((2, 5, 6), turned), T((5, 4))),
        case("q @ k^T", T((2, 3, 6, 5)), T((2, 3, 6, 5), turned)),
        case("expanded", T((1, 6, 5), lambda v: v.expand(3, 6, 5)), T((3, 5, 4))),
        case("slice", T((3, 6, 10), lambda v: v[..., ::2]), T((5, 4))),
        case(
            "heads",
            T((2, 6, 3, 5), lambda v: v.transpose(1, 2)),
            T((2, 6, 3, 5), lambda v: v.permute(0, 2, 3, 1)),
        ),
    ],
    big=case("big", T((7, 11, 40)), T((40, 48))),
    op_info=OpInfo("matmul"),
    behind=Behind((Given.X, Given.TURNED)),
    entries=(
        Entry("mm", {"self": "input", "mat2": "other"}),
        Entry("bmm", {"self": "input", "mat2": "other"}),
    ),
)


def _mm(*front: T) -> list[Case]:
    return [
        case("plain", *front, T((6, 5)), T((5, 4))),
        case("transposed left", *front, T((5, 6), turned), T((5, 4))),
        case("transposed right", *front, T((6, 5)), T((4, 5), turned)),
        case("transposed both", *front, T((5, 6), turned), T((4, 5), turned)),
        case("slice", *front, T((6, 10), lambda v: v[:, ::2]), T((5, 4))),
    ]


MM = RowTests(
    row="mm",
    cases=_mm(),
    big=case("big", T((60, 40)), T((40, 48))),
    op_info=OpInfo("mm"),
    behind=OF_ITS_OWN,
    entries=(Entry("mm", {"self": "input"}),),
)


def _bmm(*front: T) -> list[Case]:
    return [
        case("plain", *front, T((3, 6, 5)), T((3, 5, 4))),
        case("transposed left", *front, T((3, 5, 6), turned), T((3, 5, 4))),
        case("transposed right", *front, T((3, 6, 5)), T((3, 4, 5), turned)),
        case("expanded", *front, T((1, 6, 5), lambda v: v.expand(3, 6, 5)), T((3, 5, 4))),
    ]


BMM = RowTests(
    row="bmm",
    cases=_bmm(),
    big=case("big", T((3, 30, 40)), T((3, 40, 48))),
    op_info=OpInfo("bmm"),
    behind=OF_ITS_OWN,
    entries=(Entry("bmm", {"self": "input"}),),
)

ADDMM = RowTests(
    row="addmm",
    cases=[
        *_mm(T((4,))),
        case("full", T((6, 4)), T((6, 5)), T((5, 4))),
        case("column", T((6, 1)), T((6, 5)), T((5, 4))),
        case("scalar", T(()), T((6, 5)), T((5, 4))),
        case("alpha, beta", T((4,)), T((6, 5)), T((5, 4)), beta=0.5, alpha=3.0),
        case("beta zero", T((4,)), T((6, 5)), T((5, 4)), beta=0),
    ],
    big=case("big", T((48,)), T((60, 40)), T((40, 48))),
    modules=lambda: [(Conv1D(), (2, 6, 8))],
    op_info=OpInfo("addmm"),
    behind=OF_ITS_OWN,
    entries=(Entry("addmm", {"self": "input"}),),
    added="input",
)

BADDBMM = RowTests(
    row="baddbmm",
    cases=[
        *_bmm(T((3, 6, 4))),
        case("row", T((4,)), T((3, 6, 5)), T((3, 5, 4))),
        case("alpha, beta", T((6, 4)), T((3, 6, 5)), T((3, 5, 4)), beta=2, alpha=0.25),
        case("beta zero", T((1, 6, 4)), T((3, 6, 5)), T((3, 5, 4)), beta=0),
    ],
    big=case("big", T((48,)), T((3, 30, 40)), T((3, 40, 48))),
    op_info=OpInfo("baddbmm"),
    behind=OF_ITS_OWN,
    entries=(Entry("baddbmm", {"self": "input"}),),
    added="input",
)


def _ends(*ends: int) -> T:
    """Where groups end."""
    return T((len(ends),), make=lambda shape, generator: torch.tensor(ends, dtype=torch.int32))


def _half(*shape: int, view: Callable[[Any], Any] = lambda x: x) -> T:
    """bfloat16: fake tensors of ``grouped_mm`` have no other dtype."""
    return T(shape, view, dtype=torch.bfloat16)


def _spell_grouped_mm(target: Any, first: Case) -> Case:
    if target is not getattr(F, "grouped_mm", None):
        return first
    return case("named", *first.args[:2], offs=first.args[2])


GROUPED_MM = RowTests(
    row="grouped_mm",
    cases=[
        case("rows", _half(24, 16), _half(3, 16, 8), _ends(8, 9, 24)),
        case("transposed", _half(24, 16), _half(3, 8, 16, view=turned), _ends(8, 9, 24)),
        case("an empty group", _half(24, 16), _half(3, 16, 8), _ends(8, 8, 24)),
        case("sums", _half(24, 16, view=turned), _half(24, 8), _ends(8, 9, 24)),
        case("columns", _half(3, 8, 16), _half(24, 16, view=turned), _ends(8, 16, 24)),
        case("batch", _half(3, 8, 16), _half(3, 8, 16, view=turned)),
        Case(
            "out_dtype",
            (_half(24, 16), _half(3, 16, 8), _ends(8, 9, 24)),
            {"out_dtype": torch.bfloat16},
            obstacle="has out_dtype",
        ),
    ],
    spell=_spell_grouped_mm,
    big=case("big", _half(64, 48), _half(3, 48, 40), _ends(16, 40, 64)),
    op_info="op_db has no entry for it",
    behind=OF_ITS_OWN,
    entries=(Entry("_grouped_mm", {"self": "input"}),),
)

RECORDS = (LINEAR, MATMUL, MM, BMM, ADDMM, BADDBMM, GROUPED_MM)
