"""Cards by name: what a GPU computes and moves in a second at most, and what it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dropit_fx.planner.errors import PlanError

TERA = 1e12
GIGA = 10**9


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU, as its maker describes it.

    Attributes:
        name: For people.
        peaks: FLOP/s of matrix products by dtype of their operands, sums in float32.
        bandwidth: Of its memory, bytes/s.
        capability: Of its instruction set, times ten: what inductor schedules for.
        processors: How many streaming multiprocessors it has.
        memory: Bytes; None: not known.
        host: Bytes/s between it and the host, in each direction.
    """

    name: str
    peaks: Mapping[torch.dtype, float] = field(repr=False)
    bandwidth: float
    capability: int = 90
    processors: int = 132
    memory: int | None = None
    host: float = 64 * GIGA

    def seconds(self, nbytes: int, flops: int = 0, dtype: torch.dtype | None = None) -> float:
        """Of a kernel that reaches the card's limits: of its arithmetic, or of its memory."""
        peak = self.peaks.get(dtype or torch.float32, self.peaks[torch.float32])
        return max(flops / peak, nbytes / self.bandwidth)


def _peaks(half: float, single: float) -> dict[torch.dtype, float]:
    """Of tensor cores without sparsity; float32 without TF32, which PyTorch leaves off."""
    halves = dict.fromkeys((torch.float16, torch.bfloat16), half * TERA)
    return {**halves, torch.float32: single * TERA}


# The link to the host is PCIe with 16 lanes, each way: 64 GB/s in its fifth generation, 32 before.
# NVIDIA's data sheets: "H100 Tensor Core GPU" (SXM), "A100 Tensor Core GPU" (SXM, 80 GB), and "Ada
# GPU Architecture", appendix A (GeForce RTX 4090)
CARDS = {
    "h100": Card(name="H100 SXM", peaks=_peaks(989, 67), bandwidth=3.35 * TERA, memory=80 * GIGA),
    "a100": Card(
        name="A100 SXM 80 GB",
        peaks=_peaks(312, 19.5),
        bandwidth=2.039 * TERA,
        capability=80,
        processors=108,
        memory=80 * GIGA,
        host=32 * GIGA,
    ),
    "4090": Card(
        name="RTX 4090",
        peaks=_peaks(165.2, 82.6),
        bandwidth=1.008 * TERA,
        capability=89,
        processors=128,
        memory=24 * GIGA,
        host=32 * GIGA,
    ),
}


def find_card(name: str) -> Card:
    """A card by name, or one of a peak and bandwidths, scheduled for as an H100 is.

    Args:
        name: One of :data:`CARDS`; or ``PEAK,BANDWIDTH`` in TFLOP/s, of all dtypes, and TB/s; and
            behind a third comma, in GB/s, what it exchanges with the host in each direction (an
            H100's, unless given).

    Raises:
        PlanError: It is neither.
    """
    if name.lower() in CARDS:
        return CARDS[name.lower()]
    try:
        peak, bandwidth, *host = (float(part) for part in name.split(","))
    except ValueError:
        peak, bandwidth, host = math.nan, math.nan, []
    if len(host) > 1 or not all(0 < n < math.inf for n in (peak, bandwidth, *host)):
        raise PlanError(
            f"device {name!r}: write {', '.join(CARDS)}, or PEAK,BANDWIDTH in TFLOP/s and TB/s,"
            " as in 600,2.8; GB/s to the host may follow, as in 600,2.8,55"
        )
    return Card(
        name=f"{peak:g} TFLOP/s, {bandwidth:g} TB/s" + "".join(f", {n:g} GB/s" for n in host),
        peaks=_peaks(peak, peak),
        bandwidth=bandwidth * TERA,
        host=host[0] * GIGA if host else CARDS["h100"].host,
    )
