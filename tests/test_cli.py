"""The command line, in-process: what it prints, writes and refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch

import dropit_fx
from dropit_fx.bench.model_spec import build
from dropit_fx.cli import main

FACTORIES = """
import torch
from torch import nn

def mlp():
    layers = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
    return nn.Sequential(*layers)

def tokens():
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    return model, (torch.arange(10).expand(2, 10),)

def blocks():
    torch.manual_seed(0)
    layers = []
    for _ in range(4):
        layers += nn.LayerNorm(64), nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)
    return nn.Sequential(*layers), (torch.randn(256, 64),)

def number():
    return 3

def wanting(width, depth=2):
    return nn.Linear(width, width)

def leaving():
    raise SystemExit("usage: none")

def raising():
    raise RuntimeError("no weights here" + chr(10) + "nor there")

def keywords():
    class Scaled(nn.Linear):
        def forward(self, x, *, scale):
            return super().forward(x * scale)
    return Scaled(64, 64), {"x": torch.randn(2, 64), "scale": torch.ones(2, 1)}

def wide():
    return nn.Linear(4096, 8), (torch.ones(1, 4096),)

class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def untraceable():
    return nn.Sequential(nn.Linear(4, 4), Branches()), (torch.ones(2, 4),)
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of factories in the working directory, imported anew."""
    (tmp_path / "cli_factories.py").write_text(FACTORIES)
    (tmp_path / "cli_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_factories", raising=False)
    return "cli_factories"


def test_report_of_a_factory(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["report", "--model", f"{factories}:mlp", "--batch", "64", "--preset", "dropit"]) == 0
    )
    summary = capsys.readouterr().out.splitlines()
    assert summary[0].split()[:3] == ["read", "by", "tensors"]
    assert max(map(len, summary)) <= 80
    every = ["--preset", "dropit", "--no-summary"]
    assert main(["report", "--model", f"{factories}:mlp", "--batch", "64", *every]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["saved", "tensor"]
    assert any("bitmask(bits=1)+mink(gamma=0.9)" in line for line in lines)
    assert lines[-1].startswith("total")


def test_a_plan_is_a_file_that_keeps_the_peak(
    factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"{factories}:blocks"
    asked = ["plan", "--model", spec, "--batch", "256", "--peak", "70%"]
    assert main([*asked, "-o", "plan.yaml"]) == 0
    assert "asked for" in capsys.readouterr().err
    model, args = build(spec, 256, None)
    packed = dropit_fx.transform(model, "plan.yaml", example_args=args)
    report = dropit_fx.report(packed)
    assert report.kept_bytes < report.dense_bytes
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "plan.yaml").read_text()
    assert printed.startswith("# ")


@pytest.mark.parametrize(("peak", "said"), [("1%", "least"), ("many", "many"), ("-4GiB", "-4GiB")])
def test_a_peak_that_is_none_or_cannot_be_kept_is_one_message(
    factories: str, capsys: pytest.CaptureFixture[str], peak: str, said: str
) -> None:
    assert main(["plan", "--model", f"{factories}:blocks", f"--peak={peak}"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("dropit-fx: error: ")
    assert said in told


def test_a_forecast_names_the_batch_that_fits(
    factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fits.json"
    asked = ["forecast", "--model", f"{factories}:blocks", "--batch", "256", "--json", str(out)]
    assert main([*asked, "--device", "3MiB", "--optimizer", "adamw", "--preset", "max"]) == 0
    told = capsys.readouterr().out
    data = json.loads(out.read_text())
    dense, packed = data["ways"]
    assert (dense["way"], packed["way"]) == ("dense", "max")
    assert dense["largest_batch"] < packed["largest_batch"]
    assert f"a batch of {packed['largest_batch']} is the most" in told
    assert data["memory"] == 3 * 2**20
    assert main([*asked, "--device", "100kB"]) == 1
    assert main([*asked, "--device", "a100", "--dtype", "bfloat16"]) == 0
    data = json.loads(out.read_text())
    assert (data["memory"], data["dtype"]) == (80 * 10**9, "bfloat16")
    assert data["ways"][0]["peak"] < dense["peak"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--device", "h10"], "write h100, a100, 4090, a size such as 24GiB"),
        (["--device", "40%"], "write h100"),
        (["--device", "cuda:77"], "or the cuda that is here"),
        (["--device", "1GiB", "--optimizer", "adamv"], "torch.optim has no adamv."),
        (["--device", "1GiB", "--optimizer", "muon"], "--optimizer Muon: ValueError"),
        (["--device", "1GiB", "--optimizer", "adafactor"], "Adafactor cannot be told"),
        (["--device", "1GiB", "--config", "no.yaml"], "no config file 'no.yaml'"),
    ],
)
def test_a_forecast_of_nothing_is_one_message(
    factories: str, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert main(["forecast", "--model", f"{factories}:blocks", *given]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_report_of_timm_with_size(capsys: pytest.CaptureFixture[str]) -> None:
    spec = "timm:deit_tiny_patch16_224"
    assert main(["report", "--model", spec, "--batch", "2", "--size", "64", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    qkv = next(r for r in data["rows"] if r["module"] == "blocks.0.attn.qkv")
    assert qkv["shape"] == [2 * (4 * 4 + 1), 192]
    assert 0 < data["kept_bytes"] < data["dense_bytes"]
    assert sum(r["kept_bytes"] for r in data["rows"]) == data["kept_bytes"]


def test_report_of_torchvision_writes_json_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "r.json", tmp_path / "r.png"
    arguments = ["--model", "torchvision:resnet18", "--batch", "2", "--size", "64", "--summary"]
    assert main(["report", *arguments, "--json", str(out), "--plot", str(picture)]) == 0
    data = json.loads(out.read_text())
    assert (data["model"], data["batch"], data["size"]) == ("torchvision:resnet18", 2, 64)
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "relu+conv2d" in text
    assert f"{data['ratio']:.1%} of dense" in text


def test_integer_inputs_keep_their_range(
    factories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--model", f"{factories}:tokens", "--batch", "32", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert any(r["shape"] == [32 * 10, 64] for r in rows)


def test_what_to_pack(factories: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = ["report", "--model", f"{factories}:mlp", "--batch", "64", "--json"]

    def codecs(*extra: str) -> set[str]:
        assert main([*report, *extra]) == 0
        return {r["codec"] for r in json.loads(capsys.readouterr().out)["rows"]}

    config = tmp_path / "c.yaml"
    config.write_text("preset: null\nrules:\n  - {op: linear, codec: keep}\n")
    assert codecs("--config", str(config)) == {"keep"}
    assert any("mink(gamma=0.5)" in c for c in codecs("--gamma", "0.5", "--strategy", "mink"))
    assert any("mink(gamma=0.75, bits=4)" in c for c in codecs("--gamma", "0.75"))
    assert any("mink(gamma=0.5, bits=6)" in c for c in codecs("--bits", "6"))
    assert any("random(gamma=0.9)" in c for c in codecs("--strategy", "random"))
    assert not any("mink" in c for c in codecs("--preset", "lossless"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "timm:resnet8"], "timm has no model 'resnet8'. Did you mean 'resnet"),
        (["--model", "torchvision:resnt18"], "torchvision has no model 'resnt18'. Did you mean"),
        (["--model", "resnet18"], "'resnet18' is no model: write timm:NAME, torchvision:NAME"),
        (
            ["--model", "tim:resnet18"],
            "no module 'tim' to import 'resnet18' from. Did you mean 'timm",
        ),
        (["--model", "cli_factories:mpl"], "has no function 'mpl'. Did you mean 'mlp"),
        (["--model", "cli_factories:number"], "cli_factories:number returned int; a module was"),
        (["--model", "cli_factories:untraceable"], "no tracer takes"),
        (["--model", "cli_factories:raising"], "raised RuntimeError: no weights here\n"),
        (["--model", "cli_factories:leaving"], "raised SystemExit: usage: none\n"),
        (["--model", "cli_factories:wanting"], "without arguments, and requires width\n"),
        (["--model", "cli_broken:net"], "importing cli_broken raised ZeroDivisionError: "),
        (["--model", "cli_factories:mlp", "--batch", str(10**20)], "no inputs of a batch of 10000"),
        (["--model", "cli_factories:mlp", "--batch", str(10**18)], "no inputs of a batch of 10000"),
        (["--model", "hf:gptt"], "no kind of model 'gptt', and it is no folder with a config.json"),
        (["--model", "hf:wav2vec2"], "is made by none of AutoModelForSeq2SeqLM"),
        (["--model", "cli_factories:wide", "--plot", "x.png"], "--plot: nothing to draw"),
        (["--model", "cli_factories:mlp", "--gamma", "2"], "gamma = 2.0 for codec 'mink'"),
        (["--model", "cli_factories:mlp", "--preset", "dropt"], "Did you mean 'dropit'?"),
        (["--model", "cli_factories:mlp", "--config", "none.yaml"], "none.yaml"),
        (["--model", "cli_factories:mlp", "--json", "no/such/folder.json"], "no/such/folder.json"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(
    factories: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert "dropit-fx: error: " in error  # torch may log lines of its own before
    assert message in error
    assert "Traceback" not in error


def test_a_missing_extra_is_named(
    factories: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [n for n in sys.modules if n.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["report", "--model", f"{factories}:mlp", "--plot", "x.png"]) == 2
    assert "pip install 'dropit-fx[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["check"], ["plan", "--peak", "50%"]])
def test_what_does_not_fit_into_memory_is_one_message(
    factories: str, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert main([*command, "--model", f"{factories}:mlp", "--batch", str(10**14)]) == 2
    error = capsys.readouterr().err
    assert f"no inputs of a batch of {10**14}: " in error
    assert "Traceback" not in error


def test_running_out_of_memory_is_one_message(
    factories: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: object, **__: object) -> None:
        torch.empty(10**14)

    monkeypatch.setattr(dropit_fx, "check", check)
    assert main(["check", "--model", f"{factories}:mlp"]) == 2
    assert "out of memory, try a smaller --batch: " in capsys.readouterr().err


def test_a_report_takes_no_memory_for_its_inputs(
    factories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = 10**10  # of 64 floats: 2.3 TiB
    assert main(["report", "--model", f"{factories}:mlp", "--batch", str(rows), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dense_bytes"] > rows * 64 * 4


def test_keyword_inputs(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ["--model", f"{factories}:keywords", "--batch", "8"]
    assert main(["report", *spec, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert any(r["op"] == "linear" and r["shape"] == [8, 64] for r in rows)
    assert main(["check", *spec]) == 0
    assert main(["bench", "step", *spec]) == 2
    assert "takes keyword inputs" in capsys.readouterr().err


def test_a_config_of_hugging_face_is_a_model_with_its_loss(
    factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=99).save_pretrained("tiny")
    given = ["--model", "hf:tiny", "--batch", "4", "--size", "24", "--json"]
    assert main(["report", *given]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert any(r["op"] == "cross_entropy" and r["shape"] == [4 * 24, 99] for r in rows)


@pytest.mark.parametrize("arguments", [[], ["reprt"], ["report"], ["report", "--model"]])
def test_arguments_that_do_not_parse(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["report", "--help"], ["demo", "--help"], ["bench", "pareto", "--help"]],
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert f"dropit-fx {' '.join(arguments[:-1])}".rstrip() in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text == f"dropit-fx {dropit_fx.__version__}, PyTorch {torch.__version__}\n"


def test_the_suffix_of_a_picture_is_read_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", "--model", "none:none", "--plot", "x.doc"])
    assert stop.value.code == 2
    assert "'x.doc' is none of .png, .svg, .pdf" in capsys.readouterr().err


def test_bench_pareto(factories: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, picture = tmp_path / "p.json", tmp_path / "p.png"
    bench = ["bench", "pareto", "--model", f"{factories}:mlp", "--batch", "256"]
    small = ["--inner", "aot_eager", "--rounds", "1", "--variants", "checkpoint", "dropit"]
    assert main([*bench, *small, "--json", str(out), "--plot", str(picture)]) == 0
    data = json.loads(out.read_text())
    assert list(data["variants"]) == ["dense", "dropit"]
    assert data["variants"]["dropit"]["saved_ratio"] < 1
    assert (data["batch"], data["inner"], data["rounds"]) == (256, "aot_eager", 1)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "checkpoint is left out: Sequential has neither" in capsys.readouterr().out

    for wrong, message in (
        (["--variants", "balancd"], "no variant matches 'balancd'. Did you mean 'balanced'"),
        (["--plot", "no/such/folder.png"], "no folder to write no/such/folder.png into"),
    ):
        assert main([*bench, *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_compiled(factories: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    arguments = ["--model", f"{factories}:mlp", "--batch", "64", "--json", str(out), "--compiled"]
    assert main(["report", *arguments]) == 0
    compiled = json.loads(out.read_text())["compiled"]
    assert compiled["packed"]["saved_bytes"] < compiled["dense"]["saved_bytes"]
    assert any(v["packed"] for v in compiled["packed"]["saved"])
    assert not any(v["packed"] for v in compiled["dense"]["saved"])
    assert compiled["packed"]["packs_in_backward"] == []
    assert compiled["packed"]["unpacks_in_forward"] == []
    assert "saved by the compiled forward" in capsys.readouterr().out
