"""A predicted step as files that others' tools open: PyTorch's memory visualiser, and Perfetto.

Both count time in ops, since a forecast knows no other: the first op of the step is at 0, and each
takes one microsecond.
"""

from __future__ import annotations

import itertools
import json
import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from dropit_fx.planner.timeline import PHASES, TEMPORARY, Lifetime, Timeline

Places = Mapping[str, tuple[str, str]]  # node of the graph -> its module, and the user's file:line
_FIRST_ADDRESS = 0x7F00_0000_0000


def write_snapshot(told: Timeline, places: Places, path: str | PathLike[str]) -> None:
    """Writes a step as ``torch.cuda.memory._dump_snapshot`` writes one that ran."""
    events: list[dict[str, Any]] = []
    addresses: dict[int, int] = {}
    free = itertools.count(_FIRST_ADDRESS, 1 << 36)  # no two blocks overlap, whatever their size

    def note(action: str, address: int, nbytes: int, at: int, frames: Any) -> None:
        events.append(
            {
                "action": action,
                "addr": address,
                "size": nbytes,
                "stream": 0,
                "time_us": at,
                "frames": frames,
            }
        )

    def let_go(address: int, nbytes: int, at: int, frames: Any) -> None:
        for action in ("free_requested", "free_completed"):
            note(action, address, nbytes, at, frames)

    for kind, nbytes in told.resident.items():
        if nbytes:
            note("alloc", next(free), nbytes, 0, [_frame(kind)])
    for at, (gone, born, own) in enumerate(_changes(told)):
        for number in gone:
            life = told.lives[number]
            let_go(addresses[number], life.nbytes, at, _frames(life, told, places))
        for number in born:
            life = told.lives[number]
            addresses[number] = next(free)
            note("alloc", addresses[number], life.nbytes, at, _frames(life, told, places))
        if own:
            address, frames = next(free), [_frame(f"{told.ops[at]}, for itself")]
            note("alloc", address, own, at, frames)
            let_go(address, own, at, frames)
    snapshot = {"segments": [], "device_traces": [events], "allocator_settings": {}}
    Path(path).write_bytes(pickle.dumps(snapshot))


def write_trace(told: Timeline, path: str | PathLike[str]) -> None:
    """Writes a step as Chrome's trace events: phases, ops, and bytes by kind as counters."""
    events: list[dict[str, Any]] = []
    ends = (*told.phases[1:], len(told.ops))
    for name, start, end in zip(PHASES, told.phases, ends, strict=True):
        events.append(_event("X", name, start, dur=end - start, tid=0))
    level = defaultdict(int, told.resident)
    kinds = dict.fromkeys([*told.resident, *(life.kind for life in told.lives), TEMPORARY])
    for at, (gone, born, own) in enumerate(_changes(told)):
        for number in gone:
            level[told.lives[number].kind] -= told.lives[number].nbytes
        for number in born:
            level[told.lives[number].kind] += told.lives[number].nbytes
        events.append(_event("X", told.ops[at], at, dur=1, tid=1))
        shown = {k: level[k] + (own if k == TEMPORARY else 0) for k in kinds}
        events.append(_event("C", "bytes", at, args=shown))
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ns"})
    Path(path).write_text(text, encoding="utf-8")


def _event(phase: str, name: str, at: int, **more: Any) -> dict[str, Any]:
    return {"ph": phase, "name": name, "ts": at, "pid": 0} | more


def _changes(told: Timeline) -> Iterator[tuple[list[int], list[int], int]]:
    """Of each op: what is gone when it begins, what it makes, and what it takes for itself."""
    gone, born = defaultdict(list), defaultdict(list)
    for number, life in enumerate(told.lives):
        born[life.born].append(number)
        gone[life.freed].append(number)
    level = sum(told.resident.values())
    for at, used in enumerate(told.used):
        level -= sum(told.lives[n].nbytes for n in gone[at])
        level += sum(told.lives[n].nbytes for n in born[at])
        yield gone[at], born[at], max(used - level, 0)


def _frames(life: Lifetime, told: Timeline, places: Places) -> list[dict[str, Any]]:
    """What the visualiser shows of a block, as a stack: the op, the node, its module and line."""
    stack = [_frame(f"{life.kind}: {told.ops[life.born]}")]
    if life.node:
        module, where = places.get(life.node, ("", ""))
        stack.append(_frame(f"{life.node} in {module}" if module else life.node, where))
    return [*stack, _frame(told.phase(life.born))]


def _frame(name: str, where: str = "") -> dict[str, Any]:
    file, _, line = where.rpartition(":")
    return {"name": name, "filename": file, "line": int(line) if line.isdigit() else 0}
