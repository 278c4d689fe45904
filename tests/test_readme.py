"""The README cannot go stale: its code runs, its output and its tables are what the code gives."""

import re
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
from dropit_fx import backend
from dropit_fx.private_names import RUN

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

sys.path.insert(0, str(ROOT / "examples"))
import figures  # noqa: E402

HINT = "run: python examples/figures.py --write"


@pytest.mark.slow
def test_python_blocks_run_and_print_what_is_shown() -> None:
    names: dict[str, Any] = {}
    found = 0
    for language, code, shown in figures.blocks(README):
        if language == "python":
            found += 1
            output = figures.run_python(code, names)
            assert output == (shown[1] if shown else ""), HINT
    assert found >= 6


def test_console_blocks_print_what_is_shown() -> None:
    shown_blocks = [b for b in figures.blocks(README) if b[0] == "console" and b[2]]
    assert shown_blocks
    for _, code, shown in shown_blocks:
        assert shown is not None
        assert figures.run_console(code) == shown[1], HINT


@pytest.mark.parametrize("name", figures.SECTIONS)
def test_generated_sections_are_up_to_date(name: str) -> None:
    part = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert part, f"the README has no section {name!r}"
    assert part[1] == figures.SECTIONS[name](), HINT


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for target in re.findall(r"^\$? ?make (\w+)", text, re.MULTILINE):
            assert f"\n{target}:" in makefile


def test_files_that_documents_name_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        for path in re.findall(r"`((?:dropit_fx|passes|tests|examples)/[\w./*]*)`", text):
            assert list(ROOT.glob(path)), f"{document} names {path}"
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        for path in re.findall(r"\]\((?!http)([^)]+)\)", prose):
            assert (ROOT / path).exists(), f"{document} links to {path}"


def test_every_line_of_the_comparison_has_its_test() -> None:
    part = re.search(r"<!-- compared -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert part
    lines = part[1].strip().splitlines()[2:]
    for line in lines:
        named = re.match(r"\| [^|]+ \| `(test_\w+\.py)::(test_\w+)` \|", line)
        assert named, line
        assert f"\ndef {named[2]}(" in (ROOT / "tests" / named[1]).read_text(), line
    assert len(lines) >= 10


def test_every_environment_default_is_named() -> None:
    for option in backend.OPTIONS:
        assert f"`DROPIT_{option.upper()}`" in README


def test_yaml_blocks_are_configs() -> None:
    model, x = vit()
    found = [code for language, code, _ in figures.blocks(README) if language == "yaml"]
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
    install = re.search(r"^## Install\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    assert install
    for version in (*RUN, *(f"Python {python}" for python in pythons)):
        assert version in install[1], f"the install section does not say {version}"
