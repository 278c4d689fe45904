"""Softmax and the losses behind it: what the tests know of them."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from op_calls import BLOCKS, IMAGE, LAST, Case, T, case, classes, positive, turned
from op_record import Behind, Calls, Entry, Given, OpInfo, RowTests
from torch import Tensor, nn

from dropit_fx.ops.rule import INSIDE


def _softmax_cases() -> list[Case]:
    x = T((2, 3, 5, 7))
    return [
        case("last", x, -1),
        case("last by number", x, 3),
        case("first", x, 0),
        case("channels", x, 1),
        case("1-D", T((33,)), 0),
        case("scalar", T(()), 0),
        case("keyword", x, dim=2),
        case("dtype", x, -1, dtype=torch.float64),
        case("dtype as it is", x, -1, dtype=torch.float32),
        case("transposed memory", T((6, 9), turned), -1),
        case("channels_last", T(x.shape, format=LAST), 1),
        case("slice", T((6, 9), lambda v: v[:, ::2]), -1),
        case("expanded", T((1, 5), lambda v: v.expand(3, 5)), -1),
        case("one class", T((4, 1)), -1),
        case("empty batch", T((0, 5)), -1),
    ]


def _softmax(a: Any, grad: Tensor, packed: Any) -> dict[str, Tensor]:
    y = packed(a["input"].softmax(a["dim"]))
    return {"input": y * (grad - (grad * y).sum(a["dim"], keepdim=True))}


def _log_softmax(a: Any, grad: Tensor, packed: Any) -> dict[str, Tensor]:
    y = packed(a["input"].log_softmax(a["dim"])).exp()
    return {"input": grad - y * grad.sum(a["dim"], keepdim=True)}


SOFTMAX = RowTests(
    row="softmax",
    cases=_softmax_cases(),
    quantised=(case("last", BLOCKS, -1), case("channels", IMAGE, 1)),
    by_the_book=_softmax,
    modules=lambda: [(nn.Softmax(-1), (4, 9))],
    op_info=OpInfo("softmax"),
    behind=Behind((Given.X, -1)),
    entries=(Entry("_softmax", {"self": "input"}),),
)
LOG_SOFTMAX = RowTests(
    row="log_softmax",
    cases=_softmax_cases(),
    quantised=(case("last", BLOCKS, -1), case("channels", IMAGE, 1)),
    by_the_book=_log_softmax,
    modules=lambda: [(nn.LogSoftmax(1), (4, 9))],
    op_info=OpInfo("log_softmax"),
    behind=Behind((Given.X, -1)),
    entries=(Entry("_log_softmax", {"self": "input"}),),
)


def _logsumexp_cases() -> list[Case]:
    x = T((2, 3, 5, 7))
    layouts = {
        "plain": (x, -1),
        "channels": (x, 1),
        "two": (x, (1, 3)),
        "all": (x, (0, 1, 2, 3)),
        "1-D": (T((33,)), 0),
        "scalar": (T(()), 0),
        "turned": (T((6, 9), turned), -1),
        "channels_last": (T(x.shape, format=LAST), 1),
        "slice": (T((6, 9), lambda v: v[:, ::2]), 0),
        "empty batch": (T((0, 5)), -1),
        "small": (T((6, 5), lambda v: v - 1000), -1),
    }
    out = [case(name, *given) for name, given in layouts.items()]
    return out + [case(f"{n}, kept", *given, keepdim=True) for n, given in layouts.items()]


def _logsumexp(a: Any, grad: Tensor, packed: Any) -> dict[str, Tensor]:
    x, dim = a["input"], a["dim"]
    grad = grad if a["keepdim"] else grad.unsqueeze(dim)
    return {"input": grad * packed((x - x.logsumexp(dim, True)).exp())}


LOGSUMEXP = RowTests(
    row="logsumexp",
    cases=_logsumexp_cases(),
    quantised=(case("last", BLOCKS, -1), case("channels", IMAGE, 1, keepdim=True)),
    by_the_book=_logsumexp,
    large=lambda call: {"probs"},
    modules=lambda: [(Calls(lambda x: x.logsumexp(-1, keepdim=True)), (4, 9))],
    op_info=OpInfo("logsumexp"),
    behind=Behind((Given.X, -1)),
    entries=(
        # both are read for one function of them, the probabilities
        Entry("logsumexp", {"self": "input"}, amend=lambda found: found | {("probs", "input")}),
    ),
)


def _loss_cases() -> list[Case]:
    x, y = T((6, 5)), T((6,), make=classes(5))
    ignored = T((6,), make=classes(5, -100))
    zeros = T((6,), make=classes(5, 0))
    image, labels = T((2, 5, 3, 4)), T((2, 3, 4), make=classes(5, -100))
    out = [
        case("2-D", x, y),
        case("1-D", T((5,)), T((), make=classes(5))),
        case("3-D", T((2, 5, 7)), T((2, 7), make=classes(5))),
        case("4-D", image, labels),
        case("classes last", T((2, 7, 5), turned), T((2, 7), make=classes(5))),
        case("channels_last", T(image.shape, format=LAST), labels),
        case("transposed memory", T((5, 6), turned), y),
        case("slice", T((6, 10), lambda v: v[:, ::2]), y),
        case("shifted tokens", T((7, 5), lambda v: v[:-1]), y),
        case("one class", T((6, 1)), T((6,), make=classes(1))),
        case("all ignored", x, T((6,), make=lambda shape, _: torch.full(shape, -100))),
    ]
    for reduction in ("none", "mean", "sum"):
        out += [
            case(f"2-D, {reduction}", x, ignored, reduction=reduction),
            case(f"ignoring 0, {reduction}", x, zeros, ignore_index=0, reduction=reduction),
            case(f"4-D, {reduction}", image, labels, reduction=reduction),
            case(
                f"empty batch, {reduction}",
                T((0, 5)),
                T((0,), make=classes(5)),
                reduction=reduction,
            ),
        ]
    return out


OF_ITS_OWN = "its target has a shape of its own"
COUNTED = {"total_weight": INSIDE}

NLL_LOSS = RowTests(
    row="nll_loss",
    cases=[
        # PyTorch's own backward refuses channels_last
        *(c for c in _loss_cases() if c.name not in ("1-D", "channels_last")),
        case("class weights", T((6, 5)), T((6,), make=classes(5)), T((5,), make=positive)),
        case("one", T((5,)), T((), make=classes(5)), reduction="sum"),
    ],
    op_info=OpInfo("nn.functional.nll_loss"),
    behind=OF_ITS_OWN,
    entries=(
        Entry("nll_loss_forward", {"self": "input", **COUNTED}),
        Entry("nll_loss2d_forward", {"self": "input", **COUNTED}),
    ),
)

LOGITS, LABELS = T((6, 5)), T((6,), make=classes(5))
WEIGHTS = T((5,), make=positive)


def _probabilities(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator).softmax(min(1, len(shape) - 1))


def _soft(*shape: int) -> T:
    return T(shape, make=_probabilities)


def _settled_cases() -> list[Case]:
    """Class weights, label smoothing and soft targets, together and alone."""
    image, last = T((2, 5, 3, 4)), T((2, 5, 3, 4), format=LAST)
    labels = T((2, 3, 4), make=classes(5, -100))
    hard = {
        "2-D": (LOGITS, T((6,), make=classes(5, -100)), -100),
        "ignoring 1": (LOGITS, T((6,), make=classes(5, 1)), 1),
        "all ignored": (LOGITS, T((6,), make=classes(1)), 0),
        "4-D": (image, labels, -100),
        "channels_last": (last, labels, -100),
        "1-D": (T((5,)), T((), make=classes(5)), -100),
        "empty batch": (T((0, 5)), T((0,), make=classes(5)), -100),
    }
    soft = {
        "soft": (LOGITS, _soft(6, 5), -100),
        "soft 4-D": (image, _soft(2, 5, 3, 4), -100),
        "soft channels_last": (last, _soft(2, 5, 3, 4), -100),
        "soft 1-D": (T((5,)), _soft(5), -100),
        "soft slice": (T((6, 10), lambda v: v[:, ::2]), _soft(6, 5), -100),
        "soft empty batch": (T((0, 5)), _soft(0, 5), -100),
    }
    settings = itertools.product((None, WEIGHTS), (0.0, 0.1, 1.0), ("none", "mean", "sum"))
    out = []
    for (name, (x, y, ignored)), (weight, smoothing, reduction) in itertools.product(
        {**hard, **soft}.items(), list(settings)
    ):
        plain = weight is None and not smoothing
        uncovered = weight is not None and smoothing and reduction == "mean"
        if name in hard and (plain or uncovered):
            continue
        label = f"{name}, {reduction}, {'weights, ' * (weight is not None)}smoothing {smoothing}"
        how = {"ignore_index": ignored, "reduction": reduction, "label_smoothing": smoothing}
        out.append(case(label, x, y, weight=weight, **how))
    return out


def _cross_entropy(a: Any, grad: Tensor, packed: Any) -> dict[str, Tensor]:
    x, target, smoothing = a["input"], a["target"], a["label_smoothing"]
    soft, count = target.is_floating_point(), x.shape[1]
    counted = torch.ones_like(x[:, 0]) if soft else target != a["ignore_index"]
    weight = torch.ones(count) if a["weight"] is None else a["weight"]
    if not soft:
        target = torch.zeros_like(x).scatter(1, (target * counted).unsqueeze(1), 1.0)
        divisor = (weight.view(-1, *[1] * (x.dim() - 2)) * target).sum(1)[counted].sum()
    else:
        divisor = x.numel() / count
    target = target * (1 - smoothing) + smoothing / count
    target = target * weight.view(-1, *[1] * (x.dim() - 2))
    share = grad * counted / (divisor if a["reduction"] == "mean" else 1)
    log_probs = packed(x.log_softmax(1))
    return {"input": (log_probs.exp() * target.sum(1, True) - target) * share.unsqueeze(1)}


CROSS_ENTROPY = RowTests(
    row="cross_entropy",
    cases=[*_loss_cases(), *_settled_cases()],
    obstacles=(
        (
            F.cross_entropy,
            Case(
                "mean of weights",
                (LOGITS, T((6,), make=classes(5, -100)), WEIGHTS),
                {"label_smoothing": 0.1},
                obstacle="its mean divides by the weights of the targets that are not ignored",
            ),
        ),
        (
            F.cross_entropy,
            Case(
                "targets with a gradient",
                (LOGITS, T((6, 5))),
                obstacle="its targets or class weights require grad",
            ),
        ),
        (
            F.cross_entropy,
            Case(
                "weights with a gradient",
                (LOGITS, _soft(6, 5), T((5,))),
                obstacle="its targets or class weights require grad",
            ),
        ),
    ),
    quantised=(
        case("mean", T((30, 40)), T((30,), make=classes(40))),
        case("sum", T((4, 10, 13)), T((4, 13), make=classes(10, -100)), reduction="sum"),
        case("none", T((30, 40)), T((30,), make=classes(40, 0)), ignore_index=0, reduction="none"),
        case("weights", T((30, 40)), T((30,), make=classes(40, 0)), T((40,), make=positive)),
        case("smoothing", T((30, 40)), T((30,), make=classes(40, -100)), label_smoothing=0.1),
        case("soft", T((4, 10, 13)), _soft(4, 10, 13), T((10,), make=positive), reduction="sum"),
        case("soft, smoothing", T((30, 40)), _soft(30, 40), label_smoothing=0.1),
    ),
    by_the_book=_cross_entropy,
    modules=lambda: [(Calls(lambda x: F.cross_entropy(x, torch.tensor([3, 0, 8, 3]))), (4, 9))],
    op_info=OpInfo("nn.functional.cross_entropy"),
    behind=OF_ITS_OWN,
    entries=(
        Entry("_log_softmax", {"self": "input", "result": "log_probs"}),
        Entry("nll_loss_forward", {"self": "log_probs", **COUNTED}),
        Entry("nll_loss2d_forward", {"self": "log_probs", **COUNTED}),
    ),
    steps={"log_probs": "input"},
)

RECORDS = (SOFTMAX, LOG_SOFTMAX, LOGSUMEXP, NLL_LOSS, CROSS_ENTROPY)
