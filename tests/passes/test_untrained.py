"""``train: false`` and ``bias``: what no rule trains gets no gradient, and costs no memory."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropit_fx
from dropit_fx import check, measure
from dropit_fx.compile import backend
from dropit_fx.config import ConfigError
from dropit_fx.report.rows import Report

N = 64
Gradients = dict[str, Tensor | None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(N), nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Words, blocks of which one is checkpointed, convolution, norms, tied weights and products."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(12, N)
        self.pos = nn.Parameter(torch.randn(N))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.conv, self.norm = nn.Conv1d(N, N, 3, padding=1), nn.BatchNorm1d(N)
        self.act = nn.PReLU(N)
        self.product = Product()
        self.head = nn.Linear(N, 12)
        self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x) + self.pos
        for block in self.blocks[:2]:
            h = block(h)
        region: Tensor = checkpoint(self.blocks[2], h, use_reentrant=False)
        h = self.act(self.norm(self.conv(region.transpose(1, 2)))).transpose(1, 2)
        out: Tensor = self.head(self.product(h))
        return out


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(N, N) / 8), nn.Parameter(torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.b, x.reshape(-1, N), self.w)
        return flat.view(x.shape) @ self.w.t()


def words() -> Tensor:
    return torch.randint(12, (8, 16))


def gradients(runs: Callable[..., Any], model: nn.Module, *args: Any) -> Gradients:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    runs(*args).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters()}


def config(*rules: dict[str, Any], preset: str | None = "lossless") -> dict[str, Any]:
    return {"preset": preset, "rules": list(rules)}


def rewritten(
    way: str, model: nn.Module, made: dict[str, Any], *args: Any
) -> tuple[Callable[..., Any], Callable[[], Report]]:
    """The model as ``transform`` or the plug-in makes it, and its report, once it has run."""
    if way == "transform":
        graph = dropit_fx.transform(model, made, example_args=args)
        return graph, lambda: dropit_fx.report(graph)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=way, options={"config": made})
    return compiled, lambda: backend.compiled_graphs()[-1].report


# rules -> the names that get no gradient, and those whose gradient is that of some readers alone
CASES: dict[str, tuple[list[dict[str, Any]], set[str], set[str]]] = {
    "a layer": ([{"module": "blocks.0.fc1", "train": False}], {"blocks.0.fc1.*"}, set()),
    "its bias stays": ([{"module": "blocks.0.fc1", "train": "bias"}], {"blocks.0.fc1.w"}, set()),
    "a norm": ([{"module": "blocks.1.norm", "train": False}], {"blocks.1.norm.*"}, set()),
    "its weight": ([{"module": "blocks.1.norm", "train": "bias"}], {"blocks.1.norm.w"}, set()),
    "in a region": ([{"module": "blocks.2.fc2", "train": False}], {"blocks.2.fc2.*"}, set()),
    "a region": ([{"module": "blocks.2*", "train": "bias"}], {"blocks.2.*.w"}, set()),
    "a convolution": ([{"op": "conv1d", "train": False}], {"conv.*"}, set()),
    "batch norm": ([{"op": "batch_norm", "train": "bias"}], {"norm.w"}, set()),
    "prelu": ([{"module": "act", "train": False}], {"act.*"}, set()),
    "a product": ([{"module": "product", "train": False}], {"product.*"}, set()),
    "its bias": ([{"module": "product", "train": "bias"}], {"product.w"}, set()),
    "one of two products": ([{"op": "addmm", "train": "bias"}], set(), {"product.w"}),
    "the other, of a view": ([{"op": "matmul", "train": False}], set(), {"product.w"}),
    "the lookup": ([{"op": "embedding", "train": False}], set(), {"emb.w"}),
    "the tied head": ([{"module": "head", "train": False}], {"head.bias"}, {"emb.w"}),
    "both": ([{"module": ["head", "emb"], "train": "bias"}], {"emb.w"}, set()),
    "all but one": (
        [{"module": "blocks.1.*", "train": True}, {"module": "blocks*", "train": False}],
        {"blocks.0.*", "blocks.2.*"},
        set(),
    ),
    "biases alone": (
        [{"train": "bias"}],
        {"blocks.*.w", "emb.w", "conv.w", "norm.w", "act.w", "product.w", "pos"},
        set(),
    ),
}


def names(model: nn.Module, globs: set[str]) -> set[str]:
    from fnmatch import fnmatchcase

    full = {f"{g}eight" if g.endswith(".w") and g != "product.w" else g for g in globs}
    return {n for n, _ in model.named_parameters() if any(fnmatchcase(n, g) for g in full)}


# of the plug-in, whose graphs name parameters otherwise
DYNAMO = ("a region", "its bias", "the other, of a view", "the tied head", "biases alone")
RUNS = [("transform", case) for case in CASES] + [("dropit_eager", case) for case in DYNAMO]


@pytest.mark.parametrize(("way", "case"), RUNS)
def test_what_is_trained_has_denses_bits_and_the_rest_no_gradient(way: str, case: str) -> None:
    rules, untrained, shared = CASES[case]
    torch.manual_seed(0)
    model, x = Net(), words()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    runs, report = rewritten(way, model, config(*rules), x)
    found = gradients(runs, model, x)
    measured = measure.saved_bytes(runs, x)
    dense = gradients(model, model, x)
    untrained, shared = names(model, untrained), names(model, shared)
    assert {n for n, g in found.items() if g is None} == untrained
    differing = {n for n, g in dense.items() if n not in untrained and not torch.equal(g, found[n])}
    assert differing == shared
    assert all(p.requires_grad and torch.equal(p, before[n]) for n, p in model.named_parameters())
    told = report()
    assert set(told.untrained) == untrained
    assert set(told.shared) == shared
    assert told.kept_bytes == measured
    torch.compiler.reset()
    assert told.dense_bytes == measure.saved_bytes(model, x)


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
def test_the_input_of_a_layer_is_not_kept_and_the_report_says_by_which_rule(way: str) -> None:
    model = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N))
    x = torch.randn(32, N)
    for train, kept in (("bias", 1), (True, 1), (False, 0)):
        # tanh keeps its result, which is the input of the second layer too
        rules = [{"module": "2", "train": "bias"}, {"module": "0", "train": train}]
        runs, report = rewritten(way, model, config(*rules, preset=None), x)
        runs(x)
        told = report()
        assert told.kept_bytes == kept * x.numel() * 4 == measure.saved_bytes(runs, x)
        (row,) = told.rows
        assert row.dense_bytes == x.numel() * 4
        assert (row.codec == "untrained") == (not kept)
        assert (row.note == "not trained: rule 1") == (not kept)
        if not kept:
            assert "untrained (not trained: rule 1)" in str(told)


def test_what_is_before_all_that_is_trained_is_not_kept() -> None:
    layers = nn.Linear(N, N), nn.Tanh(), nn.Tanh(), nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N)
    rules = {"module": ["0", "3"], "train": False}
    x = torch.randn(32, N)
    graph = dropit_fx.transform(nn.Sequential(*layers), config(rules), example_args=(x,))
    told = dropit_fx.report(graph)
    # the first tanh has no reader with parameters
    notes = ["nothing is trained that needs it", "not trained: rule 1"]
    assert [r.note for r in told.rows if r.codec == "untrained"] == notes
    assert told.kept_bytes == x.numel() * 4 == measure.saved_bytes(graph, x)


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
def test_a_parameter_of_a_trained_module_keeps_its_gradient_through_one_that_is_not(
    way: str,
) -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.layer = nn.Parameter(torch.randn(8, N)), Block()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(self.queries) * x
            return out

    model, x = Queries(), torch.randn(8, N)
    runs, _ = rewritten(way, model, config({"module": "layer*", "train": False}), x)
    found, dense = gradients(runs, model, x), gradients(model, model, x)
    assert [n for n, g in found.items() if g is not None] == ["queries"]
    assert torch.equal(found["queries"], dense["queries"])  # type: ignore[arg-type]


def test_optimisers_leave_it_alone_and_copies_of_the_model_too() -> None:
    model, x = Net(), words()
    graph = dropit_fx.transform(
        model, config({"module": "blocks.*", "train": False}), example_args=(x,)
    )
    for made in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        optimiser = torch.optim.AdamW(made.parameters(), weight_decay=0.1)
        before = {n: p.detach().clone() for n, p in made.named_parameters()}
        made(x).sum().backward()
        optimiser.step()
        same = {n for n, p in made.named_parameters() if torch.equal(p, before[n])}
        assert same == {n for n in before if n.startswith("blocks.")}
        assert dropit_fx.report(made).untrained


def test_gradually_more_is_trained() -> None:
    """The model is transformed again for each stage; one optimiser goes through all of them."""
    model, x = Net(), words()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    kept: list[int] = []
    for frozen in (("blocks.0", "blocks.1"), ("blocks.0",), ()):
        rules = [{"module": f"{name}.*", "train": False} for name in frozen]
        graph = dropit_fx.transform(model, config(*rules), example_args=(x,))
        kept.append(dropit_fx.report(graph).kept_bytes)
        assert measure.saved_bytes(graph, x) == kept[-1]
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for _ in range(2):
            graph(x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        same = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
        assert same == {n for n in before if n.startswith(tuple(f"{name}." for name in frozen))}
    assert kept == sorted({*kept}), "each stage keeps more than the one before"


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
def test_a_fused_head_that_is_not_trained(way: str) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(N, N), nn.Linear(N, 5000)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.first(x).tanh()), target)

    model, given = Words(), (torch.randn(64, N), torch.randint(5000, (64,)))
    made = config({"module": "head", "train": False})
    runs, report = rewritten(way, model, made, *given)
    found, dense = gradients(runs, model, *given), gradients(model, model, *given)
    assert {n for n, g in found.items() if g is None} == {"head.weight", "head.bias"}
    torch.testing.assert_close(found["first.weight"], dense["first.weight"])
    assert any(row.codec == "fused" for row in report().rows)
    assert report().kept_bytes == measure.saved_bytes(runs, *given)
    checked = check(model, given, config=made, backend=way)  # type: ignore[arg-type]
    assert checked, checked


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
def test_under_autocast_the_report_is_what_is_measured(way: str) -> None:
    model, x = nn.Sequential(Block(), Block(), nn.Linear(N, 12)), torch.randn(64, N)
    rule = {"module": "0.*", "train": "bias"}
    with torch.autocast("cpu", torch.bfloat16):
        runs, report = rewritten(way, model, config(rule, preset="balanced"), x)
        runs(x)
        assert report().kept_bytes == measure.saved_bytes(runs, x)


def test_a_codec_in_the_same_rule_and_codecs_for_what_is_not_trained() -> None:
    model, x = Net(), words()
    rules = (
        {"module": "blocks.0.*", "train": "bias", "codec": "quant", "bits": 4},
        {"module": "head", "train": False},
        {"module": "head", "op": "linear", "codec": "mink"},  # saved in the model untouched
    )
    graph = dropit_fx.transform(model, config(*rules, preset=None), example_args=(x,))
    told = dropit_fx.report(graph)
    assert any(r.codec == "quant(bits=4)" and r.module.startswith("blocks.0") for r in told.rows)
    assert "blocks.0.fc1.weight" in told.untrained
    assert told.kept_bytes == measure.saved_bytes(graph, x)


def test_submodules_are_named_from_where_the_report_names_them() -> None:
    model, x = Net(), words()
    made = config({"module": "fc1", "train": False})
    dropit_fx.transform(model, made, example_args=(x,), modules="blocks.0")
    assert dropit_fx.report(model).untrained == ("blocks.0.fc1.weight", "blocks.0.fc1.bias")
    assert gradients(model, model, x)["blocks.0.fc1.weight"] is None


def test_a_rule_that_matches_no_parameter_says_which_there_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = Net(), words()
    made = config({"module": "block.*", "train": False})
    told = r"rule \{module: block\.\*, train: false\} matched no read of a parameter\. .*fc1 \(lin"
    with pytest.raises(ConfigError, match=told):
        dropit_fx.transform(model, made, example_args=(x,))
    with caplog.at_level(logging.WARNING):
        rewritten("dropit_eager", model, made, x)[0](x)
    assert "matched no read of a parameter" in caplog.text


class OtherInEval(nn.Module):
    """Whose modes differ in more than a constant: no tracer opens it for both."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(N))

    def forward(self) -> Tensor:
        return self.w.sin() if self.training else self.w * 2


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(N, N), OtherInEval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x) * self.scale()
        return out


def test_a_module_that_stays_whole_is_refused() -> None:
    model, x = Whole(), torch.randn(4, N)
    told = r"rule 1 \{train: false\}: module 'scale' \(OtherInEval\) is one node"
    with pytest.raises(ConfigError, match=told):
        dropit_fx.transform(model, config({"train": False}), example_args=(x,))
    rules = {"module": "scale", "train": True}, {"train": False}
    graph = dropit_fx.transform(model, config(*rules), example_args=(x,))
    found = gradients(graph, model, x)
    assert [n for n, g in found.items() if g is not None] == ["scale.w"]


def test_where_nothing_is_trained_pytorch_says_so() -> None:
    model, x = Net(), words()
    graph = dropit_fx.transform(model, config({"train": False}), example_args=(x,))
    assert not measure.saved_bytes(graph, x)
    with pytest.raises(RuntimeError, match="does not require grad"):
        graph(x).sum().backward()


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
def test_check_compares_what_is_trained(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net(), words()
    made = config({"module": ["blocks.0.*", "head"], "train": "bias"}, preset="balanced")
    checked = check(model, (x,), config=made, backend=way)
    assert checked, checked
    (said,) = [f.text for f in checked.findings if f.name == "not trained"]
    assert said.startswith("3 parameters get no gradient, as the config says; 1 from some of")
    (said,) = [f.text for f in checked.findings if f.name == "gradients, exact formats"]
    assert said.startswith(f"{len(list(model.parameters())) - 4} gradients have the same bits")
    monkeypatch.setattr(Report, "untrained", ("pos",))
    checked = check(model, (x,), config=made, backend=way)
    assert "not trained" in checked.failed
    assert "gradients, exact formats" in checked.failed


@pytest.mark.slow
def test_compiled_by_inductor(tmp_path: Path) -> None:
    model, x = Net(), words()
    path = tmp_path / "far.yaml"
    path.write_text("preset: lossless\nrules:\n  - module: blocks.*\n    train: bias\n")
    checked = check(model, (x,), config=path, backend="dropit")
    assert checked, checked
    assert any(f.name == "not trained" for f in checked.findings)
