"""The predicted step as the page draws it: bytes by kind, op after op, and what stands at the peak.

Ops are many and pixels few: some that follow each other share a column, which shows the fullest of
them, so that the peak is there whatever the width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from math import ceil
from typing import Any

from dropit_fx.planner.timeline import (
    GRADIENTS,
    PHASES,
    RESIDENT,
    SAVED,
    TEMPORARY,
    Lifetime,
    Timeline,
)
from dropit_fx.report.palette import CODEC_COLOURS
from dropit_fx.report.rows import short

KINDS = (*RESIDENT, SAVED, GRADIENTS, TEMPORARY)
KIND_COLOURS = dict(zip(KINDS, CODEC_COLOURS.values(), strict=False))
COLUMNS = 480  # at most so many, in all phases together
SHOWN = 12  # of the tensors at the peak

Places = Mapping[str, tuple[str, str]]  # node of the graph -> its module, and the user's file:line


def step_data(told: Timeline, places: Places, dense: Timeline | None) -> dict[str, Any]:
    """A step as plain data.

    Args:
        told: Of the rewritten model.
        places: Where its nodes come from.
        dense: Of the untouched model, where that is known.

    Returns:
        ``kinds`` that occur; ``columns``, each with its ``op``, the ``phase``, ``bytes`` by kind
        and those of the ``dense`` step meanwhile; the ``peak``, ``dense_peak`` (or None), the
        ``peak_op`` and its phase; ``alive``, the largest tensors there; and ``others``, how many
        more there are and their bytes.
    """
    kinds = [k for k in KINDS if told.resident.get(k) or any(x.kind == k for x in told.lives)]
    kinds = list(dict.fromkeys((*kinds, TEMPORARY)))
    levels = _levels(told)
    columns = []
    for phase, (start, end) in zip(PHASES, _phases(told), strict=True):
        count = min(end - start, max(1, COLUMNS * (end - start) // max(1, len(told.ops))))
        beside = _dense_levels(dense, phase, count)
        for number in range(count):
            ops = range(*(start + (end - start) * i // count for i in (number, number + 1)))
            at = max(ops, key=told.used.__getitem__)
            columns.append(
                {
                    "op": told.ops[at],
                    "phase": phase,
                    "bytes": [levels[at].get(kind, 0) for kind in kinds],
                    "dense": beside[number],
                }
            )
    at = told.peak_op
    alive = sorted(_alive(told, places, at), key=lambda one: -one["nbytes"])
    return {
        "kinds": kinds,
        "columns": columns,
        "peak": told.peak,
        "dense_peak": None if dense is None else dense.peak,
        "peak_op": told.ops[at] if told.ops else "",
        "peak_phase": told.phase(at) if told.ops else PHASES[0],
        "alive": alive[:SHOWN],
        "others": {"count": len(alive[SHOWN:]), "nbytes": sum(a["nbytes"] for a in alive[SHOWN:])},
    }


def _phases(told: Timeline) -> list[tuple[int, int]]:
    """The ops of each phase: the first, and the one behind the last."""
    return list(zip(told.phases, (*told.phases[1:], len(told.ops)), strict=True))


def _levels(told: Timeline) -> list[dict[str, int]]:
    """Bytes by kind in each op; they add up to ``used``."""
    changes: list[dict[str, int]] = [defaultdict(int) for _ in range(len(told.ops) + 1)]
    for life in told.lives:
        changes[life.born][life.kind] += life.nbytes
        changes[life.freed][life.kind] -= life.nbytes
    level, found = defaultdict(int, told.resident), []
    for used, change in zip(told.used, changes[:-1], strict=True):
        for kind, nbytes in change.items():
            level[kind] += nbytes
        own = max(used - sum(level.values()), 0)  # what the op takes for itself
        found.append({**level, TEMPORARY: level[TEMPORARY] + own})
    return found


def _dense_levels(dense: Timeline | None, phase: str, count: int) -> list[int | None]:
    """The fullest of the dense step's ops in each of ``count`` columns of a phase."""
    start, end = (0, 0) if dense is None else _phases(dense)[PHASES.index(phase)]
    if dense is None or start == end:
        return [None] * count
    used = dense.used[start:end]
    cuts = [i * len(used) / count for i in range(count + 1)]
    return [max(used[int(a) : ceil(b)]) for a, b in pairwise(cuts)]


def _alive(told: Timeline, places: Places, at: int) -> list[dict[str, Any]]:
    """What is there in one op: each resident kind, each tensor, and what the op takes itself."""
    found = [_tensor(kind, nbytes) for kind, nbytes in told.resident.items() if nbytes]
    lives = [life for life in told.lives if life.born <= at < life.freed and life.nbytes]
    found += [_tensor(x.kind, x.nbytes, *_named(x, told, places)) for x in lives]
    own = (told.used[at] if told.used else 0) - sum(one["nbytes"] for one in found)
    return [*found, _tensor(TEMPORARY, own, "", told.ops[at], "")] if own > 0 else found


def _named(life: Lifetime, told: Timeline, places: Places) -> tuple[str, str, str]:
    """The module, the op and the line that made a tensor."""
    module, where = places.get(life.node, ("", ""))
    return module, told.ops[life.born], where


def _tensor(
    kind: str, nbytes: int, module: str = "", op: str = "", where: str = ""
) -> dict[str, Any]:
    return {"kind": kind, "nbytes": nbytes, "module": module, "op": op, "where": short(where)}
