"""``keep``: the tensor as it is. ``drop``: nothing at all, where only its shape is read."""

from torch import Tensor

from dropit_fx.codecs.codec import Codec
from dropit_fx.ops.rule import Use

KEEP = Codec(
    name="keep",
    serves=frozenset(Use),
    pack=lambda flat, options: (flat,),
    unpack=lambda parts, options, numel, dtype: parts[0],
    nbytes=lambda numel, dtype, options: numel * dtype.itemsize,
    faithful=lambda options: True,
    lossless=lambda options: True,
)

DROP = Codec(
    name="drop",
    serves=frozenset({Use.SHAPE}),
    pack=lambda flat, options: (),
    unpack=lambda parts, options, numel, dtype: _never(),
    nbytes=lambda numel, dtype, options: 0,
    lossless=lambda options: True,
)


def _never() -> Tensor:
    raise AssertionError("a dropped tensor has no values to read")
