"""pack_checkpoints and regions that decide by values what they compute

Made again from rounded inputs they may decide otherwise: other sizes, or other experts at equal
sizes, which nobody would notice. The oracle is the same run without it.
"""

import functools
import warnings
from collections.abc import Callable
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
from dropit_fx.runtime.followed import Followed

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


def mixed(kind: Callable[[], nn.Module], **options: Any) -> Mixed:
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


Rows = Callable[["Chosen", Tensor, Tensor], Tensor]  # of the region, its input and its scores


class Chosen(Experts):
    """Reads rows that a function says."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(ROWS).flip(0))
        self.rows = rows

    def routed(self, x: Tensor, scores: Tensor) -> Tensor:
        return (x @ self.experts[0])[self.rows(self, x, scores)] * scores[:, :1]


def _written(values: Tensor, way: str) -> Tensor:
    """Indices into which these are written."""
    rows = torch.arange(ROWS)
    if way == "whole":
        rows.copy_(values)
    elif way == "out":
        torch.add(values, 0, out=rows)
    elif way == "part":
        rows[3:9] = values[3:9]
    else:
        rows.view(2, -1)[1].detach()[3:9].copy_(values[3:9])
    return rows


def _buffer_written(region: Chosen, x: Tensor, scores: Tensor) -> Tensor:
    return region.order.copy_(scores[:, 0].argsort())


def _branch(region: Chosen, x: Tensor, scores: Tensor) -> Tensor:
    return torch.arange(ROWS) if scores[3, 0] > scores[4, 0] else torch.arange(ROWS).flip(0)


def _no_grad(region: Chosen, x: Tensor, scores: Tensor) -> Tensor:
    with torch.no_grad():
        return x.detach().view(-1)[:ROWS].sort().indices


class _Sorted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.argsort()


WAYS = "whole", "out", "part", "view"
SAME: dict[str, Rows] = {
    "positions": lambda region, x, s: torch.arange(len(x)).flip(0),
    "buckets": lambda region, x, s: (torch.arange(ROWS).float().log1p() * 10).long().clamp(0, 63),
    "distances": lambda region, x, s: (torch.arange(8)[:, None] - torch.arange(8)).abs().flatten(),
    "mask": lambda region, x, s: (region.order < 32).nonzero().flatten().repeat(2),
    "number": lambda region, x, s: torch.arange(ROWS).roll(int(region.order[3])),
    "tensor": lambda region, x, s: (torch.arange(len(x)) + torch.tensor(len(x) // 2)) % len(x),
    "parameter": lambda region, x, s: region.experts[0, 0].detach().argsort(),
    "shape": lambda region, x, s: (
        torch.full_like(s[:, 0], 3).new_ones(ROWS).cumsum(0).long() % ROWS
    ),
    "chance": lambda region, x, s: torch.randperm(ROWS),
    **{way: lambda region, x, s, way=way: _written(region.order, way) for way in WAYS},
}
DIFFERENT: dict[str, Rows] = {
    "argmax": lambda region, x, s: s.argmax(-1),
    "topk": lambda region, x, s: s.topk(2, -1).indices[:, 1],
    "sorted": lambda region, x, s: s[:, 0].argsort(),
    "no_grad": _no_grad,
    "compared": lambda region, x, s: (s[:, 0] > 0.25).long(),
    "of both": lambda region, x, s: (region.order + s.argmax(-1)) % ROWS,
    "number": lambda region, x, s: torch.arange(ROWS).roll(int(s[:, 0].argmax())),
    "branch": _branch,
    "size": lambda region, x, s: torch.arange(ROWS).roll(len(x[s[:, 0] > 0.25])),
    "nonzero": lambda region, x, s: torch.arange(ROWS).roll(len((s[:, 0] > 0.25).nonzero())),
    "unique": lambda region, x, s: torch.arange(ROWS).roll(len(s.argmax(-1).unique())),
    "list": lambda region, x, s: torch.tensor(s.argmax(-1).tolist()),
    "numpy": lambda region, x, s: torch.from_numpy(s[:, 0].detach().numpy().argsort()),
    "function": lambda region, x, s: _Sorted.apply(s[:, 0]),
    "buffer": _buffer_written,
    **{way: lambda region, x, s, way=way: _written(s[:, 0].argsort(), way) for way in WAYS},
}


@REENTRANT
@pytest.mark.parametrize("rows", SAME.values(), ids=SAME)
def test_indices_that_depend_on_nothing_rounded_are_no_decision(
    rows: Rows, use_reentrant: bool
) -> None:
    model, x = mixed(lambda: Chosen(rows), use_reentrant=use_reentrant), batch()
    loss, grads = step(model, x)
    packing = pack_checkpoints(model, bits=8)
    for _ in range(2):
        found = step(model, x)
        assert found[0] == loss
        assert 0 < error(found[1], grads) < 0.02
    assert {row.codec for row in packing.report().rows} == {"quant(bits=8)"}


@REENTRANT
@pytest.mark.parametrize("rows", DIFFERENT.values(), ids=DIFFERENT)
def test_indices_that_depend_on_what_is_rounded_are_a_decision(
    rows: Rows, use_reentrant: bool
) -> None:
    model, x = mixed(lambda: Chosen(rows), use_reentrant=use_reentrant), batch()
    grads = step(model, x)[1]
    pack_checkpoints(model, bits=2)
    if use_reentrant:
        with pytest.raises(RuntimeError, match=r"'deciding' .*Use use_reentrant=False"):
            step(model, x)
        return
    with pytest.warns(UserWarning, match="'deciding'"):
        steps = [step(model, x)[1] for _ in range(2)]
    for found in steps:
        for name in exact(model):
            assert torch.equal(found[name], grads[name]), name


@REENTRANT
def test_indices_by_values_that_no_op_showed_are_an_error(use_reentrant: bool) -> None:
    def rows(region: Chosen, x: Tensor, scores: Tensor) -> Tensor:
        return torch.arange(ROWS).roll(sum(value > 0.3 for value in x[:, 0].tolist()))

    model, x = mixed(lambda: Chosen(rows), use_reentrant=use_reentrant), batch()
    pack_checkpoints(model, bits=2)
    with pytest.raises(RuntimeError, match=r"layer 'deciding' \(Chosen\)"):
        step(model, x)


def test_what_shares_the_memory_of_a_rounded_input_is_rounded() -> None:
    """A region is given it twice, once without a gradient, or finds it beside."""

    class Twice(Mixed):
        beside = False

        def forward(self, x: Tensor) -> Tensor:
            def deciding(x: Tensor, other: Tensor) -> Tensor:
                found = hidden if self.beside else other
                return self.deciding(x) * (x @ found.detach().t())[:, found[:, 0].argsort()]

            x = hidden = checkpoint(self.plain, self.stem(x), **self.options)
            return self.head(checkpoint(deciding, x, x.detach(), **self.options)).square().mean()

    for beside in (False, True):
        torch.manual_seed(0)
        model, x = Twice(Block()).train(), batch()
        model.beside = beside
        grads = step(model, x)[1]
        pack_checkpoints(model, bits=2)
        with pytest.warns(UserWarning, match="pack_checkpoints"):
            found = step(model, x)[1]
        for name in exact(model):
            assert torch.equal(found[name], grads[name]), name


@REENTRANT
def test_a_region_in_a_region_finds_indices_of_the_outer_one(use_reentrant: bool) -> None:
    """Or, reentrant, makes some itself, when it is made again."""

    class Nested(Experts):
        def routed(self, x: Tensor, scores: Tensor) -> Tensor:
            def inner(y: Tensor) -> Tensor:
                found = self.router(y).argmax(-1) if use_reentrant else rows
                return (y @ self.experts[0])[found]

            rows = scores.argmax(-1)
            return checkpoint(inner, x, use_reentrant=use_reentrant) * scores[:, :1]

    model, x = mixed(Nested), batch()
    grads = step(model, x)[1]
    pack_checkpoints(model, bits=2)
    if use_reentrant:
        with pytest.raises(RuntimeError, match="Use use_reentrant=False"):
            step(model, x)
        return
    with pytest.warns(UserWarning, match="'deciding'"):
        found = step(model, x)[1]
    for name in exact(model):
        assert torch.equal(found[name], grads[name]), name


def test_compiled_code_in_a_region_stays_compiled() -> None:
    """What it chooses is not seen coming about, and so may differ."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    chosen = torch.compile(lambda s: s.argmax(-1) % 3, backend=backend)
    model, x = mixed(lambda: Chosen(lambda region, x, s: chosen(s))), batch()
    grads = step(model, x)[1]
    compiled = len(graphs)
    pack_checkpoints(model, bits=2)
    with pytest.warns(UserWarning, match="'deciding'"):
        found = step(model, x)[1]
    assert len(graphs) == compiled == 1
    for name in exact(model):
        assert torch.equal(found[name], grads[name]), name


def test_only_regions_with_indices_are_followed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A region that has none, and one whose indices depend on its input, are not followed again."""
    ops: list[Any] = []
    dispatch = Followed.__torch_dispatch__

    def counting(self: Followed, func: Any, *rest: Any) -> Any:
        ops.append(func)
        return dispatch(self, func, *rest)

    monkeypatch.setattr(Followed, "__torch_dispatch__", counting)
    for rows, again in ((SAME["positions"], True), (DIFFERENT["argmax"], False)):
        model, x = mixed(lambda rows=rows: Chosen(rows)), batch()
        pack_checkpoints(model, bits=8)
        counts = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                ops.clear()
                step(model, x)
                counts.append(len(ops))
        assert counts[0] > counts[1] == counts[2], "the plain block is followed once"
        assert bool(counts[1]) == again


def test_relative_positions_of_transformers_are_no_decision() -> None:
    transformers = pytest.importorskip("transformers")
    deberta = transformers.DebertaV2Config(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=16,
        max_position_embeddings=64,
    )
    t5 = transformers.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    )
    t5.decoder_start_token_id = 0
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))
    for kind, config, most in (
        (transformers.DebertaV2ForMaskedLM, deberta, 0.2),
        (transformers.T5ForConditionalGeneration, t5, 0.2),
    ):
        torch.manual_seed(0)
        model = kind(config).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(2)
        loss = model(input_ids=ids, labels=ids).loss
        packing = pack_checkpoints(model, bits=6)
        torch.manual_seed(2)
        found = model(input_ids=ids, labels=ids).loss
        found.backward()
        assert found.item() == loss.item()
        assert packing.report().ratio < most, kind.__name__


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
