"""Piecewise-linear functions: what the tests know of them."""

from typing import Any

import torch
from op_calls import CHANNELS, IMAGE, LAST, Case, T, case, pointwise, positive
from op_record import Behind, Entry, Given, Joint, OpInfo, RowTests
from torch import nn

RELU = RowTests(
    row="relu",
    cases=pointwise(),
    modules=lambda: [(nn.ReLU(), (4, 9)), (nn.ReLU(inplace=True), (4, 9))],
    op_info=OpInfo("nn.functional.relu"),
    behind=Behind(),
    entries=(Entry("relu", {"self": "input"}),),
)

# The result lies strictly between the bounds where and only where the input does.
FROM_ITS_RESULT = {"input": "result"}

RELU6 = RowTests(
    row="relu6",
    cases=pointwise(),
    op_info=OpInfo("nn.functional.relu6"),
    behind=Behind(),
    entries=(Entry("hardtanh", {"self": "input"}),),
    instead=FROM_ITS_RESULT,
)

HARDTANH = RowTests(
    row="hardtanh",
    cases=pointwise({"min_val": -0.3, "max_val": 0.8}),
    modules=lambda: [  # PyTorch's ReLU6 is a Hardtanh
        (nn.ReLU6(), (4, 9)),
        (nn.ReLU6(inplace=True), (4, 9)),
        (nn.Hardtanh(-0.5, 0.5), (4, 9)),
    ],
    op_info=OpInfo("nn.functional.hardtanh"),
    behind=Behind((Given.X, -0.5, 0.7)),
    entries=(Entry("hardtanh", {"self": "input"}),),
    instead=FROM_ITS_RESULT,
)

LEAKY_RELU = RowTests(
    row="leaky_relu",
    cases=pointwise({"negative_slope": 0.2}, {"negative_slope": 0.0}),
    modules=lambda: [(nn.LeakyReLU(0.1, inplace=True), (4, 9))],
    op_info=OpInfo("nn.functional.leaky_relu"),
    behind=Behind((Given.X, 0.2)),
    entries=(Entry("leaky_relu", {"self": "input"}),),
)


HARDSIGMOID = RowTests(
    row="hardsigmoid",
    cases=pointwise({"inplace": True}),
    modules=lambda: [(nn.Hardsigmoid(), (4, 9))],
    op_info=OpInfo("nn.functional.hardsigmoid"),
    behind=Behind(),
    entries=(Entry("hardsigmoid", {"self": "input"}),),
)


def _has_one_bound(target: Any) -> bool:
    return "clamp_m" in str(target)


CLAMP = RowTests(
    row="clamp",
    cases=[
        *[Case(f"{c.name}, both", (*c.args, -0.3, 0.8), c.kwargs) for c in pointwise()],
        case("least", T((4, 9)), -0.3),
        case("greatest", T((4, 9)), max=0.8),
        case("on the bounds", T((4, 9), lambda v: v.round()), -1, 1),
        Case("tensors", (T((4, 9)), T((9,)), None), obstacle="its bounds are tensors"),
    ],
    spell=lambda target, first: (
        case("one bound", T((4, 9)), 0.2) if _has_one_bound(target) else first
    ),
    op_info=OpInfo("clamp"),
    behind=Behind(
        lambda target: (Given.X, 0.1) if _has_one_bound(target) else (Given.X, -0.5, 0.7)
    ),
    entries=(Entry("clamp", {"self": "input"}),),
)

SLOPES = T((1,))


def _prelu(a: Any, grad: Any, packed: Any) -> Any:
    x, w = a["input"], a["weight"]
    # whatever is packed of a value, its sign is its own
    below = torch.where(x > 0, 0.0, packed(x).clamp(max=0))
    across = [1, -1] + [1] * (x.dim() - 2)
    w = w.view(across)
    dw = (grad * below).sum_to_size(w.shape)
    return {"input": grad * torch.where(x > 0, 1.0, w), "weight": dw}


PRELU = RowTests(
    row="prelu",
    cases=[
        *[Case(f"{c.name}, one slope", (*c.args, SLOPES), c.kwargs) for c in pointwise()],
        case("slope for each channel", T((2, 3, 5, 7)), T((3,))),
        case("slope for each channel, 2-D", T((6, 5)), T((5,))),
        case("slope for each channel, channels_last", T((2, 3, 5, 7), format=LAST), T((3,))),
        case("frozen slope", T((2, 3, 5)), T((3,), make=positive)),
    ],
    quantised=(case("channels", IMAGE, CHANNELS),),
    by_the_book=_prelu,
    modules=lambda: [(nn.PReLU(), (4, 9)), (nn.PReLU(9), (4, 9))],
    op_info=OpInfo("nn.functional.prelu"),
    behind="its slopes have the dtype of its input",
    entries=(
        Entry(
            "_prelu_kernel",
            {"self": "input"},
            Joint(mentions=("input", "weight"), gradients=("input", "weight")),
        ),
    ),
    keeps=lambda found, needs: found - {"weight"} if needs == {"weight"} else found,
)

ABS = RowTests(
    row="abs",
    cases=pointwise(),
    op_info=OpInfo("abs"),
    behind=Behind(),
    entries=(Entry("abs", {"self": "input"}),),
    codes=3,
)

RECORDS = (ABS, RELU, RELU6, HARDTANH, LEAKY_RELU, HARDSIGMOID, CLAMP, PRELU)
