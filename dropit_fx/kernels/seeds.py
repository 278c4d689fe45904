"""Seeds of rounding and sampling: drawn beside PyTorch's generators, which are left as they are.

A seed that came from the global generator would move it on, and the dropout behind a packed layer
would draw another mask than in the dense model. So a seed is a hash of that generator's state, and
of how many seeds there were since the state or the global seed last changed: the same after
``torch.manual_seed``, another one in each call.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from dropit_fx.kernels.format import Format
from dropit_fx.private import last_seeding

_ENDS = 96  # bytes at either end of a state: of the CPU's 5056, some change with every draw


@dataclass
class _Count:
    """The seeds that were drawn on one device at one state of its generator."""

    seeding: object = None
    state: tuple[int, ...] = ()
    seeds: int = 0


_counts: dict[torch.device, _Count] = {}
_lock = threading.Lock()


def draw_seed(device: torch.device) -> Tensor:
    """A fresh 64-bit seed on `device`, int64 with one element, without a host sync.

    While CUDA records a graph, it comes from the device's own generator: whatever the host draws
    would be the same in each replay.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    whole = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    state = (*whole[:_ENDS].tolist(), *whole[-_ENDS:].tolist())
    seeding = last_seeding()
    with _lock:
        count = _counts.setdefault(device, _Count())
        if count.state != state or count.seeding is not seeding:
            count.state, count.seeding, count.seeds = state, seeding, 0
        number, count.seeds = count.seeds, count.seeds + 1
    drawn = hashlib.blake2b(bytes(state) + number.to_bytes(8, "little"), digest_size=8).digest()
    seed = int.from_bytes(drawn, "little", signed=True)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def rounding_seed(form: Format, x: Tensor, seed: Tensor | None) -> Tensor | None:
    """What `x` is rounded with: nothing to nearest; at random `seed`, or a fresh one for None."""
    if not form.draws:
        return None
    return draw_seed(x.device) if seed is None else seed
