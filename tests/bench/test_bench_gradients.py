"""``dropit-fx bench gradients`` on a pretrained encoder and real text: what the presets promise."""

from __future__ import annotations

import json
from pathlib import Path

from dropit_fx.bench.gradients import bench_gradients


def test_the_default_preset_keeps_the_direction_of_a_pretrained_models_gradient(
    tmp_path: Path,
) -> None:
    path = tmp_path / "gradients.json"
    balanced, lossless = bench_gradients(["balanced", "lossless"], json_path=str(path))
    assert json.loads(path.read_text())["rows"] == [balanced, lossless]
    assert balanced["cosine"] >= 0.98
    assert balanced["saved"] < 0.15
    assert lossless["error"] == 0
