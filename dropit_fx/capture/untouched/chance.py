"""Where random numbers come from: whether a run drew some, and the states of before."""

from __future__ import annotations

import functools
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dropit_fx.holders import alive


@dataclass(frozen=True)
class Source:
    """A source of random numbers."""

    name: str
    state: Callable[[], Any]
    restore: Callable[[Any], object]


def sources(living: bool) -> Iterator[Source]:
    """Python's, NumPy's and PyTorch's own; ``living``: every generator of Python and NumPy."""
    yield Source("Python's random", random.getstate, random.setstate)
    yield Source("torch's default generator", torch.get_rng_state, torch.set_rng_state)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for i in range(torch.cuda.device_count()):
            yield Source(
                f"torch's generator of cuda:{i}",
                functools.partial(torch.cuda.get_rng_state, i),
                functools.partial(torch.cuda.set_rng_state, device=i),
            )
    numpy: Any = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (random.Random,)
    own = {id(getattr(random.random, "__self__", None))}
    if numpy is not None:
        own.add(id(getattr(numpy.random.random, "__self__", None)))
        yield Source("NumPy's random", numpy.random.get_state, numpy.random.set_state)
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    for found in alive(*kinds) if living else ():
        if id(found) in own or isinstance(found, random.SystemRandom):
            continue
        kind = f"a {type(found).__module__}.{type(found).__qualname__}"
        if isinstance(found, random.Random):
            yield Source(kind, found.getstate, found.setstate)
        elif isinstance(found, numpy.random.RandomState):
            yield Source(kind, found.get_state, found.set_state)
        else:
            bits = found.bit_generator
            yield Source(
                kind,
                functools.partial(getattr, bits, "state"),
                functools.partial(setattr, bits, "state"),
            )


def same_state(one: Any, other: Any) -> bool:
    """Whether nothing was drawn between two states of one source."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return pickle.dumps(one) == pickle.dumps(other)
