"""The list of codecs: one file each, in one visible tuple."""

from dropit_fx.codecs.bitmask import BITMASK
from dropit_fx.codecs.few_bit import FEW_BIT
from dropit_fx.codecs.keep import DROP, KEEP
from dropit_fx.codecs.mink import MINK, QUANT, RANDOM
from dropit_fx.core_types import Codec

CODECS: tuple[Codec, ...] = (KEEP, DROP, MINK, RANDOM, QUANT, FEW_BIT, BITMASK)
CODEC: dict[str, Codec] = {codec.name: codec for codec in CODECS}
