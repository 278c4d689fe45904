"""The bench of peaks: rows as they are measured, a run that goes on, and the counts by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropit_fx.bench import peaks
from dropit_fx.bench.model_spec import SpecError
from dropit_fx.cli import main


class Net(nn.Module):
    """Some layers, and their loss."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Linear(32, 32), nn.GELU())]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) ** 2).mean()


def net() -> tuple[nn.Module, tuple[Tensor]]:
    """Called by name."""
    return Net(), (torch.ones(512, 32).cumsum(0) / 512,)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(peaks, "MODELS", {"test_bench_peaks:net": (512, None)})
    monkeypatch.setattr(peaks, "SHARES", (100.0, 80.0, 5.0))


def test_rows_are_written_and_a_second_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "peaks.json"
    arguments = ["bench", "peaks", "--inner", "aot_eager", "--json", str(path)]
    assert main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(r["way"], r["share"]) for r in rows] == [
        (way, share) for way in peaks.WAYS for share in (100.0, 80.0, 5.0)
    ]
    for row in rows:
        if row["way"] == "budget":
            assert row["predicted"] is None
        elif row["share"] == 5.0:
            assert not row["feasible"]
            assert not row["failed"]
            assert "least that can be kept" in row["why"]
        else:
            assert row["real"] - peaks.NUMBERS <= row["requested"] <= row["dense"]
            assert row["real"] == pytest.approx(row["predicted"], rel=0.01)
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert "eager" in printed

    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"rows": rows[:-1]}))
    measured: list[Any] = []
    again = peaks.measure
    monkeypatch.setattr(peaks, "measure", lambda *a: measured.append(a) or again(*a))
    assert main(arguments) == 0
    assert [(name, way, shares) for name, way, shares, _ in measured] == [
        ("test_bench_peaks:net", "budget", [5.0])
    ]
    assert json.loads(path.read_text()) == json.loads(whole)


def test_what_fails_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "MODELS", {"nowhere:net": (2, None)})
    found = peaks.bench_peaks(ways=["eager"])
    assert {(row["feasible"], row["failed"]) for row in found["rows"]} == {(False, True)}
    assert "nowhere" in found["rows"][0]["why"]
    with pytest.raises(SpecError, match="matches none of"):
        peaks.bench_peaks(models=["no*"[:2] + "ne"])


def test_counts_by_hand() -> None:
    def row(share: int, real: int, predicted: int | None, way: str = "eager") -> dict[str, Any]:
        made = {"model": "m", "way": way, "share": share, "feasible": True, "requested": 10 * share}
        return made | {"real": real, "predicted": predicted, "dense": 1000}

    refused = {"model": "m", "way": "eager", "share": 30, "feasible": False, "failed": False}
    rows = [
        row(100, 1000, 1000),
        row(80, 700, 720),  # kept, not close, 2.9 % off
        row(60, 590, 570),  # kept, close, 3.4 % off
        row(40, 595, 595),  # neither kept, nor lower than before
        refused,
        row(50, 900, None, "budget"),
    ]
    assert peaks.lines(rows) == [
        ["eager", "5", "4", "0", "3", "2", "3 of 4", "0 of 1"],
        ["budget", "1", "1", "0", "0", "0", "", "1 of 1"],
    ]
