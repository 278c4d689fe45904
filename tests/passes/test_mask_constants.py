"""A mask's constant takes all levels of a block: what it may stand among is kept exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropit_fx import report, transform

Masking = Callable[[Tensor, Tensor], Tensor]
LEAST = torch.finfo(torch.float32).min


def _put(x: Tensor, mask: Tensor) -> Tensor:
    own = x.clone()
    own[mask] = -1e9
    return own


MASKINGS: dict[str, Masking] = {
    "masked_fill": lambda x, mask: x.masked_fill(mask, -1e9),
    "in place": lambda x, mask: (x * 1).masked_fill_(mask, LEAST),
    "where": lambda x, mask: torch.where(mask, -1e4, x),
    "where of tensors": lambda x, mask: torch.where(mask, torch.full_like(x, -1e30), x),
    "a sum": lambda x, mask: x + mask.to(x.dtype) * -10000,
    "a difference": lambda x, mask: x - 1e9 * mask.float()[..., :],
    "a logarithm": lambda x, mask: x + (1 - mask.float()).log().clamp(min=LEAST),
    "an assignment": _put,
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "picked": lambda x, t: -F.log_softmax(x, -1).gather(-1, t[:, None]).mean(),
    "cross_entropy": lambda x, t: F.cross_entropy(x, t),
}


def _entropy(x: Tensor, t: Tensor) -> Tensor:
    log_p = F.log_softmax(x, -1)
    return (log_p.exp() * log_p).sum(-1).mean()


class Policy(nn.Module):
    """Scores of actions, some of which are not allowed."""

    def __init__(self, masking: Masking, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.scores = nn.Linear(32, 64), nn.Linear(64, 200)
        self.masking, self.loss = masking, loss

    def forward(self, x: Tensor, mask: Tensor, t: Tensor) -> Tensor:
        return self.loss(self.masking(self.scores(F.gelu(self.hidden(x))), mask), t)


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    x, mask = torch.randn(64, 32), torch.rand(64, 200) < 0.3
    t = torch.randint(200, (64,))
    return x, mask.scatter(1, t[:, None], False), t


def _error(model: nn.Module, packed: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    found = []
    for run in (model, packed):
        model.zero_grad()
        run(*inputs).backward()
        found.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    return float((found[1] - found[0]).norm() / found[0].norm())


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("loss", [*LOSSES, "entropy"])
def test_masked_scores_have_the_gradient_of_dense(masking: str, loss: str) -> None:
    torch.manual_seed(0)
    model, inputs = Policy(MASKINGS[masking], LOSSES.get(loss, _entropy)), _inputs()
    packed = transform(model, example_args=inputs)
    assert _error(model, packed, inputs) < 0.08  # 0.2 to 24 with the mask in few bits
    assert "few bits tell no others apart" in str(report(packed))


def test_the_plug_in_sees_them_too() -> None:
    model, inputs = Policy(MASKINGS["a sum"], _entropy), _inputs()
    assert _error(model, torch.compile(model, backend="dropit_eager"), inputs) < 0.08


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = (self.q(x) @ self.k(x).mT).masked_fill(mask, -1e9)
        return torch.softmax(scores, -1) @ x


@pytest.mark.parametrize(
    "masking",
    [
        lambda x, mask: x * 1e5,
        lambda x, mask: x.masked_fill(mask, -100.0),
        lambda x, mask: x.masked_fill(mask, -1e9).clamp(min=-50),
        lambda x, mask: x.masked_fill(mask, -torch.inf),
        lambda x, mask: x + torch.exp(mask.float() * -1e9),
    ],
)
def test_what_holds_no_large_constant_is_packed(masking: Masking) -> None:
    packed = transform(Policy(masking, LOSSES["picked"]), example_args=_inputs())
    assert "tell no others apart" not in str(report(packed))
    weights = transform(
        Attention(), example_args=(torch.randn(4, 16, 32), torch.rand(16, 16) < 0.3)
    )
    assert "tell no others apart" not in str(report(weights))


def test_a_rule_of_the_users_own_is_followed() -> None:
    own = {"rules": [{"op": "log_softmax", "codec": "quant"}]}
    model = Policy(MASKINGS["masked_fill"], LOSSES["picked"])
    assert "tell no others apart" not in str(
        report(transform(model, config=own, example_args=_inputs()))
    )
