"""`make gpu` without a GPU: its tests are collected and rehearsed, its script runs to the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dropit_fx.bench import gpu as bench_gpu
from dropit_fx.bench import gpu_models, gpu_rows, plot
from dropit_fx.bench.gpu import plan
from dropit_fx.bench.gpu_tables import key, label, line_of_tests, model_cells
from dropit_fx.bench.gpu_worker import Worker, run_tests
from dropit_fx.cli import main
from dropit_fx.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import figures  # noqa: E402

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def pytest_on_gpu_tests(*arguments: str, rehearsal: str = "0") -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"DROPIT_GPU_REHEARSAL": rehearsal}
    environment.pop("PYTEST_XDIST_WORKER", None)  # it is none
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@without_gpu
def test_tests_that_need_a_gpu_are_skipped_with_the_reason_where_there_is_none() -> None:
    out = pytest_on_gpu_tests("tests/gpu")
    assert "no GPU: torch.cuda.is_available() is False" in out
    last = out.strip().splitlines()[-1]
    assert " skipped in " in last
    assert int(last.split()[0]) > 900
    assert "passed" not in last


@pytest.mark.slow
def test_tests_that_need_a_gpu_can_be_rehearsed_on_the_cpu() -> None:
    some = (
        "formats and 5000 or codes or random or another or current or linear or reduce or resnet18"
    )
    out = pytest_on_gpu_tests("tests/gpu", "-k", some, rehearsal="1")
    assert " passed" in out.strip().splitlines()[-1]


# The script ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What a rehearsal wrote, and where."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "copy").mkdir()
    rehearse(folder)
    path = folder / "gpu_card.json"
    assert (folder / "copy" / path.name).read_text() == path.read_text()
    return json.loads(path.read_text()), path


def rehearse(folder: Path) -> None:
    chosen = ["--models", "gpt2", "kernels", "--variants", "eager *", "compiled balanced"]
    options = ["--rehearse", "--minutes", "5", "--out", str(folder / "gpu_card.json")]
    assert main(["bench", "gpu", *options, *chosen, "--copy-to", str(folder / "copy")]) == 0


@pytest.mark.slow
def test_a_rehearsal_measures_every_row_that_it_was_asked_for(
    rehearsed: tuple[dict[str, Any], Path],
) -> None:
    result, path = rehearsed
    rows = {label(row): row for row in result["rows"]}
    assert not [row for row in result["rows"] if "failed" in row]
    assert set(gpu_rows.kernels()) < rows.keys()
    eager = {v: rows[f"gpt2, eager, {v}"] for v in gpu_rows.MODES["eager"]}
    assert eager["no logits"]["saved_bytes"] < eager["balanced"]["saved_bytes"]
    assert rows["gpt2, compiled, balanced"]["against"] == "dense, compiled"
    assert result["left_out"] == []
    saved = {name: row["saved_bytes"] for name, row in eager.items()}
    assert saved["max"] < saved["balanced"] < saved["checkpoint"] < saved["dense"]
    assert saved["save_on_cpu"] == saved["dense"]
    assert eager["dense"]["error"] == eager["checkpoint"]["error"] == 0
    assert 0 < eager["balanced"]["error"] < 0.4
    assert eager["balanced"]["loss"] == eager["dense"]["loss"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for what in ("torch", "python", "timm", "transformers", "commit", "sources", "date"):
        assert result[what], what


@pytest.mark.slow
def test_a_second_run_measures_what_the_first_did_not(
    rehearsed: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    result, path = rehearsed
    rehearse(path.parent)
    assert json.loads(path.read_text())["rows"] == result["rows"]


def test_rows_are_measured_again_where_they_failed_or_other_sources_measured_them() -> None:
    jobs = plan(["deit_s"], ["eager *"])
    done = [job | {"sources": "new"} for job in jobs]
    assert bench_gpu._in_order(jobs, done, "new") == []
    done[2]["sources"] = "old"
    done[3]["failed"] = "out of memory"
    assert bench_gpu._in_order(jobs, done[:-1], "new") == [jobs[-1], jobs[3], jobs[2]]


def test_the_most_wanted_comes_first_and_dense_before_what_is_compared_with_it() -> None:
    names = [label(row) for row in plan()]
    languages = sum(model.language for model in gpu_models.MODELS.values())
    variants = sum(map(len, gpu_rows.MODES.values())) - len(gpu_rows.MODES)
    rows = 6 * variants + languages * len(gpu_rows.MODES)
    assert len(set(names)) == len(names) == rows + len(gpu_rows.kernels())
    assert names[:2] == ["deit_s, eager, dense", "deit_s, eager, balanced"]
    for model in gpu_models.MODELS:
        for mode in gpu_rows.MODES:
            own = [n for n in names if n.startswith(f"{model}, {mode}")]
            assert own[0].endswith("dense")
    assert [label(r) for r in plan(["vit_l"], ["compiled max"])] == [
        "vit_l, compiled, dense",
        "vit_l, compiled, max",
    ]
    with pytest.raises(ConfigError, match="nothing to measure matches 'deit_x'"):
        plan(["deit_x"])


def test_no_row_begins_that_would_not_end_in_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    bench_gpu.bench_gpu(str(path), minutes=0.1, models=["kernels"], rehearse=True)
    result = json.loads(path.read_text())
    assert result["rows"] == []
    assert result["left_out"] == list(gpu_rows.kernels())
    assert "no time for" in capsys.readouterr().out


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker("cpu", "eager", rehearse=True)
    yield made
    made.end()


@pytest.mark.slow
def test_a_row_that_fails_hangs_or_dies_leaves_the_next_one_alone(worker: Worker) -> None:
    good = {"kind": "kernel", "name": "relu's mask"}
    failed = worker.measure({"kind": "kernel", "name": "none"}, 120)
    assert failed["failed"] == "KeyError: 'none'"
    assert "gpu_rows.py" in failed["traceback"]
    first = worker.process
    assert worker.measure(good, 120)["bits"] == 1
    assert worker.process is first
    os.kill(first.pid, signal.SIGKILL)
    assert worker.measure(good, 120)["failed"] == "the process died, exit code -9"
    assert worker.measure(good, 0.01)["failed"] == "ended after 0 s"
    assert worker.measure(good, 120)["bits"] == 1


def test_tests_are_counted_and_their_failures_named(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "def test_right(): pass\n\ndef test_wrong():\n    assert 1 == 2\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    result = run_tests(str(tmp_path), rehearse=True, limit=60)
    assert (result["passed"], result["failed"], result["skipped"]) == (1, 1, 0)
    assert "assert 1 == 2" in result["failures"]["test_some::test_wrong"]
    (tmp_path / "test_some.py").write_text(
        "import time\n\ndef test_right(): pass\n\ndef test_slow(): time.sleep(60)\n"
    )
    result = run_tests(str(tmp_path), rehearse=True, limit=15)
    assert result["error"] == "ended after 15 s"
    assert result["passed"] >= 1  # pytest also lists the test that it was in
    assert line_of_tests(result).endswith("(ended after 15 s)")


def test_gradients_are_compared_as_one_vector() -> None:
    parameters = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
    parameters[0].grad = torch.tensor([3.0, 0.0])
    compared = gpu_rows.compare(parameters, [torch.tensor([3.0, 0.0]), torch.tensor([4.0])])
    assert compared == {"cosine": pytest.approx(0.6), "error": pytest.approx(0.8)}


def test_make_gpu_is_one_command_of_the_interpreter_at_hand() -> None:
    command = ["make", "--dry-run", "gpu", "PYTHON=python3.12", "OUT=/tmp/figures"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if not line.startswith("make")]
    words = "python3.12 -m dropit_fx.cli bench gpu --tests tests/gpu --copy-to /tmp/figures"
    assert line.replace("'", "").split() == words.split()


# The README ---------------------------------------------------------------------------------------


@pytest.fixture
def no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of figures of a checkout that has none."""
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / figures.FIGURES).mkdir(parents=True)
    return tmp_path / figures.FIGURES


def test_without_figures_the_readme_says_that_nothing_was_measured(no_figures: Path) -> None:
    assert figures.gpu().startswith("**Nothing has been measured on a GPU.** `make gpu` does it")


@pytest.mark.slow
def test_the_readme_has_a_table_of_what_was_measured(
    no_figures: Path, rehearsed: tuple[dict[str, Any], Path]
) -> None:
    result, _ = rehearsed
    result = result | {"card": "NVIDIA H100", "left_out": ["lora, eager, max"]}
    result["tests"] = {"passed": 3, "failed": 0, "skipped": 1, "seconds": 100.0}
    rows = [dict(row) for row in result["rows"]]
    for row in rows:
        if row["kind"] == "model":
            row["peak_bytes"] = 2 * row["saved_bytes"]
    rows[1] = {k: rows[1][k] for k in ("kind", "model", "mode", "variant", "sources")}
    rows[1]["failed"] = "out of memory: tried to allocate 80 GiB\nmore"
    path = no_figures / "gpu_nvidia_h100.json"
    path.write_text(json.dumps(result | {"rows": rows}))
    plot.gpu_picture(result | {"rows": rows}, path.with_suffix(".svg"))
    assert path.with_suffix(".svg").read_text().count("<!-- checkpoint -->") == 1
    path.with_suffix(".png").touch()
    text = figures.gpu()
    assert "one NVIDIA H100" in text
    assert "tests: 3 passed, 0 failed, 1 skipped in 100 s" in text
    assert f"| GPT-2, 8 x 1024 | {key(rows[1])[2]} | {key(rows[1])[3]} | out of memory: tri" in text
    assert "| relu's mask | 1.00 |" in text
    assert "1 rows had no time" in text
    assert "](gpu_nvidia_h100.png)" in text
    assert "Nothing has been measured" not in text
    assert len(model_cells(rows)) == text.count("| GPT-2, 8 x 1024 |")


# Devices ------------------------------------------------------------------------------------------


@without_gpu
@pytest.mark.parametrize(
    "command",
    [
        ["step", "--model", "dropit_fx.bench.model_spec:small_net"],
        ["pareto", "--model", "dropit_fx.bench.model_spec:small_net"],
        ["kernels"],
        ["gpu"],
    ],
    ids=lambda command: command[0],
)
def test_a_device_that_is_not_there_is_an_error_of_one_sentence(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *command, "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert f"--device cuda: PyTorch {torch.__version__} sees no CUDA device on this mach" in said
    assert main(["bench", *command, "--device", "disk"]) == 2
    assert "--device disk: write cpu, cuda, or cuda:1" in capsys.readouterr().err


def test_the_device_cpu_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    command = ["bench", "step", "--model", "dropit_fx.bench.model_spec:small_net", "--batch", "2"]
    found = []
    for device in ([], ["--device", "cpu"]):
        assert main([*command, "--rounds", "1", "--no-compile", *device, "--json", str(path)]) == 0
        written = json.loads(path.read_text())
        assert written["device"] == "cpu"
        found.append({n: r["saved_bytes"] for n, r in written["variants"].items()})
    assert found[0] == found[1]


def test_what_measures_nothing_is_named_as_it_is_called() -> None:
    names = {path.name for path in bench_gpu.ROOT.rglob("*.py")}
    assert set(bench_gpu.NO_FIGURES) <= names
