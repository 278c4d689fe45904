"""``dropit_fx.compile.partition``, by its public name."""

import sys

from dropit_fx.compile import partition

sys.modules[__name__] = partition
