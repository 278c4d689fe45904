"""A wheel, one built by way of a source distribution too, holds every file of the package."""

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_SHIPPED = {".pyc", ".so", ".o", ".md"}


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def package_files(folder: Path, name: str) -> set[str]:
    """Every file under `folder`, by the path that a wheel gives it; links are not followed."""
    return {
        f"{name}/{Path(where, file).relative_to(folder).as_posix()}"
        for where, _, files in os.walk(folder)
        for file in files
        if Path(file).suffix not in NOT_SHIPPED
    }


SOURCES = package_files(ROOT / "dropit_fx", "dropit_fx") | package_files(
    ROOT / "passes", "dropit_fx/passes"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without anything built, so that no stale `build/` or `egg-info` can stand in."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("dropit_fx", "passes"):
        ignore = shutil.ignore_patterns("__pycache__", *(f"*{s}" for s in NOT_SHIPPED))
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(
        sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ".",
        cwd=checkout,
    )  # fmt: skip
    (made,) = out.glob("*.tar.gz")
    return made


@pytest.fixture(scope="module", params=["checkout", "sdist"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is built without a compiler, and one with."""
    out = tmp_path_factory.mktemp("wheel")
    source: Path = request.getfixturevalue(request.param)
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
        "--wheel-dir", out, source,
        cwd=out, **({"CC": "false"} if request.param == "checkout" else {}),
    )  # fmt: skip
    (made,) = out.glob("dropit_fx-*.whl")
    return made


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {n for n in names if ".dist-info/" not in n and Path(n).suffix not in NOT_SHIPPED}
    assert shipped == SOURCES
    assert {"dropit_fx/py.typed", "dropit_fx/passes/__init__.py"} <= shipped


def test_wheel_declares_the_command_and_the_backends(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
    entries = configparser.ConfigParser()
    entries.read_string(archive.read(name).decode())
    assert dict(entries["console_scripts"]) == {"dropit-fx": "dropit_fx.cli:main"}
    assert dict(entries["torch_dynamo_backends"]) == {
        "dropit": "dropit_fx.compile.backend:dropit",
        "dropit_eager": "dropit_fx.compile.backend:dropit_eager",
    }


def test_installed_wheel_imports_its_own_passes(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import dropit_fx, dropit_fx.passes as p; print(dropit_fx.__file__); print(p.__file__)"
    out = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path)).split()
    assert [Path(line) for line in out] == [
        tmp_path / "dropit_fx" / "__init__.py",
        tmp_path / "dropit_fx" / "passes" / "__init__.py",
    ]


def test_sdist_holds_no_links_and_no_second_copy_of_the_passes(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [m.name for m in members if m.issym() or m.islnk()]
    assert not [m.name for m in members if "/dropit_fx/passes" in m.name]


def test_the_link_to_passes_is_relative() -> None:
    assert os.readlink(ROOT / "dropit_fx" / "passes") == os.path.join("..", "passes")


def test_every_package_is_listed() -> None:
    found = {
        str(Path(f).parent).replace("/", ".") for f in SOURCES if f.endswith(".py")
    }  # a folder that is not listed would be left out of the wheel without a word
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_the_tests_run_on_what_is_claimed() -> None:
    project = PYPROJECT["project"]
    here = "Programming Language :: Python :: {}.{}".format(*sys.version_info[:2])
    assert here in project["classifiers"]
    (torch_range,) = (
        r.specifier for r in map(Requirement, project["dependencies"]) if r.name == "torch"
    )
    assert torch_range.contains(version("torch"))


THREE_WAYS = """
import dropit_fx, torch
from torch import nn
from dropit_fx.kernels import cpu

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.ReLU())

x = torch.randn(128, 64)
dense = mlp()
packed = dropit_fx.transform(mlp(), example_args=(x,))
plugged = torch.compile(mlp(), backend="dropit", options={"inner": "aot_eager"})
parts = nn.Sequential(mlp(), nn.Linear(256, 4))
dropit_fx.transform(parts, modules="0", example_args=(x,))
for model in (packed, plugged):
    out = model(x)
    assert torch.equal(out, dense(x))
    out.sum().backward()
parts(x).sum().backward()
share = dropit_fx.measure.saved_bytes(packed, x) / dropit_fx.measure.saved_bytes(dense, x)
print(dropit_fx.__file__)
print("C" if cpu.library() else "PyTorch", f"{share:.2f}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wheel", "kernels"),
    [("checkout", "PyTorch"), ("sdist", "C")],
    ids=["no compiler", "compiler"],
    indirect=["wheel"],
)
def test_three_ways_of_use_in_an_environment_of_its_own(
    wheel: Path, kernels: str, tmp_path: Path
) -> None:
    python = tmp_path / "env/bin/python"
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    # its dependencies, and pip, are read from here: a line of a .pth is only a path, so that
    # nothing that is installed here for editing is found
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (site / "here.pth").write_text(f"{Path(sysconfig.get_paths()['purelib'])}\n")
    run(python, "-m", "pip", "install", "--no-deps", wheel, cwd=tmp_path)
    out = run(python, "-c", THREE_WAYS, cwd=tmp_path).splitlines()
    assert Path(out[0]).is_relative_to(site)
    found, share = out[1].split()
    assert found == kernels
    assert float(share) < 0.5
