"""Seconds of moves: measured once for each machine, or told of a card's limits."""

import json
from pathlib import Path

import pytest
import torch
from models import CASE
from torch import nn

from dropit_fx.codecs import CODEC
from dropit_fx.planner import speeds
from dropit_fx.planner.cards import CARDS, find_card
from dropit_fx.planner.costs import seconds_of
from dropit_fx.planner.moves import WHOLE, base_config, groups_of
from dropit_fx.planner.speeds import CardSpeeds, Line, MeasuredSpeeds, cache_file, shown_seconds
from dropit_fx.planner.step import Step
from dropit_fx.planner.timeline import forecast
from dropit_fx.rewriting import Rewriter

CPU = torch.device("cpu")
QUANT = CODEC["quant"].defaults() | {"bits": 4}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a process that has measured nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(speeds, "_LINES", {})
    monkeypatch.setattr(speeds, "LARGE", 2**14)
    return tmp_path / "dropit_fx" / "seconds.json"


def test_what_was_measured_is_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = MeasuredSpeeds(CPU)
    found = first.pack("quant", QUANT, 1000, torch.float32)
    first.remember()
    assert cache_file() == cache
    assert found > 0

    def refused(*_: object) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(speeds, "_LINES", {})  # a new process
    monkeypatch.setattr(speeds, "fastest", refused)
    assert MeasuredSpeeds(CPU).pack("quant", QUANT, 1000, torch.float32) == found
    with pytest.raises(AssertionError, match="measured again"):
        MeasuredSpeeds(CPU).pack("quant", QUANT | {"bits": 3}, 1000, torch.float32)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"x": 3}', '{"x": {"y": [1]}}', "\x00"])
def test_a_broken_cache_is_no_error(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    one = MeasuredSpeeds(CPU)
    assert one.moves(1000) > 0
    one.remember()
    assert any("copy" in lines for lines in json.loads(cache.read_text()).values())


def test_where_nothing_can_be_written_there_is_no_cache(cache: Path) -> None:
    cache.parent.parent.joinpath("dropit_fx").write_text("a file in the place of the folder")
    one = MeasuredSpeeds(CPU)
    assert one.moves(1000) > 0
    one.remember()
    assert not cache.exists()


def test_a_card_reads_and_writes_at_its_bandwidth() -> None:
    card = CardSpeeds(find_card("1,2"))
    kept = CODEC["quant"].nbytes(10**6, torch.float32, QUANT)
    seconds = card.pack("quant", QUANT, 10**6, torch.float32)
    assert seconds == pytest.approx((4 * 10**6 + kept) / 2e12)
    assert card.unpack("quant", QUANT, 10**6, torch.float32) == seconds
    assert card.computes(10**9, torch.float32) == pytest.approx(1e-3)


def test_a_step_takes_its_products_or_its_memory() -> None:
    model = nn.Linear(64, 128, bias=False)
    told = forecast(Step(model, (torch.randn(32, 64),), loss=torch.sum), model)
    product = 2 * 32 * 64 * 128
    assert sum(flops for _, flops, _ in told.work) == 2 * product  # no gradient of the input
    bound = CardSpeeds(find_card("1e-6,1000"))  # arithmetic alone counts
    assert told.seconds(bound) == pytest.approx(2 * product / 1e6, rel=0.01)
    memory = CardSpeeds(find_card("1000000,1"))
    assert told.seconds(memory) >= 4 * (32 * 64 + 64 * 128 + 32 * 128) / 1e12


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_patch16_224"])
def test_only_what_is_packed_takes_time(name: str) -> None:
    model = CASE[name].model()
    args, kwargs = CASE[name].inputs(2)
    base = Rewriter(model, args, kwargs).rewritten(base_config())
    groups = groups_of(base, forecast(Step(model, args, kwargs), base.module))
    found = seconds_of(base, groups, CardSpeeds(CARDS["h100"]))
    for group, seconds in zip(groups, found, strict=True):
        for level, took in zip(group.levels, seconds, strict=True):
            assert (took == 0) == (level == WHOLE) or not group.made
    assert sum(max(of) for of in found) > 0


def test_seconds_have_three_digits() -> None:
    texts = [shown_seconds(s) for s in (0, 1.23456e-6, 0.0123456, 12.3456)]
    assert texts == ["0 us", "1.23 us", "12.3 ms", "12.3 s"]
    assert Line(1.0, 0.5).at(4) == 3
