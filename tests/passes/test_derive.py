"""Values that are made again in the backward from what is packed of others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from op_calls import assert_same
from torch import Tensor, fx, nn

import dropit_fx
from dropit_fx import measure
from dropit_fx.capture.fake import concrete_fakes
from dropit_fx.compile.backend import compiled_graphs
from dropit_fx.config import make_config
from dropit_fx.passes import run_pipeline
from dropit_fx.passes.plan import Plan
from dropit_fx.report.rows import report_of
from dropit_fx.runtime.packed_call import derived, pack

SCALAR = 8  # bytes of a number, which autograd keeps as a tensor of its own


def rounded(x: Tensor, bits: int = 5) -> Tensor:
    """``x`` through ``quant`` as the preset `balanced` packs it."""
    flat = x.detach().reshape(-1)
    parts = torch.ops.dropit.sparsify(flat, 10_000, 256, bits, 0, False)
    out: Tensor = torch.ops.dropit.unsparsify(*parts, flat.numel(), x.dtype, 10_000, 256, bits, 0)
    return out.view_as(x)


def codecs(packed: nn.Module) -> dict[str, str]:
    """Saved tensor -> codec, or the reason why it is kept."""
    return {r.name: r.reason or r.codec for r in dropit_fx.report(packed).rows}


def nodes(packed: nn.Module, target: Any) -> list[Any]:
    return [n for n in packed.graph.nodes if n.target is target]


class NormThenLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        return self.q(h) + self.q(h) + self.k(h)


def test_one_copy_serves_a_norm_and_the_linears_behind_it() -> None:
    torch.manual_seed(0)
    model, x = NormThenLinear(), torch.randn(32, 64)
    nn.init.normal_(model.norm.weight)
    packed = dropit_fx.transform(copy.deepcopy(model), example_args=(x,))
    assert codecs(packed)["linear"] == "quant(bits=5)"
    assert codecs(packed)["layer_norm"] == "derived"
    assert len(nodes(packed, pack)) == len(nodes(packed, derived)) == 1
    assert measure.saved_bytes(packed, x) == dropit_fx.report(packed).kept_bytes
    out, expected = packed(x), model(x)
    assert_same(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)

    h = model.first(x).detach()
    mean, rstd = h.mean(1, keepdim=True), (h.var(1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    again = (rounded(h) - mean) * rstd * model.norm.weight + model.norm.bias
    torch.testing.assert_close(packed.k.weight.grad, grad.t() @ again)
    torch.testing.assert_close(packed.q.weight.grad, 2 * grad.t() @ again)
    expected.backward(grad)
    assert_same(packed.k.bias.grad, model.k.bias.grad)


def test_without_derive_each_value_has_its_own_copy() -> None:
    x = torch.randn(32, 64)
    packed = dropit_fx.transform(NormThenLinear(), {"derive": False}, example_args=(x,))
    assert codecs(packed)["layer_norm"] == "mink(gamma=0.5, bits=4)"
    assert not nodes(packed, derived)


def test_a_rule_of_ones_own_says_how_a_value_is_kept() -> None:
    x = torch.randn(32, 64)
    rules = [{"module": "q", "op": "linear", "codec": "mink", "gamma": 0.8}]
    packed = dropit_fx.transform(NormThenLinear(), {"rules": rules}, example_args=(x,))
    assert "mink(gamma=0.8)" in codecs(packed)["layer_norm"]


def test_nothing_is_derived_from_a_copy_in_too_few_bits_which_has_more_where_that_is_less() -> None:
    x = torch.randn(32, 64)

    notes: dict[str, str] = {}

    def formats(bits: int, gamma: float = 0.5) -> tuple[int, set[str]]:
        rules = [{"op": "layer_norm", "codec": "quant", "bits": bits}]
        packed = dropit_fx.transform(
            NormThenLinear(), {"rules": rules}, gamma=gamma, example_args=(x,)
        )
        report = dropit_fx.report(packed)
        notes.clear()
        notes.update({r.codec: r.note for r in report.rows if r.note})
        assert all(note in str(report) for note in notes.values())
        return len(nodes(packed, derived)), {r.codec for r in report.rows if "quant" in r.codec}

    assert (formats(5), notes) == ((1, {"quant(bits=5)"}), {})
    assert formats(3) == (1, {"quant(bits=4)"})  # 3 bits, and 2.5 of a copy for the layers behind
    assert notes["quant(bits=4)"].startswith("from the 3 bits asked for, nothing could be made")
    assert formats(1, gamma=0.9) == (0, {"quant(bits=1)"})
    assert notes["mink(gamma=0.9, bits=4)"].startswith("a copy of its own")


class Residual(nn.Module):
    """Batch norm and ReLU between convolutions, in place as vision models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        h = self.act(self.bn1(x))
        h = self.bn2(self.conv2(h))
        h += x
        return self.act(h).mean((2, 3))


def test_a_convolution_reads_relu_of_batch_norm_of_the_packed_input() -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(4, 3, 16, 16)
    packed = dropit_fx.transform(copy.deepcopy(model), example_args=(x,))
    assert codecs(packed)["batch_norm"] == "bitmask(bits=1)+derived"
    assert measure.saved_bytes(packed, x) == dropit_fx.report(packed).kept_bytes
    out, expected = packed(x), model(x)
    assert_same(out, expected)
    assert_same(dict(packed.named_buffers()), dict(model.named_buffers()))
    assert int(packed.bn1.num_batches_tracked) == 1
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    assert_same(packed.bn2.bias.grad, model.bn2.bias.grad)  # its masks are exact
    error = (packed.conv2.weight.grad - model.conv2.weight.grad).norm()
    assert 0 < error < 0.1 * model.conv2.weight.grad.norm()
    assert int(packed.bn1.num_batches_tracked) == 1  # not counted again in the backward


class Stream(nn.Module):
    """Four residual blocks, each read by the next one's convolution and by its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.convs[0](x))
        for conv, norm in zip(self.convs[1:], self.norms[1:], strict=True):
            x = (x + norm(conv(x))).relu()
        return x


def test_a_residual_stream_is_not_made_again_from_its_beginning() -> None:
    packed = dropit_fx.transform(Stream(), example_args=(torch.randn(4, 8, 32, 32),))
    copies: dict[Any, set[Any]] = {}
    for node in packed.graph.nodes:
        if node.target is pack:
            copies[node] = {node}
        elif node.target is derived:
            copies[node] = set().union(*(copies.get(how, set()) for how in node.args[2].values()))
    made = [how for node, how in copies.items() if node.target is derived]
    assert max(map(len, made)) == 2  # norms[1] of its packed input, and of that of norms[0]
    read = [codec for name, codec in codecs(packed).items() if name.startswith("relu")]
    assert read.count("bitmask(bits=1)+derived") == 1
    assert read.count("bitmask(bits=1)+mink(gamma=0.5, bits=4)") == 2


def test_one_batch_norm_in_eval_mode_uses_and_keeps_its_statistics() -> None:
    model, x = Residual(), torch.randn(4, 3, 16, 16)
    packed = dropit_fx.transform(copy.deepcopy(model), example_args=(x,))
    model.bn1.eval()
    packed.bn1.eval()
    assert_same(packed(x), model(x))
    assert_same(dict(packed.named_buffers()), dict(model.named_buffers()))
    packed.eval(), model.eval()
    assert_same(packed(x), model(x))
    packed.train(), model.train()
    assert_same(packed(x), model(x))


class HandWritten(nn.Module):
    """A root-mean-square norm in simple ops, and the tanh form of GELU, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(64, 64), nn.Parameter(torch.rand(64) + 0.5)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))
        u = self.up(h)
        return self.down(0.5 * u * (1.0 + torch.tanh(0.8 * (u + 0.045 * torch.pow(u, 3.0)))))


def test_norms_and_nonlinearities_written_by_hand_keep_one_copy_each() -> None:
    torch.manual_seed(0)
    model, x = HandWritten(), torch.randn(32, 64)
    packed = dropit_fx.transform(copy.deepcopy(model), example_args=(x,))
    assert [n.args[0].name for n in nodes(packed, pack)] == ["linear", "linear_1"]
    extra = measure.saved_bytes(packed, x) - dropit_fx.report(packed).kept_bytes
    assert extra in range(0, 4 * SCALAR, SCALAR)
    assert_same(packed(x), model(x))
    packed(x).square().sum().backward()
    model(x).square().sum().backward()
    for ours, theirs in zip(packed.parameters(), model.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 0.15 * theirs.grad.norm()


class WrittenTo(nn.Module):
    """GELU's input is written to before another reader sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = torch.add(h, 1.0)
        z = self.second(F.gelu(y))
        h.mul_(3.0)
        return z + self.third(F.gelu(torch.add(h, 1.0)))


def test_a_tensor_that_was_written_to_is_no_source() -> None:
    torch.manual_seed(0)
    model, x = WrittenTo(), torch.randn(32, 64)
    packed = dropit_fx.transform(copy.deepcopy(model), example_args=(x,))
    packed(x).square().sum().backward()
    model(x).square().sum().backward()
    for ours, theirs in zip(packed.parameters(), model.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 0.1 * theirs.grad.norm()


def test_a_weight_frozen_after_the_rewrite_and_a_norm_that_is() -> None:
    x = torch.randn(32, 64)
    packed = dropit_fx.transform(NormThenLinear(), example_args=(x,))
    packed.q.weight.requires_grad_(False)
    packed(x).sum().backward()
    assert packed.q.weight.grad is None
    assert packed.k.weight.grad is not None
    for name in ("first.weight", "first.bias", "norm.weight", "norm.bias"):
        packed.get_parameter(name).requires_grad_(False)
    packed.zero_grad()
    packed(x).sum().backward()
    assert packed.k.weight.grad is not None


@pytest.mark.parametrize("batch", [32, 5])
def test_copies_and_other_batches(batch: int) -> None:
    packed = dropit_fx.transform(NormThenLinear(), example_args=(torch.randn(32, 64),))
    twin, x = copy.deepcopy(packed), torch.randn(batch, 64)
    packed(x).square().sum().backward()
    twin(x).square().sum().backward()
    for ours, theirs in zip(packed.parameters(), twin.parameters(), strict=True):
        assert_same(ours.grad, theirs.grad)


@pytest.mark.parametrize("model", [NormThenLinear, HandWritten, Residual])
def test_compiled_and_eager_derive_the_same(model: Any) -> None:
    torch.manual_seed(0)
    module = model()
    x = torch.randn(4, 3, 16, 16) if model is Residual else torch.randn(32, 64)
    eager = dropit_fx.transform(copy.deepcopy(module), example_args=(x,))
    options = {"inner": "aot_eager"}
    compiled = torch.compile(module, backend="dropit", fullgraph=True, options=options)
    eager(x).square().sum().backward()
    compiled(x).square().sum().backward()
    for ours, theirs in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    (partition,) = compiled_graphs()[-1].partitions
    assert partition.packs_in_backward == partition.unpacks_in_forward == ()


# --- attention's result: its backward runs the forward again


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(64, 192), nn.Linear(64, 64), dropout

    def attend(self, qkv: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in qkv.chunk(3, -1))
        made = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        return made.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.attend(self.qkv(x)))
        return out


def for_a_compiler(model: nn.Module, x: Tensor) -> tuple[Any, Plan]:
    """As the plug-in rewrites a graph for what makes equal calls once, but run as it is."""
    plans: list[Plan] = []

    def rewrite(gm: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
        fakes = tuple(concrete_fakes(inputs))
        plan = run_pipeline(Plan(module=gm, inputs=fakes, config=make_config(), compiled=True))
        plans.append(plan)
        return plan.module

    packed = torch.compile(model, backend=rewrite, fullgraph=True)
    packed(x)
    return packed, plans[0]


def test_what_attention_gives_is_made_again_from_its_packed_operands() -> None:
    torch.manual_seed(0)
    model, x = Attention().bfloat16(), torch.randn(8, 32, 64).bfloat16()
    packed, plan = for_a_compiler(copy.deepcopy(model), x)
    assert "drop+derived" in {r.codec for r in report_of(plan).rows}
    assert measure.saved_bytes(packed, x) == report_of(plan).kept_bytes
    out = packed(x)
    assert_same(out, model(x))
    grad = torch.randn_like(out)
    out.backward(grad)
    qkv = torch.cat([rounded(part) for part in model.qkv(x).chunk(3, -1)], -1)
    again = grad.flatten(0, 1).t() @ model.attend(qkv).flatten(0, 1)
    assert_same(packed.out.weight.grad, again)

    model(x).backward(grad)
    exact = model.out.weight.grad
    own = dropit_fx.transform(copy.deepcopy(model), {"derive": False}, example_args=(x,))
    own.zero_grad()
    own(x).backward(grad)
    errors = [(p.out.weight.grad - exact).norm() / exact.norm() for p in (packed, own)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("dtype", "dropout"),
    [(torch.float32, 0.0), (torch.bfloat16, 0.1)],
    ids=["float32 on a CPU", "dropout"],
)
def test_where_no_backward_makes_it_what_attention_gives_has_its_own_copy(
    dtype: torch.dtype, dropout: float
) -> None:
    model, x = Attention(dropout).to(dtype), torch.randn(8, 32, 64).to(dtype)
    plan = for_a_compiler(model, x)[1]
    assert not nodes(plan.module, derived)
    assert any("mink(gamma=0.5, bits=4)" in row.codec for row in report_of(plan).rows)


def test_where_nothing_makes_equal_calls_one_it_has_its_own_copy() -> None:
    """Else eager mode would run attention's forward a third time."""
    x = torch.randn(8, 32, 64).bfloat16()
    packed = dropit_fx.transform(Attention().bfloat16(), example_args=(x,))
    assert "mink(gamma=0.5, bits=4)" in codecs(packed)["scaled_dot_product_attention"]


class Attends(nn.Module):
    """A residual stream of attention without projections: nothing in it but sums of results."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(4):
            h = h + F.scaled_dot_product_attention(h, h, h)
        out: Tensor = self.last(h)
        return out


def test_a_stream_of_attention_is_not_made_again_from_its_beginning() -> None:
    x = torch.randn(8, 4, 32, 16).bfloat16()
    packed: Any = for_a_compiler(Attends().bfloat16(), x)[1].module
    read: dict[Any, int] = {}
    for node in packed.graph.nodes:
        if node.target is pack:
            read[node] = 1
        elif node.target is derived:
            inner = sum(read[how] for how in node.args[2].values())
            read[node] = 1 if node.args[0] == "scaled_dot_product_attention" else inner
    assert max(read.values()) == 2
    assert len(nodes(packed, pack)) > 1


@pytest.mark.parametrize(
    ("name", "share"),
    [("deit_tiny_patch16_224", 0.12), ("resnet18", 0.15), ("convnext_tiny", 0.15)],
)
def test_saved_bytes_of_balanced_are_what_was_predicted(name: str, share: float) -> None:
    model = timm.create_model(name)
    x = torch.randn(2, 3, 224, 224)
    packed = dropit_fx.transform(model, example_args=(x,))
    report = dropit_fx.report(packed)
    assert measure.saved_bytes(packed, x) == report.kept_bytes
    assert report.kept_bytes <= share * measure.saved_bytes(model, x)


def test_under_autocast_weights_stand_for_their_copies() -> None:
    model, x = NormThenLinear(), torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        packed = dropit_fx.transform(copy.deepcopy(model), example_args=(x,))
        statistics = 2 * 2 * 32  # kept in float32, where fake tensors say bfloat16
        extra = measure.saved_bytes(packed, x) - dropit_fx.report(packed).kept_bytes
        assert extra in (0, statistics)
        assert codecs(packed)["linear_1.weight"] == "recast"
        assert_same(packed(x), model(x))
        packed(x).float().sum().backward()
        model(x).float().sum().backward()
    assert packed.first.bias.grad.dtype == model.first.bias.grad.dtype
    error = (packed.k.weight.grad - model.k.weight.grad).norm()
    assert error < 0.1 * model.k.weight.grad.norm()


# --- channels of different scales: each is rounded in units of its own deviation


def scaled_channels(layout: torch.memory_format) -> Tensor:
    """Images whose channels have means up to 100 and deviations from 0.001 to 100; one constant."""
    x = torch.randn(8, 7, 6, 6, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1e-3, 1e-2, 0.1, 1, 10, 100, 0]).view(1, -1, 1, 1)
    shift = torch.tensor([100, -30, 10.0, 1, 0, -100, 5]).view(1, -1, 1, 1)
    return (x * scale + shift).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(7), nn.GroupNorm(7, 7)], ids=["batch", "group"])
def test_a_norm_of_channels_of_any_scale_has_an_accurate_gradient(
    norm: nn.Module, layout: torch.memory_format
) -> None:
    model = nn.Sequential(nn.Identity(), copy.deepcopy(norm).double(), nn.Tanh()).double()
    x = scaled_channels(layout).double()
    rules = [{"op": "*_norm", "codec": "quant", "bits": 8, "block": 256}]
    config = {"preset": None, "rules": rules, "force": True}
    packed = dropit_fx.transform(model, example_args=(x,), config=config)

    grads = []
    for run in (model, packed):
        leaf = x.clone().requires_grad_()
        run(leaf * 1).mul(torch.arange(6.0).double()).sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    error = (grads[1] - grads[0]).transpose(0, 1).flatten(1).norm(dim=1)
    size = grads[0].transpose(0, 1).flatten(1).norm(dim=1)
    assert (error < 0.03 * size)[:6].all(), error / size


def test_statistics_of_channels_are_counted() -> None:
    x = scaled_channels(torch.contiguous_format)
    model = nn.Sequential(nn.Conv2d(7, 9, 1), nn.BatchNorm2d(9))
    rules = [{"op": "batch_norm", "codec": "quant"}]
    packed = dropit_fx.transform(
        model, example_args=(x,), config={"preset": None, "rules": rules, "force": True}
    )
    report = dropit_fx.report(packed)
    assert measure.saved_bytes(packed, x) == report.kept_bytes


# --- casts

HALVES = (torch.bfloat16, torch.float16)
aten = torch.ops.aten
CASTS: dict[str, Any] = {
    "to(dtype)": lambda h, dtype: h.to(dtype),
    "to(dtype=)": lambda h, dtype: h.to(dtype=dtype, copy=True),
    "to(device, dtype)": lambda h, dtype: h.to("cpu", dtype),
    "to(other)": lambda h, dtype: h.to(torch.zeros(3, dtype=dtype)),
    "to(tensor=)": lambda h, dtype: h.to(tensor=torch.zeros(3, dtype=dtype)),
    "type": lambda h, dtype: h.type(dtype),
    "type(name)": lambda h, dtype: h.type(
        {torch.bfloat16: "torch.BFloat16Tensor", torch.float16: "torch.HalfTensor"}[dtype]
    ),
    "type_as": lambda h, dtype: h.type_as(torch.zeros(3, dtype=dtype)),
    "its name": lambda h, dtype: h.bfloat16() if dtype is torch.bfloat16 else h.half(),
    "aten.to.dtype": lambda h, dtype: aten.to.dtype(h, dtype),
    "aten.to.device": lambda h, dtype: aten.to.device(h, "cpu", dtype),
    "aten.to.other": lambda h, dtype: aten.to.other(h, other=torch.zeros(3, dtype=dtype)),
    "aten.to.dtype_layout": lambda h, dtype: aten.to.dtype_layout(h, dtype=dtype, device="cpu"),
    "aten.type_as": lambda h, dtype: aten.type_as.default(h, torch.zeros(3, dtype=dtype)),
    "aten._to_copy": lambda h, dtype: aten._to_copy.default(h, dtype=dtype),
}


class Cast(nn.Module):
    """A value in float32 that GELU reads, and a linear layer in a lower precision."""

    def __init__(self, cast: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.cast, self.dtype = cast, dtype
        self.inner, self.outer = nn.Linear(64, 64), nn.Linear(64, 64, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.outer(self.cast(h, self.dtype)).float() + F.gelu(h)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("spelling", CASTS)
def test_a_cast_is_made_again_from_what_it_casts(spelling: str, dtype: torch.dtype) -> None:
    model, x = Cast(CASTS[spelling], dtype), torch.randn(32, 64)
    packed = dropit_fx.transform(copy.deepcopy(model), example_args=(x,))
    saved = {r.op: r.codec for r in dropit_fx.report(packed).rows}
    assert saved == {"gelu": "quant(bits=5)", "linear": "derived"}
    assert measure.saved_bytes(packed, x) == dropit_fx.report(packed).kept_bytes
    out = packed(x)
    assert_same(out, model(x))
    grad = torch.randn_like(out)
    out.backward(grad)
    again = rounded(model.inner(x)).to(dtype)  # rounded by the codec, then by the cast
    assert_same(packed.outer.weight.grad, grad.to(dtype).t() @ again)


@pytest.mark.parametrize("spelling", ["to(dtype)", "to(other)", "aten.to.dtype", "type_as"])
def test_a_cast_to_the_same_dtype_is_the_value_itself(spelling: str) -> None:
    model, x = Cast(CASTS[spelling], torch.float32), torch.randn(32, 64)
    packed = dropit_fx.transform(model, example_args=(x,))
    assert len(nodes(packed, pack)) == 1
    assert not nodes(packed, derived)  # both readers share the copy
    assert measure.saved_bytes(packed, x) == dropit_fx.report(packed).kept_bytes


NO_CASTS: dict[str, Any] = {
    "memory format": lambda h, dtype: (
        h.view(1, 2, 1, -1).to(memory_format=torch.channels_last, copy=True).reshape(32, 64)
    ),
    "a copy": lambda h, dtype: h.to(dtype, copy=True),
    "through integers": lambda h, dtype: h.to(torch.int32).to(dtype),
}


@pytest.mark.parametrize("spelling", NO_CASTS)
def test_what_is_no_cast_between_floats_is_not_made_again(spelling: str) -> None:
    model, x = Cast(NO_CASTS[spelling], torch.float32), torch.randn(32, 64)
    packed = dropit_fx.transform(copy.deepcopy(model), example_args=(x,))
    assert not nodes(packed, derived)
    assert_same(packed(x), model(x))


def test_casts_are_made_again_one_after_the_other() -> None:
    def cast(h: Tensor, dtype: torch.dtype) -> Tensor:
        return h.half().bfloat16().float()

    model, x = Cast(cast, torch.float32), torch.randn(32, 64)
    packed = dropit_fx.transform(copy.deepcopy(model), example_args=(x,))
    out = packed(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    again = cast(rounded(model.inner(x)), torch.float32)
    assert_same(packed.outer.weight.grad, grad.t() @ again)


# --- values have identities


class Wrote(nn.Module):
    """Two linears, and what happens to the value between them."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32)
        self.register_buffer("table", torch.ones(32))
        self.between = between

    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.first(x * 1))
        return self.between(self, h, x)


def _wrote(write: Any, view: Any = lambda h: h) -> Any:
    def between(m: Any, h: Tensor, x: Tensor) -> Tensor:
        seen: Tensor = view(h)
        write(h)
        return m.second(view(h)) + m.second(seen.reshape(64, 32)).view_as(m.second(view(h)))  # type: ignore[no-any-return]

    return between


def _written_afterwards(value: str) -> Any:
    def between(m: Any, h: Tensor, x: Tensor) -> Tensor:
        base = m.table if value == "a buffer" else x
        y = F.gelu(h) + base
        base.view(-1).add_(10.0)
        return m.second(y)  # type: ignore[no-any-return]

    return between


WROTE: dict[str, Any] = {
    "add_, then a view": _wrote(lambda h: h.add_(10.0), lambda h: h.view(4, 16, 32)),
    "mul_ through a transpose": _wrote(lambda h: h.t().mul_(3.0)),
    "a part": _wrote(lambda h: h[:, :16].add_(3.0)),
    "setitem": _wrote(lambda h: h.__setitem__((slice(None), 3), 7.0)),
    "sub_ of itself": _wrote(lambda h: h.sub_(h * 2)),
    "a buffer later": _written_afterwards("a buffer"),
    "a model input later": _written_afterwards("a model input"),
    "slices of one size": lambda m, h, x: (
        F.gelu(h.repeat(1, 2)[:16, :32]).sum() * F.gelu(h.repeat(1, 2)[:32, :16]).sum()
    ),
    "tanh, then a product": lambda m, h, x: m.second(torch.tanh(h) * 2),
    "exp, then a norm": lambda m, h, x: m.second(m.norm(torch.exp(h))),
    "softmax, then a sum": lambda m, h, x: m.second(torch.softmax(h, -1) + 1),
    "a detached gate": lambda m, h, x: (F.gelu(h), F.gelu(h).detach() * torch.sigmoid(h)),
    "an index that topk keeps": lambda m, h, x: h.gather(1, torch.topk(h, 2)[1]),
    "batch norm of a view": lambda m, h, x: (
        F.batch_norm(torch.tanh(h).view(4, 16, 32), None, None, training=True).sum((1, 2)).cos(),
        m.second(torch.tanh(h)),
    ),
}


@pytest.mark.parametrize("way", ["transform", "dropit_eager"])
@pytest.mark.parametrize("kind", WROTE)
def test_gradients_are_those_of_the_values_as_they_were(kind: str, way: str) -> None:
    torch.manual_seed(0)
    model, x = Wrote(WROTE[kind]), torch.randn(64, 32)
    found = []
    for preset in (None, "lossless", "balanced"):
        run: Any = copy.deepcopy(model)
        parameters = list(run.parameters())
        if preset is not None and way == "transform":
            run = dropit_fx.transform(run, example_args=(x.clone(),), preset=preset)
        elif preset is not None:
            torch._dynamo.reset()
            run = torch.compile(run, backend=way, options={"preset": preset})
        outs = run(x.clone())
        outs = outs if isinstance(outs, tuple) else (outs,)
        loss = sum(o.square().sum() for o in outs)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append(([o.detach() for o in outs], [g for g in grads if g is not None]))
    dense, exact, lossy = found
    assert_same(exact, dense)
    assert_same(lossy[0], dense[0])
    for ours, theirs in zip(lossy[1], dense[1], strict=True):
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.85


# --- what needs a gradient only since it was written into


def multiplied(h: Tensor, w: Tensor) -> Tensor:
    return h.mul_(w)


def divided(h: Tensor, w: Tensor) -> Tensor:
    h /= w + 3
    return h


def multiplied_in_a_view(h: Tensor, w: Tensor) -> Tensor:
    h[:4].mul_(w[:4])
    return h + w


@pytest.mark.parametrize("preset", ["balanced", "lossless"])
@pytest.mark.parametrize("write", [multiplied, divided, multiplied_in_a_view])
def test_what_a_write_alone_makes_need_a_gradient_is_not_counted_for_it(
    write: Any, preset: str
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return write(torch.sin(x), self.fc(x))

    x, model = torch.randn(8, 32), Model()
    made = dropit_fx.transform(model, preset=preset, example_args=(x,))
    told = dropit_fx.report(made)
    assert measure.saved_bytes(model, x) == told.dense_bytes
    assert measure.saved_bytes(made, x) == told.kept_bytes


class Dropped(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.first(x))
        out: Tensor = self.last(F.dropout(h, 0.25, self.training, self.inplace))
        return out


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("door", ["transform", "dropit_eager"])
def test_what_dropout_leaves_is_made_again_with_its_mask(door: str, inplace: bool) -> None:
    torch.manual_seed(0)
    model, x = Dropped(inplace), torch.randn(128, 64)
    if door == "transform":
        packed: Any = dropit_fx.transform(model, example_args=(x,))
        assert "derived" in codecs(packed).values()  # by the name of the storage: gelu, in place
        assert dropit_fx.report(packed).kept_bytes == measure.saved_bytes(packed, x)
    else:
        packed = torch.compile(model, backend=door)
        assert measure.saved_bytes(packed, x) < 0.2 * measure.saved_bytes(model, x)
    grad = torch.randn(128, 64)
    torch.manual_seed(1)
    packed(x).backward(grad)
    found = model.last.weight.grad
    torch.manual_seed(1)
    mask = F.dropout(torch.ones(128, 64), 0.25)
    again = F.gelu(rounded(model.first(x))) * mask
    torch.testing.assert_close(found, grad.t() @ again)


def test_without_its_mask_packed_nothing_is_made_again_of_dropout() -> None:
    x = torch.randn(128, 64)
    rules = [{"op": "dropout", "codec": "keep"}]
    packed = dropit_fx.transform(Dropped(False), {"rules": rules}, example_args=(x,))
    assert codecs(packed)["dropout"] == "mink(gamma=0.5, bits=4)"
    assert dropit_fx.report(packed).kept_bytes == measure.saved_bytes(packed, x)


class Quotient(nn.Module):
    """A number over a tensor: autograd keeps the reciprocal, and not the divisor."""

    def forward(self, x: Tensor) -> Tensor:
        y = 3 / (x.abs() + 1)
        return F.gelu(F.relu(y))


class Reshaped(nn.Module):
    """What is made again from its own operand, behind a copy without gaps."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm((x + 1).t().contiguous(), (x.shape[0],))
        return F.sigmoid(y) * F.relu(y)


class RowsSum(nn.Module):
    """A product whose operand is copied by the op, so that the packed call reads another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = x.abs() + 1
        return (y @ self.weight).sum(0) + F.gelu(F.relu(y))


@pytest.mark.parametrize("kind", [Quotient, Reshaped, RowsSum])
@pytest.mark.parametrize("preset", ["balanced", "lossless"])
def test_what_is_derived_holds_nothing_that_is_not_counted(kind: Any, preset: str) -> None:
    x = torch.randn(8, 8, requires_grad=True)
    model = kind()
    packed = dropit_fx.transform(model, preset=preset, example_args=(x,))
    told = dropit_fx.report(packed)
    assert told.kept_bytes == measure.saved_bytes(packed, x)
    assert told.dense_bytes == measure.saved_bytes(model, x)


class QuotientOfWhole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        whole = x.abs() + 1
        y = 3 / whole
        return whole.log() + F.relu(y) * F.sigmoid(y - 1)


def test_a_number_over_a_tensor_is_not_made_again_by_another_rounding() -> None:
    """``3 / x`` is ``x.reciprocal() * 3``, which a division of 3 by ``x`` is not."""
    x = torch.randn(64, 64, requires_grad=True)
    packed = dropit_fx.transform(QuotientOfWhole(), example_args=(x,))
    assert codecs(packed)["add"] == "no row for log in the op table"
    assert not [n for n in nodes(packed, derived) if n.args[0] == "div"]
