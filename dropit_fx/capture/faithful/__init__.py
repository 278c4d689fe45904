"""The proof that a captured graph does what its model does.

A tracer drops without a word what it does not see: custom backwards, tensor hooks, writes through
aliases, chance of fixed shape, a replaced ``forward``. So the model and the graph both run on fake
tensors, forward and backward, and every value is numbered by how it came about: the op, the numbers
of what it read, and for a random op what the generator's state was (value numbering). Equal numbers
are equal computations, in whatever order and with whatever names; views and in-place writes are
followed storage by storage. What must agree: outputs, gradients of parameters and inputs, and what
is written to parameters, buffers, inputs and constants.
"""

from dropit_fx.capture.faithful.one_run import difference, meaning
from dropit_fx.capture.faithful.study import Study

__all__ = ["Study", "difference", "meaning"]
