"""Rules that would lower what is kept most: each is accepted, and saves what is told of it."""

import copy
import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import CASE
from torch import nn

import dropit_fx
from dropit_fx.cli import main
from dropit_fx.rules import Rule


def net() -> nn.Sequential:
    blocks = [
        nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        for _ in range(3)
    ]
    return nn.Sequential(*blocks)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("mlp", "balanced"),
        ("mlp", "lossless"),
        ("deit_tiny_patch16_224", "lossless"),
        ("resnet18", "balanced"),
    ],
)
def test_rules_are_accepted_and_save_what_they_say(name: str, preset: str, tmp_path: Path) -> None:
    model = net() if name == "mlp" else CASE[name].model()
    args = (torch.randn(256, 32),) if name == "mlp" else CASE[name].inputs(4)[0]
    before = dropit_fx.report(dropit_fx.transform(model, preset=preset, example_args=args))
    found = dropit_fx.suggest(before)
    assert found.rules
    assert found.kept == before.kept_bytes
    file, kept = tmp_path / "rules.yaml", before.kept_bytes
    for number in range(1, len(found.rules) + 1):
        file.write_text(str(replace(found, rules=found.rules[:number])))
        packed = dropit_fx.transform(model, file, example_args=args)
        after = dropit_fx.report(packed).kept_bytes
        assert kept - after == found.rules[number - 1].saves > 0
        kept = after
    assert dropit_fx.measure.saved_bytes(packed, *args) == kept
    assert max(map(len, str(found).splitlines())) <= 80


def test_the_rules_of_a_config_stay_behind_them() -> None:
    own = dropit_fx.Config(rules=(Rule(codec="keep"),), preset=None)
    model, x = net(), torch.randn(256, 32)
    report = dropit_fx.report(dropit_fx.transform(model, own, example_args=(x,)))
    (first,) = dropit_fx.suggest(report, 1).rules
    config = dropit_fx.Config(rules=(first.rule, *own.rules), preset=None)
    packed = dropit_fx.transform(model, config, example_args=(x,))
    assert report.kept_bytes - dropit_fx.report(packed).kept_bytes == first.saves


def test_what_a_config_sets_beside_its_rules_is_said_too(tmp_path: Path) -> None:
    config = {"preset": "lossless", "offload": True, "drop_logits": True}
    model, x = net(), torch.randn(256, 32)
    found = dropit_fx.suggest(
        dropit_fx.report(dropit_fx.transform(model, config, example_args=(x,)))
    )
    file = tmp_path / "rules.yaml"
    file.write_text(str(found))
    said = dropit_fx.load_config(file)
    assert said.offload
    assert said.drop_logits
    assert not said.force


def test_nothing_is_left_to_say() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    found = dropit_fx.suggest(dropit_fx.report(dropit_fx.transform(model, example_args=(x,))))
    assert found.rules == ()
    assert "no rule" in str(found)


def test_the_model_has_to_be_there() -> None:
    x = torch.randn(8, 32)
    model = net()
    packed = dropit_fx.transform(model, example_args=(x,))
    with pytest.raises(ValueError, match="not of a copy or a part"):
        dropit_fx.suggest(dropit_fx.report(copy.deepcopy(packed)))
    report = dropit_fx.report(packed)
    assert report.origin is not None
    del model
    gc.collect()
    with pytest.raises(ValueError, match="keep it"):
        dropit_fx.suggest(report)


def test_the_command_prints_lines_to_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "dropit_fx.bench.model_spec:small_net"
    assert main(["suggest", "--model", model, "--batch", "64"]) == 0
    file = tmp_path / "rules.yaml"
    file.write_text(capsys.readouterr().out)
    assert dropit_fx.load_config(file).rules
    assert main(["report", "--model", model, "--batch", "64", "--config", str(file)]) == 0
