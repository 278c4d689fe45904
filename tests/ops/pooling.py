"""Pooling and padding: what the tests know of them."""

import torch.nn.functional as F
from op_calls import LAST, LAST3D, Case, T, case, turned
from op_record import Behind, Entry, Given, OpInfo, RowTests
from torch import nn


def _max_cases(d: int) -> list[Case]:
    size = (9, 8, 7)[:d] if d > 1 else (13,)
    x = T((2, 3, *size))
    out = [
        case("plain", x, 2),
        case("overlapping", x, 3, 1),
        case("padding", x, 3, 2, 1),
        case("dilation", x, 2, 1, 0, 2),
        case("ceil_mode", x, 3, 2, ceil_mode=True),
        case("ceil_mode, padding, dilation", x, 3, 2, 1, 2, ceil_mode=True),
        case("stride zero is kernel", x, 2, None, 1),
        case("per dimension", x, (3, 2, 1)[:d], (1, 2, 1)[:d]),
        case("one-tuple", x, (2,), (1,)),
        case("window of one", x, 1, 2),
        case("unbatched", T((3, *size)), 2),
        case("transposed memory", T(x.shape, turned), 2),
    ]
    if d > 1:
        out.append(case("channels_last", T(x.shape, format=LAST if d == 2 else LAST3D), 3, 2, 1))
        out.append(case("empty batch", T((0, 3, *size)), 2))
    return out


MORE_THAN_256 = "its window has more than 256 cells"

MAX_POOL1D = RowTests(
    row="max_pool1d",
    cases=_max_cases(1),
    obstacles=((F.max_pool1d, Case("257", (T((1, 1, 600)), 257, 1), obstacle=MORE_THAN_256)),),
    modules=lambda: [(nn.MaxPool1d(3), (2, 3, 12))],
    op_info=OpInfo("nn.functional.max_pool1d"),
    behind=Behind((Given.X, 2), dims=3),
    entries=(Entry("max_pool2d_with_indices", {"self": "input", "result1": "indices"}),),
    # it pools over a view with a dimension more
    keeps=lambda found, needs: found - {"result"},
    codes=3,
)
MAX_POOL2D = RowTests(
    row="max_pool2d",
    cases=_max_cases(2),
    obstacles=(
        (
            F.max_pool2d,
            Case(
                "indices",
                (T((2, 3, 8, 8)), 2),
                {"return_indices": True},
                obstacle="the caller wants the indices themselves",
            ),
        ),
        (F.max_pool2d, Case("17 x 17", (T((1, 1, 40, 40)), 17, 1), obstacle=MORE_THAN_256)),
    ),
    modules=lambda: [(nn.MaxPool2d(3, 2, 1), (2, 3, 9, 9))],
    op_info=OpInfo("nn.functional.max_pool2d"),
    behind=Behind((Given.X, 2)),
    entries=(Entry("max_pool2d_with_indices", {"self": "input", "result1": "indices"}),),
    codes=9,
)
MAX_POOL3D = RowTests(
    row="max_pool3d",
    cases=_max_cases(3),
    modules=lambda: [(nn.MaxPool3d(2), (1, 2, 4, 4, 4))],
    op_info=OpInfo("nn.functional.max_pool3d"),
    behind=Behind((Given.X, 2)),
    entries=(Entry("max_pool3d_with_indices", {"self": "input", "result1": "indices"}),),
    codes=27,
)

PAD = RowTests(
    row="pad",
    cases=[
        *[case(f"{m}, 2-D", T((2, 3, 5, 6)), (1, 2, 0, 1), m) for m in ("reflect", "replicate")],
        *[case(f"{m}, 1-D", T((2, 5, 6)), (1, 2), m) for m in ("reflect", "replicate")],
        case("reflect, transposed", T((3, 5, 6), turned), (1, 2), "reflect"),
        case("replicate, 3-D", T((2, 3, 4, 5, 6)), (1, 2, 0, 1, 2, 2), "replicate"),
        case("constant", T((2, 3, 5, 6)), (1, 2, 0, -1), "constant", 0.5),
    ],
    op_info=OpInfo("nn.functional.pad", variant="reflect"),
    behind=Behind((Given.X, (1, 1, 0, 1), "reflect")),
    entries=tuple(
        Entry(f"{mode}_pad{d}d", {"self": "input"})
        for mode in ("reflection", "replication")
        for d in (1, 2, 3)
    ),
)

AVG_POOL1D = RowTests(
    row="avg_pool1d",
    cases=[
        case("plain", T((2, 3, 9)), 2),
        case("padding", T((2, 3, 9)), 3, 1, 1, True, False),
        case("unbatched", T((3, 9)), 2),
        case("slice", T((2, 3, 18), lambda v: v[..., ::2]), 2),
        case("empty batch", T((0, 3, 9)), 2),
    ],
    op_info=OpInfo("nn.functional.avg_pool1d"),
    behind=Behind((Given.X, 2), dims=3),
    entries=(Entry("avg_pool2d", {"self": "input"}),),
)

X = T((2, 3, 9, 8))

AVG_POOL2D = RowTests(
    row="avg_pool2d",
    cases=[
        case("plain", X, 2),
        case("overlapping", X, 3, 1),
        case("per dimension", X, (3, 2), (1, 2)),
        case("one-tuples", X, (2,), (1,), (1,)),
        case("padding", X, 3, 2, 1),
        case("padding not counted", X, 3, 2, 1, count_include_pad=False),
        case("ceil_mode", X, 3, 2, ceil_mode=True),
        case("ceil_mode, padding", X, 3, 2, 1, True, False),
        case("divisor_override", X, 3, 2, 1, divisor_override=5),
        case("global", X, (9, 8)),
        case("unbatched", T((3, 9, 8)), 2),
        case("channels_last", T(X.shape, format=LAST), 3, 2, 1),
        case("transposed memory", T(X.shape, turned), 2),
        case("slice", T((2, 6, 9, 8), lambda v: v[:, ::2]), 2),
        case("empty batch", T((0, 3, 9, 8)), 2),
    ],
    modules=lambda: [(nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 3, 9, 9))],
    op_info=OpInfo("nn.functional.avg_pool2d"),
    behind=Behind((Given.X, 2)),
    entries=(Entry("avg_pool2d", {"self": "input"}),),
)

AVG_POOL3D = RowTests(
    row="avg_pool3d",
    cases=[
        case("plain", T((2, 3, 5, 4, 6)), 2),
        case("padding", T((2, 3, 5, 4, 6)), 3, 1, 1, True, False, 5),
        case("unbatched", T((3, 5, 4, 6)), 2),
        case("transposed memory", T((2, 3, 4, 5, 6), turned), 2),
    ],
    half_on_cpu=False,
    op_info=OpInfo("nn.functional.avg_pool3d"),
    behind=Behind((Given.X, 2)),
    entries=(Entry("avg_pool3d", {"self": "input"}),),
)


def _adaptive(d: int) -> RowTests:
    return RowTests(
        row=f"adaptive_avg_pool{d}d",
        cases=[
            case("smaller", T((2, 3, *(9, 8, 7)[:d])), (4, 3, 2)[:d]),
            case("unbatched", T((3, *(9, 8, 7)[:d])), (4, 3, 2)[:d]),
            case("larger", T((2, 3, *(3, 2, 2)[:d])), (4, 3, 5)[:d]),
            case("transposed memory", T((2, 3, *(9, 8, 7)[:d]), turned), (4, 3, 2)[:d]),
        ],
        op_info=OpInfo(f"nn.functional.adaptive_avg_pool{d}d"),
        behind=Behind((Given.X, (2, 3, 4)[3 - d :]), dims=3 if d == 1 else 4),
        entries=(Entry(f"_adaptive_avg_pool{max(d, 2)}d", {"self": "input"}),),
    )


RECORDS = (
    *(MAX_POOL1D, MAX_POOL2D, MAX_POOL3D, PAD, AVG_POOL1D, AVG_POOL2D, AVG_POOL3D),
    *(_adaptive(d) for d in (1, 2, 3)),
)
