"""A forecast keeps its word: the batch that it names fits in a real step, and the next does not."""

import pytest
import torch
import torch.nn.functional as F
from planned_steps import measured, state_of
from torch import Tensor, nn

from dropit_fx import PlanError, forecast, plan, transform
from dropit_fx.planner.cards import CARDS
from dropit_fx.planner.fits import resized
from dropit_fx.planner.step import Step


def net() -> nn.Sequential:
    layers = nn.LayerNorm(32), nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32)
    return nn.Sequential(*layers, *(nn.Linear(32, 32), nn.GELU()))


def real_peak(model: nn.Module, batch: int, packed: bool) -> int:
    x = torch.randn(batch, 32)
    module = transform(model, example_args=(x,)) if packed else model
    return measured(Step(model, (x,)), module)


@pytest.mark.parametrize("batch", [3, 64, 4000])
def test_the_largest_batch_fits_in_a_real_step_and_the_next_does_not(batch: int) -> None:
    """Whether the batch that is asked about fits or not."""
    model, memory = net(), 2**20
    found = forecast(model, torch.randn(batch, 32), memory=memory)
    for way, packed in zip(found.ways, (False, True), strict=True):
        assert way.told.peak == pytest.approx(real_peak(model, batch, packed), rel=0.01)
        assert way.fits == (way.told.peak <= memory)
        assert way.largest
        assert real_peak(model, way.largest, packed) <= memory
        assert real_peak(model, way.largest + 1, packed) > memory
    dense, packed_way = found.ways
    assert (dense.largest or 0) < (packed_way.largest or 0)
    assert bool(found) == any(way.fits for way in found.ways)


class WithLoss(nn.Module):
    """Takes keywords, and computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = net(), nn.Linear(32, 10)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(x))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_model_of_keywords_and_labels() -> None:
    inputs = {"x": torch.randn(8, 32), "labels": torch.arange(8)}
    alone = forecast(WithLoss(), inputs, memory="1GiB", search=False)
    found = forecast(WithLoss(), inputs, memory=2 * alone.ways[0].told.peak)
    assert (found.ways[0].largest or 0) > 8
    assert [way.largest for way in alone.ways] == [None, None]


def test_where_nothing_fits_it_says_what_stands_there() -> None:
    found = forecast(net(), torch.randn(64, 32), memory="20 kB")
    assert not found
    assert [way.largest for way in found.ways] == [0, 0]
    said = str(found)
    assert "does not fit; no batch does" in said
    assert "at the peak, in the backward (" in said
    assert max(map(len, said.splitlines())) <= 80


def test_a_batch_on_which_the_model_does_not_run_is_none_that_fits() -> None:
    model = nn.Sequential(nn.Linear(32, 256), nn.Unflatten(0, (-1, 4)), nn.Linear(256, 8))
    (dense, _) = forecast(model, torch.randn(8, 32), memory=10**6).ways
    assert dense.largest
    assert dense.largest % 4 == 0


def test_the_state_of_the_optimizer_takes_room() -> None:
    model, x = net(), torch.randn(64, 32)
    moved = torch.optim.AdamW(model.parameters())
    alone, with_state = (forecast(model, x, memory="1MB", optimizer=o) for o in (None, moved))
    assert with_state.ways[0].told.resident["optimizer state"] > 0
    assert (with_state.ways[0].largest or 0) < (alone.ways[0].largest or 0)


def test_it_takes_a_config_and_a_plan() -> None:
    model, x = net(), torch.randn(512, 32)
    planned = plan(model, x, peak="96%")
    (dense, packed) = forecast(model, x, memory=planned.asked, config=planned, search=False).ways
    assert (dense.way, packed.way) == ("dense", "packed")
    assert packed.told.peak <= planned.predicted
    (_, same) = forecast(
        model, x, memory="1GiB", config={"preset": None, "rules": [{"codec": "keep"}]}, search=False
    ).ways
    assert same.told.peak == dense.told.peak


def test_nothing_is_left_in_the_model() -> None:
    model, x = nn.Sequential(net(), nn.BatchNorm1d(32)), torch.randn(8, 32)
    before, chance = state_of(model), torch.get_rng_state()
    forecast(model, x, memory="1MiB")
    after = state_of(model)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert torch.equal(torch.get_rng_state(), chance)


def test_inputs_with_other_rows_stay_as_they_are() -> None:
    turned = torch.randn(3, 4).t()
    given = (
        torch.randn(4, 3),
        torch.ones(7),
        torch.tensor(1.0),
        turned,
        torch.ones(1, 4).expand(4, 4),
    )
    step = resized(Step(net(), given, {"flag": True}, Tensor.sum), 4, 9)
    assert [tuple(t.shape) for t in step.args] == [(9, 3), (7,), (), (9, 3), (9, 4)]
    sizes = [t.untyped_storage().nbytes() // 4 for t in step.args]
    assert sizes == [27, 7, 1, 27, 4]
    assert step.kwargs == {"flag": True}


@pytest.mark.parametrize("memory", ["", "much", "40%", 0, -3, None])
def test_a_memory_that_means_nothing(memory: object) -> None:
    with pytest.raises(PlanError, match=r'write bytes, or a size such as "24GiB"'):
        forecast(net(), torch.randn(4, 32), memory=memory)  # type: ignore[arg-type]


def test_without_rows_there_is_no_search() -> None:
    class Number(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, scale: Tensor) -> Tensor:
            return torch.tanh(self.weight * scale)

    with pytest.raises(PlanError, match="search=False"):
        forecast(Number(), torch.tensor(2.0), memory="1MB")
    assert forecast(Number(), torch.tensor(2.0), memory="1MB", search=False)


def test_cards_say_what_they_hold() -> None:
    assert all(card.memory and card.memory >= 24e9 for card in CARDS.values())
