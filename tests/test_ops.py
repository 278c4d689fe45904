"""Every row of the op table, in every spelling, with every codec that serves it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from op_cases import (
    CASES,
    FROM_ITS_RESULT,
    LOSSLESS,
    Case,
    T,
    assert_agrees,
    assert_same,
    case,
    graph_of,
    pack_graph,
    run,
    spelled,
    spellings,
    writes,
)
from torch import Tensor, fx, nn

import dropit_fx
from dropit_fx.backend import compiled_graphs
from dropit_fx.codecs import CODEC
from dropit_fx.config import serves
from dropit_fx.core_types import Plan, Read, Use
from dropit_fx.op_table import OP_RULES, RULES, bind
from dropit_fx.packed_call import PACKED_OPS

ALL_CASES = [(name, c) for name, cases in CASES.items() for c in cases]


def case_id(value: Any) -> str:
    if isinstance(value, Case):
        return value.name
    return str(getattr(value, "__name__", value))


def test_every_row_has_cases() -> None:
    assert set(CASES) == set(RULES)


# --- found and packed, in every spelling


@pytest.mark.parametrize(("name", "target"), spellings(), ids=case_id)
def test_every_spelling_is_packed_without_changing_a_bit(name: str, target: Any) -> None:
    call = spelled(name, target)
    tensors = call.tensors()
    dense = graph_of(target, call)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    assert reasons(plan) == kept_as_they_are(tensors)
    absent = {n for n, a in (bind(RULES[name], call.args, call.kwargs) or {}).items() if a is None}
    every = {r.operand for r in RULES[name].reads}
    assert {d.read.operand for d in plan.decisions} == every - absent
    calls = [n.target for n in packed.graph.nodes if n.target in PACKED_OPS.values()]
    assert calls == [PACKED_OPS[name]]
    assert target not in [n.target for n in packed.graph.nodes]
    assert_agrees(call, run(packed, tensors), run(dense, tensors))


def reasons(plan: Plan) -> list[str]:
    """Why reads are kept, but for statistics: those stay as they are."""
    kept = [d for d in plan.decisions if not d.packed]
    return sorted(d.reason for d in kept if d.read.read is None or d.read.read.like)


def kept_as_they_are(tensors: list[Tensor]) -> list[str]:
    """The reason for each tensor argument that is no float."""
    kinds = [str(t.dtype).removeprefix("torch.") for t in tensors if not t.is_floating_point()]
    return [f"its dtype is {kind}" for kind in kinds]


# --- in-place spellings run out of place: who reads the written tensor later reads the result


def writing() -> list[Any]:
    """(row, target, settings) of every spelling that writes into its input."""
    by_name = [(name, target, {}) for name, target in spellings() if writes(target)]
    rows = [r.name for r in OP_RULES if "inplace" in inspect.signature(r.run).parameters]
    return by_name + [(name, RULES[name].targets[0], {"inplace": True}) for name in rows]


def writing_graph(target: Any, call: Case, settings: dict[str, Any], reader: str) -> fx.GraphModule:
    """A call that writes, and a reader: of what it wrote to, of a view of that, or its result."""
    graph = fx.Graph()
    count = sum(isinstance(a, T) for a in call.args)
    leaves = [graph.placeholder(f"t{i}") for i in range(count)]
    copies = [graph.call_method("clone", (leaf,)) for leaf in leaves]
    written, operands = copies[0], iter(copies)
    seen = {"the written tensor": written}
    if reader == "an older view":
        seen[reader] = graph.call_method("flatten", (written,))
    args = tuple(next(operands) if isinstance(a, T) else a for a in call.args)
    create = graph.call_method if isinstance(target, str) else graph.call_function
    seen["the result"] = create(target, args, settings)
    if reader == "a newer view":
        seen[reader] = graph.call_method("flatten", (written,))
    graph.output(graph.call_function(torch.neg, (seen[reader],)))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    "reader", ["the written tensor", "a newer view", "an older view", "the result"]
)
@pytest.mark.parametrize(("name", "target", "settings"), writing(), ids=case_id)
def test_later_readers_of_a_written_tensor_see_the_result(
    name: str, target: Any, settings: dict[str, Any], reader: str
) -> None:
    call = spelled(name, target)
    if name in ("elu", "selu", "celu"):
        call = replace(call, rounds=FROM_ITS_RESULT)
    tensors = call.tensors()
    dense = writing_graph(target, call, settings, reader)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    # a result out of place would not be seen through a view that is there already
    assert any(d.packed for d in plan.decisions) == (reader != "an older view")
    assert_agrees(call, run(packed, tensors), run(dense, tensors))


# --- lossless codecs: every gradient has the same bits


@pytest.mark.parametrize(("name", "call"), ALL_CASES, ids=case_id)
def test_lossless_gradients_have_the_same_bits(name: str, call: Case) -> None:
    tensors = call.tensors()
    dense = graph_of(RULES[name].targets[0], call)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    if call.obstacle:
        assert {d.reason for d in plan.decisions} <= {call.obstacle}
    else:
        inside = [f"{name} keeps it inside, its row does not know it"] * call.copies
        assert reasons(plan) == sorted(inside + kept_as_they_are(tensors))
    assert_agrees(call, run(packed, tensors), run(dense, tensors))


@pytest.mark.parametrize(
    ("name", "call"),
    [(n, c) for n, c in ALL_CASES if sum(t.requires_grad for t in c.tensors()) > 1],
    ids=case_id,
)
def test_each_gradient_alone_has_the_same_bits(name: str, call: Case) -> None:
    # a formula computes only what is asked for, and may read only what that needs
    if (name, call.name) == ("matmul", "broadcast right"):
        pytest.skip("matmul itself folds a batch of one in two ways, which differ in rounding")
    tensors = call.tensors()
    wanted = [t for t in tensors if t.requires_grad]
    for only in wanted:
        for t in wanted:
            t.requires_grad_(t is only)
        dense = graph_of(RULES[name].targets[0], call)
        packed, _ = pack_graph(dense, tensors, LOSSLESS)
        assert_agrees(call, run(packed, tensors), run(dense, tensors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_lossless_gradients_have_the_same_bits_in_other_dtypes(
    name: str, dtype: torch.dtype
) -> None:
    call = CASES[name][0]
    tensors = call.tensors(dtype)
    dense = graph_of(RULES[name].targets[0], call)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    assert reasons(plan) == kept_as_they_are(tensors)
    assert_agrees(call, run(packed, tensors), run(dense, tensors))


# --- lossy codecs: only the gradients that read the packed tensor change, and by its loss alone


def contractions() -> list[Any]:
    """(row, read, codec) for every codec that a GEMM or convolution operand can be packed with."""
    return [
        (rule.name, read, codec.name)
        for rule in OP_RULES
        for read in rule.reads
        for codec in CODEC.values()
        if read.use is Use.CONTRACT and serves(codec, read) and codec.name not in ("keep", "drop")
    ]


def arguments(name: str, call: Case) -> list[str]:
    """Names of the tensor arguments, in the order of the placeholders."""
    bound = bind(RULES[name], call.args, call.kwargs) or {}
    return [n for n, a in bound.items() if isinstance(a, T)]


def big(name: str) -> Case:
    """A call whose operands take more than one block, and a part of one."""
    if name.startswith("conv"):
        d = int(name.removeprefix("conv_transpose").removeprefix("conv")[0])
        side = {1: 300, 2: 18, 3: 7}[d]
        return case("big", T((2, 8, *[side] * d)), T((8, 8, *[3] * d)), T((8,)))
    shapes = {
        "linear": ((7, 11, 40), (48, 40), (48,)),
        "matmul": ((7, 11, 40), (40, 48)),
        "mm": ((60, 40), (40, 48)),
        "bmm": ((3, 30, 40), (3, 40, 48)),
        "addmm": ((48,), (60, 40), (40, 48)),
        "baddbmm": ((48,), (3, 30, 40), (3, 40, 48)),
    }
    return case("big", *[T(s) for s in shapes[name]])


@pytest.mark.parametrize(
    ("name", "read", "codec"), contractions(), ids=lambda v: getattr(v, "operand", v)
)
def test_only_gradients_that_read_the_packed_tensor_change(
    name: str, read: Read, codec: str
) -> None:
    call = big(name)
    names = arguments(name, call)
    tensors = call.tensors()
    config = {
        "preset": None,
        "force": True,
        "rules": [{"codec": codec}],
    }
    dense = graph_of(RULES[name].targets[0], call)
    packed, plan = pack_graph(dense, tensors, config)
    decided = {d.read.operand: d for d in plan.decisions}
    if not read.lossy:
        assert (
            decided[read.operand].reason
            == f"the gradient of {read.needed_by[0]} depends on it, and stays exact"
        )
        return
    assert decided[read.operand].codec == codec
    seed = 3  # of the random codecs, too
    out, grads = run(packed, tensors, seed)
    exact, exact_grads = run(dense, tensors, seed)
    assert_same(out, exact)
    lossy = {n for d in plan.decisions if d.packed for n in d.read.read.needed_by}
    for n, grad, wanted in zip(names, grads, exact_grads, strict=True):
        if n in lossy:
            assert not torch.equal(grad, wanted)
        else:
            assert_same(grad, wanted)


def dropped(x: Tensor, gamma: float, block: int | None) -> Tensor:
    """DropIT's min-k (section 3.2), written with ``torch.topk``: independent of the kernels."""
    flat = x.detach().reshape(-1)
    pieces = flat.split(block or flat.numel())
    out = []
    for piece in pieces:
        ratio = round((1 - gamma) * 10_000)
        # to the nearest for blocks; the paper floors
        k = (len(piece) * ratio + 5000) // 10_000 if block else len(piece) * ratio // 10_000
        kept = piece.abs().topk(k).indices
        out.append(torch.zeros_like(piece).scatter(0, kept, piece[kept]))
    return torch.cat(out).reshape(x.shape)


@pytest.mark.parametrize("scope", ["block", "tensor"])
@pytest.mark.parametrize("gamma", [0.3, 0.9])
@pytest.mark.parametrize("name", [r.name for r in OP_RULES if r.reads[0].use is Use.CONTRACT])
def test_mink_gradient_is_that_of_the_explicitly_dropped_tensor(
    name: str, gamma: float, scope: str
) -> None:
    call = big(name)
    names, tensors = arguments(name, call), call.tensors()
    config = {
        "preset": None,
        "force": True,
        "rules": [{"codec": "mink", "gamma": gamma, "scope": scope, "block": 256}],
    }
    dense = graph_of(RULES[name].targets[0], call)
    packed, plan = pack_graph(dense, tensors, config)
    _, grads = run(packed, tensors)
    for decision in plan.decisions:
        if not decision.packed:
            continue
        at = names.index(decision.read.operand)
        instead = list(tensors)
        instead[at] = dropped(
            tensors[at], gamma, 256 if scope == "block" else None
        ).requires_grad_()
        _, oracle = run(dense, instead)
        for reader in decision.read.read.needed_by:
            assert_same(grads[names.index(reader)], oracle[names.index(reader)])


def test_mink_drops_in_memory_order_where_the_input_is_channels_last() -> None:
    x, w = T((2, 8, 18, 18), format=torch.channels_last), T((8, 8, 3, 3))
    call = case("channels_last", x, w)
    tensors = call.tensors()
    config = {
        "preset": None,
        "force": True,
        "rules": [{"codec": "mink", "gamma": 0.8, "block": 256}],
    }
    dense = graph_of(torch.conv2d, call)
    packed, _ = pack_graph(dense, tensors, config)
    rows = tensors[0].permute(0, 2, 3, 1)
    instead = dropped(rows, 0.8, 256).permute(0, 3, 1, 2).requires_grad_()
    _, (_, oracle) = run(dense, [instead, tensors[1]])
    _, (_, grad) = run(packed, tensors)
    assert_same(grad, oracle)


def test_random_is_unbiased() -> None:
    call = case("linear", T((32, 64)), T((16, 64)))
    tensors = call.tensors()
    tensors[0].requires_grad_(False)
    config = {
        "preset": None,
        "force": True,
        "rules": [{"codec": "random", "gamma": 0.5, "block": 64}],
    }
    dense = graph_of(F.linear, call)
    packed, _ = pack_graph(dense, tensors, config)
    _, (_, exact) = run(dense, tensors)
    draws = torch.stack([run(packed, tensors, seed)[1][1] for seed in range(150)])
    one = (draws - exact).norm(dim=(1, 2)).mean() / exact.norm()
    mean = (draws.mean(0) - exact).norm() / exact.norm()
    assert 0.5 < one < 2  # a single draw is far off
    assert mean < 1.3 * one / 150**0.5  # and the mean is as near as 150 unbiased draws allow


# --- what a row does not cover runs as before


@pytest.mark.parametrize(
    "settings", [{"p": 0.0}, {"p": 1.0}, {"p": 0.5, "training": False}], ids=str
)
def test_dropout_that_needs_no_mask_is_left_alone(settings: dict[str, Any]) -> None:
    call = case("dropout", T((4, 9)), **settings)
    tensors = call.tensors()
    dense = graph_of(F.dropout, call)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    assert not any(d.packed for d in plan.decisions)
    assert_same(run(packed, tensors), run(dense, tensors))


def test_max_pool_whose_indices_are_returned_is_left_alone() -> None:
    call = case("pool", T((2, 3, 8, 8)), 2, return_indices=True)
    tensors = call.tensors()
    dense = graph_of(F.max_pool2d, call)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    assert {d.reason for d in plan.decisions} == {
        "this call of max_pool2d is of a kind that its row does not cover"
    }
    assert_same(packed(*tensors), dense(*tensors))


def test_max_pool_with_a_window_of_more_than_256_cells_is_left_alone() -> None:
    call = case("pool", T((1, 1, 40, 40)), 17, 1)
    tensors = call.tensors()
    dense = graph_of(F.max_pool2d, call)
    packed, plan = pack_graph(dense, tensors, LOSSLESS)
    assert not any(d.packed for d in plan.decisions)
    assert_same(run(packed, tensors), run(dense, tensors))


@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "leaky_relu"])
def test_slopes_at_the_kinks_and_at_nan_are_autograds(name: str) -> None:
    special = [-1.0, -0.0, 0.0, 1.0, 6.0, torch.inf, -torch.inf, torch.nan]
    x = torch.tensor(special).requires_grad_()
    dense = graph_of(RULES[name].targets[0], case("special", T((8,))))
    packed, _ = pack_graph(dense, [x], LOSSLESS)
    assert_same(run(packed, [x]), run(dense, [x]))


@pytest.mark.parametrize("fill", [0.0, torch.nan, -torch.inf])
def test_max_pool_picks_the_same_of_equal_values(fill: float) -> None:
    x = torch.full((1, 1, 6, 6), fill).requires_grad_()
    dense = graph_of(F.max_pool2d, case("equal", T((1, 1, 6, 6)), 3, 2, 1))
    packed, _ = pack_graph(dense, [x], LOSSLESS)
    assert_same(run(packed, [x]), run(dense, [x]))


# --- the same ops as modules, as users write them, through the tracers


class Conv1D(nn.Module):
    """Hugging Face's layer of GPT-2: ``addmm`` over the flattened input."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D as Layer

        self.layer = Layer(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def modules() -> list[Any]:
    return [
        ("linear", nn.Linear(8, 5), (2, 6, 8)),
        ("linear", nn.Linear(8, 5, bias=False), (6, 8)),
        ("conv1d", nn.Conv1d(3, 4, 3, padding="same"), (2, 3, 12)),
        ("conv2d", nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 9)),
        ("conv2d", nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9, 9)),
        ("conv3d", nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
        ("conv_transpose1d", nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 8)),
        ("conv_transpose2d", nn.ConvTranspose2d(3, 4, 3, output_padding=1, stride=2), (2, 3, 5, 5)),
        ("conv_transpose3d", nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
        ("addmm", Conv1D(), (2, 6, 8)),
        ("relu", nn.ReLU(), (4, 9)),
        ("relu", nn.ReLU(inplace=True), (4, 9)),
        ("hardtanh", nn.ReLU6(), (4, 9)),  # PyTorch's ReLU6 is a Hardtanh
        ("hardtanh", nn.ReLU6(inplace=True), (4, 9)),
        ("hardtanh", nn.Hardtanh(-0.5, 0.5), (4, 9)),
        ("leaky_relu", nn.LeakyReLU(0.1, inplace=True), (4, 9)),
        ("dropout", nn.Dropout(0.4), (4, 9)),
        ("dropout", nn.Dropout(0.4, inplace=True), (4, 9)),
        ("max_pool1d", nn.MaxPool1d(3), (2, 3, 12)),
        ("max_pool2d", nn.MaxPool2d(3, 2, 1), (2, 3, 9, 9)),
        ("max_pool3d", nn.MaxPool3d(2), (1, 2, 4, 4, 4)),
    ]


class Between(nn.Module):
    """A layer between two products with scalars, so that it reads no model input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * 2.0) * 3.0


def lossless(name: str) -> dict[str, Any]:
    codec = {Use.CONTRACT: {"codec": "mink", "gamma": 0.0}, Use.SLOPE: {"codec": "bitmask"}}
    return LOSSLESS | {"rules": [codec[RULES[name].reads[0].use]]}


def by_symbolic_trace(model: nn.Module, x: Tensor, name: str) -> Any:
    return dropit_fx.transform(model, lossless(name), example_args=(x,))


def by_export(model: nn.Module, x: Tensor, name: str) -> Any:
    exported = torch.export.export(model, (x,)).module()
    return dropit_fx.transform(exported, lossless(name), example_args=(x,))


def by_dynamo(model: nn.Module, x: Tensor, name: str) -> Any:
    options = {"config": lossless(name)}
    return torch.compile(model, backend="dropit_eager", fullgraph=True, options=options)


@pytest.mark.parametrize("by", [by_symbolic_trace, by_export, by_dynamo])
@pytest.mark.parametrize(("name", "layer", "shape"), modules(), ids=lambda v: type(v).__name__)
def test_module_is_packed_by_every_tracer(
    name: str, layer: nn.Module, shape: tuple[int, ...], by: Any
) -> None:
    model = Between(layer)
    x = torch.randn(shape).requires_grad_()  # a layer without parameters saves nothing else
    packed = by(model, x, name)

    def step(function: Any) -> list[Any]:
        torch.manual_seed(5)
        leaf = x.detach().clone().requires_grad_()
        out = function(leaf)
        return [out, *torch.autograd.grad(out.square().sum(), [leaf, *model.parameters()])]

    assert_same(step(packed), step(model))
    report = compiled_graphs()[-1].report if by is by_dynamo else dropit_fx.report(packed)
    assert {row.op for row in report.rows if not row.reason} == {name}


# --- PyTorch's own samples of arguments


OP_DB = {
    "nn.functional.linear": "linear",
    "nn.functional.conv1d": "conv1d",
    "nn.functional.conv2d": "conv2d",
    "nn.functional.conv3d": "conv3d",
    "nn.functional.conv_transpose1d": "conv_transpose1d",
    "nn.functional.conv_transpose2d": "conv_transpose2d",
    "nn.functional.conv_transpose3d": "conv_transpose3d",
    "matmul": "matmul",
    "mm": "mm",
    "bmm": "bmm",
    "addmm": "addmm",
    "baddbmm": "baddbmm",
    "nn.functional.relu": "relu",
    "nn.functional.relu6": "relu6",
    "nn.functional.leaky_relu": "leaky_relu",
    "nn.functional.hardtanh": "hardtanh",
    "nn.functional.dropout": "dropout",
    "nn.functional.max_pool1d": "max_pool1d",
    "nn.functional.max_pool2d": "max_pool2d",
    "nn.functional.max_pool3d": "max_pool3d",
}


def test_op_db_is_asked_about_every_row() -> None:
    assert set(OP_DB.values()) == set(RULES)


def samples(name: str, limit: int) -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [o for o in op_db if o.name == name and o.variant_test_name == ""]
    found = list(info.sample_inputs("cpu", torch.float32, requires_grad=True))
    step = max(1, len(found) // limit)
    # op_db's dropout reseeds, in a way that Dynamo cannot follow
    op = F.dropout if name == "nn.functional.dropout" else info.op
    return [(op, s.input, s.args, s.kwargs) for s in found[::step][:limit]]


@pytest.mark.parametrize(("backend", "limit"), [("dropit_eager", 5), ("aot_eager", 2)])
@pytest.mark.parametrize("name", OP_DB)
def test_op_db_samples_have_the_same_bits(name: str, backend: str, limit: int) -> None:
    eager = backend == "dropit_eager"
    options = {"config": LOSSLESS} if eager else {"config": LOSSLESS, "inner": "aot_eager"}
    seen = len(compiled_graphs())
    for op, *given in samples(name, limit):
        leaves, spec = pytree.tree_flatten(given)
        wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]

        def call(*leaves: Any, op: Any = op, spec: Any = spec) -> Any:
            operands = [t * 1 if isinstance(t, Tensor) else t for t in leaves]
            x, args, kwargs = pytree.tree_unflatten(operands, spec)
            return op(x, *args, **kwargs)

        torch._dynamo.reset()
        compiled = torch.compile(
            call, backend="dropit_eager" if eager else "dropit", options=options, fullgraph=True
        )
        results = []
        for function in (call, compiled):
            torch.manual_seed(5)
            out = pytree.tree_leaves(function(*leaves))[0]
            results.append([out, *torch.autograd.grad(out.sum(), wanted, allow_unused=True)])
        assert_same(*results)
    assert len(compiled_graphs()) > seen
