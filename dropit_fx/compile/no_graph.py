"""What Dynamo gives the plug-in no graph of: said once for each line at which it stops.

Where a function cannot be cut in two (a loop over experts whose rows depend on values), Dynamo runs
it as it is, without a word, and calls no backend. The end of its attempt is all that shows it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from dropit_fx.private import at_end_of_compile, pytree, stopped_tracing

log = logging.getLogger(__name__)
_said: set[str] = set()


class TellOfNoGraph:
    """Called by Dynamo at the end of each attempt; ``backends`` are those that it is said of."""

    def __init__(self, backends: Collection[Any]) -> None:
        self.backends = backends

    def ask(self) -> None:
        """Has Dynamo call it: ``torch._dynamo.reset()`` forgets that."""
        at_end_of_compile(self)

    # a backward is compiled when it first runs: in a frame that Dynamo follows, where the function
    # that is compiled calls backward itself. Dynamo holds a lock here, which it would wait for
    @torch.compiler.disable
    def __call__(self, args: Any) -> None:
        """Says what stopped Dynamo, where gradients are on and there are tensors at all."""
        stopped = stopped_tracing() if torch.is_grad_enabled() else None
        if stopped is None or stopped.backend not in self.backends or stopped.where in _said:
            return
        tensors = any(isinstance(v, Tensor) for v in pytree.tree_leaves(stopped.values))
        if not tensors or stopped.function.startswith("<"):  # a comprehension
            return
        _said.add(stopped.where)
        options = re.findall(r"`(torch\._dynamo\.config\.\w+ = True)`", stopped.reason)
        log.warning(
            "torch.compile gives no graph of %s, which runs as it is: it stops at %s (%s)."
            " What that function saves itself is not packed, what it calls may be; %s",
            stopped.function,
            stopped.where,
            stopped.reason.partition("\n")[0],
            f"with {options[0]} it may go on there."
            if options
            else "`with dropit_fx.pack_saved():` around the model itself packs without a graph.",
        )
