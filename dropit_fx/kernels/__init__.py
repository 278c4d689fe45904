"""The packed format and its kernels; importing this registers the ops of namespace `dropit`.

May be imported from here: what this file names, ``format`` (sizes of codes), ``dtypes``,
``dispatch`` (how an op is registered), ``channels`` (their statistics), the ops by ``attention``,
``hadamard``, ``logits``, ``masks``, ``projection``, ``rows``, ``row_norms`` (what earlier steps
tell of rows) and ``windows``, and what compilers get for them, ``fused`` and ``fused_bits``. Needs
no other room.
"""

from dropit_fx.kernels import ops as ops
from dropit_fx.kernels.coder import may_hold_nan
from dropit_fx.kernels.format import AFFINE, FULL, SPACINGS, SYMMETRIC, UNIFORM, Format

__all__ = ["AFFINE", "FULL", "SPACINGS", "SYMMETRIC", "UNIFORM", "Format", "may_hold_nan"]
