"""What a codec is: one way of keeping a saved tensor, with the options that a config may set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dropit_fx.ops.rule import Read, Use
from dropit_fx.words import fits

Options = dict[str, Any]
# Elements of a block, as options have them.
BLOCKS = {"type": "integer", "minimum": 8, "maximum": 2**62, "multipleOf": 8}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a codec: its default, and what a config may say."""

    name: str
    default: Any
    schema: Mapping[str, Any]  # of its values: a JSON schema, as far as `words.fits` knows them
    meaning: str  # unit and range, as config errors print them
    shown: bool = False  # whether reports say it beside the codec, where it is not null or false

    def legal(self, value: object) -> bool:
        """Whether a config may say this."""
        return fits(value, self.schema)


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One way of keeping a saved tensor.

    Attributes:
        name: The word in config files, graphs and reports.
        serves: The uses whose backward may read what ``unpack`` returns; all of them where that is
            the tensor as it was.
        options: What a config rule may set.
        pack: ``(flat, options) -> parts``: a 1-D contiguous tensor to the tensors that are kept.
        unpack: ``(parts, options, numel, dtype) -> flat``.
        pack_channels: ``(flat, mean, inverse, inner, options) -> parts``: as ``pack`` of
            ``(flat - mean) * inverse``, where run r of ``inner`` elements is of channel r % C; None
            where that takes a pass of its own.
        unpack_channels: ``(parts, mean, deviation, inner, options, numel, dtype) -> flat``.
        buffers: How many tensors ``parts`` are.
        nbytes: ``(numel, dtype, options) -> int``: exactly the bytes of ``parts``.
        lossless: Whether these options give back every bit.
        faithful: Whether other values may be made from what these options give back.
        slope: ``unpack`` gives the derivative at the packed values, not the values.
        codes: It keeps reads that are small integers (``Read.bits``), and no others.
        contract: For a codec of whole rows, which keeps ``by_row`` and ``by_sample`` reads alone:
            ``(parts, options, grad, dtype) -> (grad', x')``. Of ``grad: (rows, out)`` and what was
            packed of ``x: (rows, width)`` fewer rows, chosen or mixed, weighted so that
            ``grad'^T x'`` is ``grad^T unpack(parts)``. The options have one more, ``width``:
            elements of a row.
        remembers: Whether with these options the choice of rows follows the gradients of earlier
            steps. They have one more then, ``memory``: the name of what knows these
            (``kernels.row_norms``).
        fused: Custom ops of ``pack`` and ``unpack`` (their names in namespace ``dropit``), each
            with a function of the same arguments in ops of PyTorch that a compiler fuses; it gives
            None for arguments of which there is no such form.
    """

    name: str
    serves: frozenset[Use]
    options: tuple[Option, ...] = ()
    pack: Callable[[Tensor, Options], tuple[Tensor, ...]]
    unpack: Callable[[tuple[Tensor, ...], Options, Any, torch.dtype], Tensor]
    nbytes: Callable[[int, torch.dtype, Options], int]
    pack_channels: Callable[[Tensor, Tensor, Tensor, Any, Options], tuple[Tensor, ...]] | None = (
        None
    )
    unpack_channels: (
        Callable[[tuple[Tensor, ...], Tensor, Tensor, Any, Options, Any, torch.dtype], Tensor]
        | None
    ) = None
    buffers: int = 1
    lossless: Callable[[Options], bool] = lambda options: False
    faithful: Callable[[Options], bool] = lambda options: False
    slope: bool = False
    codes: bool = False
    contract: (
        Callable[[tuple[Tensor, ...], Options, Tensor, torch.dtype], tuple[Tensor, Tensor]] | None
    ) = None
    remembers: Callable[[Options], bool] = lambda options: False
    fused: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def can_keep(self, read: Read) -> bool:
        """Whether the backward of ``read`` may read what the codec gives back."""
        if self.serves == frozenset(Use):
            return True
        fits = self.codes == (read.bits is not None) and not (self.slope and read.function is None)
        if self.contract is not None and read.by_row is None and read.by_sample is None:
            return False
        return fits and read.use in self.serves

    def defaults(self) -> Options:
        """Every option at its default."""
        return {o.name: o.default for o in self.options}
