"""The list of codecs: how a tensor may be kept, one file each, in one visible tuple.

May be imported from here: ``CODECS``, ``CODEC``, the words that stand in the place of a codec,
``codec`` (what a codec is), ``mink`` for ``format_of``, and ``cast`` and ``low_rank`` for the words
of their options. Needs ``ops`` for the uses and the step tables, and ``kernels``.
"""

from dropit_fx.codecs.bitmask import BITMASK
from dropit_fx.codecs.cast import CAST
from dropit_fx.codecs.codec import Codec
from dropit_fx.codecs.few_bit import FEW_BIT
from dropit_fx.codecs.keep import DROP, KEEP
from dropit_fx.codecs.low_rank import LOW_RANK
from dropit_fx.codecs.mink import MINK, QUANT, RANDOM
from dropit_fx.codecs.rows import ROWS

CODECS: tuple[Codec, ...] = (
    *(KEEP, DROP),
    *(MINK, RANDOM, ROWS, LOW_RANK),
    *(QUANT, CAST, FEW_BIT, BITMASK),
)
CODEC: dict[str, Codec] = {codec.name: codec for codec in CODECS}

# In the place of a codec, where a read is let go and nothing is packed for it
DERIVED = "derived"  # made again from what is packed of the operands
RECAST = "recast"  # made again from the parameter, which is cast again
UNREAD = "unread"  # no gradient that is asked for reads it
STAND_INS = (DERIVED, RECAST, UNREAD)
