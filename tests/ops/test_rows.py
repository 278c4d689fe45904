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
from op_cases import CASES, ON_CUDA, T, graph_of

from dropit_fx.codecs.bitmask import BITMASK
from dropit_fx.kernels.format import index_bits
from dropit_fx.ops.rule import INSIDE, OpRule
from dropit_fx.ops.table import CHECKPOINT, OP_RULES, RULES, SAVES_NOTHING, bind

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
    **{
        name: [(name, {"self": "input"})]
        for name in (
            *("gelu", "silu", "mish", "elu", "celu", "softplus", "hardswish", "hardsigmoid"),
            *("sigmoid", "tanh", "avg_pool2d", "avg_pool3d", "exp", "sin", "cos", "clamp"),
            *("gather", "index_select"),
        )
    },
    "where": [("where.self", {"self": "input"})],
    "masked_fill": [("masked_fill.Scalar", {"self": "input"})],
    "embedding": [("embedding", {"indices": "input"})],
    "pad": [
        (f"{mode}_pad{d}d", {"self": "input"})
        for mode in ("reflection", "replication")
        for d in (1, 2, 3)
    ],
    "avg_pool1d": [("avg_pool2d", {"self": "input"})],
    **{
        f"adaptive_avg_pool{d}d": [(f"_adaptive_avg_pool{max(d, 2)}d", {"self": "input"})]
        for d in (1, 2, 3)
    },
    "selu": [("elu", {"self": "input"})],
    "logsigmoid": [("log_sigmoid_forward", {"self": "input", "buffer": INSIDE})],
    "softsign": [
        ("div.Tensor", {"self": "input", "other": INSIDE}),  # x / (1 + |x|)
        ("abs", {"self": "input"}),
    ],
    "mul": [("mul.Tensor", {"self": "input"})],
    "div": [("div.Tensor", {"self": "input"})],
    "pow": [("pow.Tensor_Scalar", {"self": "input"})],
    "layer_norm": [("native_layer_norm", {"result1": "mean", "result2": "rstd"})],
    "group_norm": [("native_group_norm", {"result1": "mean", "result2": "rstd"})],
    "rms_norm": [("_fused_rms_norm", {"result1": INSIDE})],
    "batch_norm": [
        ("native_batch_norm", {"result1": "mean", "result2": "invstd"}),
        ("cudnn_batch_norm", {"result1": "mean", "result2": "invstd", "result3": "reserve"}),
    ],
    "scaled_dot_product_attention": [
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            {"output": "result", "logsumexp": INSIDE},
        )
    ],
    "softmax": [("_softmax", {"self": "input"})],
    "log_softmax": [("_log_softmax", {"self": "input"})],
    "nll_loss": [
        ("nll_loss_forward", {"self": "input", "total_weight": INSIDE}),
        ("nll_loss2d_forward", {"self": "input", "total_weight": INSIDE}),
    ],
    "cross_entropy": [
        ("_log_softmax", {"self": "input", "result": "log_probs"}),
        ("nll_loss_forward", {"self": "log_probs", "total_weight": INSIDE}),
        ("nll_loss2d_forward", {"self": "log_probs", "total_weight": INSIDE}),
    ],
}

# One formula gives the gradients of all these arguments, so that it mentions all these tensors.
JOINT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "convolution": (("input", "weight"), ("input", "weight", "bias")),
    "native_layer_norm": (
        ("input", "weight", "bias", "mean", "rstd"),
        ("input", "weight", "bias"),
    ),
    "native_group_norm": (("input", "weight", "mean", "rstd"), ("input", "weight", "bias")),
    "native_batch_norm": (
        ("input", "weight", "running_mean", "running_var", "mean", "invstd"),
        ("input", "weight", "bias"),
    ),
    "cudnn_batch_norm": (
        ("input", "weight", "running_mean", "running_var", "mean", "invstd", "reserve"),
        ("input", "weight", "bias"),
    ),
    "_fused_rms_norm": (("input", "weight", INSIDE), ("input", "weight")),
}

# Where the house reads something else than PyTorch, and why that says as much.
INSTEAD = {
    # the result lies strictly between the bounds where and only where the input does
    "relu6": {"input": "result"},
    "hardtanh": {"input": "result"},
}

# Ops of several steps: each step has an entry, and its gradient goes on to the argument.
STEPS = {"softsign": {INSIDE: "input"}, "cross_entropy": {"log_probs": "input"}}


def in_vain(entry: str, operand: str, reader: str) -> bool:
    """Whether a joint formula mentions ``operand``, but not for the gradient of ``reader``."""
    # the bias is added: its gradient is a sum of the cotangent; the weight multiplies, so that its
    # own gradient does not read it; a convolution is linear in its input, a norm is not
    linear = ("input", "weight") if entry == "convolution" else ("weight",)
    return reader == "bias" or (operand == reader and operand in linear)


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


@pytest.mark.parametrize("name", [r.name for r in OP_RULES])
def test_row_reads_what_the_formulas_of_pytorch_mention(name: str) -> None:
    reads = {(r.operand, n) for r in RULES[name].reads for n in r.needed_by}
    every = set()
    for entry_name, names in ENTRIES[name]:
        entry = entries()[entry_name]
        found = set()
        for wanted, formula in formulas(entry):
            for argument in wanted:
                reader = names.get(argument, argument)
                reader = STEPS.get(name, {}).get(reader, reader)
                for tensor in tensors_in(formula, entry["name"]):
                    operand = names.get(tensor, tensor)
                    operand = INSTEAD.get(name, {}).get(operand, operand)
                    found.add((operand, reader))
        if entry_name in JOINT:
            assert found == set(itertools.product(*JOINT[entry_name]))
            found = {pair for pair in found if not in_vain(entry_name, *pair)}
        if name == "cross_entropy":
            found.discard(("weight", "input"))  # with class weights, the row does not cover it
        if name == "scaled_dot_product_attention":
            # a mask that requires grad is added to q k^T: its gradient reads what theirs do
            found |= {(operand, "attn_mask") for operand, _ in found}
        if entry_name == "native_batch_norm":
            found |= {(operand, n) for operand in ON_CUDA for n in ("input", "weight")}
        assert reads == found or name in STEPS, entry_name
        every |= found
    assert reads == every


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
    read = [r.operand for r in rule.reads if needs & set(r.needed_by) and r.operand not in ON_CUDA]
    made = [n for n in read if n not in seen and n not in bound]
    if INSIDE in made:  # whatever else there is
        assert len(inner) >= len(made) > 0
    else:
        assert len(inner) == len(made), "tensors made inside the op"
    return found, {n for n in read if n in seen}


def wanted() -> list[tuple[str, tuple[str, ...]]]:
    """(row, arguments that require grad): each that reads something alone, and all of them."""
    out = []
    for rule in OP_RULES:
        call = CASES[rule.name][0]
        given = [n for n, a in (bind(rule, call.args, call.kwargs) or {}).items() if a is not None]
        every = sorted({n for r in rule.reads for n in r.needed_by if n in given})
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
    if name in ("layer_norm", "group_norm", "batch_norm") and needs == ("weight",):
        found -= {"weight"}  # kept for a joint formula: the gradient of the weight does not read it
    if name == "rms_norm" and needs == ("weight",):
        found |= {"input"}  # from which the row makes the normalised one again, which is kept
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
            if read.bits is None or rule.name in ("embedding", "index_select", "gather"):
                continue
            settings = {"kernel_size": 3}
            cells = 3 ** int(rule.name[8]) if rule.name.startswith("max_pool") else 2
            bits = read.bits(settings)
            assert 2 ** (bits - 1) < cells <= 2**bits


# --- no argument of a call is passed over in silence


def code_of(function: Any) -> Iterator[CodeType]:
    """The code of a function, and of those that it defines."""
    stack = [function.__code__]
    while stack:
        code = stack.pop()
        yield code
        stack += [c for c in code.co_consts if isinstance(c, CodeType)]


def variables_read(function: Any) -> set[str]:
    names: set[str] = set()
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
            words |= {c for c in code.co_consts if isinstance(c, str)}
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
    assert function is None or not passed_over(rule, function)


def test_a_parameter_that_is_passed_over_is_found() -> None:
    def run(input: Any, scale: float = 1.0, mode: str = "", inplace: bool = False) -> Any:
        return [input for _ in range(1)]

    rule = OpRule(name="new", targets=(), reads=(), run=run)
    assert passed_over(rule, run) == {"scale", "mode"}


def test_every_parameter_is_set_by_a_case_or_named_as_an_obstacle() -> None:
    unset = set()
    for rule in OP_RULES:
        parameters = inspect.signature(rule.run).parameters
        left = {n for n, p in parameters.items() if p.default is not p.empty} - {"inplace"}
        for call in CASES[rule.name]:
            bound = bind(rule, call.args, call.kwargs) or {}
            left -= {
                n for n in left if isinstance(bound[n], T) or bound[n] != parameters[n].default
            }
        unset |= {(rule.name, n) for n in left - words_in(rule.obstacle)}
    assert unset == {("embedding", "norm_type")}  # without max_norm it says nothing


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
