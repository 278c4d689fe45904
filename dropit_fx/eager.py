"""Packing without a graph: ``pack_checkpoints`` of a model, ``pack_saved`` of a block of code.

In eager mode, for what no tracer takes; saved-tensor hooks pack what autograd saves meanwhile. The
forward keeps its bits. Gradients are approximate where what is read back is rounded.
"""

from __future__ import annotations

import threading
from typing import Any, Self

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from dropit_fx.capture.provenance import line_at_work
from dropit_fx.codecs import CODEC
from dropit_fx.config import ConfigError
from dropit_fx.private import dynamo_skips
from dropit_fx.private_hooks import drop_hooks, hooks_in_force
from dropit_fx.report.rows import Report, Row
from dropit_fx.runtime.checkpoints import CheckpointPacker, may_be_called_as_such
from dropit_fx.runtime.saved_copies import Copies
from dropit_fx.runtime.saved_hooks import Packing, outside_of_ours, unpack
from dropit_fx.runtime.saved_notes import Note, Notes
from dropit_fx.words import is_whole

BLOCK = 512  # elements that share a scale: a thirtieth of a byte each


def _options(bits: int) -> dict[str, Any]:
    """Options of the codec that keeps floats.

    Raises:
        ConfigError: No kept value has so many bits.
    """
    if not is_whole(bits) or not 1 <= bits <= 8:
        raise ConfigError(f"bits={bits!r}: must be 1 to 8, the bits of a kept value.")
    return CODEC["quant"].defaults() | {"bits": bits, "block": BLOCK}


def _report(notes: Notes | None, what: str) -> Report:
    if notes is None:
        raise ValueError(f"there is nothing to report yet: {what}")
    return Report(tuple(_row(notes, note) for note in notes.rows()))


def _row(notes: Notes, note: Note) -> Row:
    return Row(
        name=note.name,
        module="",
        op=notes.op(note),
        where=note.where,
        shape=note.shape,
        dtype=str(note.dtype).removeprefix("torch."),
        dense_bytes=note.dense_bytes,
        kept_bytes=note.kept_bytes,
        codec="+".join(note.codecs) or "keep",
        reason=note.reason,
        note="something holds it since before: packing frees nothing" if note.existed else "",
    )


class pack_saved:
    """Packs what autograd saves in a ``with`` block, whatever the code in it.

    Floats that a gradient flows through are kept in ``bits`` bits of each value, with a scale for
    512 of them; masks and, on a CPU, indices exactly, in the fewest bits. Kept as they are:
    parameters and what is made of them alone, values that no gradient flows through, tensors of
    fewer than 1,024 elements, what holds NaN or infinity, subclasses of tensors. A storage is
    packed once for all that save it. The backward may run inside or outside of the block.

    Writing in place into what was saved is an error, as without this. Second derivatives are
    refused. Saved-tensor hooks around the block are handed what is kept, packed or not; those
    inside of it have what is theirs to themselves, as checkpointed regions have.

    Args:
        bits: Of a kept value, 1 to 8.

    Raises:
        ConfigError: No kept value has so many bits.
    """

    def __init__(self, *, bits: int = 8) -> None:
        self._options = _options(bits)
        self._notes: Notes | None = None  # of the first block, and those inside of it
        self._noted = False
        self._open = threading.local()  # the blocks of each thread, inside of each other

    def __enter__(self) -> Self:
        """Packs from here on.

        Raises:
            RuntimeError: The block is in compiled code.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "pack_saved packs what is saved in eager mode, and this block is in compiled code."
                ' Use torch.compile(..., backend="dropit") without it.'
            )
        if self._notes is None:
            self._notes = Notes(line_at_work)
        notes = None if self._noted else self._notes
        packing = Packing(self._options, Copies(), outside_of_ours(hooks_in_force()), notes)
        hooks = saved_tensors_hooks(packing.pack, unpack)
        hooks.__enter__()
        self._open.hooks = [*getattr(self._open, "hooks", ()), hooks]
        return self

    def __exit__(self, *error: object) -> None:
        """Packs no more; what is packed stays so until its backward."""
        self._open.hooks.pop().__exit__(*error)
        self._noted = not self._open.hooks or self._noted

    def report(self) -> Report:
        """What became of each storage that the first block saved, read by which autograd nodes.

        Nodes that nothing saved later was computed from go by the function that made them.

        Raises:
            ValueError: No block has run.
        """
        return _report(self._notes, "use it as `with packed:` around a forward first.")


for _method in (pack_saved.__enter__, pack_saved.__exit__):
    dynamo_skips(_method)


class PackedCheckpoints:
    """A model whose checkpoints are packed; :meth:`remove` undoes it."""

    def __init__(self, model: nn.Module, bits: int, trust_indices: bool) -> None:
        self._hook = CheckpointPacker(_options(bits), line_at_work, trust_indices)
        drop_hooks(model, CheckpointPacker)
        may_be_called_as_such(model)
        self._handles = (
            model.register_forward_pre_hook(self._hook.before),
            model.register_forward_hook(self._hook),
        )

    def remove(self) -> None:
        """Makes the model what it was; graphs that are not backward yet stay packed."""
        for handle in self._handles:
            handle.remove()

    def report(self) -> Report:
        """What became of each input of a checkpoint in the first forward that trained.

        Raises:
            ValueError: There was none.
        """
        return _report(self._hook.notes, "run a forward in training mode first.")


def pack_checkpoints(
    model: nn.Module, *, bits: int = 6, trust_indices: bool = False
) -> PackedCheckpoints:
    """Keeps packed what the checkpointed regions of a model are made again from.

    In eager mode, whoever turned the checkpoints on: ``torch.utils.checkpoint`` in either form,
    ``checkpoint_wrapper``, transformers, timm, diffusers; before this call or after it. Class,
    parameters and state dict stay as they are; copies and pickles of the model pack as well. What
    is packed, and what is not, is as in :class:`pack_saved`; what a region finds without being
    given it (in a closure, in keyword arguments) is held as it is.

    A region that saves indices which depend on its input, as routers of experts do, might choose
    others when it is made again from rounded inputs. These are kept exactly, and a warning names
    the first such region. Which indices depend on it is told op by op while a region runs: those
    of positions, masks and token ids do not. Where the region saves others than it did, because it
    goes by values that no op showed (``tolist``), the backward is an error. What a region decides
    by comparing, without an index, is decided again: masks where rounded values lie beyond a
    threshold differ, as those of ``relu`` do.

    Args:
        model: Any module; checkpoints count that run in a call of it.
        bits: Of a kept value, 1 to 8.
        trust_indices: Packs inputs of regions whose indices may depend on them too, and follows no
            region op by op: the region saves what it chooses by (the router's logits, with
            ``create_selective_checkpoint_contexts``).

    Returns:
        What undoes it, and reports. A second call, of a copy too, takes the place of the first.

    Raises:
        ConfigError: No kept value has so many bits.
        RuntimeError: In the first forward that trains: no checkpoint ran. In the backward: a region
            computes something else from rounded inputs, or is reentrant and saves such indices.
    """
    return PackedCheckpoints(model, bits, trust_indices)
