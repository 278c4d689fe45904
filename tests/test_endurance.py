"""A hundred steps of what `make endurance` runs: nothing grows, and every bit is the same."""

from __future__ import annotations

from pathlib import Path

import endurance
import pytest


@pytest.mark.parametrize("way", ["eager", "aot_eager"])
def test_losses_are_the_same_to_the_bit_also_across_a_resume(way: str, tmp_path: Path) -> None:
    file = tmp_path / "half.pt"
    whole = endurance.train(way, range(60), every=10)
    first = endurance.train(way, range(30), file)
    rest = endurance.train(way, range(30, 60), file)
    assert first.losses + rest.losses == whole.losses
    assert len(set(whole.losses)) == 60
    assert whole.losses[-1] < whole.losses[0]
    assert whole.objects[-1] == whole.objects[2]


def test_batches_of_many_lengths_compile_no_more_graphs_than_without_us() -> None:
    assert endurance.graphs_for_all_lengths(packed=True) <= endurance.graphs_for_all_lengths(False)
