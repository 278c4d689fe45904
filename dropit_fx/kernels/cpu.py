"""Loads the C kernels of `cpu.c` and makes them the CPU implementation of the ops.

The shared library is an optional part of the installation (extension `dropit_fx.kernels._cpu`;
plain C, loaded with ctypes). Where it is missing the reference takes over; one log line says so.
OpenMP's symbols resolve to the runtime that torch has loaded, so both use the same threads.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropit_fx.kernels import reference
from dropit_fx.kernels.dtypes import NUMBER
from dropit_fx.kernels.format import (
    Format,
    check_borders,
    check_levels,
    check_stream,
    check_uint,
    uint_nbytes,
)
from dropit_fx.kernels.seeds import draw_seed, rounding_seed

_log = logging.getLogger(__name__)


class Data:
    """An argument of a C function: the elements of a contiguous tensor; no address for None."""

    @staticmethod
    def from_param(x: Tensor | None) -> ctypes.c_void_p:
        """As ctypes asks."""
        return ctypes.c_void_p(None if x is None else x.data_ptr())


INT64, INT, FLOAT = ctypes.c_int64, ctypes.c_int, ctypes.c_float


class Array:
    """An argument of a C function: an array of numbers of a kind."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def from_param(self, values: Sequence[float]) -> Any:
        """As ctypes asks."""
        return (self.kind * len(values))(*values)


_SIGNATURES: dict[str, list[Any]] = {
    "dropit_sparsify": [Data] * 7 + [INT64] * 5 + [INT] * 5,
    "dropit_unsparsify": [Data] * 6 + [INT64] * 5 + [INT] * 4,
    "dropit_pack": [Data] * 2 + [INT64, INT, INT],
    "dropit_unpack": [Data] * 2 + [INT64, INT, INT],
    "dropit_encode_steps": [Data, Data, Array(FLOAT), INT64] + [INT] * 4,
    "dropit_decode_steps": [Data, Data, Array(FLOAT), INT64] + [INT] * 4,
    "dropit_level": [INT],  # 0 plain C, 1 AVX2, 2 AVX-512, -1 the best; gives what is used now
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C kernels; None where this installation has none, which is logged once."""
    return load("_cpu", _SIGNATURES)


def load(stem: str, signatures: Mapping[str, Sequence[Any]]) -> ctypes.CDLL | None:
    """Loads one shared library of this folder; None, and one log line, where that cannot be.

    Args:
        stem: Its file's name, without the suffix of extension modules.
        signatures: Function -> ctypes types of its arguments.
    """
    folder = Path(__file__).parent
    candidates = [folder / f"{stem}{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in candidates if path.exists()), None)
    if path is None or sys.byteorder != "little":
        _log.warning("dropit_fx: C kernels not built, using the slower PyTorch ones")
        return None
    try:
        lib = ctypes.CDLL(str(path))
        for name, arguments in signatures.items():
            getattr(lib, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        _log.warning("dropit_fx: C kernels not usable (%s), using the slower PyTorch ones", error)
        return None
    return lib


Channels = tuple[
    Tensor | None, Tensor | None, int, int
]  # mean, factor, how many, elements of a run
_NO_CHANNELS: Channels = (None, None, 1, 1)


def _channels(mean: Tensor, factor: Tensor, inner: int) -> Channels:
    return mean.contiguous(), factor.contiguous(), mean.numel(), inner


def sparsify(x: Tensor, form: Format, seed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.sparsify`."""
    lib = library()
    if lib is None or x.dtype not in NUMBER:
        return reference.sparsify(x, form, seed)
    return _sparsify(lib, x, form, rounding_seed(form, x, seed))


def sparsify_channels(
    x: Tensor, mean: Tensor, inverse: Tensor, inner: int, form: Format, seed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.sparsify_channels`; what is standardised is in memory a block at a time."""
    lib = library()
    if lib is None or x.dtype not in NUMBER:
        return reference.sparsify_channels(x, mean, inverse, inner, form, seed)
    channels = _channels(mean, inverse, inner)
    return _sparsify(lib, x, form, rounding_seed(form, x, seed), channels)


def sample(x: Tensor, form: Format, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.sample`."""
    lib = library()
    if lib is None or x.dtype not in NUMBER:
        return reference.sample(x, form, seed)
    seed = draw_seed(x.device) if seed is None else seed
    values, _, mask = _sparsify(lib, x, form, seed, sampled=True)
    return values, mask


def _sparsify(
    lib: ctypes.CDLL,
    x: Tensor,
    form: Format,
    seed: Tensor | None,
    channels: Channels = _NO_CHANNELS,
    sampled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    parts = form.buffers(x)
    numbers = form.keep, form.block, NUMBER[x.dtype], form.bits, form.spacing
    failed = lib.dropit_sparsify(
        x.contiguous(),
        *parts,
        seed,
        *channels,
        x.numel(),
        *numbers,
        sampled,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("dropit::sparsify: no memory for its scratch space")
    return parts


def unsparsify(
    values: Tensor, scale: Tensor, mask: Tensor, numel: int, dtype: torch.dtype, form: Format
) -> Tensor:
    """As `reference.unsparsify`."""
    lib = library()
    if lib is None or not _knows(values, dtype, form):
        return reference.unsparsify(values, scale, mask, numel, dtype, form)
    return _unsparsify(lib, (values, scale, mask), numel, dtype, form)


def unsparsify_channels(
    values: Tensor,
    scale: Tensor,
    mask: Tensor,
    mean: Tensor,
    deviation: Tensor,
    inner: int,
    numel: int,
    dtype: torch.dtype,
    form: Format,
) -> Tensor:
    """As `reference.unsparsify_channels`."""
    lib = library()
    if lib is None or not _knows(values, dtype, form):
        given = values, scale, mask, mean, deviation, inner, numel, dtype
        return reference.unsparsify_channels(*given, form)
    channels = _channels(mean, deviation, inner)
    return _unsparsify(lib, (values, scale, mask), numel, dtype, form, channels)


def _knows(values: Tensor, dtype: torch.dtype, form: Format) -> bool:
    return dtype in NUMBER and (form.bits > 0 or values.dtype == dtype)


def _unsparsify(
    lib: ctypes.CDLL,
    parts: tuple[Tensor, Tensor, Tensor],
    numel: int,
    dtype: torch.dtype,
    form: Format,
    channels: Channels = _NO_CHANNELS,
) -> Tensor:
    check_packed(parts, numel, form)
    out = parts[0].new_empty(numel, dtype=dtype)
    held = [part.contiguous() for part in parts]
    numbers = form.keep, form.block, NUMBER[dtype], form.bits, form.spacing
    threads = torch.get_num_threads()
    failed = lib.dropit_unsparsify(out, *held, *channels, numel, *numbers, threads)
    if failed:
        raise MemoryError("dropit::unsparsify: no memory for its scratch space")
    return out


def check_packed(parts: tuple[Tensor, Tensor, Tensor], numel: int, form: Format) -> None:
    """Raises ValueError where the buffers have not the sizes of the format: C reads past no end."""
    sizes = zip(("values", "scale", "mask"), parts, form.sizes(numel), strict=True)
    for name, part, count in sizes:
        if part.numel() != count and (form.bits or name != "scale"):
            raise ValueError(
                f"{name} has {part.numel()} elements, but a tensor of {numel} packed as {form}"
                f" has {count}"
            )


def pack_uint(x: Tensor, bits: int) -> Tensor:
    """As `reference.pack_uint`."""
    lib = library()
    if lib is None:
        return reference.pack_uint(x, bits)
    check_uint(x, bits)
    out = x.new_empty(uint_nbytes(x.numel(), bits), dtype=torch.uint8)
    lib.dropit_pack(x.contiguous(), out, x.numel(), bits, torch.get_num_threads())
    return out


def unpack_uint(packed: Tensor, bits: int, numel: int) -> Tensor:
    """As `reference.unpack_uint`."""
    lib = library()
    if lib is None:
        return reference.unpack_uint(packed, bits, numel)
    check_uint(packed, bits)
    check_stream(packed, bits, numel)
    out = packed.new_empty(numel, dtype=torch.uint8)
    lib.dropit_unpack(packed.contiguous(), out, numel, bits, torch.get_num_threads())
    return out


def encode_steps(x: Tensor, borders: Sequence[float], bits: int) -> Tensor:
    """As `reference.encode_steps`."""
    lib = library()
    if lib is None or x.dtype not in NUMBER:
        return reference.encode_steps(x, borders, bits)
    check_borders(x.dtype, borders, bits)
    out = x.new_empty(uint_nbytes(x.numel(), bits), dtype=torch.uint8)
    numbers = x.numel(), len(borders), NUMBER[x.dtype], bits, torch.get_num_threads()
    lib.dropit_encode_steps(x.contiguous(), out, borders, *numbers)
    return out


def decode_steps(
    packed: Tensor, levels: Sequence[float], bits: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.decode_steps`."""
    lib = library()
    if lib is None or dtype not in NUMBER:
        return reference.decode_steps(packed, levels, bits, numel, dtype)
    check_levels(packed, levels, bits, dtype)
    check_stream(packed, bits, numel)
    out = packed.new_empty(numel, dtype=dtype)
    numbers = numel, len(levels), NUMBER[dtype], bits, torch.get_num_threads()
    lib.dropit_decode_steps(packed.contiguous(), out, levels, *numbers)
    return out
