"""Losses of two tensors, element by element: what the tests know of them."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from op_calls import BLOCKS, LAST, Case, T, case, positive, turned
from op_record import Calls, Entry, OpInfo, RowTests
from torch import Tensor

BOTH = ("input", "target")
ALIKE = "its target is as large as its input"
JOINED = Case(
    "another dtype",
    (T((6, 5)), T((6, 5), lambda x: x.double())),
    obstacle="it joins two dtypes",
)


def _cases(**settings: Any) -> list[Case]:
    """Two tensors in every layout, each reduced in every way."""
    x, image = T((6, 5)), T((2, 3, 5, 4))
    pairs = {
        "plain": (x, x),
        "1-D": (T((7,)), T((7,))),
        "scalars": (T(()), T(())),
        "4-D": (image, image),
        "transposed memory": (T((5, 6), turned), x),
        "transposed target": (x, T((5, 6), turned)),
        "both transposed": (T((5, 6), turned), T((5, 6), turned)),
        "channels_last": (T(image.shape, format=LAST), image),
        "slice": (T((6, 10), lambda v: v[:, ::2]), x),
        "constant target": (x, T((6, 5), make=positive)),
        "constant input": (T((6, 5), make=positive), x),
        "empty": (T((0, 5)), T((0, 5))),
    }
    found = [case("plain", x, x, **settings)]
    for reduction in ("none", "mean", "sum"):
        how = {**settings, "reduction": reduction}
        found += [case(f"{name}, {reduction}", *pair, **how) for name, pair in pairs.items()]
    return found


def _weighed(loss: Callable[..., Tensor]) -> tuple[Any, Case]:
    why = "it has a weight for each element"
    call = Case("weights", (T((6, 5)), T((6, 5))), {"weight": T((6, 5))}, obstacle=why)
    return loss, call


def _larger(loss: Callable[..., Tensor]) -> tuple[Any, Case]:
    why = "its target is larger than its input"
    return loss, Case("larger target", (T((6, 1)), T((6, 5))), obstacle=why)


def _by_the_book(
    slope: Callable[[Tensor, Any], Tensor], kept: Callable[[Tensor, Any], Tensor]
) -> Callable[[Any, Tensor, Any], dict[str, Tensor]]:
    """The gradients from the ``slope`` at each difference, of which ``kept`` is packed."""

    def gradients(a: Any, grad: Tensor, packed: Any) -> dict[str, Tensor]:
        each = grad / a["input"].numel() if a["reduction"] == "mean" else grad
        found = each * slope(packed(kept(a["input"] - a["target"], a)), a)
        return {"input": found, "target": -found}

    return gradients


def _instead(name: str, **settings: Any) -> Entry:
    """Both gradients are functions of the difference, which is kept in the place of the two."""
    made = {("difference", n) for n in BOTH}
    return Entry(name, {"self": "input"}, amend=lambda found: found | made)


QUANTISED = tuple(
    case(reduction, BLOCKS, BLOCKS, reduction=reduction) for reduction in ("mean", "sum", "none")
)
TARGET = torch.linspace(-1, 1, 36).view(4, 9)

MSE_LOSS = RowTests(
    row="mse_loss",
    cases=[*_cases(), case("smaller target", T((6, 5)), T((5,)))],
    obstacles=(_weighed(F.mse_loss), _larger(F.mse_loss)),
    quantised=QUANTISED,
    by_the_book=_by_the_book(lambda d, a: 2 * d, lambda d, a: d),
    large=lambda call: {"difference"},
    modules=lambda: [(Calls(lambda x: F.mse_loss(x, TARGET)), (4, 9))],
    op_info=OpInfo("nn.functional.mse_loss"),
    behind=ALIKE,
    entries=(_instead("mse_loss"),),
)


ROUNDED = "PyTorch rounds in another order in vectors than one by one, as the strides have it"


def _bent(**settings: Any) -> list[Case]:
    return [replace(c, rounds=ROUNDED) for c in (*_cases(), *_cases(**settings))]


def _clamped(bound: str) -> Callable[[Tensor, Any], Tensor]:
    return lambda d, a: d.clamp(-a[bound], a[bound])


SMOOTH_L1_LOSS = RowTests(
    row="smooth_l1_loss",
    cases=_bent(beta=0.3),
    obstacles=(
        _larger(F.smooth_l1_loss),
        (
            F.smooth_l1_loss,
            Case(
                "no bend",
                (T((6, 5)), T((6, 5))),
                {"beta": 0.0},
                obstacle="with this beta it is no smooth_l1_loss",
            ),
        ),
    ),
    quantised=(*QUANTISED, case("beta", BLOCKS, BLOCKS, beta=0.5)),
    by_the_book=_by_the_book(lambda d, a: (d / a["beta"]).clamp(-1, 1), _clamped("beta")),
    large=lambda call: {"difference"},
    modules=lambda: [(Calls(lambda x: F.smooth_l1_loss(x, TARGET)), (4, 9))],
    op_info=OpInfo("nn.functional.smooth_l1_loss"),
    behind=ALIKE,
    entries=(_instead("smooth_l1_loss"),),
)
HUBER_LOSS = RowTests(
    row="huber_loss",
    cases=_bent(delta=0.3),
    obstacles=(_weighed(F.huber_loss), _larger(F.huber_loss)),
    quantised=(*QUANTISED, case("delta", BLOCKS, BLOCKS, delta=0.5)),
    by_the_book=_by_the_book(_clamped("delta"), _clamped("delta")),
    large=lambda call: {"difference"},
    modules=lambda: [(Calls(lambda x: F.huber_loss(x, TARGET)), (4, 9))],
    op_info=OpInfo("nn.functional.huber_loss"),
    behind=ALIKE,
    entries=(_instead("huber_loss"),),
)

L1_LOSS = RowTests(
    row="l1_loss",
    cases=_cases(),
    obstacles=(_weighed(F.l1_loss), _larger(F.l1_loss), (F.l1_loss, JOINED)),
    modules=lambda: [(Calls(lambda x: F.l1_loss(x, TARGET)), (4, 9))],
    op_info=OpInfo("nn.functional.l1_loss"),
    behind=ALIKE,
    entries=(
        # of both: what comes before the absolute value is the difference
        Entry("abs", {"self": "sign"}, amend=lambda found: {("sign", n) for n in BOTH}),
    ),
    codes=3,
)

_LOGITS = "binary_cross_entropy_with_logits"
LOGITS = getattr(F, _LOGITS)


def shares(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


def _logits_cases() -> list[Case]:
    """Each tensor of logits in each layout, with the weights that there may be."""
    image, labels = T((2, 3, 5, 4)), T((2, 3, 5, 4), make=shares)
    beside = {
        "": {},
        "weight": {"weight": T((3, 1, 1), make=positive)},
        "pos_weight": {"pos_weight": T((3, 1, 1), make=positive)},
        "both": {
            "weight": T((2, 3, 5, 4), make=positive),
            "pos_weight": T((3, 5, 4), make=positive),
        },
    }
    pairs = {
        "4-D": (image, labels),
        "channels_last": (T(image.shape, format=LAST), labels),
        "turned": (T((2, 3, 4, 5), turned), labels),
        "target of logits": (image, T((2, 3, 4, 5), turned, make=shares)),
        "slice": (T((2, 3, 5, 8), lambda v: v[..., ::2]), labels),
        "no batch": (T((0, 3, 5, 4)), T((0, 3, 5, 4), make=shares)),
    }
    out = [case("plain", T((6, 5)), T((6, 5), make=shares))]
    for reduction in ("none", "mean", "sum"):
        out += [
            case(f"{name}, {reduction}, {extra}", *pair, reduction=reduction, **weights)
            for name, pair in pairs.items()
            for extra, weights in beside.items()
            if name != "no batch" or extra != "both"
        ]
        out.append(case(f"scalars, {reduction}", T(()), T((), make=shares), reduction=reduction))
    return out


def _logits_by_the_book(a: Any, grad: Tensor, packed: Any) -> dict[str, Tensor]:
    x, target = a["input"], a["target"]
    positive = 1.0 if a["pos_weight"] is None else a["pos_weight"]
    slope = (positive * target + 1 - target) * x.sigmoid() - positive * target
    weight = 1.0 if a["weight"] is None else a["weight"]
    size = x.numel() if a["reduction"] == "mean" else 1
    return {"input": packed(slope) * weight * grad / size}


OF_BLOCKS = T(BLOCKS.shape, make=shares)

BCE_WITH_LOGITS = RowTests(
    row=_LOGITS,
    cases=_logits_cases(),
    obstacles=(
        (
            LOGITS,
            Case(
                "target with a gradient",
                (T((6, 5)), T((6, 5))),
                obstacle="its target or weights require grad",
            ),
        ),
    ),
    quantised=(
        case("mean", BLOCKS, OF_BLOCKS),
        case("weights", BLOCKS, OF_BLOCKS, T((40,), make=positive), reduction="sum"),
        case("positive", BLOCKS, OF_BLOCKS, pos_weight=T((40,), make=positive), reduction="none"),
    ),
    by_the_book=_logits_by_the_book,
    large=lambda call: {"slope"},
    modules=lambda: [(Calls(lambda x: LOGITS(x, TARGET.sigmoid())), (4, 9))],
    op_info=OpInfo(f"nn.functional.{_LOGITS}"),
    behind=ALIKE,
    entries=(
        Entry(
            _LOGITS,
            {"self": "input"},
            # no gradient of the target, which is an obstacle; the slope is made of the others
            amend=lambda found: (
                {pair for pair in found if pair[1] == "input"} | {("slope", "input")}
            ),
        ),
    ),
)


_BCE = "binary_cross_entropy"


def in_reach(x: Any) -> Any:
    """Between 0 and 1, by ops that save nothing."""
    return (x.frac() + 1).frac()


def _bce_cases() -> list[Case]:
    """Probabilities in each layout, beside targets with a gradient and without."""
    image, labels = T((2, 3, 5, 4), in_reach), T((2, 3, 5, 4), make=shares)
    pairs = {
        "4-D": (image, labels),
        "channels_last": (T((2, 3, 5, 4), in_reach, format=LAST), labels),
        "turned": (T((2, 3, 4, 5), lambda x: turned(in_reach(x))), labels),
        "target with a gradient": (image, image),
        "weight": (image, labels, T((2, 3, 5, 4), make=positive)),
        "scalars": (T((), in_reach), T((), make=shares)),
        "empty": (T((0, 5), in_reach), T((0, 5), make=shares)),
    }
    found = [case("plain", T((6, 5), in_reach), T((6, 5), in_reach))]
    for reduction in ("none", "mean", "sum"):
        found += [case(f"{n}, {reduction}", *p, reduction=reduction) for n, p in pairs.items()]
    return found


BCE = RowTests(
    row=_BCE,
    cases=_bce_cases(),
    obstacles=(
        (
            F.binary_cross_entropy,
            Case(
                "weights of columns",
                (T((6, 5), in_reach), T((6, 5), make=shares), T((5,), make=positive)),
                obstacle="its target or weights are not in the shape of its input",
            ),
        ),
    ),
    modules=lambda: [
        (Calls(lambda x: F.binary_cross_entropy(in_reach(x), TARGET.sigmoid())), (4, 9))
    ],
    op_info=OpInfo(f"nn.functional.{_BCE}"),
    behind="its input lies between 0 and 1",
    entries=(Entry(_BCE, {"self": "input"}),),
)


def logarithms(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator).log()


def _kl_cases() -> list[Case]:
    """Probabilities and logarithms as the target, in each layout."""
    image = T((2, 3, 5, 4))
    out = [case("plain", T((6, 5)), T((6, 5), make=shares))]
    for (of, make), reduction in itertools.product(
        (("probabilities", shares), ("logarithms", logarithms)),
        ("none", "mean", "sum", "batchmean"),
    ):
        pairs = {
            "4-D": (image, T(image.shape, make=make)),
            "channels_last": (T(image.shape, format=LAST), T(image.shape, make=make)),
            "turned target": (image, T((2, 3, 4, 5), turned, make=make)),
            "smaller target": (image, T((5, 4), make=make)),
            "smaller input": (T((5, 1)), T((6, 5, 4), make=make)),
            "scalars": (T(()), T((), make=make)),
            "empty": (T((0, 5)), T((0, 5), make=make)),
        }
        how = {"reduction": reduction, "log_target": make is logarithms}
        out += [case(f"{of}, {n}, {reduction}", *p, **how) for n, p in pairs.items()]
    return out


def _kl_by_the_book(a: Any, grad: Tensor, packed: Any) -> dict[str, Tensor]:
    target = packed(a["target"].exp() if a["log_target"] else a["target"])
    rows, every = a["input"].shape[0], a["input"].numel()
    return {"input": -target * grad / {"batchmean": rows, "mean": every}.get(a["reduction"], 1)}


KL_DIV = RowTests(
    row="kl_div",
    cases=_kl_cases(),
    obstacles=(
        (
            F.kl_div,
            Case(
                "target with a gradient",
                (T((6, 5)), T((6, 5))),
                {"log_target": True},
                obstacle="its target requires grad",
            ),
        ),
    ),
    quantised=(
        case("mean", BLOCKS, OF_BLOCKS),
        case("logs", BLOCKS, T(BLOCKS.shape, make=logarithms), log_target=True),
        case("batch", BLOCKS, OF_BLOCKS, reduction="batchmean"),
        case("none", BLOCKS, OF_BLOCKS, reduction="none"),
    ),
    by_the_book=_kl_by_the_book,
    large=lambda call: {"target", "probs"},
    modules=lambda: [
        (Calls(lambda x: F.kl_div(x, x.detach().softmax(1), reduction="sum")), (4, 9))
    ],
    op_info=OpInfo("nn.functional.kl_div"),
    behind=ALIKE,
    # one product of the target's probabilities; which tensor they are, the call says
    entries=(Entry("mul.Tensor", amend=lambda found: set()),),
)

RECORDS = (MSE_LOSS, L1_LOSS, SMOOTH_L1_LOSS, HUBER_LOSS, BCE_WITH_LOGITS, BCE, KL_DIV)
