"""The examples train: each script in a tiny setting, and what it writes.

The preset `lossless` is the oracle of the comparison: with the same weights, batches and dropout
its training is the dense one to the last bit.
"""

import json
import re
import shlex
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dropit_fx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import bert  # noqa: E402
import bytes as whole_models  # noqa: E402
import demo  # noqa: E402
import digits  # noqa: E402
import figures  # noqa: E402
import freeze  # noqa: E402
import gpt2  # noqa: E402
import llama_lora  # noqa: E402
import picture  # noqa: E402
import training  # noqa: E402
import video  # noqa: E402

VARIANTS = ["dense", "lossless", "balanced"]
TINY = {
    "digits": ("--limit 128 --epochs 10 --models resnet --no-compile", digits.main),
    "bert": ("--limit 32 --epochs 6", bert.main),
}


@pytest.fixture(scope="module")
def shallow() -> Iterator[None]:
    """Of the pretrained encoder's six layers, which are alike, two."""

    def cut() -> Any:
        model = build()
        del model.encoder.encoder.layer[2:]
        return model

    build, task = bert.build, bert.BERT.tasks["bert"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bert, "build", cut)
        patch.setitem(bert.BERT.tasks, "bert", replace(task, build=cut))
        yield


@pytest.fixture(scope="module", params=TINY)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shallow: None
) -> Path:
    """The JSON that a script wrote."""
    options, main = TINY[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tiny = f"--presets lossless balanced --seeds 1 --rounds 1 {options} --out {folder}"
    assert main(tiny.split()) == 0
    return folder / f"{request.param}.json"


def test_what_is_written(written: Path) -> None:
    results = json.loads(written.read_text())
    assert results["settings"]["seeds"] == 1
    assert {"presets", "batch", "epochs", "threads", "versions"} <= set(results["settings"])
    for name, ways in results["models"].items():
        assert list(ways) == ["eager"]
        assert list(ways["eager"]) == VARIANTS
        for got in ways["eager"].values():
            assert set(got) == {"runs", "saved_bytes", "peak_memory", "time"}
            epochs = [len(run["accuracy"]) for run in got["runs"]]
            assert epochs == [results["settings"]["epochs"][name]]
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_loss_falls_and_less_is_saved(written: Path) -> None:
    for ways in json.loads(written.read_text())["models"].values():
        for got in ways["eager"].values():
            (run,) = got["runs"]
            assert sum(run["loss"][-2:]) < 0.95 * sum(run["loss"][:2])
        saved = [ways["eager"][variant]["saved_bytes"] for variant in VARIANTS]
        assert saved[0] >= saved[1] > 4 * saved[2]


def test_variants_start_from_the_same_weights_batches_and_dropout(written: Path) -> None:
    for ways in json.loads(written.read_text())["models"].values():
        assert ways["eager"]["lossless"]["runs"] == ways["eager"]["dense"]["runs"]


def test_gpt2_goes_on_where_it_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--steps 2 --layers 1 --width 32 --heads 2 --batch 2 --length 64"
    variants = ["--variants", "dense", "lossless", "pack_checkpoints"]
    options = [*sizes.split(), *variants, "--seeds", "2", "--out", str(tmp_path)]
    assert gpt2.main(options) == 0
    path = tmp_path / "gpt2.json"
    runs = json.loads(path.read_text())["runs"]
    assert [(run["seed"], run["variant"]) for run in runs] == [
        (seed, variant) for seed in range(2) for variant in variants[1:]
    ]
    for dense, lossless, checkpoints in (runs[:3], runs[3:]):
        losses = {name: dense[name] for name in ("first", "last", "held_out")}
        assert losses.items() <= lossless.items()
        assert checkpoints["first"] == dense["first"]  # of the first step, before anything is read
        assert checkpoints["held_out"] != dense["held_out"]
        assert checkpoints["held_out"] == pytest.approx(dense["held_out"], rel=1e-3)
        assert checkpoints["saved"] < dense["saved"] / 4
    assert runs[0]["held_out"] != runs[3]["held_out"]

    results = json.loads(path.read_text())
    del results["runs"][2]
    results["runs"][0]["held_out"] = 2 * runs[1]["held_out"]  # is not measured again
    path.write_text(json.dumps(results))
    capsys.readouterr()
    assert gpt2.main(options) == 0
    again = json.loads(path.read_text())["runs"]
    assert [run["seconds"] for run in again[:-1]] == [r["seconds"] for r in results["runs"]]
    assert {**again[-1], "seconds": 0} == {**runs[2], "seconds": 0}
    assert "lossless" in capsys.readouterr().out

    with pytest.raises(SystemExit, match=r"has runs with .*: another --out"):
        gpt2.main([*options, "--lr", "1e-3"])
    assert json.loads(path.read_text())["runs"] == again


def test_adapters_of_a_llama_lose_as_dense_does_and_save_an_eighth(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = "--steps 2 --base-steps 2 --layers 1 --width 64 --heads 2 --batch 2 --length 64"
    assert llama_lora.main([*sizes.split(), "--presets", "lossless", "adapters", "--sft"]) == 0
    shown = capsys.readouterr().out
    dense = re.search(r"dense +([\d.]+) +([\d.]+)", shown)
    assert dense is not None, shown
    assert re.search(rf"lossless +{dense[1]} +{dense[2]} ", shown), shown
    share = re.search(r"adapters .*\((\d+)%\)", shown)
    assert share is not None, shown
    assert int(share[1]) <= 14


def test_sft_without_trl_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    import llama_lora

    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r"trl is not installed.*or leave --sft out"):
        llama_lora.main(["--sft"])


def test_demo_shows_a_step_a_page_and_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = "--model dropit_fx.bench.model_spec:small_net --batch 4 --size 16 --rounds 1"
    training = "--epochs 2 --limit 128"
    assert demo.main([*step.split(), *training.split(), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "small_net, batch 4" in shown
    assert re.search(r"balanced\s+\d+ ms.* MiB .* MiB", shown)
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert list(json.loads((tmp_path / "digits.json").read_text())["models"]) == ["vit"]


def test_table_of_the_readme(written: Path) -> None:
    results = json.loads(written.read_text())
    made = figures.training_table(results)
    for name in results["models"]:
        for variant in VARIANTS:
            assert f"| {name}, eager, {variant} |" in made


def test_adapters_are_published_once_they_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / figures.FIGURES).mkdir(parents=True)
    assert figures.measured() == ""
    runs = [{"seed": s, "accuracy": [0.5], "loss": [1.0]} for s in range(2)]
    dense = {"runs": runs, "saved_bytes": 1000, "peak_memory": 2000, "time": 1.0}
    packed = dense | {"saved_bytes": 90, "gradient_error": {"lora_A": 0.01, "lora_B": 0.02}}
    settings = {"batch": {"bert_lora": 32}, "seeds": 2, "threads": 1}
    models = {"bert_lora": {"eager": {"dense": dense, "adapters": packed}}}
    path = tmp_path / figures.FIGURES / f"{bert.LORA.name}.json"
    path.write_text(json.dumps({"settings": settings, "models": models}))
    made = figures.measured()
    assert figures.LORA in made
    assert "| bert_lora, eager, adapters | 50.0 ± 0.0 % |" in made
    assert "Gradients of lora_B, adapters: 2.0% from dense's." in made


def test_errors_of_gradients_are_told_of_each_part() -> None:
    """A run whose gradients of one part are a quarter too large; dropout is that of dense."""
    layers = {
        "a": torch.nn.Linear(8, 16),
        "drop": torch.nn.Dropout(0.5),
        "b": torch.nn.Linear(16, 3),
    }

    def build() -> torch.nn.Module:
        return torch.nn.Sequential(OrderedDict(layers))

    def run(x: torch.Tensor) -> torch.Tensor:
        hidden = layers["a"](x)
        out: torch.Tensor = layers["b"](layers["drop"](hidden + (hidden - hidden.detach()) / 4))
        return out

    data = training.Data(torch.randn(24, 8), torch.arange(24) % 3, *torch.empty(2, 0))
    task = training.Task(
        build=build, data=lambda: data, batch=8, lr=0.0, epochs=0, parts=("a.", "b.")
    )
    model = build()
    found = training.gradient_errors(training.Made(model, model, run), data, task)
    assert found == {"a.": pytest.approx(0.25, rel=1e-5), "b.": 0}
    exact = training.make(task, "lossless", False, 0)
    assert training.gradient_errors(exact, data, task) == {"a.": 0, "b.": 0}


def test_times_only_replaces_nothing_but_times(tmp_path: Path) -> None:
    path = tmp_path / "digits.json"
    options = ["--models", "resnet", "--no-compile", "--rounds", "1", "--out", str(tmp_path)]
    assert digits.main(["--seeds", "1", "--epochs", "1", "--limit", "64", *options]) == 0
    before = json.loads(path.read_text())
    for got in before["models"]["resnet"]["eager"].values():
        got["time"] = -1.0
    path.write_text(json.dumps(before))
    assert digits.main(["--times-only", *options]) == 0
    after = json.loads(path.read_text())
    for got in after["models"]["resnet"]["eager"].values():
        assert got["time"] > 0
        got["time"] = -1.0
    assert after == before


def test_bytes_of_whole_models_are_counted_and_join_those_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiny() -> torch.nn.Module:
        config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=99)
        config.update({"attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0})
        return whole_models.Tokens(transformers.GPT2LMHeadModel(config))

    model = whole_models.Model("Tiny", tiny, lambda: (torch.randint(0, 99, (4, 32)),))
    models = {"one": model, "two": model}
    monkeypatch.setattr(whole_models, "MODELS", models)
    for name in models:
        options = f"--models {name} --no-compiled --out {tmp_path}"
        assert whole_models.main(options.split()) == 0
    found = json.loads((tmp_path / "bytes.json").read_text())["models"]
    assert list(found) == ["one", "two"]
    assert found["one"] == found["two"]
    dense, packed = found["one"]["eager"]["dense"], found["one"]["eager"]["packed"]
    x = torch.randint(0, 99, (4, 32))
    assert dense["saved_bytes"] == dropit_fx.measure.saved_bytes(tiny(), x)
    assert packed["saved_bytes"] < 0.2 * dense["saved_bytes"]
    assert packed["peak_bytes"] < dense["peak_bytes"]


def test_text_is_balanced_the_same_each_time_and_names_no_class() -> None:
    data = bert.load()
    for labels, count in ((data.train_y, bert.TRAIN), (data.test_y, bert.TEST)):
        assert labels.bincount().tolist() == [count] * len(bert.PARTS)
    bert.load.cache_clear()
    assert torch.equal(bert.load().train_x, data.train_x)
    train, test = ({tuple(row.tolist()) for row in x} for x in (data.train_x, data.test_x))
    assert not train & test
    for part in ("integrate", "spatial"):
        prose = " ".join(t for texts in bert.docstrings(part) for t in texts).lower()
        assert len(prose) > 10_000
        assert not [name for name in (*bert.PARTS, "scipy") if name in prose]


def test_curves_have_few_points_and_keep_the_mean() -> None:
    losses = [float(i) for i in range(80)]
    assert training.curve(losses) == [i * 2 + 0.5 for i in range(40)]
    assert training.curve(losses[:7]) == losses[:7]


def test_verdict_names_what_is_less_accurate_than_dense() -> None:
    reached = {"dense": [0.9, 0.92], "balanced": [0.89, 0.905], "max": [0.95, 0.83]}
    eager = {v: {"runs": [{"accuracy": [0.1, a]} for a in last]} for v, last in reached.items()}
    assert training.verdict({"models": {"vit": {"eager": eager}}}).endswith(": vit max.")
    eager["max"] = eager["balanced"]
    assert training.verdict({"models": {"vit": {"eager": eager}}}).endswith(": none.")


def test_too_few_examples_are_an_error() -> None:
    with pytest.raises(SystemExit, match="5 examples are not one batch of 64"):
        digits.main(["--limit", "5", "--models", "resnet", "--no-compile"])


def test_demo_picture(tmp_path: Path) -> None:
    """As training.py calls it: with and without compiled runs, of one and two seeds."""
    run = {"accuracy": [0.3, 0.8, 0.9], "loss": [2.0, 1.0, 0.5, 0.4]}
    got = {"runs": [run, run], "saved_bytes": 9, "peak_memory": 9, "time": 1.2}
    way = {"dense": got, "balanced": got, "max": {**got, "runs": [run]}}
    models = {"vit": {"eager": way, "compiled": way}, "resnet": {"eager": way}}
    picture.demo_picture({"models": models}, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 5_000


def test_a_frozen_share_of_an_encoder_saves_less(
    shallow: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--limit 32 --epochs 1 --measures 1 --memory-batch 32 --rates 0 0.9"
    given = [*shlex.split(sizes), "--out"]
    freeze.main([*given, str(tmp_path)])
    path = tmp_path / "freeze.json"
    written = path.read_text()
    dense, whole, frozen = json.loads(written)["runs"]
    assert dense["frozen"] == whole["frozen"] == 0
    assert frozen["frozen"] >= 0.88
    assert frozen["saved"] < 0.6 * whole["saved"] < 0.6 * dense["saved"]
    assert frozen["peak"] < whole["peak"] < dense["peak"]
    of_state = [run["total"] - run["peak"] for run in (dense, whole, frozen)]
    assert of_state[0] == of_state[1] > of_state[2]  # moments of what has trained
    assert "slimfit" in capsys.readouterr().out

    freeze.main([*given, str(tmp_path)])  # nothing is left to do
    assert path.read_text() == written
    found = json.loads(written)
    path.write_text(json.dumps(found | {"runs": [dense, whole]}))
    freeze.main([*given, str(tmp_path)])  # and here the last
    again = json.loads(path.read_text())["runs"]
    assert [run["rate"] for run in again] == [0, 0, 0.9]
    assert again[2]["accuracy"] == frozen["accuracy"]
    with pytest.raises(SystemExit, match=r"has runs with .*: another --out"):
        freeze.main([*given, str(tmp_path), "--epochs", "7"])
    assert json.loads(path.read_text())["runs"] == again


def test_the_table_of_freezing_tells_the_smallest_step_that_is_as_good() -> None:
    def run(seed: int, rate: float, accuracy: float, total: int) -> dict[str, Any]:
        made = {"seed": seed, "rate": rate, "variant": "slimfit" if rate else "dense"}
        made |= {"accuracy": accuracy, "frozen": rate}
        return made | (
            {"saved": total // 4, "peak": total // 2, "total": total} if not seed else {}
        )

    ways = {
        0.0: (0.5, 0.7, 1200),
        0.5: (0.6, 0.58, 600),
        0.8: (0.52, 0.5, 400),
        0.95: (0.1, 0.2, 200),
    }
    runs = [run(seed, rate, way[seed], way[2]) for seed in (0, 1) for rate, way in ways.items()]
    results = {"settings": {"memory_batch": 128}, "runs": runs}
    # dense's mean is 60 %, its deviation 14 %: 51 % is as good, 15 % is not
    assert freeze.as_good(results) == (0.8, 3.0)
    table = figures.freeze_table(results)
    assert "rate 0.8, 3.0 times smaller" in table
    assert "a batch of 128" in table
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + len(ways)
    assert "No rate is smaller" in figures.freeze_table(results | {"runs": [runs[0], runs[3]]})
    assert figures.freeze_table(results | {"runs": runs[:1]}), "a study that has just begun"


def test_a_video_transformer_saves_in_proportion_to_its_frames() -> None:
    options = video.arguments().parse_args(["--epochs", "1"])
    train, test = video.clips(torch.arange(64), 1), video.clips(torch.arange(64, 80), 2)
    whole, half, some = (video.one_run(share, train, test, options) for share in (1.0, 0.5, 0.25))
    for share, row in ((0.5, half), (0.25, some)):
        assert row["saved"] < (share + 0.05) * whole["saved"]
        assert row["peak"] < (share + 0.1) * whole["peak"]
    assert video.clips(torch.arange(2), 1)[0].shape == (2, video.FRAMES, video.SIDE, video.SIDE)
