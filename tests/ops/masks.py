"""Ops that a mask decides: what the tests know of them."""

import math

import torch
from op_calls import LAST, Case, T, case, coins, pointwise, turned
from op_record import Behind, Entry, Given, OpInfo, RowTests
from torch import nn

DROPOUT = RowTests(
    row="dropout",
    cases=pointwise({"p": 0.1}, {"p": 0.3}, {"p": 0.9}),
    spell=lambda target, first: case("p, train", T((4, 9)), 0.5, True),
    modules=lambda: [(nn.Dropout(0.4), (4, 9)), (nn.Dropout(0.4, inplace=True), (4, 9))],
    op_info=OpInfo("nn.functional.dropout", reseeds=True),
    behind=Behind((Given.X, 0.3, True)),
    entries=(Entry("native_dropout", {"result1": "mask"}),),
)

MASK, X = T((2, 3, 5), make=coins), T((2, 3, 5))


def _where_behind(target: object) -> tuple[object, ...]:
    if target == "where":
        return (Given.X, Given.MASK, 0.5)
    fill = Given.NUMBER if target is torch.ops.aten.where.self else 0.5
    return (Given.MASK, Given.X, fill)


def _spell_where(target: object, first: Case) -> Case:
    condition, x, y = first.args
    return case("other order", x, condition, y) if target == "where" else first


WHERE = RowTests(
    row="where",
    cases=[
        case("same shape", MASK, X, X),
        case("condition of a row", T((5,), make=coins), X, X),
        case("all broadcast", T((3, 1), make=coins), T((5,)), T((2, 1, 1))),
        case("number", MASK, X, 0.5),
        case("number first", MASK, -math.inf, X),
        case("transposed memory", T((9, 6), make=coins), T((6, 9), turned), T((9, 6))),
        case("slice", T((6, 5), make=coins), T((6, 10), lambda v: v[:, ::2]), T((6, 5))),
        case("empty", T((5,), make=coins), T((0, 5)), T((0, 5))),
        Case(
            "two dtypes",
            (MASK, X, T((2, 3, 5), lambda v: v.double())),
            obstacle="it joins two dtypes",
        ),
    ],
    spell=_spell_where,
    op_info=OpInfo("where"),
    behind=Behind(_where_behind),
    entries=(Entry("where.self", {"self": "input"}),),
)

MASKED_FILL = RowTests(
    row="masked_fill",
    cases=[
        case("same shape", X, MASK, -1.0),
        case("row", X, T((5,), make=coins), -math.inf),
        case("broadcast input", T((3, 5)), MASK, 0),
        case("transposed memory", T((6, 9), turned), T((9, 6), make=coins), 2.0),
        case("slice", T((6, 10), lambda v: v[:, ::2]), T((6, 5), make=coins), 2.0),
        case("empty", T((0, 5)), T((5,), make=coins), 2.0),
        Case(
            "tensor",
            (T((4, 9)), T((4, 9), make=coins), T(())),
            obstacle="its value is a tensor",
        ),
    ],
    op_info=OpInfo("masked_fill"),
    behind=Behind((Given.X, Given.MASK, 0.5)),
    entries=(Entry("masked_fill.Scalar", {"self": "input"}),),
)

BOTH = ("input", "other")
TIED = T((4, 9), make=lambda shape, generator: torch.randint(3, shape, generator=generator) - 1.0)


def _of_two(name: str) -> RowTests:
    return RowTests(
        row=name,
        cases=[
            case("same shape", X, X),
            case("row", X, T((5,))),
            case("both broadcast", T((2, 1, 5)), T((3, 1))),
            case("ties", TIED, T((4, 9), lambda v: v.round())),
            case("numbers", T(()), T(())),
            case("transposed memory", T((6, 9), turned), T((9, 6))),
            case("slice", T((6, 10), lambda v: v[:, ::2]), T((6, 5))),
            case("empty", T((0, 5)), T((0, 5))),
            Case(
                "two dtypes", (X, T(X.shape, lambda v: v.double())), obstacle="it joins two dtypes"
            ),
        ],
        op_info=OpInfo(name),
        behind=Behind((Given.X, Given.NUMBER)),
        entries=(
            Entry(name, {"self": "input"}, amend=lambda found: found | {("side", n) for n in BOTH}),
        ),
        codes=3,
    )


def _of_a_row(name: str) -> RowTests:
    return RowTests(
        row=name,
        cases=[
            case("all", X),
            case("last", X, -1),
            case("two", X, (0, 2)),
            case("keepdim", X, 1, True),
            case("ties", T((4, 9), lambda v: v.round()), 1),
            case("transposed memory", T((6, 9), turned), 0),
            case("channels_last", T((2, 3, 5, 4), format=LAST), (2, 3), True),
            Case("number", (T(()),), obstacle="it is of one number"),
        ],
        op_info=OpInfo(name),
        behind=Behind((Given.X, -1)),
        entries=(Entry(name, {"self": "input"}, amend=lambda found: found | {("mask", "input")}),),
    )


RECORDS = (
    *(DROPOUT, WHERE, MASKED_FILL),
    *map(_of_two, ("maximum", "minimum")),
    *map(_of_a_row, ("amax", "amin")),
)
