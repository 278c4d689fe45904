"""The memory policy tags a joint graph of AOTAutograd's as a plan says; PyTorch's cut heeds it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy

import dropit_fx
from dropit_fx.capture.provenance import node_module
from dropit_fx.integrations.torchtitan import memory_policy

KEEP_TANH = {"rules": [{"op": "tanh", "codec": "keep"}], "preset": "balanced"}


class Block(nn.Module):
    """A residual, a norm, chance."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.two(torch.tanh(self.one(self.norm(x)))))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(64, 8))


Policy = Callable[..., fx.GraphModule]


class Taken:
    """A compiled step whose joint graph goes through a policy before it is cut."""

    def __init__(self, model: nn.Module, x: Tensor, policy: Policy | None) -> None:
        def cut(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
            if policy is not None:
                assert policy(joint, config=object()) is joint
            self.tags = {n.name: n.meta.get("recompute") for n in joint.graph.nodes}
            self.later = [n.name for n in joint.graph.nodes if n.meta.get("autograd_backward")]
            graphs = min_cut_rematerialization_partition(joint, inputs, **kwargs)
            output = graphs[0].graph.find_nodes(op="output")[0]
            saved = output.args[0][kwargs["num_fwd_outputs"] :]
            self.saved = {n.name for n in saved if n.op != "placeholder"}
            return graphs

        torch.compiler.reset()
        compiled = torch.compile(
            model, backend=aot_autograd(fw_compiler=lambda gm, _: gm, partition_fn=cut)
        )
        model.zero_grad()
        torch.manual_seed(3)
        compiled(x).square().mean().backward()
        self.gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_what_the_plan_keeps_is_saved_and_all_else_computed_again(model: nn.Module) -> None:
    x = torch.randn(32, 16, 64)
    plain = Taken(model, x, None)
    taken = Taken(model, x, memory_policy(model, dropit_fx.load_config(KEEP_TANH), (x,)))
    assert all(map(torch.equal, plain.gradients, taken.gradients))
    assert {"tanh", "tanh_1"} <= taken.saved
    drawn = {name for name in taken.saved if name.startswith("getitem")}  # results of dropout
    assert len(drawn) == 4
    assert taken.saved == {"tanh", "tanh_1"} | drawn
    assert len(plain.saved) > len(taken.saved)
    assert not any(taken.tags[name] for name in taken.later)


def test_a_plan_tags_each_block_by_itself(model: nn.Module) -> None:
    x = torch.randn(32, 16, 64)
    rules = [{"module": "0*", "op": "tanh", "codec": "keep"}]
    config = dropit_fx.load_config({"rules": rules, "preset": "balanced"})
    taken = Taken(model, x, memory_policy(model, config, (x,)))
    assert taken.tags["tanh"] is CheckpointPolicy.MUST_SAVE
    assert taken.tags["tanh_1"] is CheckpointPolicy.PREFER_RECOMPUTE
    assert "tanh_1" not in taken.saved


def test_modules_as_torchtitan_names_them_and_ops_that_do_not_fit(model: nn.Module) -> None:
    x = torch.randn(32, 16, 64)
    policy = memory_policy(model, dropit_fx.load_config(KEEP_TANH), (x,))

    def renamed(gm: fx.GraphModule, *, config: Any) -> fx.GraphModule:
        for node in gm.graph.nodes:
            if "nn_module_stack" in node.meta:
                name = "elsewhere" if node.name == "tanh" else node_module(node)
                del node.meta["nn_module_stack"]
                node.meta["custom"] = {"module_fqn": name}
        return policy(gm, config=config)

    taken = Taken(model, x, renamed)
    assert taken.tags["tanh"] is CheckpointPolicy.PREFER_RECOMPUTE  # of a module without a plan
    assert taken.tags["tanh_1"] is CheckpointPolicy.MUST_SAVE
