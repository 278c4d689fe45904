"""Experts as one grouped product, compiled: Mixtral's and Qwen2-MoE's layers of transformers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropit_fx import measure
from dropit_fx.compile.backend import compiled_graphs

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
IDS = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(num_local_experts=4, **SIZES)
    return transformers.MixtralForCausalLM(config)


def qwen() -> nn.Module:
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**QWEN, **SIZES))


def step(function: Any, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = function(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("make", [mixtral, qwen])
def test_products_of_experts_are_packed(make: Any) -> None:
    torch.manual_seed(0)
    model = make().to(torch.bfloat16).train()
    model.set_experts_implementation("grouped_mm")
    torch._dynamo.reset()
    loss, grads = step(torch.compile(model, backend="eager"), model)
    for preset in ("lossless", "balanced"):
        torch._dynamo.reset()
        options: Any = {"preset": preset}
        compiled = torch.compile(model, backend="dropit_eager", options=options)
        before = len(compiled_graphs())
        found = step(compiled, model)
        graphs = compiled_graphs()[before:]
        assert torch.equal(found[0], loss)
        off = sum((found[1][n] - grads[n]).float().square().sum() for n in grads)
        off = (off / sum(g.float().square().sum() for g in grads.values())) ** 0.5
        rows = [r for g in graphs for r in g.report.rows if "grouped_mm" in r.op]
        inputs = [r for r in rows if "kept" not in r.reason and r.codec != "keep"]
        if preset == "lossless":
            assert all(torch.equal(found[1][n], grads[n]) for n in grads)
            assert not inputs
        else:
            assert 0 < float(off) < 0.15
            assert len(inputs) == 4  # of each layer, what goes into both products
            assert measure.saved_bytes(compiled, input_ids=IDS, labels=IDS, use_cache=False) == sum(
                g.saved_bytes for g in graphs
            )
