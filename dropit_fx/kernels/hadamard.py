"""Rotation of each 16 values by the normalised Hadamard matrix: the op behind `quant`'s `hadamard`.

What is large in one of the 16 is spread over all, so that fewer levels between the least and the
greatest serve them; an orthogonal matrix leaves the length of the error as it is. Blocks of 16 are
those of NVFP4 training (arXiv 2509.25149) and of HOT (arXiv 2503.21261).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dropit_fx.kernels.dispatch import define
from dropit_fx.kernels.fused_bits import divides

SIZE = 16


def rotate(x: Tensor) -> Tensor:
    """``H x`` of each 16 consecutive elements; it is its own inverse.

    16 that hold NaN or infinity stay as they are: turned, all of them would be NaN.

    Args:
        x: (numel,) float32 or float64, less than a quarter of the greatest number. Up to 15
            elements behind the last 16 stay as they are. Not under autocast, which lowers products.
    """
    whole = x.numel() // SIZE * SIZE
    given = x[:whole].view(-1, SIZE)
    turned = given @ _matrix(x)
    some = torch.where(turned.isfinite().all(1, keepdim=True), turned, given).view(-1)
    return some if divides(SIZE, x.numel()) else torch.cat((some, x[whole:]))


def _matrix(like: Tensor) -> Tensor:
    """A quarter of -1 to the number of ones that row and column have in common, in binary."""
    number = torch.arange(SIZE, device=like.device)
    common = number[:, None] & number
    common = common ^ (common >> 2)
    odd = (common ^ (common >> 1)) & 1
    return 0.25 - 0.5 * odd.to(like.dtype)


define("rotate(Tensor x) -> Tensor", rotate, torch.empty_like, triton=False)
