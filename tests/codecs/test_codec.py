"""What a codec can keep, and the packed format that its options mean."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from dropit_fx.codecs import CODEC, STAND_INS
from dropit_fx.config import Rule
from dropit_fx.kernels import FULL, Format
from dropit_fx.ops.rule import INSIDE, Read, Use

VALUE = Read(operand="input", use=Use.CONTRACT, needed_by=("weight",))
ROW = replace(VALUE, by_row=lambda args: True)
SLOPE = replace(VALUE, use=Use.SLOPE)
CURVE = replace(SLOPE, function=lambda args: "gelu")
CODES = replace(SLOPE, bits=lambda args: 1)
SUM = replace(VALUE, use=Use.REDUCE)
SIZES = replace(VALUE, use=Use.SHAPE)
READS = {
    "value": VALUE,
    "row": ROW,
    "slope": SLOPE,
    "curve": CURVE,
    "codes": CODES,
    "sum": SUM,
    "sizes": SIZES,
    "inside": replace(SIZES, operand=INSIDE),
}
KEPT = {
    "keep": set(READS),
    "drop": {"sizes", "inside"},
    "mink": {"value", "row"},
    "random": {"value", "row"},
    "rows": {"row"},
    "low_rank": {"row"},
    "quant": {"value", "row", "slope", "curve", "sum"},
    "cast": {"value", "row", "slope", "curve", "sum"},
    "few_bit": {"curve"},
    "bitmask": {"codes"},
}


@pytest.mark.parametrize("name", CODEC)
def test_a_codec_keeps_what_its_flags_say(name: str) -> None:
    assert {what for what, read in READS.items() if CODEC[name].can_keep(read)} == KEPT[name]


@pytest.mark.parametrize("name", CODEC)
def test_a_rule_also_speaks_of_what_goes_with_the_rest_of_an_op(name: str) -> None:
    spoken_of = {w for w, read in READS.items() if Rule(codec=name).matches("", "linear", read)}
    along = {"sizes"} if name == "bitmask" else {"sizes", "inside"}
    assert spoken_of == KEPT[name] | along


def test_no_codec_is_called_as_what_stands_in_the_place_of_one() -> None:
    assert not set(STAND_INS) & set(CODEC)


def test_a_format_has_the_numbers_of_the_ops_in_their_order() -> None:
    (_, *given) = [a.name for a in torch.ops.dropit.sparsify.default._schema.arguments]
    assert given == [f.name.replace("spacing", "layout") for f in fields(Format)]
    assert Format(1000, 64, 4, 2, True).numbers == (1000, 64, 4, 2)


def test_a_format_stays_what_it_is() -> None:
    form = Format(FULL, 256, 5)
    with pytest.raises(FrozenInstanceError):
        form.bits = 9  # type: ignore[misc]
    assert {form: 1}[Format(FULL, 256, 5)] == 1
    with pytest.raises(ValueError, match="bits=9"):
        replace(form, bits=9)


@pytest.mark.parametrize("numel", [0, 1, 255, 256, 1000])
@pytest.mark.parametrize("form", [Format(FULL, 256, 5), Format(3000, 64), Format(1000, 0, 2, 1)])
def test_the_buffers_of_a_format_are_what_packing_fills(form: Format, numel: int) -> None:
    x = torch.randn(numel)
    parts = torch.ops.dropit.sparsify(x, *form.numbers, form.stochastic)
    room = form.buffers(x)
    assert [(t.shape, t.dtype) for t in parts] == [(t.shape, t.dtype) for t in room]
    assert sum(t.nbytes for t in parts) == form.nbytes(numel, 4)
    assert form.nbytes(numel, 4) == sum(
        size * t.element_size() for size, t in zip(form.sizes(numel), room, strict=True)
    )
