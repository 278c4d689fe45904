"""Models as people write them, packed: three of the zoo. ``make zoo`` has all."""

from __future__ import annotations

import pytest
import survey
import torch
import zoo
import zoo_models
from survey import Result
from torch import Tensor, nn
from wrong_rows import turn_gradients

# convolutions that recompute their weights, lookups and sums at edges, a derivative in the forward
MODELS = ("computed_weights", "message_passing", "physics_informed")


@pytest.mark.parametrize("name", MODELS)
def test_models_written_by_hand_pass(name: str) -> None:
    (result,) = zoo.check(f"hand/{name}", thorough=False)
    assert result.outcome == "passed", result
    assert result.notes["kept"]
    assert 0 < result.notes["share"] <= 1


def test_every_family_and_every_model_written_by_hand_is_asked_about() -> None:
    items = zoo.items()
    assert len(items) == len(set(items)) > 200
    assert {item.split("/")[0] for item in items} == set(zoo.BUILD)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(8, 8)


class Counting(nn.Module):
    """Does something else in each call, which no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("made", "outcome"), [(Broken, "stock"), (Counting, "refused"), (nn.GELU, "failed")]
)
def test_what_came_of_a_model_has_its_word(
    made: type[nn.Module], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn_gradients(monkeypatch, "gelu")

    def builder() -> zoo_models.Made:
        layers = nn.Linear(8, 256), made(), nn.Linear(256, 8)
        return nn.Sequential(*layers), (torch.randn(16, 8),)

    monkeypatch.setitem(zoo_models.BUILDERS, "odd", builder)
    (result,) = zoo.check("hand/odd", thorough=False)
    assert result.outcome == outcome, result


def test_the_summary_says_what_is_kept_most(capsys: pytest.CaptureFixture[str]) -> None:
    notes = {"dense": 100, "share": 0.3, "kept": {"norm: in 'a' a/b.py:3": 20, "gelu: quant": 10}}
    results = [Result("hand/a transform", "a", "passed", "", notes)]
    survey.tell(results, {"hand": results}, "models of")
    lines = zoo.shares(results)
    assert "30% of dense in the middle of 1" in lines[0]
    assert lines[1] == "67% of what is kept: norm: in * *"
