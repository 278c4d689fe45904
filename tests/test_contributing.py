"""CONTRIBUTING.md, followed to the letter in a copy of the package: its ops and its codec work."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()

OPS = """
import torch
from torch import nn
import dropit_fx

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, y):
        h = self.a(x)
        return nn.functional.soft_margin_loss(torch.sin(torch.mv(h, self.b(y))), y.cos())

model, given = Model(), (torch.randn(64, 64), torch.randn(64))
exact = {"rules": [{"op": "mv", "codec": "mink", "gamma": 0.0}], "preset": None, "force": True}
exact["rules"].append({"op": "soft_margin_loss", "codec": "quant", "bits": None})

def step(run):
    loss = run(*given)
    return [loss, *torch.autograd.grad(loss, model.parameters())]

options = {"config": exact}
for made in (
    dropit_fx.transform(model, exact, example_args=given),
    torch.compile(model, backend="dropit_eager", options=options),
):
    for got, expected in zip(step(made), step(model), strict=True):
        assert torch.equal(got, expected)
packed = dropit_fx.transform(model, example_args=given)
rows = [r for r in dropit_fx.report(packed).rows if "mv" in r.op or "soft_margin_loss" in r.op]
assert rows and all(r.kept_bytes < r.dense_bytes for r in rows if not r.reason), rows
assert dropit_fx.measure.saved_bytes(packed, *given) == dropit_fx.report(packed).kept_bytes
print("ops work")
"""
CODEC = """
import torch
from torch import nn
import dropit_fx

model, x = nn.Sequential(nn.Linear(64, 64), nn.Softsign(), nn.Linear(64, 8)), torch.randn(32, 64)
config = {"preset": None, "rules": [{"op": "linear", "codec": "half", "dtype": "float16"}]}
packed = dropit_fx.transform(model, config, example_args=(x,))
report = dropit_fx.report(packed)
assert "half(dtype=float16)" in str(report)
report.page("half.html")
(line, *_) = [line for line in open("half.html") if "--codec-half" in line]
colours = [part.split()[1] for part in line.split(";") if "--codec-" in part]
assert len(set(colours)) == len(colours) > 8, line  # the guide says nothing of colours
assert report.kept_bytes == dropit_fx.measure.saved_bytes(packed, x) < report.dense_bytes
for inner in ("aot_eager_decomp_partition", "inductor"):
    options = {"config": config, "inner": inner}
    fast = torch.compile(model, backend="dropit", options=options)
    for run in (packed, fast):
        got = torch.autograd.grad(run(x).square().sum(), model.parameters())
        exact = torch.autograd.grad(model(x).square().sum(), model.parameters())
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3)
    (partition,) = dropit_fx.backend.compiled_graphs()[-1].partitions
    assert partition.packed_bytes == 32 * 64 * 2, partition
try:
    dropit_fx.transform(model, {"rules": [{"codec": "half", "dtype": "int8"}]}, example_args=(x,))
except dropit_fx.ConfigError as error:
    assert "'bfloat16' or 'float16'" in str(error)
else:
    raise AssertionError("int8 is no legal option")
print("codec works")
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package in a folder of its own, with its compiled kernels."""
    shutil.copytree(ROOT / "dropit_fx", tmp_path / "dropit_fx")  # the link to passes/ is followed
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    return tmp_path


def blocks(title: str) -> list[tuple[str, str]]:
    """File and code of each block of a section."""
    section = re.search(rf"^## {title}\n(.*?)^## ", TEXT, re.DOTALL | re.MULTILINE)
    assert section
    found = re.findall(r"^   ```python\n(.*?)^   ```", section[1], re.DOTALL | re.MULTILINE)
    parts = [textwrap.dedent(code).partition("\n") for code in found]
    return [(first.removeprefix("# "), rest) for first, _, rest in parts]


def run(code: str, folder: Path) -> str:
    """What it prints; what it compiles is no other run's."""
    own = {"PYTHONPATH": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def add(folder: Path, name: str, code: str) -> None:
    """Puts code into the file of a family, in front of the rows or records that get its names."""
    file = folder / name
    before, found, after = re.split(r"^((?:ROWS|RECORDS) = \()", file.read_text(), flags=re.M)
    made = re.findall(r"^([A-Z_]+) = (?:OpRule|RowTests)", code, re.MULTILINE)
    names = "".join(f"{n}, " for n in made)
    file.write_text(f"{before}{code}\n\n{found}{names}{after}")


def add_ops(folder: Path, room: str) -> None:
    """Those of the guide: their rows in room ``dropit_fx``, their records in room ``tests``."""
    added = [block for block in blocks("Add an op") if block[0].startswith(f"{room}/ops/")]
    assert len(added) == 2
    for name, code in added:
        add(folder, name, code)


def run_tests_of_ops(folder: Path, selected: str) -> subprocess.CompletedProcess[str]:
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/ops", "-k", selected],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_ops_that_are_added_as_the_guide_says_work(copy: Path) -> None:
    add_ops(copy, "dropit_fx")
    assert run(OPS, copy) == "ops work\n"


@pytest.mark.slow
def test_ops_that_are_added_without_their_records_fail_one_test_that_says_so(copy: Path) -> None:
    add_ops(copy, "dropit_fx")
    done = run_tests_of_ops(copy, "mv or soft_margin_loss or test_every_row")
    for row, family in (("mv", "matmul"), ("soft_margin_loss", "losses")):
        sentence = f"The row '{row}' has no record: add a RowTests to RECORDS in "
        assert f"{sentence}tests/ops/{family}.py." in done.stdout
    assert "1 failed" in done.stdout
    assert "error" not in done.stdout.splitlines()[-1]
    add_ops(copy, "tests")
    done = run_tests_of_ops(copy, "mv or soft_margin_loss or test_every_row")
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50


@pytest.mark.slow
def test_a_codec_that_is_added_as_the_guide_says_works(copy: Path) -> None:
    ((name, code),) = blocks("Add a codec")
    (copy / name).write_text(code)
    listed = copy / "dropit_fx/codecs/__init__.py"
    text = f"from dropit_fx.codecs.half import HALF\n{listed.read_text()}"
    listed.write_text(text.replace("*(KEEP, DROP)", "*(KEEP, DROP, HALF)"))
    assert run(CODEC, copy) == "codec works\n"


def test_the_keys_of_compile_caches_change_with_the_code_of_a_codec(copy: Path) -> None:
    ((name, code),) = blocks("Add a codec")
    version = "from dropit_fx.runtime.packed_call import CACHE_VERSION; print(CACHE_VERSION)"
    seen = []
    for text in (code, code, code.replace("parts[0].to(dtype)", "2 * parts[0].to(dtype)")):
        (copy / name).write_text(text)
        seen.append(run(version, copy))
    assert seen[0] == seen[1] != seen[2]
