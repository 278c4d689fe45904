"""Rewritten graphs as they print; EXPECTTEST_ACCEPT=1 pytest tests/passes/test_graph.py renews."""

from __future__ import annotations

import re
from typing import Any

import torch
from expecttest import TestCase
from torch import Tensor, fx, nn

import dropit_fx
from dropit_fx.runtime.packed_call import PACKED_OPS, pack


def code(module: fx.GraphModule) -> str:
    """The body of ``forward``, without the clean-up of names and with options in short."""
    lines = []
    for line in module.code.strip().splitlines()[1:]:
        line = re.sub(r";  .* = None$", "", line.strip())
        line = re.sub(r"\{'gamma': ([\d.]+), [^}]*\}", r"{gamma \1}", line)
        line = re.sub(r"\('bitmask', \{[^}]*\}\)", "bits", line)
        line = line.replace("('keep', {})", "keep")
        line = line.replace(", (1, 1), (0, 0), (1, 1), 1", "")  # of convolutions, the defaults
        lines.append(line.replace("dropit_fx_runtime_packed_call_", ""))
    return "\n".join(lines)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
    )


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.Flatten()
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.q, self.k = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.inp(x))
        return self.q(h) @ self.k(h).t()


def count(module: fx.GraphModule, *targets: Any) -> int:
    return sum(n.target in targets for n in module.graph.nodes)


class TestPrintedGraphs(TestCase):
    maxDiff = None

    def test_mlp(self) -> None:
        packed = dropit_fx.transform(mlp(), preset="dropit", example_args=(torch.randn(64, 64),))
        assert count(packed, pack) == 2
        assert count(packed, *PACKED_OPS.values()) == 4
        self.assertExpectedInline(
            code(packed),
            """\
input_1 = input
_0_bias = getattr(self, "0").bias
_2_weight = getattr(self, "2").weight
_2_bias = getattr(self, "2").bias
_4_weight = getattr(self, "4").weight
_4_bias = getattr(self, "4").bias
_0_weight = getattr(self, "0").weight
linear = torch._C._nn.linear(input_1, _0_weight, _0_bias)
relu = packed_relu(linear, inplace = False, packed = {'result': bits})
pack = pack(relu, (_2_weight,), 'mink', {gamma 0.9}, autocast = True)
linear_1 = packed_linear(relu, _2_weight, _2_bias, packed = {'input': pack, 'weight': keep})
relu_1 = packed_relu(linear_1, inplace = False, packed = {'result': bits})
pack_1 = pack(relu_1, (_4_weight,), 'mink', {gamma 0.9}, autocast = True)
linear_2 = packed_linear(relu_1, _4_weight, _4_bias, packed = {'input': pack_1, 'weight': keep})
return linear_2""",
        )

    def test_conv_relu_conv(self) -> None:
        packed = dropit_fx.transform(
            convnet(), preset="dropit", example_args=(torch.randn(4, 3, 32, 32),)
        )
        assert count(packed, pack) == 1
        assert count(packed, *PACKED_OPS.values()) == 2
        self.assertExpectedInline(
            code(packed),
            """\
input_1 = input
_0_bias = getattr(self, "0").bias
_2_weight = getattr(self, "2").weight
_2_bias = getattr(self, "2").bias
_0_weight = getattr(self, "0").weight
conv2d = torch.conv2d(input_1, _0_weight, _0_bias)
relu = packed_relu(conv2d, inplace = True, packed = {'result': bits})
pack = pack(relu, (_2_weight,), 'mink', {gamma 0.9}, autocast = True)
conv2d_1 = packed_conv2d(relu, _2_weight, _2_bias, packed = {'input': pack, 'weight': keep})
flatten = conv2d_1.flatten(1, -1)
return flatten""",
        )

    def test_two_linears_share_a_pack(self) -> None:
        config = {"rules": [{"op": "matmul", "codec": "keep"}]}
        packed = dropit_fx.transform(Attention(), config, example_args=(torch.randn(64, 64),))
        assert count(packed, pack) == 1
        assert count(packed, *PACKED_OPS.values()) == 3
        self.assertExpectedInline(
            code(packed),
            """\
inp_bias = self.inp.bias
q_weight = self.q.weight
q_bias = self.q.bias
k_weight = self.k.weight
k_bias = self.k.bias
inp_weight = self.inp.weight
linear = torch._C._nn.linear(x, inp_weight, inp_bias)
relu = packed_relu(linear, packed = {'result': bits})
pack = pack(relu, (q_weight, k_weight), 'mink', {gamma 0.5}, autocast = True)
linear_1 = packed_linear(relu, q_weight, q_bias, packed = {'input': pack, 'weight': keep})
linear_2 = packed_linear(relu, k_weight, k_bias, packed = {'input': pack, 'weight': keep})
t = linear_2.t()
matmul = linear_1 @ t
return matmul""",
        )

    def test_nothing_to_pack_leaves_the_graph_alone(self) -> None:
        packed = dropit_fx.transform(mlp(), {"preset": None}, example_args=(torch.randn(64, 64),))
        assert count(packed, pack, *PACKED_OPS.values()) == 0
        self.assertExpectedInline(
            code(packed),
            """\
input_1 = input
_0_weight = getattr(self, "0").weight
_0_bias = getattr(self, "0").bias
linear = torch._C._nn.linear(input_1, _0_weight, _0_bias)
relu = torch.nn.functional.relu(linear, inplace = False)
_2_weight = getattr(self, "2").weight
_2_bias = getattr(self, "2").bias
linear_1 = torch._C._nn.linear(relu, _2_weight, _2_bias)
relu_1 = torch.nn.functional.relu(linear_1, inplace = False)
_4_weight = getattr(self, "4").weight
_4_bias = getattr(self, "4").bias
linear_2 = torch._C._nn.linear(relu_1, _4_weight, _4_bias)
return linear_2""",
        )


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    names, wanted = zip(*sorted(model.named_parameters()), strict=True)
    return dict(zip(names, torch.autograd.grad(model(x).square().sum(), wanted), strict=True))


def test_tracing_a_rewritten_graph_again_keeps_its_packed_calls() -> None:
    x = torch.randn(64, 64)
    packed = dropit_fx.transform(mlp(), preset="dropit", example_args=(x,))
    again = fx.symbolic_trace(packed)
    assert [n.target for n in again.graph.nodes] == [n.target for n in packed.graph.nodes]
    assert_same(gradients(again, x), gradients(packed, x))


def test_the_printed_code_is_the_code_that_runs() -> None:
    x = torch.randn(4, 3, 32, 32)
    packed = dropit_fx.transform(convnet(), preset="dropit", example_args=(x,))
    by_nodes = fx.Interpreter(packed).run(x)
    assert_same(by_nodes, packed(x))


def test_nodes_keep_the_users_line_and_module() -> None:
    packed = dropit_fx.transform(Attention(), preset="dropit", example_args=(torch.randn(64, 64),))
    modules_of = {"linear_1": "q", "pack": "q", "linear_2": "k"}
    for node in packed.graph.nodes:
        if node.target is pack or node.target in PACKED_OPS.values():
            assert "test_graph.py" in node.meta["stack_trace"]
            modules = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
            assert modules[-1:] == ([] if node.name == "relu" else [modules_of[node.name]])


def test_arguments_of_packs_are_plain_values() -> None:
    packed = dropit_fx.transform(mlp(), preset="dropit", example_args=(torch.randn(64, 64),))
    (first, _) = [n for n in packed.graph.nodes if n.target is pack]
    source, needed, codec, options = first.args
    assert isinstance(source, fx.Node)
    assert all(isinstance(n, fx.Node) for n in needed)
    assert codec == "mink"
    assert {type(v) for v in options.values()} <= {float, int, str, bool, type(None)}
