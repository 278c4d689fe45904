"""What the benches measure: the figures that the format is there for, on a real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dropit_fx.bench.formats import Coded, Sample, collect, measure_format
from dropit_fx.bench.trained import trained
from dropit_fx.cli import main
from dropit_fx.codecs.cast import FLOAT8
from dropit_fx.kernels import Format


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    pytest.importorskip("transformers")
    return collect(trained(sequences=10))


def test_the_format_needs_a_fifth_of_the_published_bits(samples: list[Sample]) -> None:
    published = measure_format(samples, None)
    assert published["bits"] == pytest.approx(6.4, abs=1e-3)
    assert 0.45 < published["error"] < 0.6
    assert published["projection"] < 0.72
    for form, bits, error, projection in (
        (Format(1320, 1024, 2), 1.3, published["error"], 0.70),
        (Format(3086, 1024, 2), 1.65, 0.34, 0.80),
        (Format(6611, 1024, 3), 3.05, 0.14, 0.93),
    ):
        row = measure_format(samples, form)
        assert row["bits"] <= bits
        assert row["error"] <= error
        assert row["projection"] >= projection


def test_the_more_rows_the_less_error_where_rows_are_drawn(samples: list[Sample]) -> None:
    drawn = Coded("rows", {"gamma": 0.7, "bits": 4})
    larger = collect(trained(sequences=32))
    torch.manual_seed(0)
    few, many = (
        [measure_format(batch, form) for form in (drawn, Format(1320, 1024, 2))]
        for batch in (samples, larger)
    )
    assert many[0]["error"] < 0.75 * few[0]["error"]
    assert many[1]["error"] > 0.9 * few[1]["error"]
    assert many[0]["bits"] < many[1]["bits"]
    assert many[0]["error"] < 0.9 * many[1]["error"]
    assert abs(many[0]["projection"] - 1) < 0.1  # unbiased: nothing shrinks the gradient
    assert many[1]["projection"] < 0.8


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("spacing", "block"), [("symmetric", 1024), ("uniform", 256)])
def test_rotated_by_hadamard_every_few_bits_have_less_error(
    samples: list[Sample], rounding: str, spacing: str, block: int
) -> None:
    torch.manual_seed(0)
    options = {"range": spacing, "block": block, "rounding": rounding}
    for bits in (2, 3, 4):
        plain, rotated = (
            measure_format(samples, Coded("quant", options | {"bits": bits, "hadamard": hadamard}))
            for hadamard in (False, True)
        )
        assert rotated["bits"] == plain["bits"]
        assert rotated["error"] < 0.97 * plain["error"]


def test_eight_bits_of_quant_lose_less_than_a_cast_to_eight_bits(samples: list[Sample]) -> None:
    quant = measure_format(samples, Coded("quant", {"bits": 8}))
    e4m3, e5m2 = (measure_format(samples, Coded("cast", {"dtype": d})) for d in FLOAT8)
    assert quant["bits"] < e4m3["bits"] == e5m2["bits"] == pytest.approx(8.0625, abs=1e-3)
    assert 1.5 * quant["error"] < e4m3["error"] < 0.6 * e5m2["error"] < 0.02


def test_factors_in_six_bits_have_less_error_than_dropped_elements_in_more_room(
    samples: list[Sample],
) -> None:
    factors = measure_format(samples, Coded("low_rank", {"rank": 0.125, "bits": 6}))
    dropped = measure_format(samples, Format(3086, 1024, 2))
    assert factors["bits"] < 0.9 * dropped["bits"]
    assert factors["error"] < 0.8 * dropped["error"]


def test_a_lossless_format_has_no_error(samples: list[Sample]) -> None:
    row = measure_format(samples[:3], Format(10000, 1024))
    assert row == {"bits": 32, "error": 0, "projection": 1}


def test_bench_kernels_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernels.json"
    threads = torch.get_num_threads()
    main(["bench", "kernels", "--shape", "3", "1000", "--rounds", "1", "--json", str(path)])
    assert torch.get_num_threads() == threads
    written = json.loads(path.read_text())["dtypes"]
    assert written["float32"]["published"]["bits"] == pytest.approx(6.4)
    assert written["bfloat16"]["gamma 0.9"]["bits"] == pytest.approx(2.6, abs=0.05)
    assert written["float32"]["steps, 3 bits"]["bits"] == 3
    assert written["float32"]["steps, 3 bits"]["unpack"]["of_clone"] > 0
    assert all(row["seconds"] > 0 for row in (w["clone"] for w in written.values()))
    products = json.loads(path.read_text())["products"]["bfloat16"]
    assert products.keys() == {"dense", "norm", "uniform", "wta_crs"}
    assert products["dense"]["of_dense"] == 1
    said = capsys.readouterr().out
    assert "gamma 0.7, 2 bits" in said
    assert "keep 30 %, wta_crs" in said


def test_bench_formats_writes_a_table_a_file_and_a_picture(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    samples: list[Sample],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("dropit_fx.bench.formats.collect", lambda run: samples[:2])
    data, picture = tmp_path / "formats.json", tmp_path / "formats.png"
    main(["bench", "formats", "--json", str(data), "--plot", str(picture)])
    rows = json.loads(data.read_text())["rows"]
    assert [row["bits"] for row in rows] == sorted(row["bits"] for row in rows)
    assert rows[0]["best"]
    assert "published" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_loss_or_model_is_refused() -> None:
    with pytest.raises(ValueError, match="loss='mse': must be one of mlm, contrastive"):
        trained(loss="mse")
    with pytest.raises(ValueError, match="model='vit': must be one of encoder, deit"):
        trained("vit")
