"""Memory against time: the variants, the verdict, the picture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dropit_fx.bench import pareto as bench_pareto
from dropit_fx.bench.pareto import beaten, checkpoint_blocks, choose, draw, verdict
from dropit_fx.config import ConfigError, presets

FACTORY = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

class Blocks(nn.Module):
    again = False

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
            for _ in range(2)
        )

    def set_grad_checkpointing(self):
        self.again = True

    def forward(self, x):
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.again else block(x))
        return x

def blocks():
    return Blocks(), (torch.randn(2, 64),)
"""


def row(saved: int, peak: int, ratio: float, ours: bool, lossless: bool = False) -> dict[str, Any]:
    return {
        "saved_bytes": saved * 2**20,
        "peak_bytes": peak * 2**20,
        "ratio": ratio,
        "ours": ours,
        "lossless": lossless or not ours,
    }


ROWS = {
    "dense": row(100, 120, 1.0, ours=False),
    "budget=0.1": row(10, 40, 1.3, ours=False),
    "balanced": row(9, 45, 1.2, ours=True),  # less of both than the budget, but for its peak
    "mesa": row(25, 60, 1.4, ours=True),  # the budget takes less of all
    "gact": row(10, 40, 1.3, ours=True),  # the same point: no less
    "slow": row(99, 130, 1.1, ours=True),  # dense allocates less, in less time; it saves more
    "lossless": row(100, 120, 1.05, ours=True, lossless=True),
}


def test_a_rival_beats_ours_with_less_memory_and_less_time() -> None:
    assert beaten(ROWS) == [
        {"memory": "saved", "rival": "budget=0.1", "ours": "mesa"},
        {"memory": "peak", "rival": "budget=0.1", "ours": "mesa"},
        {"memory": "peak", "rival": "dense", "ours": "slow"},
    ]
    assert beaten({k: v for k, v in ROWS.items() if k != "dense" and k[:3] != "bud"}) == []
    assert beaten({k: v for k, v in ROWS.items() if k in ("dense", "budget=0.1")}) == []


def test_the_verdict_says_each_pair_with_its_figures() -> None:
    rows = {k: v for k, v in ROWS.items() if k != "mesa"}
    assert verdict({"variants": rows, "beaten": beaten(rows)}) == [
        "saved: no lossless rival takes less, in less time, than one of ours",
        "peak: dense (120.0 MiB, 1.00x) beats slow (130.0 MiB, 1.10x)",
    ]


def test_variants_are_chosen_by_globs_and_dense_is_always_there() -> None:
    assert [v.name for v in choose(["balanced*"])] == [
        "dense",
        "balanced",
        "balanced+checkpoint",
        *(f"balanced+budget={b}" for b in (0.5, 0.3, 0.1)),
    ]
    every = choose([])
    assert {v.preset for v in every} - {None} == set(presets())
    assert len({v.name for v in every}) == len(every)
    with pytest.raises(ConfigError, match="no variant matches 'balancd'"):
        choose(["dense", "balancd"])


def test_blocks_are_checkpointed_where_the_model_can_and_the_reason_said_where_not() -> None:
    class Refuses(nn.Linear):
        def gradient_checkpointing_enable(self) -> None:
            raise ValueError("not this one")

    assert checkpoint_blocks(nn.Linear(2, 2)).startswith("Linear has neither set_grad_check")
    assert checkpoint_blocks(Refuses(2, 2)) == "gradient_checkpointing_enable: not this one"


def test_the_picture_has_two_panels_and_every_point(tmp_path: Path) -> None:
    path = tmp_path / "pareto.svg"
    draw({"model": "m", "batch": 2, "inner": "aot_eager", "variants": ROWS}, path)
    picture = path.read_text()
    for name in ROWS:
        assert picture.count(f"<!-- {name} -->") == 2, name
    assert picture.count("saved for the backward") == picture.count("peak of forward") == 1


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The spec of a model whose blocks can be checkpointed."""
    (tmp_path / "pareto_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "pareto_factory:blocks"


def test_bench_pareto_compiles_every_variant_and_writes_what_it_returns(
    blocks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = tmp_path / "pareto.json", tmp_path / "pareto.png"
    with torch.compiler.config.patch(force_disable_caches=True):
        result = bench_pareto.bench_pareto(
            blocks,
            batch=512,
            only=["*checkpoint", "budget=0.1", "balanced", "*balanced*0.1"],
            inner="aot_eager_decomp_partition",
            rounds=1,
            json_path=str(path),
            plot_path=str(picture),
        )
    rows = result["variants"]
    assert json.loads(path.read_text()) == result
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert result["skipped"] == {}
    assert rows["dense"]["ratio"] == rows["dense"]["saved_ratio"] == 1
    saved = {name: r["saved_bytes"] for name, r in rows.items()}
    assert saved["checkpoint"] < saved["dense"]
    assert saved["balanced+checkpoint"] < saved["balanced"]
    assert saved["budget=0.1"] < 0.2 * saved["dense"]
    assert saved["balanced"] < 0.3 * saved["dense"]
    assert saved["balanced+budget=0.1"] <= saved["balanced"]
    assert {n for n, r in rows.items() if r["ours"]} == {n for n in rows if "balanced" in n}
    assert {n for n, r in rows.items() if r["lossless"]} == {"dense", "checkpoint", "budget=0.1"}
    out = capsys.readouterr().out
    for line in verdict(result):
        assert line in out


def test_what_cannot_be_checkpointed_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from torch import nn\n\ndef plain():\n    return nn.Sequential(nn.Linear(64, 64))\n"
    (tmp_path / "pareto_plain.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = bench_pareto.bench_pareto(
        "pareto_plain:plain", 8, only=["checkpoint"], inner="aot_eager", rounds=1
    )
    assert list(result["variants"]) == ["dense"]
    assert list(result["skipped"]) == ["checkpoint"]
    assert "checkpoint is left out: Sequential has neither" in capsys.readouterr().out
