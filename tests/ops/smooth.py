"""Smooth functions of one tensor: what the tests know of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from op_calls import BLOCKS, GATHERED, IMAGE_LAST, Case, T, case, pointwise
from op_record import Behind, Entry, OpInfo, RowTests
from torch import Tensor, nn

from dropit_fx.ops.rule import INSIDE

FROM_ITS_RESULT = "written in place, PyTorch computes the slope from the result"
PLAIN = case("plain", BLOCKS)
TURNED = case("transposed memory", T((11, 40), lambda v: v.t()))
LAID_OUT = case("channels_last", IMAGE_LAST)
APPROXIMATE = case("tanh", BLOCKS, approximate="tanh")


def _record(
    name: str,
    cases: Sequence[Case],
    layer: nn.Module | None = None,
    op_info: str = "nn.functional.{}",
    quantised: tuple[Case, ...] = (),
    **parts: Any,
) -> RowTests:
    """A record of a function with a table of slopes, which stands in PyTorch's own tables too."""
    return RowTests(
        **{
            "row": name,
            "cases": cases,
            "quantised": (PLAIN, *quantised),
            "tables": ((name, PLAIN),),
            "modules": lambda: [(layer, (4, 9))] if layer else [],
            "op_info": OpInfo(op_info.format(name)),
            "behind": Behind(),
            "entries": (Entry(name, {"self": "input"}),),
            **parts,
        }
    )


GELU = _record(
    "gelu",
    pointwise({"approximate": "tanh"}, rounds=GATHERED),
    quantised=(APPROXIMATE,),
    tables=(("gelu", PLAIN), ("gelu_tanh", APPROXIMATE)),
    modules=lambda: [(nn.GELU(), (4, 9)), (nn.GELU("tanh"), (4, 9))],
)
SILU = _record(
    "silu",
    pointwise({"inplace": True}),
    nn.SiLU(inplace=True),
    quantised=(TURNED,),
    tables=(("silu", PLAIN), ("silu", TURNED)),
)
MISH = _record("mish", pointwise({"inplace": True}, rounds=GATHERED), nn.Mish())
ELU = _record(
    "elu",
    pointwise({"alpha": 0.5}, {"alpha": 2.0}),
    nn.ELU(0.5),
    quantised=(case("alpha", BLOCKS, alpha=0.5),),
    no_table={"alpha": 0.5},
    rounds_in_place=FROM_ITS_RESULT,
)
SELU = _record(
    "selu",
    [
        *pointwise(),
        Case("in place", (T((4, 9)),), {"inplace": True}, rounds=FROM_ITS_RESULT),
    ],
    nn.SELU(),
    entries=(Entry("elu", {"self": "input"}),),
    rounds_in_place=FROM_ITS_RESULT,
)
CELU = _record(
    "celu",
    pointwise({"alpha": 0.5}, {"alpha": 2.0}),
    nn.CELU(2.0),
    no_table={"alpha": 2.0},
    rounds_in_place=FROM_ITS_RESULT,
)
SOFTPLUS = _record(
    "softplus",
    pointwise({"beta": 3.0}, {"beta": 2, "threshold": 1}),
    nn.Softplus(2.0, 5.0),
    quantised=(case("beta", BLOCKS, beta=3.0),),
    no_table={"beta": 3.0},
)


def _on_its_side(
    args: Mapping[str, Any], grad: Tensor, packed: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    x = args["input"]
    between = packed(x).clamp(-3, 3) / 3 + 0.5
    return {"input": grad * torch.where(x.abs() < 3, between, (x > 0).to(x.dtype))}


HARDSWISH = _record(
    "hardswish",
    pointwise({"inplace": True}),
    nn.Hardswish(inplace=True),
    by_the_book=_on_its_side,
)
LOGSIGMOID = _record(
    "logsigmoid",
    pointwise(),
    nn.LogSigmoid(),
    entries=(Entry("log_sigmoid_forward", {"self": "input", "buffer": INSIDE}),),
)
SOFTSIGN = _record(
    "softsign",
    pointwise(),
    entries=(
        Entry("div.Tensor", {"self": "input", "other": INSIDE}),  # x / (1 + |x|)
        Entry("abs", {"self": "input"}),
    ),
    steps={INSIDE: "input"},
)


def _sigmoid(a: Any, grad: Any, packed: Any) -> Any:
    y = packed(torch.sigmoid(a["input"]))
    return {"input": grad * (y * (1 - y))}


def _tanh(a: Any, grad: Any, packed: Any) -> Any:
    y = packed(torch.tanh(a["input"]))
    return {"input": grad * (1 - y * y)}


SIGMOID = _record("sigmoid", pointwise(), nn.Sigmoid(), op_info="{}", by_the_book=_sigmoid)
TANH = _record(
    "tanh",
    pointwise(),
    nn.Tanh(),
    op_info="{}",
    quantised=(LAID_OUT,),
    tables=(("tanh", PLAIN), ("tanh", LAID_OUT)),
    by_the_book=_tanh,
)
EXP = _record(
    "exp",
    pointwise(),
    op_info="{}",
    tables=(),
    by_the_book=lambda a, grad, packed: {"input": grad * packed(a["input"].exp())},
)
SIN = _record("sin", pointwise(), op_info="{}", tables=())
COS = _record("cos", pointwise(), op_info="{}", tables=())
ERF = _record("erf", pointwise(), op_info="{}", tables=())

RECORDS = (
    *(GELU, SILU, MISH, ELU, SELU, CELU, SOFTPLUS, HARDSWISH, LOGSIGMOID, SOFTSIGN),
    *(SIGMOID, TANH, EXP, SIN, COS, ERF),
)
