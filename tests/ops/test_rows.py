"""Each row's ``reads``, against PyTorch's own table of derivatives and against autograd itself."""

from __future__ import annotations

import dis
import inspect
import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch
import torchgen
import yaml
from op_calls import T, graph_of
from op_cases import CASES, RECORDS

from dropit_fx.codecs.bitmask import BITMASK
from dropit_fx.kernels.format import index_bits
from dropit_fx.ops.losses import loss_row
from dropit_fx.ops.rule import INSIDE, OpRule
from dropit_fx.ops.table import CHECKPOINT, OP_RULES, RULES, SAVES_NOTHING, bind

DERIVATIVES = Path(torchgen.__file__).parent / "packaged" / "autograd" / "derivatives.yaml"


@cache
def entries() -> dict[str, dict[str, Any]]:
    table = yaml.safe_load(DERIVATIVES.read_text())
    return {entry["name"].split("(")[0]: entry for entry in table}


def formulas(entry: dict[str, Any]) -> list[tuple[list[str], str]]:
    """(arguments, the formula of their gradients)."""
    plain = entry.get("dispatch", {}).get("Default", entry)
    # what stands under "result" is the forward-mode derivative
    results = ("result", "result0", "result1", "result2", "result3", "output")
    skip = ("name", *results, "output_differentiability", "dispatch")
    return [([n.strip() for n in k.split(",")], v) for k, v in plain.items() if k not in skip]


def tensors_in(formula: str, schema: str) -> set[str]:
    """The tensor arguments and results that a formula computes with, not just asks for sizes."""
    formula = re.sub(
        r"\w+\.(sym_)?(sizes|strides|size|options|layout|scalar_type)\([^)]*\)", "", formula
    )
    formula = re.sub(r"\w+->sym_sizes\(\)", "", formula)
    names = re.findall(r"Tensor\??(?:\([^)]*\))?\s+(\w+)", schema)
    return {
        n
        for n in [*names, "result", "result1", "result2", "result3"]
        if re.search(rf"\b{n}\b", formula)
    }


@pytest.mark.parametrize("name", [n for n, r in RECORDS.items() if r.entries])
def test_row_reads_what_the_formulas_of_pytorch_mention(name: str) -> None:
    record = RECORDS[name]
    # other calls may have another formula; what stands beside what is rounded, autograd has not
    rows = [r for r in RULES[name].reads if r.when is None and not r.beside]
    reads = {(r.operand, n) for r in rows for n in r.needed_by}
    every = set()
    for behind in record.entries:
        entry = entries()[behind.name]
        found = set()
        for wanted, formula in formulas(entry):
            for argument in wanted:
                reader = behind.names.get(argument, argument)
                reader = record.steps.get(reader, reader)
                for tensor in tensors_in(formula, entry["name"]):
                    operand = behind.names.get(tensor, tensor)
                    operand = record.instead.get(operand, operand)
                    found.add((operand, reader))
        if behind.joint:
            assert found == set(itertools.product(behind.joint.mentions, behind.joint.gradients))
            found = {pair for pair in found if not behind.joint.in_vain(*pair)}
        found = behind.amend(found)
        assert reads == found or record.steps, behind.name
        every |= found
    assert reads == every


def graph_and_saved(name: str, needs: set[str]) -> tuple[set[str], set[str]]:
    """Which of the row's reads autograd keeps when the arguments in ``needs`` require grad.

    Returns:
        The operands that were recognised among the kept tensors, and those that the row expects.
    """
    rule, call, on_cuda = RULES[name], CASES[name][0], RECORDS[name].on_cuda
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
    reads = [r for r in rule.reads if needs & set(r.needed_by) and r.is_of(bound) and not r.beside]
    read = [r.operand for r in reads if r.operand not in on_cuda]
    made = [r.operand for r in reads if not r.instead and r.operand in read]
    made = [n for n in made if n not in seen and n not in bound]
    if INSIDE in made:  # whatever else there is
        assert len(inner) >= len(made) > 0
    else:
        assert len(inner) == len(made), "tensors made inside the op"
    return found, {n for n in read if n in seen}


def wanted() -> list[tuple[str, tuple[str, ...]]]:
    """(row, arguments that require grad): each that reads something alone, and all of them."""
    out = []
    for name, (call, *_) in CASES.items():
        rule = RULES[name]
        given = [n for n, a in (bind(rule, call.args, call.kwargs) or {}).items() if a is not None]
        every = sorted({n for r in rule.reads for n in r.needed_by if n in given})
        out += [(name, (n,)) for n in every]
        out += [(name, tuple(every))] if len(every) > 1 else []
    return out


@pytest.mark.parametrize(("name", "needs"), wanted(), ids=str)
def test_autograd_keeps_what_the_row_says_for_these_gradients(
    name: str, needs: tuple[str, ...]
) -> None:
    found, expected = graph_and_saved(name, set(needs))
    record = RECORDS[name]
    kept = record.keeps(found, set(needs))
    assert {record.instead.get(n, n) for n in kept} == expected


ADDED = {name: record.added for name, record in RECORDS.items() if record.added}


@pytest.mark.parametrize("name", ADDED)
def test_nothing_is_kept_where_only_the_bias_requires_grad(name: str) -> None:
    found, expected = graph_and_saved(name, {ADDED[name]})
    assert found == expected == set()


def test_every_lossless_bit_width_is_that_of_a_mask_or_of_a_window() -> None:
    for name, record in RECORDS.items():
        for read in RULES[name].reads:
            if read.bits is None or not record.codes:
                continue
            settings = {"kernel_size": 3}
            bits = read.bits(settings)
            assert 2 ** (bits - 1) < record.codes <= 2**bits


# --- no argument of a call is passed over in silence


def code_of(function: Any) -> Iterator[CodeType]:
    """The code of a function, and of those that it defines."""
    stack = [function.__code__]
    while stack:
        code = stack.pop()
        yield code
        stack += [c for c in code.co_consts if isinstance(c, CodeType)]


def variables_read(function: Any) -> set[str]:
    """What its code reads, or hands on: in an ``order``, or all of it to a function like it."""
    around = inspect.getclosurevars(function).nonlocals
    names = set(around.get("order", ()))
    for inner in (f for f in around.values() if isinstance(f, FunctionType)):
        if inspect.signature(inner) == inspect.signature(function):
            names |= variables_read(inner)
    for code in code_of(function):
        for instruction in dis.get_instructions(code):
            if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")):
                value = instruction.argval
                names |= set(value) if isinstance(value, tuple) else {value}
    return names


def words_in(function: Any) -> set[str]:
    """The strings in a function, and in those of this package that it calls."""
    words: set[str] = set()
    stack, seen = [function], set()
    while stack:
        one = stack.pop()
        if not isinstance(one, FunctionType) or not one.__module__.startswith("dropit_fx"):
            continue
        if one in seen:
            continue
        seen.add(one)
        stack += [cell.cell_contents for cell in one.__closure__ or ()]
        for code in code_of(one):
            for constant in code.co_consts:
                each = constant if isinstance(constant, tuple) else (constant,)
                words |= {c for c in each if isinstance(c, str)}
            stack += [one.__globals__.get(name) for name in code.co_names]
    return words


def passed_over(rule: OpRule, function: Any) -> set[str]:
    """The parameters that a function of a row does not read, and its obstacle does not name.

    Whether a call writes in place is read for every row (``ops.table.is_inplace``).
    """
    parameters = set(inspect.signature(function).parameters)
    return parameters - variables_read(function) - words_in(rule.obstacle) - {"inplace"}


@pytest.mark.parametrize("part", ["run", "run_saving", "derive"])
@pytest.mark.parametrize("rule", [*OP_RULES, *SAVES_NOTHING, CHECKPOINT], ids=lambda r: r.name)
def test_every_parameter_is_read_or_named_as_an_obstacle(rule: OpRule, part: str) -> None:
    function = getattr(rule, part)
    if isinstance(function, FunctionType):  # else a builtin: the op itself
        assert not passed_over(rule, function)


def test_a_parameter_that_is_passed_over_is_found() -> None:
    def run(input: Any, scale: float = 1.0, mode: str = "", inplace: bool = False) -> Any:
        return [input for _ in range(1)]

    rule = OpRule(name="new", targets=(), reads=(), run=run)
    assert passed_over(rule, run) == {"scale", "mode"}
    loss = loss_row("nll_loss", torch.ops.aten.nll_loss_nd.default, "input", "target", "reduction")
    without = {"weight", "ignore_index", "size_average", "reduce"}
    assert passed_over(rule, loss["run"]) == without


def test_every_parameter_is_set_by_a_case_or_named_as_an_obstacle() -> None:
    for name, record in RECORDS.items():
        rule = RULES[name]
        parameters = rule.signature.parameters
        left = {n for n, p in parameters.items() if p.default is not p.empty} - {"inplace"}
        for call in record.cases:
            bound = bind(rule, call.args, call.kwargs) or {}
            left -= {
                n for n in left if isinstance(bound[n], T) or bound[n] != parameters[n].default
            }
        assert left - words_in(rule.obstacle) == set(record.unset), name


@pytest.mark.parametrize(
    ("rows", "bits"),
    [(1, 1), (2, 1), (3, 2), (256, 8), (257, 16), (65536, 16), (65537, 32), (2**31, 32)],
)
def test_an_index_takes_the_fewest_bits_that_count_the_rows(rows: int, bits: int) -> None:
    assert index_bits(rows) == bits
    indices = torch.tensor([0, rows - 1, rows // 2])
    (packed,) = BITMASK.pack(indices, {"bits": bits})
    assert packed.nbytes == BITMASK.nbytes(3, torch.int64, {"bits": bits})
    assert BITMASK.unpack((packed,), {"bits": bits}, 3, torch.int64).equal(indices)
