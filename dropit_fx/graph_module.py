"""``dropit_fx.capture.graph_module``, which pickled models name."""

import sys

from dropit_fx.capture import graph_module

sys.modules[__name__] = graph_module
