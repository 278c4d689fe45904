"""Normalisations: what the tests know of them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from op_calls import (
    BEFORE_2_14,
    BLOCKS,
    CHANNELS,
    GATHERED,
    IMAGE,
    IMAGE_LAST,
    LAST,
    WEIGHT,
    Case,
    T,
    biases,
    case,
    positive,
    turned,
)
from op_record import Behind, Calls, Entry, Given, Joint, OpInfo, Pairs, RowTests
from torch import Tensor, nn

from dropit_fx.ops.rule import INSIDE


def _without_bias() -> list[Case]:
    """Calls of layer_norm or rms_norm."""
    x, w = T((2, 6, 5)), T((5,))
    return [
        case("no affine", x, (5,)),
        case("weight alone", x, (5,), w),
        case("eps", x, (5,), w, eps=0.3),
        case("1-D", T((5,)), [5], w),
        case("two dimensions", x, (6, 5), T((6, 5))),
        case("every dimension", x, (2, 6, 5)),
        case("transposed memory", T((2, 5, 6), turned), (5,), w),
        case("batch second", T((6, 2, 5), lambda v: v.transpose(0, 1)), (5,), w),
        case("channels_last", T((2, 3, 6, 5), format=LAST), (5,), w),
        case("channels last permuted", T((2, 5, 3, 4), lambda v: v.permute(0, 2, 3, 1)), (5,), w),
        case("slice", T((2, 6, 10), lambda v: v[..., ::2]), (5,), w),
        case("first token", T((2, 6, 5), lambda v: v[:, 0]), (5,), w),
        case("expanded", T((1, 6, 5), lambda v: v.expand(3, 6, 5)), (5,), w),
        case("one element", T((4, 1)), (1,), T((1,))),
        case("empty batch", T((0, 5)), (5,), w),
    ]


def _gradients(a: Any, grad: Tensor, packed: Tensor, **how: Any) -> dict[str, Tensor]:
    """``y = (x - mean) * rstd * weight + bias``, with the statistics of the exact ``x``.

    Args:
        a: The arguments of the call.
        grad: The gradient of its result.
        packed: ``x``, as it is after packing.
        how: ``affine``, the shape of the weight in that of ``x``; ``over``, the dimensions of the
            statistics; ``groups``, the shape of ``x`` where it has these; ``fixed``, the mean and
            variance where they are no function of ``x``.
    """
    x = a["input"]
    affine, over, groups = how["affine"], how["over"], how.get("groups", x.shape)
    fixed = how.get("fixed")
    if fixed:
        mean, var = (t.reshape(affine) for t in fixed)
    else:
        var, mean = torch.var_mean(x.reshape(groups), over, correction=0, keepdim=True)
    rstd = (var + a["eps"]).rsqrt()
    hat = (packed.reshape(groups) - mean) * rstd
    scaled = grad if a["weight"] is None else grad * a["weight"].reshape(affine)
    dx = scaled.reshape(groups)
    if not fixed:
        both = dx * hat
        dx = dx - dx.mean(over, keepdim=True) - hat * both.mean(over, keepdim=True)
    return {
        "input": (dx * rstd).reshape(x.shape),
        "weight": (grad * hat.reshape(x.shape)).sum_to_size(affine),
        "bias": grad.sum_to_size(affine),
    }


def _by_channel(a: Any, grad: Tensor, pack: Any, **how: Any) -> dict[str, Tensor]:
    """Of what packs each channel around its own mean, in units of its deviation."""
    x = a["input"]
    others = [d for d in range(x.dim()) if d != 1]
    deviation, mean = torch.std_mean(x, others, correction=0, keepdim=True)
    packed = pack((x - mean) / deviation) * deviation + mean
    affine = (1, x.shape[1], *[1] * (x.dim() - 2))
    return _gradients(a, grad, packed, affine=affine, **how)


def _layer_norm(a: Any, grad: Tensor, pack: Any) -> dict[str, Tensor]:
    x, affine = a["input"], tuple(a["normalized_shape"])
    over = tuple(range(x.dim() - len(affine), x.dim()))
    return _gradients(a, grad, pack(x), affine=affine, over=over)


def _group_norm(a: Any, grad: Tensor, pack: Any) -> dict[str, Tensor]:
    groups = torch.Size((a["input"].shape[0], a["num_groups"], -1))
    return _by_channel(a, grad, pack, over=(2,), groups=groups)


def _batch_norm(a: Any, grad: Tensor, pack: Any) -> dict[str, Tensor]:
    over = (0, *range(2, a["input"].dim()))
    fixed = None if a["training"] else (a["running_mean"], a["running_var"])
    return _by_channel(a, grad, pack, over=over, fixed=fixed)


def _not_for_itself(found: set[str], needs: set[str]) -> set[str]:
    # kept for a joint formula: the gradient of the weight does not read it
    return found - {"weight"} if needs == {"weight"} else found


LAYER_NORM = RowTests(
    row="layer_norm",
    cases=[
        case("affine", T((2, 6, 5)), (5,), T((5,)), T((5,))),
        case("affine, two dimensions", T((2, 6, 5)), (6, 5), T((6, 5)), T((6, 5))),
        case("affine, transposed memory", T((2, 5, 6), turned), (5,), T((5,)), T((5,))),
        case("bias alone", T((2, 6, 5)), (5,), None, T((5,))),
        *_without_bias(),
    ],
    quantised=(
        case("affine", BLOCKS, (40,), WEIGHT, WEIGHT),
        case("two dimensions", BLOCKS, (11, 40)),
        case("batch second", T((11, 7, 40), lambda v: v.transpose(0, 1)), (40,), WEIGHT),
    ),
    by_the_book=_layer_norm,
    modules=lambda: [
        (nn.LayerNorm(9), (4, 9)),
        (nn.LayerNorm((4, 9), elementwise_affine=False), (2, 4, 9)),
    ],
    op_info=OpInfo("nn.functional.layer_norm"),
    behind=Behind((Given.X, Given.WIDTH)),
    entries=(
        Entry(
            "native_layer_norm",
            {"result1": "mean", "result2": "rstd"},
            Joint(
                mentions=("input", "weight", "bias", "mean", "rstd"),
                gradients=("input", "weight", "bias"),
            ),
        ),
    ),
    keeps=_not_for_itself,
)


def _group_cases() -> list[Case]:
    x, w, b = T((2, 4, 5, 3)), T((4,)), T((4,))
    crashes = "this PyTorch crashes in the dense backward of weight or bias alone"
    return [
        case("affine", x, 2, w, b),
        case("no affine", x, 2),
        case("weight alone", x, 2, w),
        *([] if BEFORE_2_14 else [case("bias alone", x, 2, None, b)]),  # which PyTorch refused
        case("eps", x, 2, w, b, eps=0.3),
        case("one group", x, 1, w, b),
        case("a group for each channel", x, 4, w, b),
        case("2-D", T((6, 4)), 2, w, b),
        case("3-D", T((2, 4, 7)), 2, w, b),
        case("5-D", T((2, 4, 2, 3, 2)), 2, w, b),
        Case(
            "channels_last",
            (T(x.shape, format=LAST), 2, w, b),
            not_alone=crashes if BEFORE_2_14 else "",
        ),
        case("channels_last, no affine", T(x.shape, format=LAST), 2),
        case("transposed memory", T(x.shape, turned), 2, w, b),
        case("slice", T((2, 8, 5, 3), lambda v: v[:, ::2]), 2, w, b),
        case("empty batch", T((0, 4, 5, 3)), 2, w, b),
    ]


GROUP_NORM = RowTests(
    row="group_norm",
    cases=_group_cases(),
    quantised=(
        case("affine", IMAGE, 4, CHANNELS, CHANNELS),
        case("channels_last", IMAGE_LAST, 2),
    ),
    by_the_book=_group_norm,
    modules=lambda: [(nn.GroupNorm(2, 4), (2, 4, 5, 5))],
    op_info=OpInfo("nn.functional.group_norm"),
    behind=Behind((Given.X, 2)),
    entries=(
        Entry(
            "native_group_norm",
            {"result1": "mean", "result2": "rstd"},
            Joint(
                mentions=("input", "weight", "mean", "rstd"),
                gradients=("input", "weight", "bias"),
            ),
        ),
    ),
    keeps=_not_for_itself,
)

RMS_NORM = RowTests(
    row="rms_norm",
    cases=[case("weight", T((2, 6, 5)), (5,), T((5,))), *_without_bias()],
    quantised=(case("weight", BLOCKS, (40,), WEIGHT), case("two dimensions", BLOCKS, (11, 40))),
    modules=lambda: [(nn.RMSNorm(9), (4, 9))],
    op_info=OpInfo("nn.functional.rms_norm"),
    behind=Behind((Given.X, Given.WIDTH)),
    entries=(
        Entry(
            "_fused_rms_norm",
            {"result1": INSIDE},
            Joint(mentions=("input", "weight", INSIDE), gradients=("input", "weight")),
        ),
    ),
    # the row makes the normalised one, which is kept, again from the input
    keeps=lambda found, needs: found | {"input"} if needs == {"weight"} else found,
)


EMPTY = "its batch is empty"


def _batch_cases() -> list[Case]:
    x, w, b = T((4, 3, 5, 4)), T((3,)), T((3,))
    statistics = T((3,), make=biases), T((3,), make=positive)
    none = None, None
    part, none_of_it = T((4, 6, 5, 4), lambda v: v[:, ::2]), T((0, 3, 5, 4))
    return [
        case("training", x, *statistics, w, b, True),
        case("training, no statistics", x, *none, w, b, True),
        case("training, no affine", x, *statistics, None, None, True),
        case("training, weight alone", x, *statistics, w, None, True),
        case("training, bias alone", x, *statistics, None, b, True),
        case("training, momentum and eps", x, *statistics, w, b, True, 0.3, 0.2),
        case("training, keywords", x, *statistics, weight=w, bias=b, training=True),
        case("training, 2-D", T((6, 3)), *statistics, w, b, True),
        case("training, 3-D", T((4, 3, 7)), *statistics, w, b, True),
        case("training, 5-D", T((2, 3, 2, 3, 2)), *statistics, w, b, True),
        case("training, channels_last", T(x.shape, format=LAST), *statistics, w, b, True),
        case("training, transposed memory", T(x.shape, turned), *none, w, b, True),
        Case("training, slice", (part, *statistics, w, b, True), rounds=GATHERED),
        Case("training, empty batch", (none_of_it, *statistics, w, b, True), obstacle=EMPTY),
        case("eval", x, *statistics, w, b, False),
        case("eval, no affine", x, *statistics),
        case("eval, weight alone", x, *statistics, w),
        case("eval, 2-D", T((6, 3)), *statistics, w, b),
        case("eval, channels_last", T(x.shape, format=LAST), *statistics, w, b),
        Case("eval, slice", (part, *statistics, w, b), rounds=GATHERED),
        Case("eval, empty batch", (none_of_it, *statistics, w, b), obstacle=EMPTY),
    ]


def _spell_batch_norm(target: Any, first: Case) -> Case:
    if target is F.batch_norm:
        return first
    x, mean, var, w, b, training = first.args
    return case("other order", x, w, b, mean, var, training, 0.1, 1e-5, False)


def _behind_batch_norm(target: Any) -> tuple[Any, ...]:
    args = (Given.X, None, None, None, None, True, 0.1, 1e-5)
    return args if target is F.batch_norm else (*args, False)


def _reserved(found: Pairs) -> Pairs:
    """With what the kernel of CUDA hands to its backward."""
    return found | {("reserve", reader) for reader in ("input", "weight")}


READ_BY_BATCH_NORM = ("input", "weight", "running_mean", "running_var", "mean", "invstd")
_RUNNING = T((8,), make=biases), T((8,), make=positive)

BATCH_NORM = RowTests(
    row="batch_norm",
    cases=_batch_cases(),
    spell=_spell_batch_norm,
    quantised=(
        case("training", IMAGE, *_RUNNING, CHANNELS, CHANNELS, True),
        case("training, alone", IMAGE_LAST, None, None, None, None, True),
        case("eval", IMAGE, *_RUNNING, CHANNELS, CHANNELS),
    ),
    by_the_book=_batch_norm,
    modules=lambda: [
        (nn.BatchNorm1d(9), (4, 9)),
        (nn.BatchNorm2d(3, momentum=0.3), (2, 3, 5, 5)),
        (nn.BatchNorm2d(3, track_running_stats=False), (2, 3, 5, 5)),
    ],
    op_info=OpInfo("nn.functional.batch_norm"),
    behind=Behind(_behind_batch_norm),
    entries=(
        Entry(
            "native_batch_norm",
            {"result1": "mean", "result2": "invstd"},
            Joint(mentions=READ_BY_BATCH_NORM, gradients=("input", "weight", "bias")),
            amend=_reserved,
        ),
        Entry(
            "cudnn_batch_norm",
            {"result1": "mean", "result2": "invstd", "result3": "reserve"},
            Joint(mentions=(*READ_BY_BATCH_NORM, "reserve"), gradients=("input", "weight", "bias")),
        ),
    ),
    keeps=_not_for_itself,
    on_cuda=("reserve",),
)

RUNNING = "it counts running statistics, which a repeated call would count again"


def _instance_cases() -> list[Case]:
    x, none, affine = T((2, 3, 5, 4)), (None, None), (T((3,)), T((3,)))
    statistics = T((3,), make=biases), T((3,), make=positive)
    return [
        case("affine", x, *none, *affine),
        case("no affine", x),
        case("weight alone", x, weight=T((3,))),
        case("bias alone", x, bias=T((3,))),
        case("momentum and eps", x, *none, *affine, True, 0.3, 0.2),
        case("3-D", T((2, 3, 7)), *none, *affine),
        case("5-D", T((2, 3, 2, 3, 2)), *none, *affine),
        case("channels_last", T(x.shape, format=LAST), *none, *affine),
        case("transposed memory", T(x.shape, turned), *none, *affine),
        case("slice", T((2, 6, 5, 4), lambda v: v[:, ::2]), *none, *affine),
        Case("running", (x, *statistics, *affine), obstacle=RUNNING),
        Case("eval", (x, *statistics, *affine, False), obstacle=RUNNING),
    ]


def _spell_instance_norm(target: Any, first: Case) -> Case:
    if target is F.instance_norm:
        return first
    x, mean, var, w, b = first.args
    return case("other order", x, w, b, mean, var, True, 0.1, 1e-5, False)


def _instance_norm(a: Any, grad: Tensor, pack: Any) -> dict[str, Tensor]:
    """The gradients of the whole op at what is packed, each channel around its own mean."""
    x = a["input"]
    over = (0, *range(2, x.dim()))
    deviation, mean = torch.std_mean(x, over, correction=0, keepdim=True)
    leaves = {"input": pack((x - mean) / deviation) * deviation + mean, "weight": a["weight"]}
    leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
    with torch.enable_grad():
        hat = (leaves["input"] - leaves["input"].mean((2, 3), keepdim=True)) / (
            leaves["input"].var((2, 3), correction=0, keepdim=True) + a["eps"]
        ).sqrt()
        out = hat * leaves["weight"][:, None, None]
        grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return dict(zip(leaves, grads, strict=True)) | {"bias": grad.sum((0, 2, 3))}


INSTANCE_NORM = RowTests(
    row="instance_norm",
    cases=_instance_cases(),
    spell=_spell_instance_norm,
    quantised=(case("affine", IMAGE, None, None, CHANNELS, CHANNELS),),
    by_the_book=_instance_norm,
    modules=lambda: [
        (nn.InstanceNorm1d(3), (2, 3, 5)),
        (nn.InstanceNorm2d(3, affine=True), (2, 3, 5, 5)),
    ],
    op_info=OpInfo("nn.functional.instance_norm"),
    behind=Behind(
        lambda target: (
            (Given.X,)
            if target is F.instance_norm
            else (Given.X, None, None, None, None, True, 0.1, 1e-5, False)
        )
    ),
    entries=(
        Entry(
            "native_batch_norm",
            {"result1": INSIDE, "result2": INSIDE},
            Joint(
                mentions=("input", "weight", "running_mean", "running_var", INSIDE),
                gradients=("input", "weight", "bias"),
            ),
            amend=lambda found: {(x, n) for x, n in found if not x.startswith("running")},
        ),
    ),
    # the weight of all samples beside each other is made inside, and again
    keeps=lambda found, needs: found | ({"weight"} if "input" in needs else set()),
)

ROWS_OF = T((6, 5))

VECTOR_NORM = RowTests(
    row="vector_norm",
    cases=[
        case("rows", T((2, 6, 5)), 2, -1),
        case("kept dimension", T((2, 6, 5)), dim=(1, 2), keepdim=True),
        case("whole", T((2, 6, 5))),
        case("dtype", ROWS_OF, 2, -1, dtype=torch.float64),
        case("ord=1", ROWS_OF, 1, -1),
        case("ord=3", ROWS_OF, 3.0, 0),
        Case("ord=0", (ROWS_OF, 0, 0), obstacle="ord=0 has no gradient"),
        case("largest", ROWS_OF, math.inf, -1),
        case("transposed memory", T((2, 5, 6), turned), 2, -1),
        case("channels_last", T((2, 3, 6, 5), format=LAST), 2, (2, 3), True),
        case("slice", T((2, 6, 10), lambda v: v[..., ::2]), 2, -1),
        case("expanded", T((1, 5), lambda v: v.expand(6, 5)), 2, -1),
        case("empty batch", T((0, 5)), 2, -1),
    ],
    obstacles=(
        (torch.norm, Case("nuclear", (ROWS_OF, "nuc"), obstacle="ord='nuc' is no norm of vectors")),
    ),
    quantised=(case("rows", BLOCKS, 2, -1), case("ord=3", BLOCKS, 3, -1)),
    modules=lambda: [(Calls(lambda x: x.norm(dim=-1)), (4, 9))],
    op_info=OpInfo("linalg.vector_norm"),
    behind=Behind((Given.X, 2, -1)),
    entries=(Entry("linalg_vector_norm", {"self": "input"}),),
)

NORMALIZE = RowTests(
    row="normalize",
    cases=[
        case("plain", T((2, 6, 5))),
        case("rows", T((2, 6, 5)), dim=-1),
        case("p=3", ROWS_OF, 3.0, 0),
        case("p=1", ROWS_OF, 1.0, 0),
        case("eps", ROWS_OF, eps=3.0),
        case("transposed memory", T((2, 5, 6), turned), dim=-1),
        case("channels_last", T((2, 3, 6, 5), format=LAST)),
        case("slice", T((2, 6, 10), lambda v: v[..., ::2]), dim=-1),
        case("empty batch", T((0, 5)), dim=-1),
    ],
    quantised=(case("rows", BLOCKS, dim=-1),),
    op_info=OpInfo("nn.functional.normalize"),
    behind=Behind(),
    entries=(
        Entry("linalg_vector_norm", {"self": "input", "result": INSIDE}),
        Entry("div.Tensor", {"self": "input", "other": INSIDE}),
        Entry("clamp_min", {"self": INSIDE}),
    ),
    steps={INSIDE: "input", "other": "input"},
)

RECORDS = (LAYER_NORM, GROUP_NORM, RMS_NORM, BATCH_NORM, INSTANCE_NORM, VECTOR_NORM, NORMALIZE)
