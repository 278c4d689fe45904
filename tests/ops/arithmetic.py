"""Arithmetic of tensors and numbers, and casts: what the tests know of them."""

import operator
from collections.abc import Callable

import torch
from op_calls import BLOCKS, LAST, WEIGHT, Case, T, case, pointwise, positive, turned
from op_record import Behind, Calls, Entry, Given, OpInfo, RowTests

X = T((2, 3, 5, 7))


def _cases(number_first: str = "") -> list[Case]:
    return [
        case("same shape", X, X),
        case("row", X, T((7,))),
        case("channel", X, T((1, 3, 1, 1))),
        case("row first", T((5, 1)), X),
        case("both broadcast", T((2, 1, 5, 1)), T((3, 1, 7))),
        case("scalar", X, T(())),
        case("scalar first", T(()), X),
        case("scalars", T(()), T(())),
        case("number", X, 3.0),
        case("integer", X, 3),
        Case("number first", (3.0, X), obstacle=number_first),
        case("transposed memory", T((6, 9), turned), T((9, 6))),
        case("transposed twice", T((6, 9), turned), T((6, 9), turned)),
        case("channels_last", T(X.shape, format=LAST), T((3, 1, 1))),
        case("slice", T((6, 9), lambda v: v[:, ::2]), T((6, 5))),
        case("expanded", T((1, 5), lambda v: v.expand(6, 5)), T((6, 5))),
        case("empty", T((0, 5)), T((5,))),
        case("constant", X, T(X.shape, make=positive)),
        case("constant first", T((5, 7), make=positive), X),
    ]


def _large(*names: str) -> Callable[[Case], set[str]]:
    """Of the two operands those that are no rows or columns, if the row may change them."""

    def large(call: Case) -> set[str]:
        sizes = zip(("input", "other"), call.specs(), strict=True)
        return {n for n, spec in sizes if len(spec.shape) > 2 and n in names}

    return large


MUL = RowTests(
    row="mul",
    cases=_cases(),
    quantised=(
        case("same shape", BLOCKS, BLOCKS),
        case("row", BLOCKS, WEIGHT),
        case("column first", T((11, 1)), BLOCKS),
    ),
    large=_large("input", "other"),
    modules=lambda: [(Calls(lambda x: x * x), (4, 9))],
    op_info=OpInfo("mul"),
    behind=Behind((Given.X, 1.5)),
    entries=(Entry("mul.Tensor", {"self": "input"}),),
)
DIV = RowTests(
    row="div",
    cases=_cases("a number over a tensor is computed, and saved, through the reciprocal"),
    obstacles=(
        (
            torch.div,
            Case(
                "rounding_mode",
                (T((6, 5)), T((5,))),
                {"rounding_mode": None},
                obstacle="called with arguments that the row of div does not know",
            ),
        ),
    ),
    quantised=(case("same shape", BLOCKS, BLOCKS), case("row", BLOCKS, WEIGHT)),
    large=_large("input"),
    modules=lambda: [(Calls(lambda x: x / (x + 2.0)), (4, 9))],
    op_info=OpInfo("div", variant="no_rounding_mode"),
    behind=Behind((Given.X, 1.5)),
    entries=(Entry("div.Tensor", {"self": "input"}),),
)

EXPONENT = "its exponent is a tensor"
OF_A_NUMBER = Case("of a number", (2.0, T((6, 5))), obstacle=EXPONENT)

POW = RowTests(
    row="pow",
    cases=[
        *[Case(f"{c.name}, squared", (*c.args, 2), c.kwargs) for c in pointwise()],
        *[case(f"exponent {e}", T((4, 9)), e) for e in (0, 1, 3, 0.5, -1, -0.5, 2.5)],
    ],
    obstacles=(
        (
            operator.pow,
            Case("exponents", (T((6, 5)), T((5,), make=positive)), obstacle=EXPONENT),
        ),
        (operator.pow, OF_A_NUMBER),
        (torch.pow, OF_A_NUMBER),
    ),
    quantised=(case("cube", BLOCKS, 3), case("square", BLOCKS, 2)),
    modules=lambda: [(Calls(lambda x: x**2), (4, 9))],
    op_info=OpInfo("pow"),
    behind=Behind((Given.X, 2)),
    entries=(Entry("pow.Tensor_Scalar", {"self": "input"}),),
)

SQUARE = RowTests(
    row="square",
    cases=pointwise(),
    quantised=(case("plain", BLOCKS),),
    modules=lambda: [(Calls(torch.square), (4, 9))],
    op_info=OpInfo("square"),
    behind=Behind(),
    entries=(Entry("pow.Tensor_Scalar", {"self": "input"}),),
)

RECORDS = (
    *(MUL, DIV, POW, SQUARE),
    # These save nothing: they are seen where they stand between others.
    *(RowTests(row=name, behind=Behind((Given.X, 1.5))) for name in ("add", "sub")),
    RowTests(row="to", behind=Behind((Given.X, torch.float64), spellings=("to", "type"))),
)
