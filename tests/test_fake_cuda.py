"""What the passes make of models on a GPU, without one: fake CUDA tensors."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from fake_cuda import KERNELS, Attention, Faked, captured, faked
from models import Case, of_timm
from op_calls import LOSSLESS, graph_of
from op_calls import Case as Call
from op_cases import CASES, spelled
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.backends import cudnn
from torch.utils._python_dispatch import TorchDispatchMode

import dropit_fx
from dropit_fx.compile.backend import rewrite_dynamo_graph
from dropit_fx.compile.channels_last import channels_last
from dropit_fx.config import load_config, make_config
from dropit_fx.ops import backwards, norms
from dropit_fx.ops.table import RULES, bind
from dropit_fx.passes import run_pipeline
from dropit_fx.passes.plan import Plan
from dropit_fx.report.rows import Report, Row, rows
from dropit_fx.runtime.packed_call import pack

WIDTH, TOKENS, VOCABULARY = 256, 128, 1000
UNSEEN = 0.002  # of dense: what may be kept since no row knows it


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        attn_pdrop=0.0,  # PyTorch's attention with dropout is kept whole
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).train()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).train()


def text(batch: int) -> dict[str, Any]:
    ids = torch.zeros(batch, TOKENS, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


RESNET = of_timm("resnet50", 64, layers=(1, 1, 1, 1))
MODELS: dict[str, tuple[Case, torch.memory_format]] = {
    "deit": (of_timm("deit_tiny_patch16_224", 224, depth=2), torch.contiguous_format),
    "resnet": (RESNET, torch.contiguous_format),
    "resnet, channels last": (RESNET, torch.channels_last),
    "gpt2": (Case("gpt2", gpt2, kwargs=text, exported=True), torch.contiguous_format),
    "llama": (Case("llama", llama, kwargs=text, exported=True), torch.contiguous_format),
}
PRECISIONS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
}


@functools.cache
def model_on(device: str, name: str, precision: str) -> Faked:
    case, layout = MODELS[name]
    return captured(case, device, *PRECISIONS[precision], layout)


@functools.cache
def report(device: str, name: str, precision: str, kernel: str = "math") -> Report:
    return Report(tuple(rows(model_on(device, name, precision).plan(kernel))))


def packed_bytes(report: Report) -> int:
    """What is kept but for statistics, which CPUs compute in bfloat16 where the model is."""
    return sum(r.kept_bytes for r in report.rows if not is_statistic(r))


def is_statistic(row: Row) -> bool:
    return row.reason.startswith("small beside what is packed")


every_precision = pytest.mark.parametrize("precision", PRECISIONS)


@every_precision
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * case.exported) for n, (case, _) in MODELS.items()],
)
def test_a_gpu_keeps_what_a_cpu_keeps(name: str, precision: str) -> None:
    cpu = report("cpu", name, precision)
    packed_on_cpu = {r.name for r in cpu.rows if not r.reason}
    for kernel in KERNELS if not name.startswith("resnet") else ("math",):
        cuda, which = report("cuda", name, precision, kernel), f"{name}, {precision}, {kernel}"
        unseen = {
            r.name: r.reason
            for r in cuda.rows
            if r.reason.startswith("no row for") or "its row does not know it" in r.reason
            if r.dense_bytes > UNSEEN * cuda.dense_bytes
        }
        assert not unseen, which
        assert not {r.name for r in cuda.rows if r.reason} & packed_on_cpu, which
        assert packed_bytes(cuda) == packed_bytes(cpu), which


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_that_is_asked_for_runs(kernel: str) -> None:
    model = model_on("cuda", "deit", "bfloat16")
    with Attention(kernel) as attention, torch.enable_grad():
        run_pipeline(Plan(module=model.copy(), inputs=model.args, config=load_config(LOSSLESS)))
    assert set(attention.ran) == {kernel}


def test_a_llama_in_bfloat16_keeps_no_more_than_one_in_float32() -> None:
    """RMSNorm casts to float32 and back: the casts are made again."""
    half, single = (report("cuda", "llama", p, "flash") for p in ("bfloat16", "float32"))
    assert packed_bytes(half) == packed_bytes(single)


def test_transform_takes_a_model_of_fake_tensors() -> None:
    case, layout = MODELS["resnet"]
    model, args, _ = faked(case, "cuda", torch.float32, layout)
    packed = dropit_fx.transform(model, preset="balanced", example_args=args)
    found = dropit_fx.report(packed)
    assert found.kept_bytes == report("cuda", "resnet", "float32").kept_bytes
    assert {p.device.type for p in packed.parameters()} == {"cuda"}


@pytest.mark.parametrize("name", ["deit", "resnet"])
def test_the_plug_in_rewrites_a_graph_of_a_gpu(name: str) -> None:
    model, args, _ = faked(MODELS[name][0], "cuda", torch.float32)
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append((gm, inputs))
        return gm.forward

    with args[0].fake_mode:
        torch.compile(model, backend=keep, fullgraph=True)(*args)
    [(gm, inputs)] = graphs
    channels_last(gm)
    with Attention("math"), torch.enable_grad():
        record = rewrite_dynamo_graph(gm, inputs, make_config(preset="balanced"))
    assert record is not None
    expected = report("cuda", name, "float32")
    assert record.report.kept_bytes == expected.kept_bytes
    # inductor computes the convolutions channels-last: so are they packed
    laid_out = [n for n in gm.graph.nodes if n.target == "contiguous"]
    assert laid_out
    packs = [n.args[0] for n in gm.graph.nodes if n.target is pack]
    assert packs
    if name == "resnet":
        assert {n.target for n in packs if n.op == "call_method"} <= {
            "contiguous",
            "mean",
            "flatten",
        }


# --- each op runs the kernels that dense runs


class Kernels(TorchDispatchMode):
    """Notes the ops that reach a device, but for views and copies; in place or not is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        moves = ("clone", "alias", "detach", "empty", "empty_like", "_to_copy")
        name = func._schema.name.removeprefix("aten::")
        if func.namespace == "aten" and not func.is_view and name not in moves:
            self.ran.append(name.rstrip("_"))
        return func(*args, **(kwargs or {}))


def fake_tensors(call: Call, mode: FakeTensorMode, dtype: torch.dtype) -> list[Tensor]:
    out = []
    for tensor in call.tensors(dtype):
        with mode:
            fake = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
            )
        out.append(fake.requires_grad_(tensor.requires_grad))
    return out


def packed_copy(graph: fx.GraphModule, tensors: list[Tensor]) -> fx.GraphModule:
    module = fx.GraphModule(graph, fx.Graph())
    module.graph.output(module.graph.graph_copy(graph.graph, {}))
    run_pipeline(Plan(module=module, inputs=tuple(tensors), config=load_config(LOSSLESS)))
    return module


def kernels(graph: fx.GraphModule, tensors: list[Tensor], mode: FakeTensorMode) -> list[str]:
    with mode, Kernels() as log:
        graph(*tensors)
    return log.ran


def within(few: list[str], many: list[str]) -> bool:
    """Whether ``few`` are among ``many``, in this order."""
    rest = iter(many)
    return all(name in rest for name in few)


def test_a_copy_that_cudnn_makes_of_its_input_is_its_input() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        wide = torch.empty(2, CHANNELS, 4, 8, device="cuda", requires_grad=True)
        weight = torch.ones(CHANNELS, device="cuda", requires_grad=True)
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    half = graph.call_method("clone", (x,))
    half = graph.call_method("narrow", (half, 3, 1, 4))
    graph.output(graph.call_function(F.batch_norm, (half, None, None, w, w, True)))
    plan = Plan(
        module=fx.GraphModule({}, graph), inputs=(wide, weight), config=load_config(LOSSLESS)
    )
    done, nbytes = run_pipeline(plan), 2 * CHANNELS * 16 * 4
    large = [s for s in done.sites if s.nbytes >= nbytes]
    # autograd keeps the copy; the packed call makes none, and packs the half that was copied
    assert [(r.label, s.dense) for s in large for r in s.reads] == [
        ("batch_norm.inside", True),
        ("batch_norm.input", False),
    ]
    assert large[0].nbytes == nbytes
    packed = {d.read.label: (d.codec, d.nbytes) for d in done.decisions if d.packed}
    assert packed == {"batch_norm.inside": ("drop", 0), "batch_norm.input": ("quant", nbytes)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_packed_call_runs_the_kernels_that_dense_runs(name: str, dtype: torch.dtype) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    target = RULES[name].targets[0]
    for call in CASES[name]:
        dense = graph_of(target, call)
        tensors = fake_tensors(call, mode, dtype)
        with cudnn.flags(enabled=name != "grid_sample"):  # cuDNN's has no fake kernel
            expected = kernels(dense, tensors, mode)
            found = kernels(packed_copy(dense, tensors), tensors, mode)
        assert within(expected, found), f"{name}, {call.name}: {expected}, packed: {found}"


@pytest.mark.parametrize("target", [F.dropout, torch.dropout_, torch.ops.aten.dropout_.default])
def test_dropout_in_place_draws_as_it_does_on_a_gpu(target: Any) -> None:
    call = spelled("dropout", torch.dropout_)  # other numbers than those of the fused kernel
    if target is F.dropout:
        call = replace(call, kwargs={"inplace": True})
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    dense = graph_of(target, call)
    tensors = fake_tensors(call, mode, torch.float32)
    assert kernels(dense, tensors, mode) == ["bernoulli", "div", "mul"]
    packed = kernels(packed_copy(dense, tensors), tensors, mode)
    assert packed[:3] == ["bernoulli", "div", "mul"]


# --- batch norm

CHANNELS = 8


def batch(dtype: torch.dtype, *shape: int) -> dict[str, Any]:
    """The arguments of a batch norm on the GPU."""
    vector = lambda: torch.ones(CHANNELS, device="cuda")  # noqa: E731
    return {
        "input": torch.empty(shape, dtype=dtype, device="cuda"),
        **{n: vector() for n in ("running_mean", "running_var", "weight", "bias")},
        "training": True,
    }


@pytest.mark.parametrize(
    ("dtype", "shape", "changes", "kernel"),
    [
        (torch.float32, (2, CHANNELS, 4, 4), {}, "cudnn_batch_norm"),
        (torch.float16, (2, CHANNELS, 4, 4), {}, "cudnn_batch_norm"),
        (torch.bfloat16, (2, CHANNELS, 4, 4), {}, "native_batch_norm"),
        (torch.float32, (2, CHANNELS), {}, "native_batch_norm"),
        (torch.float32, (2, CHANNELS, 4), {"weight": None}, "native_batch_norm"),
        (torch.float32, (2, CHANNELS, 4), {"bias": None}, "native_batch_norm"),
        (
            torch.float32,
            (2, CHANNELS, 4),
            {"running_mean": None, "running_var": None},
            "cudnn_batch_norm",
        ),
        (torch.float32, (2, CHANNELS, 4), {"training": False}, "cudnn_batch_norm"),
    ],
)
def test_batch_norm_runs_the_kernel_of_dense_and_its_backward(
    dtype: torch.dtype, shape: tuple[int, ...], changes: dict[str, Any], kernel: str
) -> None:
    norm = RULES["batch_norm"]
    assert norm.run_saving
    assert norm.backward
    with FakeTensorMode(), torch.no_grad():
        arguments = batch(dtype, *shape) | changes
        with Kernels() as dense:
            F.batch_norm(**arguments)
        with Kernels() as saving:
            bound = bind(norm, (), arguments)
            assert bound is not None
            _, made = norm.run_saving(*bound.values())
        assert saving.ran == dense.ran == [kernel]
        tensors = {n: a for n, a in arguments.items() if isinstance(a, Tensor)}
        call = backwards.Called(
            norm,
            {n: None if n in tensors else a for n, a in (arguments | {"eps": 1e-5}).items()},
            *[{n: f(t) for n, t in tensors.items()} for f in (shape_of, stride_of, dtype_of)],
            frozenset(("input", "weight", "bias")),
        )
        saved: Any = tensors | made
        with Kernels() as backward:
            grads = norm.backward(torch.empty_like(arguments["input"]), saved, call)
        assert grads["input"] is not None
        assert grads["input"].shape == shape
        # ATen's own op takes the one that fits the forward; cuDNN has none in eval mode
        asks = {"weight", "bias"} <= tensors.keys() and arguments["training"]
        assert backward.ran == ["batch_norm_backward" if asks else "native_batch_norm_backward"]


def shape_of(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def stride_of(x: Tensor) -> tuple[int, ...]:
    return x.stride()


def dtype_of(x: Tensor) -> torch.dtype:
    return x.dtype


def test_what_cudnn_hands_to_its_backward_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "cudnn_reserve_nbytes", lambda x: 1000)
    expected = report.__wrapped__("cuda", "resnet", "float32")
    found = [r for r in expected.rows if r.kept_bytes == 1000]
    packed = {r.name.split(".")[0] for r in expected.rows if r.name.endswith(".invstd")}
    assert len(found) == len(packed) > 0
    assert all(r.name.endswith(".reserve") for r in found)
