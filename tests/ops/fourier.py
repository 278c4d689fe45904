"""Fourier transforms of real values: what the tests know of them."""

from typing import Any

from op_calls import T, case, turned
from op_record import Entry, OpInfo, RowTests

X = T((3, 4, 6))


def _record(name: str, size: Any, dims: Any) -> RowTests:
    return RowTests(
        row=f"fft_{name}",
        cases=[
            case("plain", X),
            case("size", X, size),
            case("dim", X, None, dims),
            case("norm", X, None, dims, "ortho"),
            case("transposed memory", T((4, 6), turned)),
        ],
        half_on_cpu=False,
        op_info=OpInfo(f"fft.{name}"),
        behind="its result is complex",
        entries=(Entry("_fft_r2c", amend=lambda found: {("input", "input")}),),  # its last size
    )


RECORDS = (
    *(_record(name, 5, 1) for name in ("rfft", "fft")),
    *(_record(name, (3, 5), (0, 2)) for name in ("rfft2", "rfftn")),
)
