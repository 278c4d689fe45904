"""Each row's ``reads``, against PyTorch's own table of derivatives and against autograd itself."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from op_cases import CASES, T, graph_of

from dropit_fx.op_table import OP_RULES, RULES, bind

DERIVATIVES = Path(torchgen.__file__).parent / "packaged" / "autograd" / "derivatives.yaml"

# Row -> the entries of derivatives.yaml behind it, with the row's name for each of their arguments.
# Composite ops have no entry of their own: linear is an mm or addmm, whose mat2 is the weight.
ENTRIES: dict[str, list[tuple[str, dict[str, str]]]] = {
    "linear": [
        ("mm", {"self": "input", "mat2": "weight"}),
        ("addmm", {"mat1": "input", "mat2": "weight", "self": "bias"}),
    ],
    **{f"conv{kind}{d}d": [("convolution", {})] for kind in ("", "_transpose") for d in (1, 2, 3)},
    "matmul": [
        ("mm", {"self": "input", "mat2": "other"}),
        ("bmm", {"self": "input", "mat2": "other"}),
    ],
    "mm": [("mm", {"self": "input"})],
    "bmm": [("bmm", {"self": "input"})],
    "addmm": [("addmm", {"self": "input"})],
    "baddbmm": [("baddbmm", {"self": "input"})],
    "relu": [("relu", {"self": "input"})],
    "relu6": [("hardtanh", {"self": "input"})],
    "hardtanh": [("hardtanh", {"self": "input"})],
    "leaky_relu": [("leaky_relu", {"self": "input"})],
    "dropout": [("native_dropout", {"result1": "mask"})],
    "max_pool1d": [("max_pool2d_with_indices", {"self": "input", "result1": "indices"})],
    "max_pool2d": [("max_pool2d_with_indices", {"self": "input", "result1": "indices"})],
    "max_pool3d": [("max_pool3d_with_indices", {"self": "input", "result1": "indices"})],
}

# Where the house reads something else than PyTorch, and why that says as much.
INSTEAD = {
    # the result lies strictly between the bounds where and only where the input does
    "relu6": {"input": "result"},
    "hardtanh": {"input": "result"},
}


@cache
def entries() -> dict[str, dict[str, Any]]:
    table = yaml.safe_load(DERIVATIVES.read_text())
    return {entry["name"].split("(")[0]: entry for entry in table}


def formulas(entry: dict[str, Any]) -> list[tuple[list[str], str]]:
    """(arguments, the formula of their gradients)."""
    plain = entry.get("dispatch", {}).get("Default", entry)
    # what stands under "result" is the forward-mode derivative
    skip = ("name", "result", "result0", "output_differentiability", "dispatch")
    return [([n.strip() for n in k.split(",")], v) for k, v in plain.items() if k not in skip]


def tensors_in(formula: str, schema: str) -> set[str]:
    """The tensor arguments and results that a formula computes with, not just asks for sizes."""
    formula = re.sub(r"\w+\.(sym_)?(sizes|strides|size|options|layout)\([^)]*\)", "", formula)
    formula = re.sub(r"\w+->sym_sizes\(\)", "", formula)
    names = re.findall(r"Tensor\??(?:\([^)]*\))?\s+(\w+)", schema)
    return {n for n in [*names, "result", "result1"] if re.search(rf"\b{n}\b", formula)}


@pytest.mark.parametrize("name", RULES)
def test_row_reads_what_the_formulas_of_pytorch_mention(name: str) -> None:
    reads = {(r.operand, n) for r in RULES[name].reads for n in r.needed_by}
    for entry_name, names in ENTRIES[name]:
        entry = entries()[entry_name]
        found = set()
        for wanted, formula in formulas(entry):
            for argument in wanted:
                reader = names.get(argument, argument)
                for tensor in tensors_in(formula, entry["name"]):
                    operand = names.get(tensor, tensor)
                    operand = INSTEAD.get(name, {}).get(operand, operand)
                    found.add((operand, reader))
        if entry_name == "convolution":
            # one formula gives all three gradients from both tensors; that of the input does not
            # depend on the input, nor that of the weight on the weight, nor that of the bias
            both = ("input", "weight")
            assert found == {(a, b) for a in both for b in (*both, "bias")}
            found = {("input", "weight"), ("weight", "input")}
        assert reads == found, entry_name


def graph_and_saved(name: str, needs: set[str]) -> tuple[set[str], set[str]]:
    """Which of the row's reads autograd keeps when the arguments in ``needs`` require grad.

    Returns:
        The operands that were recognised among the kept tensors, and those that the row expects.
    """
    rule, call = RULES[name], CASES[name][0]
    graph = graph_of(rule.targets[0], call)
    bound = bind(rule, call.args, call.kwargs) or {}
    arguments = [n for n, a in bound.items() if isinstance(a, T)]
    tensors = call.tensors()
    for argument, tensor in zip(arguments, tensors, strict=True):
        tensor.requires_grad_(argument in needs)
    kept: list[torch.Tensor] = []
    seen: dict[str, torch.Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            args = self.fetch_args_kwargs_from_env(n)[0]
            result = super().run_node(n)
            if n.target is rule.targets[0]:
                operands = [a for a in args if isinstance(a, torch.Tensor)]
                seen.update(zip(arguments, operands, strict=True))
                seen["result"] = result
            return result

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = Watch(graph).run(*tensors)
    assert out.requires_grad
    storages = {t.untyped_storage().data_ptr() for t in kept}
    outer = {n: t.untyped_storage().data_ptr() for n, t in seen.items()}
    found = {n for n, storage in outer.items() if storage in storages}
    inner = storages - set(outer.values())
    made = [r.operand for r in rule.reads if r.operand not in seen and needs & set(r.needed_by)]
    assert len(inner) == len(made), "tensors made inside the op"
    expected = {r.operand for r in rule.reads if r.operand in seen and needs & set(r.needed_by)}
    return found, expected


def wanted() -> list[tuple[str, tuple[str, ...]]]:
    """(row, arguments that require grad): each that reads something alone, and all of them."""
    out = []
    for rule in OP_RULES:
        every = sorted({n for r in rule.reads for n in r.needed_by})
        out += [(rule.name, (n,)) for n in every]
        out += [(rule.name, tuple(every))] if len(every) > 1 else []
    return out


@pytest.mark.parametrize(("name", "needs"), wanted(), ids=str)
def test_autograd_keeps_what_the_row_says_for_these_gradients(
    name: str, needs: tuple[str, ...]
) -> None:
    found, expected = graph_and_saved(name, set(needs))
    if name.startswith("conv"):
        # autograd keeps both operands whoever requires grad: the row keeps less
        assert expected <= found == {"input", "weight"}
        return
    if name == "max_pool1d":
        found -= {"result"}  # it pools over a view with a dimension more
    instead = INSTEAD.get(name, {})
    assert {instead.get(n, n) for n in found} == expected


GEMMS = {"linear": "bias", "addmm": "input", "baddbmm": "input"}


@pytest.mark.parametrize("name", GEMMS)
def test_nothing_is_kept_where_only_the_bias_requires_grad(name: str) -> None:
    found, expected = graph_and_saved(name, {GEMMS[name]})
    assert found == expected == set()


def test_every_lossless_bit_width_is_that_of_a_mask_or_of_a_window() -> None:
    for rule in OP_RULES:
        for read in rule.reads:
            if read.bits is None:
                continue
            settings = {"kernel_size": 3}
            cells = 3 ** int(rule.name[8]) if rule.name.startswith("max_pool") else 2
            bits = read.bits(settings)
            assert 2 ** (bits - 1) < cells <= 2**bits
