"""``dropit_fx.compile.backend``, by its public name."""

import sys

from dropit_fx.compile import backend

sys.modules[__name__] = backend
