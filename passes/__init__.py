"""The pipeline: each pass is a function from a plan to a plan, and the verifier follows each.

May be imported from here: ``run_pipeline``, ``verify``, ``plan`` (the data), ``find_saved`` for its
error, ``choose_codecs`` for the check of rules, ``share_packed`` for what is shared,
``derive_values`` for what others are made from, ``insert_packing`` for the nodes that make copies
and for what a module holds beside its graph. Needs ``capture`` for fake tensors, ``runtime``,
``config`` and what stands below them.
"""

from __future__ import annotations

if __name__ == "passes":
    raise ImportError("import dropit_fx.passes: this folder is that package, not a top-level one")

import logging
from collections.abc import Callable
from dataclasses import replace

from dropit_fx.passes.choose_codecs import choose_codecs
from dropit_fx.passes.derive_values import derive_values
from dropit_fx.passes.detach_parameters import detach_parameters
from dropit_fx.passes.find_saved import find_saved
from dropit_fx.passes.fuse_losses import fuse_losses
from dropit_fx.passes.insert_packing import insert_packing
from dropit_fx.passes.keep_small import keep_small
from dropit_fx.passes.plan import Plan
from dropit_fx.passes.repeat_recurrent import repeat_recurrent
from dropit_fx.passes.repeat_weights import repeat_weights
from dropit_fx.passes.sample_blocks import sample_blocks
from dropit_fx.passes.share_packed import share_packed
from dropit_fx.passes.verify import VerifyError, verify

log = logging.getLogger(__name__)

PIPELINE: tuple[Callable[[Plan], Plan], ...] = (
    sample_blocks,
    detach_parameters,
    fuse_losses,
    repeat_recurrent,
    repeat_weights,
    find_saved,
    choose_codecs,
    share_packed,
    derive_values,
    keep_small,
    insert_packing,
)


def run_pipeline(plan: Plan) -> Plan:
    """Runs every pass over ``plan`` and over the plans of nested graphs, verifying each result.

    What each made of it is logged (DEBUG): the plan, and the graph where that changed. See
    ``DROPIT_LOG`` in ``dropit_fx/logs.py``.
    """
    done: list[str] = []
    for step in PIPELINE:
        plan = _run(step, plan)
        done.append(step.__name__)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("after %s\n%s\n", step.__name__, plan)
        verify(plan, done)
    log.debug("the graph\n%s\n", plan.module.graph)
    return plan


def _run(step: Callable[[Plan], Plan], plan: Plan) -> Plan:
    """One pass over a plan, behind those of its nested graphs, which the first pass finds."""
    bodies = {name: _run(step, body) for name, body in plan.bodies.items()}
    return step(replace(plan, bodies=bodies))


__all__ = ["PIPELINE", "VerifyError", "run_pipeline", "verify"]
