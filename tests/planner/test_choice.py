"""The knapsack: the optimum of small instances, under the peak at every time, in seconds."""

import itertools
import random
import time
from dataclasses import replace

import pytest

from dropit_fx.planner.choice import Choice, Item, Span, choose
from dropit_fx.planner.errors import PlanError
from dropit_fx.planner.size import peak_bytes, shown

MIB = 2**20


def instance(count: int, seed: int, levels: int = 5) -> tuple[list[list[Item]], list[int]]:
    """Groups as a step has them: each is there from its forward to its backward."""
    rng = random.Random(seed)
    times = 4 * count
    groups = []
    for g in range(count):
        size, error = rng.randint(1, 64) * MIB, 10 ** rng.uniform(-6, 0)
        items = [Item(0.0, (Span(2 * g, times - 2 * g, size),))]
        for bits in range(8, 8 - levels + 1, -1):
            packed = size * bits // 32
            span = Span(2 * g, times - 2 * g - rng.randint(0, 1), packed)
            items.append(Item(error * 4.0**-bits, (span,)))
        groups.append(items)
    return groups, [rng.randint(1, 200) * MIB for _ in range(times)]


def peak_of(groups: list[list[Item]], used: list[int], levels: tuple[int, ...]) -> int:
    use = list(used)
    for group, level in zip(groups, levels, strict=True):
        for start, end, nbytes in group[level].spans:
            for at in range(start, end):
                use[at] += nbytes
    return max(use)


def between(groups: list[list[Item]], used: list[int], share: float) -> int:
    """A peak between the least and the most that can be."""
    least, most = (peak_of(groups, used, (i,) * len(groups)) for i in (len(groups[0]) - 1, 0))
    return int(least + share * (most - least))


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_optimum(seed: int) -> None:
    groups, used = instance(5, seed, levels=4)
    peak = between(groups, used, 0.1 + 0.15 * seed)
    best = min(
        sum(g[i].cost for g, i in zip(groups, levels, strict=True))
        for levels in itertools.product(*[range(len(g)) for g in groups])
        if peak_of(groups, used, levels) <= peak
    )
    found = choose(groups, used, peak)
    assert found is not None
    assert peak_of(groups, used, found.levels) == found.peak <= peak
    assert found.cost == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
def test_a_thousand_groups_take_seconds(share: float) -> None:
    groups, used = instance(1000, 7, levels=6)
    peak = between(groups, used, share)
    start = time.process_time()
    found = choose(groups, used, peak)
    took = time.process_time() - start
    assert found is not None
    assert peak_of(groups, used, found.levels) == found.peak <= peak
    assert found.gap < 0.01
    assert took < 5


def test_the_same_question_has_the_same_answer() -> None:
    groups, used = instance(200, 3)
    peak = between(groups, used, 0.3)
    assert choose(groups, used, peak) == choose(groups, used, peak)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_optimum_within_a_limit(seed: int) -> None:
    """Also where the smallest of all are beyond it, and None where all that fit are."""
    groups, used = instance(5, seed, levels=4)
    rng = random.Random(seed)
    groups = [
        [replace(item, beside=rng.random() * (i > 0)) for i, item in enumerate(group)]
        for group in groups
    ]
    peak = between(groups, used, 0.2 + 0.1 * seed)
    fitting = [
        levels
        for levels in itertools.product(*[range(len(g)) for g in groups])
        if peak_of(groups, used, levels) <= peak
    ]

    def sums(levels: tuple[int, ...]) -> tuple[float, float]:
        chosen = [g[i] for g, i in zip(groups, levels, strict=True)]
        return sum(i.cost for i in chosen), sum(i.beside for i in chosen)

    least = min(sums(levels)[1] for levels in fitting)
    for most in (1.05 * least, 1.5 * least, 3 * least):
        found = choose(groups, used, peak, most)
        assert found is not None
        cost, beside = sums(found.levels)
        assert beside <= most * (1 + 1e-9)
        assert peak_of(groups, used, found.levels) <= peak
        best = min(c for c, b in map(sums, fitting) if b <= most)
        assert cost == pytest.approx(best, rel=2e-3)
    assert choose(groups, used, peak, 0.9 * least) is None


def test_what_cannot_be_kept_is_told() -> None:
    groups, used = instance(20, 1)
    assert choose(groups, used, between(groups, used, 0.0) - 1) is None
    assert choose([], [5, 9], 8) is None
    assert choose([], [5, 9], 9) == Choice((), 0.0, 0.0, 9)


def test_an_error_that_is_no_number_is_refused() -> None:
    groups = [[Item(float("nan"), (Span(0, 1, 1),)), Item(0.0, (Span(0, 1, 3),))]]
    with pytest.raises(PlanError, match="not finite"):
        choose(groups, [0], 4)


@pytest.mark.parametrize(
    ("peak", "nbytes"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("6GiB", 6 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("2k", 2048),
        ("800MB", 800_000_000),
        ("40%", 400),
        (" 12.5 % ", 125),
        (2.5e3, 2500),
    ],
)
def test_a_peak_as_people_write_it(peak: str | int, nbytes: int) -> None:
    assert peak_bytes(peak, 1000) == nbytes


@pytest.mark.parametrize("peak", ["", "a lot", "6 GiBs", "-3MB", "0", 0, -1, "0%", None, True])
def test_a_peak_that_means_nothing(peak: object) -> None:
    with pytest.raises(PlanError, match='"6GiB"'):
        peak_bytes(peak, 1000)  # type: ignore[arg-type]


def test_bytes_are_shown_to_three_digits() -> None:
    assert [shown(n) for n in (0, 999, 2048, 15 * 2**20 // 10, 3 * 2**40)] == [
        "0 B",
        "999 B",
        "2.00 KiB",
        "1.50 MiB",
        "3072 GiB",
    ]
