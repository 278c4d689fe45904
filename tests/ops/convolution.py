"""Convolutions: what the tests know of them."""

from typing import Any

from op_calls import LAST, LAST3D, Case, T, case, turned
from op_record import Entry, Joint, OpInfo, RowTests
from torch import nn


def _cases(d: int, transposed: bool) -> list[Case]:
    size = {1: (12,), 2: (9, 8), 3: (6, 5, 6)}[d]
    kernel = (3, 2, 3)[:d]
    x, w = T((2, 4, *size)), T((4, 6, *kernel) if transposed else (6, 4, *kernel))
    b = T((6,))
    grouped = T((4, 3, *kernel) if transposed else (6, 2, *kernel))
    out = [
        case("plain", x, w, b),
        case("no bias", x, w),
        case("stride, padding", x, w, b, stride=2, padding=1),
        case("per dimension", x, w, b, stride=(2, 1, 1)[:d], padding=(1, 0, 1)[:d]),
        case("one-tuples", x, w, b, stride=(2,), padding=(1,)),
        case("dilation", x, w, b, dilation=2),
        case("groups", x, grouped, b, groups=2),
        case("kernel of one", x, T((4, 6, *[1] * d) if transposed else (6, 4, *[1] * d)), b),
        case("unbatched", T(x.shape[1:]), w, b),
        case("transposed memory", T(x.shape, turned if d > 1 else lambda v: v), w, b),
        case("one channel of a batch of one", T((1, 1, *size)), T((1, 1, *kernel))),
        case("empty batch", T((0, 4, *size)), w, b),
        case("slice", T((2, 8, *size), lambda v: v[:, ::2]), w, b),
        case("expanded", T((1, 4, *size), lambda v: v.expand(2, *[-1] * (d + 1))), w, b),
    ]
    if d > 1:
        last = LAST if d == 2 else LAST3D
        out.append(case("channels_last", T(x.shape, format=last), T(w.shape, format=last), b))
        out.append(case("channels_last input", T(x.shape, format=last), w, b, padding=1))
    if transposed:
        out.append(case("output_padding", x, w, b, stride=2, output_padding=1))
    else:
        odd = T((6, 4, *[3] * d))
        out.append(case("same", x, odd, b, padding="same"))
        even = T((6, 4, *[2] * d))
        out.append(Case("same, even kernel", (x, even, b), {"padding": "same"}, copies=1))
        out.append(case("same, dilated", x, odd, b, padding="same", dilation=2))
        out.append(case("valid", x, w, b, stride=2, padding="valid"))
        out.append(case("depthwise", x, T((4, 1, *kernel)), T((4,)), groups=4))
    return out


def _spell(target: Any, first: Case) -> Case:
    if getattr(target, "_overloadname", "") == "padding":
        d = len(first.args[0].shape) - 2
        return case("padding", first.args[0], T((6, 4, *[3] * d)), T((6,)), [1] * d, "same")
    return first


def _keeps(found: set[str], needs: set[str]) -> set[str]:
    # autograd keeps both operands whoever requires grad: the row keeps less
    assert found == {"input", "weight"}
    return {
        operand for operand, reader in (("input", "weight"), ("weight", "input")) if reader in needs
    }


def _record(name: str, d: int, **parts: Any) -> RowTests:
    side = {1: 300, 2: 18, 3: 7}[d]
    return RowTests(
        row=name,
        cases=_cases(d, transposed="transpose" in name),
        spell=_spell,
        one_for_all=d != 2,
        big=case("big", T((2, 8, *[side] * d)), T((8, 8, *[3] * d)), T((8,))),
        op_info=OpInfo(f"nn.functional.{name}"),
        behind="its weight has a shape of its own",
        entries=(
            Entry(
                "convolution",
                joint=Joint(
                    mentions=("input", "weight"),
                    gradients=("input", "weight", "bias"),
                    linear=("input", "weight"),
                ),
            ),
        ),
        keeps=_keeps,
        **parts,
    )


RECORDS = (
    _record(
        "conv1d",
        1,
        modules=lambda: [(nn.Conv1d(3, 4, 3, padding="same"), (2, 3, 12))],
    ),
    _record(
        "conv2d",
        2,
        modules=lambda: [
            (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 9)),
            (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9, 9)),
        ],
    ),
    _record(
        "conv3d",
        3,
        modules=lambda: [(nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4))],
    ),
    _record(
        "conv_transpose1d",
        1,
        modules=lambda: [(nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 8))],
    ),
    _record(
        "conv_transpose2d",
        2,
        modules=lambda: [(nn.ConvTranspose2d(3, 4, 3, output_padding=1, stride=2), (2, 3, 5, 5))],
    ),
    _record(
        "conv_transpose3d",
        3,
        modules=lambda: [(nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3))],
    ),
)
