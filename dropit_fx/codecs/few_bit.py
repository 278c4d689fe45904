"""``few_bit``: of the input of a pointwise function f, the interval in which f' is nearly constant.

The backward multiplies by the level of that interval in the place of ``f'(x)`` (Few-Bit Backward,
arXiv 2202.00441). The forward is exact. Borders and levels are those of ``step_tables``, chosen by
the name of the function, which the row of the op gives. NaN gets the lowest interval: the result of
the forward is NaN there already.
"""

import torch
from torch import Tensor

from dropit_fx.codecs.codec import Codec, Option, Options
from dropit_fx.kernels import fused
from dropit_fx.kernels.format import uint_nbytes
from dropit_fx.ops.rule import Use
from dropit_fx.ops.step_tables import FUNCTIONS, StepTable, table

OF_RESULT = " of result"  # f is increasing, and what is packed is f(x)


def _table(options: Options) -> StepTable:
    return table(options["function"].removesuffix(OF_RESULT), options["bits"])


# Where the slope jumps, and at the very place is what it is below: the interval above begins at the
# next normal number of float32
_NEXT = {
    "selu": {0.0: 2.0**-126},
    "hardswish": {-3.0: -3.0 + 2.0**-22},
}


def _borders(options: Options) -> list[float]:
    moved: dict[float, float] = _NEXT.get(options["function"], {})
    borders = [moved.get(b, b) for b in _table(options).borders]
    if not options["function"].endswith(OF_RESULT):
        return borders
    f = FUNCTIONS[options["function"].removesuffix(OF_RESULT)]
    out: list[float] = f(torch.tensor(borders, dtype=torch.float64)).tolist()
    return out


def _pack(flat: Tensor, options: Options) -> tuple[Tensor, ...]:
    return (torch.ops.dropit.encode_steps(flat, _borders(options), options["bits"]),)


def _unpack(parts: tuple[Tensor, ...], options: Options, numel: int, dtype: torch.dtype) -> Tensor:
    levels = list(_table(options).levels)
    out: Tensor = torch.ops.dropit.decode_steps(parts[0], levels, options["bits"], numel, dtype)
    return out


FEW_BIT = Codec(
    name="few_bit",
    serves=frozenset({Use.SLOPE}),
    options=(
        Option(
            name="bits",
            default=3,
            schema={"type": "integer", "minimum": 1, "maximum": 4},
            meaning="bits of an interval's number, 1 to 4",
            shown=True,
        ),
    ),
    pack=_pack,
    unpack=_unpack,
    nbytes=lambda numel, dtype, options: uint_nbytes(numel, options["bits"]),
    slope=True,
    fused={"encode_steps": fused.encode_steps, "decode_steps": fused.decode_steps},
)
