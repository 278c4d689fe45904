"""Packed copies that wait on the host, in a timeline: when the device has them, and when not.

As ``runtime/offload.py`` moves them: in the forward a layer's copies are there until the second
layer behind it packs, in the backward from the first read of the layer behind it, which is the one
before it then, to the first read of another but the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dropit_fx.passes.plan import Plan
from dropit_fx.planner.moves import lives_of, made_by
from dropit_fx.planner.timeline import Lifetime, Timeline
from dropit_fx.runtime.offload import OFFLOAD


def without_waiting(told: Timeline, plan: Plan) -> Timeline:
    """The timeline of a rewritten graph, in which what it offloads is on the device when needed."""
    nodes = {n.name: n for n in plan.module.graph.nodes}
    layers: dict[int, str] = {}  # of each storage that is sent, by identity
    sent: dict[int, Lifetime] = {}
    for d in plan.decisions:
        if OFFLOAD in d.options and made_by(d) is not None:
            for life in (life for life in lives_of(d, nodes, told) if life.nbytes):
                layers.setdefault(id(life), d.options[OFFLOAD])
                sent[id(life)] = life
    if not sent:
        return told
    lives = sorted(sent.values(), key=lambda life: life.born)
    runs = [[*run] for _, run in itertools.groupby(lives, key=lambda life: layers[id(life)])]
    there = [*_there(runs, len(told.used))]
    change = [0] * (len(told.used) + 1)
    for some, sign in ((lives, -1), (there, 1)):
        for life in some:
            change[life.born] += sign * life.nbytes
            change[life.freed] -= sign * life.nbytes
    used = map(sum, zip(told.used, itertools.accumulate(change[:-1]), strict=True))
    return replace(
        told,
        lives=(*(life for life in told.lives if id(life) not in sent), *there),
        used=tuple(used),
        packs={},  # they counted the lives as they were
        values={},
        host=sum(life.nbytes for life in lives),
    )


def _there(layers: Sequence[Sequence[Lifetime]], end: int) -> Iterator[Lifetime]:
    """The times at which the device has the storages of some layers, in the forward's order."""
    reads = sorted((at, n) for n, lives in enumerate(layers) for one in lives for at in one.reads)
    turn = reads[0][0] if reads else end
    for number, lives in enumerate(layers):
        behind = layers[number + 2 : number + 3]
        gone = min([turn, *(layer[0].born + 1 for layer in behind)])
        yield from (replace(life, freed=gone) for life in lives)
    back: list[tuple[int, Lifetime, int]] = []  # its layer, what has come back, and when
    for at, number in reads:
        near = number, number - 1
        yield from (replace(one, born=since, freed=at) for n, one, since in back if n not in near)
        back = [one for one in back if one[0] in near]
        known = {id(one) for _, one, _ in back}
        for n in (n for n in near if n >= 0):
            held = (one for one in layers[n] if one.freed > at and id(one) not in known)
            back += [(n, one, at) for one in held]
    yield from (replace(one, born=since, freed=end) for _, one, since in back)
