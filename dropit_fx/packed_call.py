"""``dropit_fx.runtime.packed_call``, which pickled graphs name."""

import sys

from dropit_fx.runtime import packed_call

sys.modules[__name__] = packed_call
