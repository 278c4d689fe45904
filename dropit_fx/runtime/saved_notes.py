"""What became of each storage that saved-tensor hooks have seen: notes, for a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dropit_fx.holders import grad_fn_of, next_sequence_number, storages_alive
from dropit_fx.private import storage_id
from dropit_fx.private_hooks import weak_storage

CHECKPOINT_INPUT = "checkpoint"  # what a region is made again from: no node saves it
_OUTSIDE = ("a parameter", "a leaf")  # of what is saved; not counted, as in ``measure``


@dataclass
class Note:
    """One storage.

    Attributes:
        name: The autograd node that made the tensor that was saved first, or "constant".
        where: The user's ``file:line`` that saved it first.
        shape: Of that tensor.
        dtype: Of that tensor.
        dense_bytes: Of the whole storage; 0 where something has held it since before.
        kept_bytes: Of what is kept.
        codecs: Spelled with their options.
        reason: Why it is kept as it is, or ``""``.
        readers: The numbers of the autograd nodes that save it, each with the function at work.
        existed: Whether it is older than the block.
    """

    name: str
    where: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dense_bytes: int
    kept_bytes: int = 0
    codecs: dict[str, None] = field(default_factory=dict)
    reason: str = ""
    readers: dict[tuple[int, str], None] = field(default_factory=dict)
    existed: bool = False


class Notes:
    """The notes of one forward.

    Attributes:
        names: Of autograd nodes, by their number.
    """

    def __init__(self, look: Callable[[], tuple[str, str]]) -> None:
        """Notes what exists already.

        Args:
            look: Tells the user's line that runs now, and the function in it.
        """
        self.names: dict[int, str] = {}
        self._look = look
        self._before = storages_alive()
        self._found: dict[int, tuple[Any, Note]] = {}  # by storage, which may be gone since
        self._gone: list[Note] = []
        self._asked = -1, -1  # the last node that was made to ask for its number, and the answer

    def note_of(self, x: Tensor, at_checkpoint: bool) -> Note:
        """The note of the storage of ``x``, which is saved now."""
        key = storage_id(x)
        found = self._found.get(key)
        where, function = self._look()
        note = None if found is None or found[0].expired() else found[1]
        if note is None:
            if found is not None:
                self._gone.append(found[1])
            before = self._before.get(key)
            existed = before is not None and not before.expired()
            node = grad_fn_of(x)
            note = Note(
                name=node.name() if node is not None else "constant",
                where=where,
                shape=tuple(x.shape),
                dtype=x.dtype,
                dense_bytes=0 if existed else x.untyped_storage().nbytes(),
                existed=existed,
            )
            self._found[key] = weak_storage(x), note
        reader = (-1, CHECKPOINT_INPUT) if at_checkpoint else (self._reader(), function)
        note.readers[reader] = None
        return note

    def _reader(self) -> int:
        """The number of the autograd node that is being made, which saves several tensors maybe."""
        number, (asked, reader) = next_sequence_number() - 1, self._asked
        self._asked = number, reader if number == asked + 1 else number - 1
        return self._asked[1]

    def keep(self, x: Tensor, reason: str, at_checkpoint: bool) -> None:
        """Notes that ``x`` stays as it is."""
        if x.layout != torch.strided or reason.startswith(_OUTSIDE):
            return
        note = self.note_of(x, at_checkpoint)
        note.reason = reason
        note.kept_bytes = note.dense_bytes

    def rows(self) -> list[Note]:
        """All that count, in the order of saving: not what was there before and stays."""
        noted = [*self._gone, *(note for _, note in self._found.values())]
        return [n for n in noted if n.codecs or not n.existed]

    def op(self, note: Note) -> str:
        """The autograd nodes that save it; where none has been seen since, the function."""
        named = (self.names.get(number, function) for number, function in note.readers)
        return "+".join(dict.fromkeys(named))
