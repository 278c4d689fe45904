"""``dropit-fx bench codecs``: each codec by itself, its bits, and what the gradient loses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dropit_fx.bench import codecs
from dropit_fx.bench.trained import Trained
from dropit_fx.cli import main
from dropit_fx.codecs import CODECS

LOSSLESS = {"keep", "drop", "bitmask"}


class First(nn.Module):
    """Reads a part of a storage, as the head of a ViT reads the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(x[:, 0])
        return out


@pytest.fixture(scope="module")
def run() -> Trained:
    torch.manual_seed(0)
    layers = nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 4)
    x = torch.randn(256, 64)
    model = nn.Sequential(nn.Linear(64, 64), *layers, nn.Unflatten(0, (-1, 8)), First())
    return Trained("small", model, {"input": x}, lambda run: run(x).square().mean())


@pytest.fixture(scope="module")
def rows(run: Trained) -> list[dict[str, Any]]:
    return codecs.front(codecs.measure(run))


def test_no_codec_that_loses_something_is_left_out() -> None:
    tried = {system.codec for mine in codecs.SYSTEMS.values() for system in mine}
    assert tried == {codec.name for codec in CODECS} - LOSSLESS


def test_settings_are_told_apart() -> None:
    for mine in codecs.SYSTEMS.values():
        assert len({system.name for system in mine}) == len(mine)


def test_bits_are_those_that_are_kept_and_the_rest_is_exact(rows: list[dict[str, Any]]) -> None:
    of = {(row["reads"], row["name"]): row for row in rows}
    assert of["gelu", "few_bit(bits=3)"]["bits"] == 3
    assert of["gelu", "few_bit(bits=3)"]["tensors"] == 1
    for reads in codecs.READS:
        assert of[reads, "cast(dtype=bfloat16)"]["bits"] == 16
        assert of[reads, "cast(dtype=bfloat16)"]["error"] < 0.004
        assert of[reads, "quant(bits=8)"]["bits"] == pytest.approx(8, abs=0.04)
        assert of[reads, "quant(bits=8)"]["error"] < 0.01
        errors = [of[reads, f"quant(bits={bits})"]["error"] for bits in (3, 4, 6, 8)]
        assert errors == sorted(errors, reverse=True)
    assert of["linear", "mink(gamma=0.9)"]["bits"] == pytest.approx(4.2, abs=0.1)
    assert all(row["error"] > 0 and row["tensors"] for row in rows)


def test_what_is_kept_is_told_in_the_picture_of_its_reads(rows: list[dict[str, Any]]) -> None:
    for reads, mine in codecs.SYSTEMS.items():
        found = {row["name"] for row in rows if row["reads"] == reads}
        assert found == {system.name for system in mine}


def test_on_the_front_is_what_no_smaller_one_beats() -> None:
    given = [("linear", 4, 0.1), ("linear", 2, 0.3), ("linear", 8, 0.2), ("gelu", 8, 0.5)]
    made = [{"reads": r, "bits": b, "error": e} for r, b, e in given]
    assert [(r["reads"], r["bits"]) for r in codecs.front(made) if r["front"]] == [
        ("gelu", 8),
        ("linear", 2),
        ("linear", 4),
    ]


def test_bench_codecs_writes_tables_a_file_and_a_picture(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    run: Trained,
    rows: list[dict[str, Any]],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("dropit_fx.bench.codecs.trained", lambda model, loss: run)
    monkeypatch.setattr("dropit_fx.bench.codecs.measure", lambda run, known: iter(rows))
    data, picture = tmp_path / "codecs.json", tmp_path / "codecs.png"
    main(["bench", "codecs", "--json", str(data), "--plot", str(picture)])
    found = json.loads(data.read_text())
    assert found == {model: {"title": "small", "rows": rows} for model in ("encoder", "deit")}
    assert "few_bit(bits=3)" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_cut_goes_on_behind_its_last_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Trained, rows: list[dict[str, Any]]
) -> None:
    data, measured, stop = tmp_path / "codecs.json", list[str](), [0]
    whole = codecs.measure_system

    def cut(run: Any, rewriter: Any, exact: Any, reads: str, system: Any) -> Any:
        if len(measured) == stop[0]:
            raise KeyboardInterrupt
        measured.append(f"{reads} {system.name}")
        return whole(run, rewriter, exact, reads, system)

    monkeypatch.setattr("dropit_fx.bench.codecs.trained", lambda model, loss: run)
    monkeypatch.setattr("dropit_fx.bench.codecs.measure_system", cut)
    for stop[0] in (3, 5):
        with pytest.raises(KeyboardInterrupt):
            codecs.bench_codecs(models=["encoder"], json_path=str(data))
        assert not data.exists(), "the file has all of it or is as it was"
    stop[0] = 1000
    codecs.bench_codecs(models=["encoder"], json_path=str(data))
    assert len(measured) == len({*measured}) == len(rows), "no row is measured twice"
    assert json.loads(data.read_text())["encoder"]["rows"] == rows
    assert [p.name for p in tmp_path.iterdir()] == ["codecs.json"]

    measured.clear()
    stop[0] = 2
    with pytest.raises(KeyboardInterrupt):
        codecs.bench_codecs(models=["encoder"], json_path=str(data))
    measured.clear()
    monkeypatch.setattr("dropit_fx.bench.codecs.sources", lambda: "others")
    with pytest.raises(KeyboardInterrupt):
        codecs.bench_codecs(models=["encoder"], json_path=str(data))
    assert measured[0] == "linear mink(gamma=0.9)", "other sources begin anew"


def test_a_folder_that_is_missing_is_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder to write"):
        codecs.bench_codecs(json_path=str(tmp_path / "none" / "codecs.json"))
