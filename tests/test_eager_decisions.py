"""pack_checkpoints and regions that decide by values what they compute

Made again from rounded inputs they may decide otherwise: other sizes, or other experts at equal
sizes, which nobody would notice. The oracle is the same run without it.
"""

import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpointed import REENTRANT, ROWS, WIDTH, Block, batch, error, step
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dropit_fx import measure, pack_checkpoints

EXPERTS = 4


class Experts(nn.Module):
    """A router, and the experts of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 8)

    def forward(self, x: Tensor, **named: Any) -> Tensor:
        return x + self.routed(x, self.router(x).softmax(-1), **named)


class Loop(Experts):
    """Sizes depend on values."""

    def routed(self, x: Tensor, scores: Tensor) -> Tensor:
        weight, chosen = scores.topk(2, dim=-1)
        y = torch.zeros_like(x)
        for expert, matrix in enumerate(self.experts):
            rows, place = torch.where(chosen == expert)
            y = y.index_add(0, rows, (x[rows] @ matrix) * weight[rows, place, None])
        return y


class Capacity(Experts):
    """Each expert takes as many tokens as any other: all sizes are fixed."""

    def routed(self, x: Tensor, scores: Tensor) -> Tensor:
        weight, rows = scores.t().topk(len(x) // EXPERTS, dim=-1)
        taken = torch.bmm(x[rows], self.experts) * weight[..., None]
        return torch.zeros_like(x).index_add(0, rows.flatten(), taken.flatten(0, 1))


class Masked(Experts):
    """A size depends on values, and no index is saved but a mask."""

    def routed(self, x: Tensor, scores: Tensor) -> Tensor:
        mask = scores[:, 0] > 0.25
        return torch.zeros_like(x).masked_scatter(mask[:, None], x[mask] @ self.experts[0])


class Gated(Experts):
    """Decides by comparing, at fixed sizes: no index is saved."""

    def routed(self, x: Tensor, scores: Tensor) -> Tensor:
        return (x @ self.experts[0]) * (scores[:, :1] > 0.25)


class Given(Experts):
    """Reads rows that it is given, and those of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(ROWS).flip(0))

    def routed(self, x: Tensor, scores: Tensor, rows: Any = None) -> Tensor:
        y = (x @ self.experts[0])[self.order] * scores[:, :1]
        return y if rows is None else y[rows]


class Mixed(nn.Module):
    """A plain block, then one that decides, both checkpointed."""

    def __init__(self, deciding: nn.Module, named: Any = None, **options: Any) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 10)
        self.plain, self.deciding = Block(), deciding
        self.options, self.named = {"use_reentrant": False} | options, named or {}

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.plain, self.stem(x), **self.options)
        deciding = functools.partial(self.deciding, **self.named)
        return self.head(checkpoint(deciding, x, **self.options)).square().mean()


def mixed(kind: type[Experts], **options: Any) -> Mixed:
    torch.manual_seed(0)
    return Mixed(kind(), **options).train()


def exact(model: nn.Module) -> list[str]:
    """The parameters of the last region and of what is behind it."""
    return [n for n, _ in model.named_parameters() if n.startswith(("deciding", "head"))]


@pytest.mark.parametrize("kind", [Loop, Capacity], ids=["sizes", "choices"])
def test_a_region_that_chooses_rows_is_made_again_exactly(kind: type[Experts]) -> None:
    model, x = mixed(kind), batch()
    loss, grads = step(model, x)
    dense = measure.saved_bytes(model, x)
    packing = pack_checkpoints(model, bits=2)
    with pytest.warns(UserWarning, match=f"layer 'deciding' \\({kind.__name__}\\).*trust_indices"):
        found = step(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert measure.saved_bytes(model, x) == dense - (
            packing.report().dense_bytes - packing.report().kept_bytes
        )
    assert found[0] == loss
    for name in exact(model):
        assert torch.equal(found[1][name], grads[name]), name
    plain, deciding = packing.report().rows
    assert plain.codec == "quant(bits=2)"
    assert "saves indices that it makes" in deciding.reason
    assert deciding.kept_bytes == deciding.dense_bytes


def test_a_region_inside_of_the_region_counts_as_part_of_it() -> None:
    class Nested(Capacity):
        def routed(self, x: Tensor, scores: Tensor) -> Tensor:
            return checkpoint(super().routed, x, scores, use_reentrant=False)

    model, x = mixed(Nested), batch()
    grads = step(model, x)[1]
    pack_checkpoints(model, bits=2)
    with pytest.warns(UserWarning, match="'deciding'"):
        found = step(model, x)[1]
    for name in exact(model):
        assert torch.equal(found[name], grads[name]), name


def test_indices_that_a_region_is_given_or_has_in_a_buffer_are_no_decision() -> None:
    model, x = mixed(Given, named={"rows": torch.arange(ROWS).roll(3)}), batch()
    loss, grads = step(model, x)
    packing = pack_checkpoints(model, bits=8)
    found = step(model, x)
    assert found[0] == loss
    assert 0 < error(found[1], grads) < 0.02
    assert {row.codec for row in packing.report().rows} == {"quant(bits=8)"}


def test_a_reentrant_region_that_chooses_rows_is_an_error() -> None:
    """Its forward saves nothing, so that the indices show when it is too late."""
    model, x = mixed(Capacity, use_reentrant=True), batch()
    pack_checkpoints(model)
    with pytest.raises(RuntimeError, match=r"layer 'deciding' .*Use use_reentrant=False"):
        step(model, x)
    model = mixed(Given, named={"rows": torch.arange(ROWS).roll(3)}, use_reentrant=True)
    grads = step(model, x)[1]
    pack_checkpoints(model, bits=8)
    assert 0 < error(step(model, x)[1], grads) < 0.02


def test_a_region_that_computes_something_else_is_named() -> None:
    model, x = mixed(Masked), batch()
    pack_checkpoints(model, bits=2)
    with pytest.raises(CheckpointError, match=r"layer 'deciding' \(Masked\) is made again"):
        step(model, x)


def test_what_pytorch_says_of_a_region_whose_inputs_are_exact_stays() -> None:
    class Other(Capacity):
        runs = 0

        def routed(self, x: Tensor, scores: Tensor) -> Tensor:
            self.runs += 1
            return super().routed(x, scores).exp() if self.runs == 1 else x[:3].exp().sum() * x

    model, x = mixed(Other), batch()
    pack_checkpoints(model)
    with (
        pytest.warns(UserWarning, match="'deciding'"),
        pytest.raises(CheckpointError, match=r"^torch\.utils\.checkpoint"),
    ):
        step(model, x)


@REENTRANT
def test_what_is_decided_by_comparing_is_decided_again(use_reentrant: bool) -> None:
    """As ``relu`` decides: near the threshold rounded values lie on its other side."""
    model, x = mixed(Gated, use_reentrant=use_reentrant), batch()
    loss, grads = step(model, x)
    errors = []
    for bits in (2, 4, 8):
        packing = pack_checkpoints(model, bits=bits)
        found = step(model, x)
        assert found[0] == loss
        errors.append(error(found[1], grads))
        packing.remove()
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.03


def test_a_region_that_saves_what_it_chooses_by_is_packed() -> None:
    """The router's logits are there again, so that each token has its experts."""

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        router = op == torch.ops.aten.mm.default and args[1].shape[-1] == EXPERTS
        return CheckpointPolicy.MUST_SAVE if router else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    model, x = mixed(Loop, context_fn=contexts), batch()
    loss, grads = step(model, x)
    packing = pack_checkpoints(model, bits=4, trust_indices=True)
    found = step(model, x)
    assert found[0] == loss
    assert 0 < error(found[1], grads) < 0.1
    assert {row.codec for row in packing.report().rows} == {"quant(bits=4)"}
    trusting = mixed(Loop)
    pack_checkpoints(trusting, bits=2, trust_indices=True)
    with pytest.raises(CheckpointError, match="index that trust_indices=True trusts"):
        step(trusting, x)


def test_a_write_into_the_input_of_a_region_is_seen_as_ever() -> None:
    class Writing(Capacity):
        def routed(self, x: Tensor, scores: Tensor) -> Tensor:
            with torch.no_grad():
                x.mul_(2)
            return super().routed(x, scores)

    model, x = mixed(Writing), batch()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(model, x)
    pack_checkpoints(model)
    with (
        pytest.warns(UserWarning, match="'deciding'"),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        step(model, x)


def test_mixtral_is_exact_however_it_runs_its_experts() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        max_position_embeddings=32,
    )
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))
    for kind in ("eager", "grouped_mm"):
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(config).train()
        model.set_experts_implementation(kind)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss, grads = _causal_step(model, ids)
        pack_checkpoints(model, bits=2)
        with pytest.warns(UserWarning, match=r"'model\.layers\.0' \(MixtralDecoderLayer\)"):
            found = _causal_step(model, ids)
        assert found[0] == loss
        assert error(found[1], grads) == 0, kind


def _causal_step(model: nn.Module, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flatten())
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }
