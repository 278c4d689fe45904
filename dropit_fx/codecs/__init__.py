"""The list of codecs: how a tensor may be kept, one file each, in one visible tuple.

May be imported from here: ``CODECS``, ``CODEC`` and ``codec`` (what a codec is). Needs ``ops`` for
the uses and the step tables, and ``kernels``.
"""

from dropit_fx.codecs.bitmask import BITMASK
from dropit_fx.codecs.codec import Codec
from dropit_fx.codecs.few_bit import FEW_BIT
from dropit_fx.codecs.keep import DROP, KEEP
from dropit_fx.codecs.mink import MINK, QUANT, RANDOM

CODECS: tuple[Codec, ...] = (KEEP, DROP, MINK, RANDOM, QUANT, FEW_BIT, BITMASK)
CODEC: dict[str, Codec] = {codec.name: codec for codec in CODECS}
