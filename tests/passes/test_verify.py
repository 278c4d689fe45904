"""The verifier refuses plans and graphs broken on purpose, at least one for each check."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dropit_fx.api import rewrite
from dropit_fx.capture.trace import capture
from dropit_fx.config import TrainRule, load_config
from dropit_fx.passes import PIPELINE, VerifyError, verify
from dropit_fx.passes.plan import Decision, Plan
from dropit_fx.passes.verify import CHECKS
from dropit_fx.runtime.packed_call import PACKED_OPS, derived, pack


class Net(nn.Module):
    """Two linears that share one value, masks, and a storage that the model returns."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.q = nn.Linear(64, 64)
        self.k = nn.Linear(64, 64)
        self.last = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.first(x))
        z = torch.relu(self.q(h) + self.k(h))
        return self.last(z), z


@pytest.fixture(scope="module")
def finished() -> Plan:
    x = torch.randn(64, 64)
    config = load_config({"preset": "dropit"})
    return rewrite(capture(Net()), config, (x,), {})


@pytest.fixture
def plan(finished: Plan) -> Plan:
    module = copy.deepcopy(finished.module)
    return replace(finished, module=module)


def named(plan: Plan, name: str) -> fx.Node:
    return next(n for n in plan.module.graph.nodes if n.name == name)


def decide(plan: Plan, label: str, **changes: Any) -> Plan:
    """The plan with other words in the decision for one read."""
    (found,) = [d for d in plan.decisions if d.read.label == label]
    return replace(
        plan, decisions=tuple(replace(d, **changes) if d is found else d for d in plan.decisions)
    )


def packed_as(plan: Plan, name: str, packed: dict[str, Any]) -> Plan:
    node = named(plan, name)
    node.kwargs = {**node.kwargs, "packed": packed}
    return plan


def pack_with(plan: Plan, at: int, value: Any) -> Plan:
    node = named(plan, "pack")
    node.args = (*node.args[:at], value, *node.args[at + 1 :])
    return plan


def derive_from(plan: Plan, packs: dict[str, Any], rule: str = "gelu") -> Plan:
    """The plan with a node that derives ``gelu(relu)`` from ``packs``."""
    reader, relu = named(plan, "linear_1"), named(plan, "relu")
    with plan.module.graph.inserting_before(reader):
        plan.module.graph.call_function(
            derived, (rule, (relu, "none"), packs, relu)
        ).name = "derived"
    return plan


def trained_against_a_rule(plan: Plan) -> Plan:
    rule = TrainRule(op=("linear",), train=False, number=1)
    return replace(plan, config=replace(plan.config, training=(rule,)))


def used_before_it_is_made(plan: Plan) -> Plan:
    named(plan, "linear_1").append(named(plan, "pack"))
    return plan


def second_copy(plan: Plan) -> Plan:
    graph, old = plan.module.graph, named(plan, "pack")
    with graph.inserting_after(old):
        twin = graph.call_function(pack, old.args, dict(old.kwargs))
    return packed_as(plan, "linear_2", {"input": twin})


def pack_for_nobody(plan: Plan) -> Plan:
    graph, old = plan.module.graph, named(plan, "pack")
    with graph.inserting_after(old):
        graph.call_function(pack, old.args, dict(old.kwargs))
    return plan


def pack_read_by_a_stranger(plan: Plan) -> Plan:
    graph, old = plan.module.graph, named(plan, "pack")
    with graph.inserting_after(old):
        graph.call_function(len, (old,))
    return plan


def unpacked_again(plan: Plan) -> Plan:
    graph, call = plan.module.graph, named(plan, "linear_1")
    kwargs = {k: v for k, v in call.kwargs.items() if k != "packed"}
    with graph.inserting_after(call):
        dense = graph.call_function(torch._C._nn.linear, call.args, kwargs)
    call.replace_all_uses_with(dense)
    graph.erase_node(call)
    return plan


def named_by(plan: Plan, name: str, **changes: Any) -> Plan:
    """The plan with other words in ``packed=`` of a call; None takes a word out."""
    packed = {**named(plan, name).kwargs["packed"], **changes}
    return packed_as(plan, name, {k: v for k, v in packed.items() if v is not None})


def packed_too(plan: Plan) -> Plan:
    """The last linear's input, which the model returns, packed in the graph alone."""
    graph, call = plan.module.graph, named(plan, "linear_3")
    old = named(plan, "pack")
    with graph.inserting_before(call):
        made = graph.call_function(
            pack, (call.args[0], (call.args[1],), *old.args[2:]), dict(old.kwargs)
        )
        new = graph.call_function(
            PACKED_OPS["linear"], call.args, {**call.kwargs, "packed": {"input": made}}
        )
    call.replace_all_uses_with(new)
    graph.erase_node(call)
    new.name = "linear_3"
    return plan


def _without_row(plan: Plan) -> Plan:
    (d,) = [d for d in plan.decisions if d.read.label == "linear_1.input"]
    site = next(s for s in plan.sites if any(r is d.read for r in s.reads))
    bare = replace(d.read, read=None)
    sites = tuple(
        replace(s, reads=tuple(bare if r is d.read else r for r in s.reads)) if s is site else s
        for s in plan.sites
    )
    decisions = tuple(replace(o, read=bare) if o is d else o for o in plan.decisions)
    return replace(plan, sites=sites, decisions=decisions)


def _tiny_site(plan: Plan) -> Plan:
    return replace(plan, sites=tuple(replace(s, nbytes=8) for s in plan.sites))


def _exact_read_dropped(plan: Plan) -> Plan:
    (d,) = [d for d in plan.decisions if d.read.label == "linear_1.input"]
    strict = replace(d.read, lossy=False)
    decisions = tuple(replace(o, read=strict) if o is d else o for o in plan.decisions)
    return replace(plan, decisions=decisions)


MINK = {"gamma": 0.5, "bits": None, "block": 1024, "scope": "block", "rounding": "nearest"}

# (check, what is broken, how, the sentence)
BROKEN: list[tuple[str, str, Callable[[Plan], Plan], str]] = [
    (
        "well_formed",
        "a pack behind its reader",
        used_before_it_is_made,
        "was used before it has been defined",
    ),
    (
        "untrained_is_detached",
        "a rule that nobody has asked",
        trained_against_a_rule,
        "'linear' gives 'first.weight' a gradient: rule 1 does not",
    ),
    (
        "one_decision_each",
        "a decision is missing",
        lambda p: replace(p, decisions=p.decisions[1:]),
        "5 reads but decisions for 4, or in another order",
    ),
    (
        "one_decision_each",
        "decisions in another order",
        lambda p: replace(p, decisions=p.decisions[::-1]),
        "or in another order",
    ),
    (
        "served",
        "a mask packed by a codec for operands",
        lambda p: decide(p, "relu.result", codec="mink", options=MINK),
        "relu.result is packed as 'mink', which does not serve 'slope'",
    ),
    (
        "served",
        "an operand packed as a mask",
        lambda p: decide(p, "linear_1.input", codec="bitmask", options={"bits": 1}),
        "linear_1.input is packed as 'bitmask', which does not serve 'contract'",
    ),
    (
        "served",
        "a tensor that no row knows",
        _without_row,
        "linear_1.input is packed, but no row knows it",
    ),
    (
        "served",
        "an approximation of what stays exact",
        _exact_read_dropped,
        "linear_1.input must stay exact, but 'mink' is not lossless",
    ),
    (
        "reasons_given",
        "kept and not said why",
        lambda p: decide(p, "linear_3.input", reason=""),
        "linear_3.input is kept without a reason",
    ),
    (
        "whole_or_none",
        "one reader packed, another not",
        lambda p: decide(p, "linear_2.input", codec="keep", options={}, copy=None, reason="so"),
        "'relu' is packed for relu.result and kept for linear_2.input",
    ),
    (
        "whole_or_none",
        "packed though the model returns it",
        lambda p: decide(
            decide(p, "linear_3.input", codec="mink", options=MINK, reason=""),
            "relu_1.result",
            codec="bitmask",
            reason="",
        ),
        "'relu_1' is packed, but it is a model output",
    ),
    (
        "never_larger",
        "more bytes packed than dense",
        _tiny_site,
        "bytes packed, 8 dense",
    ),
    (
        "one_copy",
        "two formats of one copy",
        lambda p: decide(p, "linear_2.input", options=MINK),
        "copy 'relu#0' has 2 formats",
    ),
    (
        "one_copy",
        "two copies of one value",
        lambda p: decide(p, "linear_2.input", copy="relu#1"),
        "one value has 2 copies: ['relu#0', 'relu#1']",
    ),
    (
        "one_copy",
        "one copy of two values",
        lambda p: decide(p, "linear_3.input", codec="mink", options=MINK, copy="relu#0"),
        "copy 'relu#0' stands for 2 values",
    ),
    (
        "says_all_that_is_kept",
        "a read that no word is said of",
        lambda p: named_by(p, "linear_1", weight=None),
        "'linear_1' does not say how 'weight' is kept",
    ),
    (
        "says_all_that_is_kept",
        "a read that is let go",
        lambda p: named_by(p, "linear_1", weight=("drop", {})),
        "'linear_1' lets 'weight' go, whose values its backward reads",
    ),
    (
        "says_all_that_is_kept",
        "a tensor kept whole that nobody has counted",
        lambda p: named_by(p, "linear_1", input=("keep", {})),
        "'linear_1' keeps 'input', which nobody has counted",
    ),
    ("packs_are_read", "a pack without readers", pack_for_nobody, "'pack_1' packs for nobody"),
    (
        "derived_from_what_is_there",
        "a value derived from a tensor that is let go",
        lambda p: derive_from(p, {}),
        "'derived' keeps 'relu' whole, which nobody else does",
    ),
    (
        "derived_from_what_is_there",
        "a value derived through an op that costs more",
        lambda p: derive_from(p, {"input": named(p, "pack")}, rule="linear"),
        "'derived' derives linear, whose row does not say how",
    ),
    (
        "served",
        "a mask that is derived",
        lambda p: decide(p, "relu.result", codec="derived", options={}, derived="relu"),
        "relu.result is derived, but its backward does not read it by value",
    ),
    (
        "packs_are_read",
        "a pack that another op reads",
        pack_read_by_a_stranger,
        "'pack' is read by 'len_1', which is no packed call",
    ),
    (
        "packs_are_read",
        "a pack of something else",
        lambda p: pack_with(p, 0, named(p, "linear")),
        "'pack' packs 'linear', which none of its readers reads",
    ),
    (
        "packs_are_read",
        "a pack without one of its options",
        lambda p: pack_with(p, 3, {"gamma": 0.9}),
        "'pack' has options ['gamma'] for codec 'mink'",
    ),
    (
        "packs_are_read",
        "a pack by an unknown codec",
        lambda p: pack_with(p, 2, "zip"),
        "for codec 'zip'",
    ),
    (
        "packs_are_read",
        "an option that is a tensor",
        lambda p: pack_with(p, 3, {**MINK, "gamma": torch.ones(())}),
        "'pack' has an option that is no plain value",
    ),
    (
        "packs_are_read",
        "a pack that nobody needs",
        lambda p: pack_with(p, 1, ()),
        "'pack' names nobody who needs it, so it would never be made",
    ),
    (
        "calls_know_their_reads",
        "an operand that the row does not read",
        lambda p: packed_as(p, "linear_1", {"bias": named(p, "pack")}),
        "'linear_1': linear has no read 'bias'",
    ),
    (
        "calls_know_their_reads",
        "an operand given by the name of a codec",
        lambda p: packed_as(p, "linear_1", {"input": ("mink", MINK)}),
        "'linear_1': 'input' is packed as ('mink', {",
    ),
    (
        "calls_know_their_reads",
        "an operand given by the dense tensor",
        lambda p: packed_as(p, "linear_1", {"input": named(p, "relu")}),
        "'linear_1': 'input' is packed as relu, which is no pack node",
    ),
    (
        "calls_know_their_reads",
        "a mask given by a pack node",
        lambda p: packed_as(p, "relu", {"result": named(p, "x")}),
        "'relu': 'result' is packed as x, which is no codec",
    ),
    (
        "graph_follows_decisions",
        "a decision that the graph forgot",
        unpacked_again,
        "linear_1.input was to be packed and is not",
    ),
    (
        "graph_follows_decisions",
        "a packing that nobody decided",
        packed_too,
        "linear_3.input is packed and no decision says so",
    ),
    (
        "graph_follows_decisions",
        "a pack with other options than decided",
        lambda p: pack_with(p, 3, MINK),
        "linear_1.input is packed as mink {'gamma': 0.5",
    ),
    (
        "graph_follows_decisions",
        "a mask by another codec than decided",
        lambda p: packed_as(p, "relu", {"result": ("drop", {})}),
        "relu.result is packed as drop {} and was to be bitmask",
    ),
    (
        "graph_follows_decisions",
        "two nodes for one copy",
        second_copy,
        "copy 'relu#0' is made 2 times",
    ),
    (
        "graph_follows_decisions",
        "one node for two copies",
        lambda p: decide(p, "linear_2.input", copy="relu#1"),
        "2 values share fewer pack nodes",
    ),
]


def test_the_intact_plan_passes_and_packs_what_the_broken_ones_break(plan: Plan) -> None:
    verify(plan)
    packed = [d.read.label for d in plan.decisions if d.packed]
    assert packed == ["relu.result", "linear_1.input", "linear_2.input"]
    assert [n.name for n in plan.module.graph.nodes if n.target is pack] == ["pack"]


@pytest.mark.parametrize(
    ("check", "what", "broken", "sentence"), BROKEN, ids=[f"{b[0]}: {b[1]}" for b in BROKEN]
)
def test_a_broken_plan_is_refused_with_its_sentence(
    plan: Plan, check: str, what: str, broken: Callable[[Plan], Plan], sentence: str
) -> None:
    with pytest.raises(VerifyError) as refusal:
        verify(broken(plan))
    lines = [line for line in str(refusal.value).splitlines() if f"{check}: " in line]
    assert any(sentence in line for line in lines), str(refusal.value)


def test_every_check_has_a_broken_plan() -> None:
    assert {c.holds.__name__ for c in CHECKS} == {b[0] for b in BROKEN}


def test_every_check_names_a_pass() -> None:
    assert {c.since for c in CHECKS} <= {step.__name__ for step in PIPELINE}


def test_a_broken_nested_graph_is_refused(plan: Plan) -> None:
    broken = decide(plan, "linear_3.input", reason="")
    with pytest.raises(VerifyError, match=r"linear_3\.input is kept without a reason"):
        verify(replace(plan, bodies={"body": broken}))


def test_a_check_says_nothing_before_its_pass(plan: Plan) -> None:
    wrong = decide(plan, "linear_3.input", reason="")
    verify(wrong, ["find_saved"])
    with pytest.raises(VerifyError):
        verify(wrong, ["find_saved", "choose_codecs"])


def test_all_violations_are_listed_at_once(plan: Plan) -> None:
    reads: tuple[Decision, ...] = plan.decisions
    wrong = replace(plan, decisions=tuple(replace(d, reason="") for d in reads[::-1]))
    with pytest.raises(VerifyError) as refusal:
        verify(wrong)
    text = str(refusal.value)
    assert "one_decision_each: " in text
    assert "reasons_given: " in text
