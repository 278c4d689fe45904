"""A peak as people write it: bytes, ``"6GiB"``, or a share of dense's, ``"40%"``."""

from __future__ import annotations

import math
import re

from dropit_fx.planner.errors import PlanError

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{end}": base**power
    for power, letter in enumerate("kmgt", 1)
    for end, base in (("b", 1000), ("ib", 1024), ("", 1024))
}
_FORM = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[a-zA-Z]*)\s*")


def peak_bytes(peak: str | int | float, dense: int) -> int:
    """The bytes that a peak means.

    Args:
        peak: A number of bytes, a number with a unit (``MB`` is 1000², ``MiB`` and ``M`` 1024²),
            or a share of ``dense`` with ``%``.
        dense: The peak of the dense step, in bytes.

    Raises:
        PlanError: It cannot be understood, or is not above 0.
    """
    if isinstance(peak, bool) or not isinstance(peak, str | int | float):
        raise PlanError(f"peak = {peak!r}: {_MEANT}")
    if isinstance(peak, str):
        found = _FORM.fullmatch(peak)
        unit = found[2].lower() if found else ""
        if found is None or (unit != "%" and unit not in _UNITS):
            raise PlanError(f"peak = {peak!r}: {_MEANT}")
        size = float(found[1]) * (dense / 100 if unit == "%" else _UNITS[unit])
    else:
        size = float(peak)
    if not math.isfinite(size) or size < 1:
        raise PlanError(f"peak = {peak!r}: {_MEANT}")
    return int(size)


_MEANT = 'write bytes, a size such as "6GiB" or "800MB", or a share of dense\'s peak, "40%"'


def shown(nbytes: float) -> str:
    """Bytes to three digits, in units of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1000 or unit == "GiB":
            break
        nbytes /= 1024
    digits = 0 if unit == "B" or nbytes >= 100 else 1 if nbytes >= 10 else 2
    return f"{nbytes:.{digits}f} {unit}"
