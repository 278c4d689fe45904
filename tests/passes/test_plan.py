"""A plan prints a line for each read; what the passes and the plug-in do can be looked at."""

import io
import logging
from typing import Any

import pytest
import torch
from torch import nn

import dropit_fx
from dropit_fx import cli, logs
from dropit_fx.config import make_config
from dropit_fx.passes import PIPELINE
from dropit_fx.passes.find_saved import find_saved
from dropit_fx.passes.plan import Copy, Keeper, Plan

X = torch.randn(32, 64)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.Flatten())


def step(model: Any) -> None:
    model(X).sum().backward()


def test_a_plan_prints_each_read_after_each_pass() -> None:
    printed = io.StringIO()
    with logs.shown("passes", printed):
        dropit_fx.transform(network(), example_args=(X,))
    said = printed.getvalue()
    first = PIPELINE.index(find_saved)
    for step in PIPELINE[:first]:
        assert f"after {step.__name__}\nno reads yet: find_saved finds them\n" in said
    for number, step in enumerate(PIPELINE[first:]):
        part = said.split(f"after {step.__name__}\n")[1].split("\n\n")[0]
        head, *lines = part.splitlines()
        assert head.split() == ["value", "read", "by", "use", "dense", "kept", "by", "bytes"]
        assert any(
            "gelu.input" in line and "slope" in line and "32,768 B" in line for line in lines
        )
        assert ("quant(bits=5)" in part) == (number > 0)
    assert "derived" in part
    assert "from gelu" in part
    assert "packed_linear" in said.split("the graph\n")[1]


def test_a_plan_says_why_something_is_kept() -> None:
    printed = io.StringIO()
    with logs.shown("passes", printed):
        made = dropit_fx.transform(nn.Sequential(nn.Linear(64, 8), nn.Tanh()), example_args=(X,))
    (row,) = [r for r in dropit_fx.report(made).rows if r.reason]
    (line,) = [line for line in printed.getvalue().splitlines() if line.endswith(row.reason)][-1:]
    assert line.startswith(row.name)


def test_a_plan_without_reads_says_so() -> None:
    module = torch.fx.symbolic_trace(nn.Flatten())
    plan = find_saved(Plan(module=module, inputs=(X,), config=make_config(None)))
    assert str(plan) == "nothing is saved"


def test_a_codec_is_spelled_with_what_was_chosen_of_it() -> None:
    rules = [{"codec": "mink", "gamma": 0.0, "bits": None}]
    made = dropit_fx.transform(
        network(), {"preset": None, "rules": rules, "force": True}, example_args=(X,)
    )
    assert "mink(gamma=0.0)" in {row.codec for row in dropit_fx.report(made).rows}


def test_one_line_for_each_graph_that_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dropit_fx.compile"):
        step(torch.compile(network(), backend="dropit_eager", options={"preset": "max"}))
    (message,) = [r.message for r in caplog.records if r.levelno == logging.INFO]
    said = dropit_fx.backend.compiled_graphs()[-1].report
    assert f"{said.kept_bytes / 2**20:.2f} MiB, dense {said.dense_bytes / 2**20:.2f}" in message
    assert message.endswith("preset max")


def test_the_environment_turns_it_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loggers = {word: logging.getLogger(name) for word, (name, _) in logs.LOGGERS.items()}
    before = {word: (logger.level, [*logger.handlers]) for word, logger in loggers.items()}
    monkeypatch.setenv("DROPIT_LOG", "passes, grapsh")
    try:
        with pytest.warns(UserWarning, match="'grapsh' means nothing.* passes, graphs"):
            logs.read_environment()
        dropit_fx.transform(network(), example_args=(X,))
    finally:
        for word, logger in loggers.items():
            logger.level, logger.handlers = before[word]
            logger.setLevel(logger.level)
    assert "after insert_packing" in capsys.readouterr().err


def test_nothing_is_said_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    step(dropit_fx.transform(network(), example_args=(X,)))
    step(torch.compile(network(), backend="dropit_eager"))
    assert capfd.readouterr() == ("", "")


def test_the_command_line_prints_passes(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "dropit_fx.bench.model_spec:small_net", "--batch", "4", "--size", "16"]
    assert cli.main(["report", *small, "--passes", "--summary"]) == 0
    out = capsys.readouterr().out
    assert out.index("after find_saved") < out.index("after insert_packing") < out.index("total")


def test_a_copy_says_of_what_it_is() -> None:
    copies = (Copy("x", 3), Copy("ln"), Copy("ln", operand="mean"))
    assert [*map(str, copies)] == ["x#3", "derived ln", "ln.mean"]
    assert f"'{Copy('x', 0)}'" == "'x#0'"


def test_what_keeps_a_value_is_printed_as_reports_say_it() -> None:
    module = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(64, 8), nn.Tanh()))
    plan = find_saved(Plan(module=module, inputs=(X,), config=make_config(None)))
    assert {site.name: site.kept_by for site in plan.sites}["_1"] is Keeper.OUTPUT
    assert f"it is {Keeper.OUTPUT}" == "it is a model output"
