"""Which rows had large gradients in earlier steps: what `wta_crs` weighs rows with as well.

The least variance of a sum `sum_i g_i x_i^T` over sampled rows is where row i is as likely as
|x_i| |g_i| is large (WTA-CRS, arXiv 2305.15265, equation 5). A forward does not know g_i, the
gradient of the product's result: it takes what earlier steps have seen at the same place i. A batch
in another order makes that a worse guess and no wrong gradient: each row is weighted by the chance
that it was drawn with. So that a bad guess costs little, steps are averaged (each weighs `DECAY` of
the next one), and no row counts for less than `FLOOR` of the mean square.

A `RowNorms` belongs to one packed copy, and is found by its name: a compiled graph holds that name
and nothing else of it. It lives as long as something holds it, and is no part of a model's state:
a copy or a pickle of its owner, in another process, begins without steps.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from dropit_fx.kernels.dispatch import define
from dropit_fx.kernels.rows import WTA_CRS, select_rows

MEMORY = "memory"  # beside the options of a codec: the name of a `RowNorms`
DECAY = 0.8  # of what a step counts for, with each step behind it
FLOOR = 0.25  # of the mean square: the least that a row counts for
_BY_NAME: weakref.WeakValueDictionary[str, RowNorms] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class RowNorms:
    """Squared gradient norms of rows, over steps; on each device its own.

    Attributes:
        name: By which ops find it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._seen: dict[torch.device, Tensor] = {}  # since rows were last chosen
        # of the steps before, and their weight
        self._sums: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return named, (self.name,)

    def __deepcopy__(self, memo: object) -> RowNorms:
        return self

    def note(self, grad: Tensor) -> None:
        """Adds ``grad: (rows, out)``, of one reader of the copy."""
        work = torch.promote_types(grad.dtype, torch.float32)
        squares = torch.linalg.vector_norm(grad, dim=1, dtype=work).square().float()
        before = self._seen.get(grad.device)
        if before is not None and len(before) == len(squares):
            squares = squares + before
        self._seen[grad.device] = squares

    def known(self, x: Tensor) -> Tensor:
        """What the rows of ``x: (rows, width)`` count for beside their norm: (rows,), float32.

        All ones before the first step, and where a batch has another number of rows. A step whose
        gradients overflow, or are all 0, does not count. Waits for no device.
        """
        rows, device = len(x), x.device
        seen, before = self._seen.pop(device, None), self._sums.get(device)
        if before is None or len(before[0]) != rows:
            before = torch.zeros(rows, device=device), torch.zeros((), device=device)
        total, weight = before
        if seen is not None and len(seen) == rows:
            share = seen / seen.mean()
            counts = share.isfinite().all()
            total = DECAY * total + torch.where(counts, share, 0.0)
            weight = DECAY * weight + counts
            self._sums[device] = total, weight
        mean = torch.where(weight > 0, total / weight, 1.0)
        return mean.clamp(min=FLOOR).sqrt()


def new_name(label: str) -> str:
    """A name that no ``RowNorms`` of this process has: the same in each run of one program."""
    return f"{label}#{next(_numbers)}"


def named(name: str) -> RowNorms:
    """That of this name; a new one where none is left."""
    found = _BY_NAME.get(name)
    if found is None:
        found = _BY_NAME[name] = RowNorms(name)
    return found


def select_known_rows(
    x: Tensor, count: int, memory: str, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `select_rows` by `wta_crs`, by the norms of `x` times what `memory` knows of the rows."""
    found = _BY_NAME.get(memory)
    if found is None or _captures(x):
        return select_rows(x, count, WTA_CRS, seed)
    return select_rows(x, count, WTA_CRS, seed, found.known(x))


def note_rows(grad: Tensor, index: Tensor, memory: str) -> Tensor:
    """The rows `index` of `grad: (rows, out)`; `memory` is told the norms of all of them."""
    found = _BY_NAME.get(memory)
    if found is not None and not _captures(grad):
        found.note(grad)
    return grad.index_select(0, index)


def _captures(x: Tensor) -> bool:
    """Whether a CUDA graph is captured: what it repeats keeps nothing for the next step."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _fake_select(x: Tensor, count: int, memory: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(count, dtype=torch.int32), x.new_empty(count, dtype=torch.float32)


def _fake_note(grad: Tensor, index: Tensor, memory: str) -> Tensor:
    return grad.new_empty(index.shape[0], grad.shape[1])


_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)  # they keep what they see

define(
    "select_known_rows(Tensor x, SymInt count, str memory) -> (Tensor index, Tensor weight)",
    select_known_rows,
    _fake_select,
    triton=False,
    tags=_TAGS,
)
define(
    "note_rows(Tensor grad, Tensor index, str memory) -> Tensor",
    note_rows,
    _fake_note,
    triton=False,
    tags=_TAGS,
)
