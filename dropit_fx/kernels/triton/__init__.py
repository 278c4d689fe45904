"""The ops in Triton: their CUDA implementation, with the bits of the reference.

Imported only when an op first sees a CUDA tensor. `bits` has what every kernel shares, `launch` the
arithmetic of grids; the kernels stand beside the functions that launch them.

Tested with Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is imported), compiled for
sm_80 and sm_90, and run on an H100, whose figures stand in `examples/figures/README.md`.
"""

from dropit_fx.kernels.triton.codes import decode_steps, encode_steps, pack_uint, unpack_uint
from dropit_fx.kernels.triton.masks import apply_mask, pack_between
from dropit_fx.kernels.triton.sparsify import sample, sparsify, sparsify_channels
from dropit_fx.kernels.triton.unsparsify import unsparsify, unsparsify_channels
from dropit_fx.kernels.triton.windows import decode_window, encode_window

__all__ = [
    "apply_mask",
    "decode_steps",
    "decode_window",
    "encode_steps",
    "encode_window",
    "pack_between",
    "pack_uint",
    "sample",
    "sparsify",
    "sparsify_channels",
    "unpack_uint",
    "unsparsify",
    "unsparsify_channels",
]
