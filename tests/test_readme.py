"""Documents cannot go stale: their code runs, their output and tables are what the code gives."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
import yaml

import dropit_fx
from dropit_fx.compile import backend
from dropit_fx.private_lookup import RUN

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT / "examples"))
import figures  # noqa: E402

TEXTS = {name: (ROOT / name).read_text() for name in figures.DOCUMENTS}
HINT = "run: python examples/figures.py --write"


def with_blocks(language: str) -> list[str]:
    """The documents whose blocks of this language run, or are read."""
    runs = (n for n, t in TEXTS.items() if n != "CONTRIBUTING.md" and language in languages(t))
    return list(runs)


def languages(text: str) -> set[str]:
    return {block[0] for block in figures.blocks(text)}


def test_every_document_is_checked_and_can_be_found_from_the_readme() -> None:
    written = {p.relative_to(ROOT).as_posix() for p in tracked("*.md")} - {"CHANGELOG.md"}
    assert written == set(figures.DOCUMENTS)
    reached, todo = set(), ["README.md"]
    while todo:
        name = todo.pop()
        reached.add(name)
        folder = (ROOT / name).parent
        for link in re.findall(r"\]\((?!http)([^)#]+\.md)", TEXTS[name]):
            target = (folder / link).resolve().relative_to(ROOT).as_posix()
            todo += [target] if target in TEXTS and target not in reached else []
    assert reached == set(figures.DOCUMENTS)


def tracked(pattern: str) -> list[Path]:
    """Files of the project, not of what was installed or built in it."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in found.stdout.splitlines()]


def test_the_readme_takes_two_minutes() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 180


@pytest.mark.slow
@pytest.mark.parametrize("name", with_blocks("python"))
def test_python_blocks_run_and_print_what_is_shown(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for language, code, shown in figures.blocks(TEXTS[name]):
        if language == "python":
            output = figures.run_python(code, names)
            assert output == (shown[1] if shown else ""), HINT


@pytest.mark.parametrize("name", with_blocks("console"))
def test_console_blocks_print_what_is_shown(name: str) -> None:
    for language, code, shown in figures.blocks(TEXTS[name]):
        if language == "console" and shown:
            assert figures.run_console(code) == shown[1], HINT


@pytest.mark.parametrize("name", figures.SECTIONS)
def test_generated_sections_are_up_to_date(name: str) -> None:
    pattern = rf"<!-- {name} -->\n(.*?)\n<!-- end -->"
    found = [m[1] for text in TEXTS.values() for m in re.finditer(pattern, text, re.DOTALL)]
    assert len(found) == 1, f"{len(found)} documents have a section {name!r}"
    assert found[0] == figures.SECTIONS[name](), HINT


@pytest.mark.parametrize("name", figures.DOCUMENTS)
def test_make_targets_exist(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`|\$ )make ([a-z]+)\b(?!=)", TEXTS[name], re.MULTILINE):
        assert f"\n{target}:" in makefile, f"{name} says make {target}"


@pytest.mark.parametrize("name", figures.DOCUMENTS)
def test_files_that_documents_name_exist(name: str) -> None:
    text = TEXTS[name]
    for path in re.findall(r"`((?:dropit_fx|passes|tests|examples)/[\w./*]*)`", text):
        assert list(ROOT.glob(path)), f"{name} names {path}"
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for path, title in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", prose):
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name} links to {path}"
        assert not title or title in titles(target.read_text()), f"{name} links to #{title}"


def titles(text: str) -> list[str]:
    """The titles of a document as links name them."""
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in found]


def test_every_line_of_the_comparison_has_its_test() -> None:
    part = re.search(
        r"<!-- compared -->\n(.*?)<!-- end -->", TEXTS["examples/compared.md"], re.DOTALL
    )
    assert part
    lines = part[1].strip().splitlines()[2:]
    for line in lines:
        named = re.match(r"\| [^|]+ \| `(test_\w+\.py)::(test_\w+)` \|", line)
        assert named, line
        file = next((ROOT / "tests").rglob(named[1]))
        assert f"\ndef {named[2]}(" in file.read_text(), line
    assert len(lines) >= 10


def test_every_environment_default_is_named() -> None:
    for option in backend.OPTIONS:
        assert f"`DROPIT_{option.upper()}`" in TEXTS["dropit_fx/presets/README.md"]


def test_yaml_blocks_are_configs() -> None:
    model, x = vit()
    found = [
        code
        for name in with_blocks("yaml")
        for language, code, _ in figures.blocks(TEXTS[name])
        if language == "yaml"
    ]
    assert found
    for code in found:
        config = yaml.safe_load(code)
        assert dropit_fx.report(dropit_fx.transform(model, config, example_args=(x,))).rows


CONFIGS = sorted((ROOT / "examples/configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_example_configs_fit_their_models(path: Path) -> None:
    model, x = FAMILIES.get(path.stem, vit)()
    report = dropit_fx.report(dropit_fx.transform(model, path, example_args=(x,)))
    assert report.kept_bytes < report.dense_bytes


def resnet() -> tuple[torch.nn.Module, torch.Tensor]:
    return timm.create_model("resnet18"), torch.randn(2, 3, 64, 64)


def bert() -> tuple[torch.nn.Module, torch.Tensor]:
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
    )
    return transformers.BertModel(config), torch.arange(128).view(2, 64)


def gpt2() -> tuple[torch.nn.Module, torch.Tensor]:
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=2, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config), torch.arange(128).view(2, 64)


def vit() -> tuple[torch.nn.Module, torch.Tensor]:
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3)
    return model, torch.randn(2, 3, 64, 64)


FAMILIES: dict[str, Callable[[], tuple[torch.nn.Module, torch.Tensor]]] = {
    "resnet": resnet,
    "bert": bert,
    "gpt2": gpt2,
}


def test_the_versions_that_were_run_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [c.rpartition(" ")[2] for c in project["classifiers"] if "Python :: 3." in c]
    assert project["requires-python"] == f">={pythons[0]}"
    oldest = RUN[0].rpartition(".")[0]
    assert f"torch>={oldest}" in project["dependencies"]
    install = re.search(r"^## Install\n(.*?)^## ", TEXTS["README.md"], re.DOTALL | re.MULTILINE)
    assert install
    for version in (*RUN, *(f"Python {python}" for python in pythons)):
        assert version in install[1], f"the install section does not say {version}"
