"""A step's kernels without a GPU: bytes and FLOPs are those of hand counts and of the code."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from dropit_fx import cli
from dropit_fx.bench.blocks import Llama
from dropit_fx.bench.roofline import DENSE, FUSED, PACKED, Prediction, as_row, predict, variants
from dropit_fx.bench.schedule import Kernel, kernels, kernels_of_step, scheduled_for
from dropit_fx.config import make_config
from dropit_fx.planner.cards import CARDS, find_card
from dropit_fx.planner.errors import PlanError
from dropit_fx.private import compile_fx
from dropit_fx.private_inductor import written

H100 = CARDS["h100"]
ROWS, WIDTH, INNER = 512, 64, 256
FOUR_BITS = {"rules": [{"op": "*", "codec": "quant", "bits": 4, "block": 256}]}
VARIANTS = {v.name: v for v in variants()}


class Block(nn.Module):
    """A norm, an MLP and a residual, as transformers have them."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm is None else norm
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Half(nn.Module):
    """Reads half of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x[:, : WIDTH // 2])


def rows(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)


def dense(graph: fx.GraphModule, inputs: list[Any], lower: Callable[..., Any]) -> Any:
    return compile_fx(graph, inputs, inner_compile=lower)


def scheduled(model: nn.Module, device: str, x: Tensor | None = None) -> list[Kernel]:
    torch.compiler.reset()
    x = rows() if x is None else x
    return kernels_of_step(model.to(x.dtype), (x,), dense, device)


def traffic(found: Sequence[Kernel], phase: str) -> tuple[int, int]:
    own = [k for k in found if k.phase == phase]
    return sum(k.read_bytes for k in own), sum(k.write_bytes for k in own)


# Bytes and FLOPs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_product_reads_its_operands_and_writes_its_result(device: str) -> None:
    found = scheduled(nn.Linear(WIDTH, INNER, bias=False), device)
    x, w, y = (2 * n for n in (ROWS * WIDTH, WIDTH * INNER, ROWS * INNER))
    assert traffic(found, "forward") == (x + w, y)
    assert traffic(found, "backward") == ((x + y) + (w + y), w + x)
    assert {(k.extern, k.dtype) for k in found} == {(True, torch.bfloat16)}
    assert [k.flops for k in found] == [2 * ROWS * WIDTH * INNER] * 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_norm_reads_its_input_once(device: str) -> None:
    """In one kernel, beside weight and bias; mean and deviation are written for the backward."""
    found = scheduled(nn.LayerNorm(WIDTH), device, rows(torch.float32))
    (norm,) = [k for k in found if k.phase == "forward"]
    x = 4 * ROWS * WIDTH
    assert (norm.read_bytes, norm.write_bytes) == (x + 2 * 4 * WIDTH, x + 2 * 4 * ROWS)
    assert (norm.name, norm.extern, norm.flops) == ("native_layer_norm", False, 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_of_a_part_of_a_tensor_the_part_is_counted(device: str) -> None:
    forward, *_ = scheduled(Half(), device)
    half = 2 * ROWS * WIDTH // 2
    assert (forward.read_bytes, forward.write_bytes) == (half, half)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_counted_on_a_cpu_is_what_the_code_reads_and_writes(dtype: torch.dtype) -> None:
    """The pointers that each generated function is given, and the sizes of what they point to."""
    counted: list[int] = []
    coded: list[int] = []

    def both(graph: fx.GraphModule, inputs: list[Any], lower: Callable[..., Any]) -> Any:
        def count(part: fx.GraphModule, given: Sequence[Any], **how: Any) -> Any:
            sizes = {n.name: n.meta["val"].numel() for n in part.graph.find_nodes(op="placeholder")}
            with scheduled_for(copy.deepcopy(part), given, "cpu") as made:
                coded.extend(bytes_of_code(written(made), sizes))
                loops = [k for k in kernels(made.scheduler.nodes, "") if not k.extern]
                counted.extend(k.nbytes for k in loops)
            return lower(part, given, **how)

        return compile_fx(graph, inputs, inner_compile=count)

    torch.compiler.reset()
    kernels_of_step(Block(nn.Identity()).to(dtype), (rows(dtype),), both, "cpu")
    assert len(coded) >= 3
    assert sum(counted) == sum(coded)


def bytes_of_code(code: str, sizes: dict[str, int]) -> list[int]:
    """Of each call of a C++ function: a pointer that is read or written once, both twice."""
    item = {"float": 4, "at::BFloat16": 2}
    sizes, found = dict(sizes), []
    pattern = r"(cpp_fused\w+) = async_compile\.cpp_pybinding.*?void\s+kernel\((.*?)\)\n"
    functions = dict(re.findall(pattern, code, re.S))
    for line in code.splitlines():
        if made := re.match(r"\s+(\w+) = empty_strided_cpu\(\(([\d, ]*)\)", line):
            shape = [int(n) for n in made[2].replace(" ", "").split(",") if n]
            sizes[made[1]] = torch.Size(shape).numel()
        if same := re.match(r"\s+(\w+) = (\w+); del \w+  # reuse", line):
            sizes[same[1]] = sizes[same[2]]
        if call := re.match(r"\s+(cpp_fused\w*)\((.*)\)$", line):
            pointers = [p.split() for p in functions[call[1]].replace("const ", "").split(",")]
            names = [n.strip() for n in call[2].split(",")]
            found.append(
                sum(
                    sizes[n] * item[kind.removesuffix("*")] * (2 if "in_out" in pointer else 1)
                    for n, (kind, pointer) in zip(names, pointers, strict=True)
                )
            )
    return found


def test_flops_are_those_of_the_step_as_it_runs() -> None:
    model, x = Block(), rows(torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    found = scheduled(model, "cuda", rows(torch.float32))
    assert sum(k.flops for k in found) == counter.get_total_flops()


def test_causal_attention_computes_half_of_what_it_would() -> None:
    class Attention(nn.Module):
        def __init__(self, causal: bool) -> None:
            super().__init__()
            self.causal = causal

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=self.causal)

    x = torch.randn(2, 4, 32, 16, dtype=torch.bfloat16, requires_grad=True)
    whole, half = (sum(k.flops for k in scheduled(Attention(c), "cuda", x)) for c in (False, True))
    scores = 2 * 4 * 32 * 32
    assert whole == 2 * half == 2 * scores * 16 * (2 + 5)


# Variants -----------------------------------------------------------------------------------------


def predicted(variant: str, model: nn.Module | None = None, **settings: Any) -> Prediction:
    model = Block().to(torch.bfloat16) if model is None else model
    settings = {"config": FOUR_BITS} | settings
    return predict(model, (rows(),), VARIANTS[variant], H100, **settings)


def test_packing_reads_and_writes_more_and_fused_packing_dispatches_nothing() -> None:
    plain, packed, fused = map(predicted, (DENSE, PACKED, FUSED))
    assert packed.nbytes > plain.nbytes
    assert {k.name for k in packed.kernels if k.extern} >= {"dropit.sparsify", "dropit.unsparsify"}
    assert not any(k.name.startswith("dropit") for k in fused.kernels if k.extern)
    assert any("dropit.unsparsify" in k.name for k in fused.kernels if k.phase == "backward")
    assert plain.flops == packed.flops == fused.flops
    assert plain.packed_bytes == 0
    assert packed.packed_bytes == fused.packed_bytes > 0
    # beside the input of the model, which stays: the input of the MLP's nonlinearity
    assert plain.saved_bytes >= 2 * ROWS * INNER
    assert packed.packed_bytes == packed.movable_bytes < 0.3 * plain.saved_bytes
    added = packed.costliest(plain)
    assert len(added) == 5
    assert any("dropit" in kernel.name for kernel, _, _ in added)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "Llama": (lambda: Llama(4096, 14336, 32, 8, 2048), (4, 2048, 4096), 1.0),
    # What attention reads is packed and unpacked, and its forward runs again: 0.10. Gradients of
    # biases are summed where what they are sums of is written, which dense reads again: -0.06
    "DeiT-B": (
        lambda: vision_transformer.Block(768, 12, mlp_ratio=4, qkv_bias=True),
        (64, 197, 768),
        1.03,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_in_four_bits_moves_so_many_bytes_of_those_of_dense(name: str) -> None:
    make, shape, bound = BLOCKS[name]
    with torch.device("meta"):
        model = make()
    model = model.to(torch.bfloat16).to_empty(device="cpu")  # nothing is computed with it
    x = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
    config = make_config(None, gamma=0, bits=4)
    plain, fused = (predict(model, (x,), VARIANTS[v], H100, config=config) for v in (DENSE, FUSED))
    assert fused.nbytes <= bound * plain.nbytes
    again = [k.phase for k in fused.kernels if k.name == "scaled_dot_product_flash_attention"]
    assert again == ["forward", "backward"]


def test_a_model_stays_as_it_is_and_is_scheduled_anew_each_time() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
    model.to(torch.bfloat16)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    first, again = (predicted(DENSE, model) for _ in range(2))
    assert first == again
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_the_optimizer_moves_is_told_apart() -> None:
    model = nn.Linear(WIDTH, WIDTH).to(torch.bfloat16)
    without, with_it = (predicted(DENSE, model, optimizer=o) for o in (False, True))
    *same, sgd = with_it.kernels
    assert tuple(same) == without.kernels
    assert sgd.nbytes == 8 * sum(p.nbytes for p in model.parameters())


# Cards --------------------------------------------------------------------------------------------


def kernel(nbytes: int, flops: int = 0, name: str = "mm") -> Kernel:
    given = {"read_bytes": nbytes, "write_bytes": 0, "flops": flops, "dtype": torch.bfloat16}
    return Kernel(phase="forward", name=name, extern=True, **given)


def test_a_kernel_takes_as_long_as_its_bytes_or_its_flops_and_its_launch() -> None:
    card = find_card("100,2")
    kinds = (kernel(4 * 10**12), kernel(1, 300 * 10**12), kernel(4 * 10**12))
    one = Prediction(variant=DENSE, kernels=kinds, card=card, launch=0.5)
    assert [one.seconds_of(k) for k in kinds] == [2.5, 3.5, 2.5]
    assert one.seconds == 8.5
    assert one.costliest() == [(kinds[0], 2, 5.0), (kinds[1], 1, 3.5)]
    other = Prediction(variant=PACKED, kernels=(*kinds, kernel(7, name="pack")), card=card)
    assert [k.name for k, _, _ in other.costliest(one)] == ["pack"]
    fewer = Prediction(variant=FUSED, kernels=(kinds[1], kernel(7, name="pack")), card=card)
    assert fewer.added(one) == [(kernel(7, name="pack"), 1), (kinds[0], -2)]
    assert fewer.nbytes - one.nbytes == sum(n * k.nbytes for k, n in fewer.added(one))
    row = as_row(other, one)
    assert row["bytes_ratio"] == other.nbytes / one.nbytes
    assert json.loads(json.dumps(row))["kernels"][0]["seconds"] == 2.0


def test_what_waits_on_the_host_is_hidden_as_far_as_each_phase_lasts() -> None:
    card = find_card("100,2,50")
    assert card.host == 50 * 10**9
    assert find_card("100,2").host == CARDS["h100"].host > CARDS["a100"].host
    phases = (kernel(2 * 10**12), replace(kernel(6 * 10**12), phase="backward"))  # 1 s, 3 s
    one = Prediction(variant=DENSE, kernels=phases, card=card, saved_bytes=100 * 10**9)
    assert (one.movable_bytes, one.hidden) == (100 * 10**9, 0.5)
    assert one.offloaded_seconds == 4 + (2 - 1)
    packed = replace(one, packed_bytes=25 * 10**9)
    assert (packed.movable_bytes, packed.hidden, packed.offloaded_seconds) == (25 * 10**9, 1, 4)
    slow = replace(one, card=find_card("100,2,25"))
    assert (slow.hidden, slow.offloaded_seconds) == (0.25, 4 + (4 - 1) + (4 - 3))
    assert replace(one, saved_bytes=0).hidden == 1, "nothing has to go"
    row = as_row(packed, one)
    assert (row["movable_bytes"], row["hidden"], row["offloaded_seconds"]) == (25 * 10**9, 1, 4)


def test_products_of_float32_have_a_peak_of_their_own() -> None:
    half, single = (H100.seconds(0, 10**12, d) for d in (torch.float16, torch.float32))
    assert single > 10 * half


@pytest.mark.parametrize(
    "name", ["h200", "", "900", "900,", "0,3", "900,-1", "1,2,3,4", "1,2,0", "nan,1"]
)
def test_a_card_that_is_none_is_told_with_those_there_are(name: str) -> None:
    with pytest.raises(PlanError, match="write h100, a100, 4090, or PEAK,BANDWIDTH in TFLOP/s"):
        find_card(name)


# The command --------------------------------------------------------------------------------------

FACTORY = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), (torch.randn(2, 64),)
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "roofline_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "roofline_factory:mlp"


def test_the_command_predicts_every_variant(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "roofline.json"
    given = ["--model", spec, "--batch", "256", "--device", "a100", "--gamma", "0", "--bits", "4"]
    assert cli.main(["bench", "roofline", *given, "--added", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    ledger = out.split("fused: kernels that")[1].split("alike ones")[0]
    assert "b dropit.unsparsify" in ledger
    assert re.search(r"all +[+-]", ledger)
    assert max(map(len, out.splitlines())) <= 80
    assert "predicted, not measured" in out
    assert "if what is saved waited on the host, at 32 GB/s" in out
    assert "checkpoint is left out: Sequential has neither" in out.replace("\n", " ")
    told = json.loads(path.read_text())
    assert told["schedule"] == "cuda"
    assert set(told["variants"]) == {"dense", "packed", "fused", "budget=0.5", "budget=0.2"}
    for name, row in told["variants"].items():
        assert f"\n{name}" in out
        assert row["ratio"] == pytest.approx(row["seconds"] / told["variants"]["dense"]["seconds"])
        assert row["bytes"] == sum(k["read_bytes"] + k["write_bytes"] for k in row["kernels"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--device", "h300"], "device 'h300': write h100"),
        (["--variants", "fusd"], "no variant matches 'fusd'. Did you mean 'fused'?"),
        (["--json", "/no/where.json"], "no folder to write /no/where.json into"),
    ],
)
def test_bad_options_are_told_before_anything_is_built(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "roofline", "--model", "no.such:model", *given]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
