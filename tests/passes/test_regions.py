"""Checkpointed regions whose inputs are packed: the forward is exact, the backward is made again.

What a region is made again from is the codec's value of its input, in eager mode as in a partition.
"""

import copy
import functools
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import dropit_fx
from dropit_fx.capture.regions import marking
from dropit_fx.codecs import CODEC
from dropit_fx.codecs.codec import Codec
from dropit_fx.compile import backend
from dropit_fx.config import make_config
from dropit_fx.measure import peak_memory, saved_bytes
from dropit_fx.ops import table as op_table
from dropit_fx.ops.rule import Use
from dropit_fx.report.rows import Row
from dropit_fx.runtime import packed_call
from dropit_fx.runtime.decisions import REASON

ROUGH = {"op": "checkpoint", "codec": "quant", "bits": 3, "block": 64}
INNERS = ("eager", "aot_eager", "aot_eager_decomp_partition")


class Region(nn.Module):
    """A linear layer, then a checkpointed block with dropout in it."""

    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.body = nn.Sequential(
            nn.Linear(64, 96), nn.GELU(), nn.Dropout(p), nn.Linear(96, 64), nn.Tanh()
        )

    def region(self, h: Tensor) -> Tensor:
        return h + self.body(h)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = checkpoint(self.region, self.first(x), use_reentrant=False)
        return h


class RecomputedFromCopy(Region):
    """The same in plain PyTorch: a region with a forward of its own and another backward."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        options = tuple(CODEC["quant"].defaults().items())
        chosen = dict(options) | {k: v for k, v in ROUGH.items() if k in dict(options)}
        packed = packed_call.pack(h, (h,), "quant", chosen)
        assert packed is not None
        again = packed_call.stand_in(h, packed)
        state = torch.get_rng_state()
        with torch.no_grad():
            exact = self.region(h)
        torch.set_rng_state(state)
        rough = self.region(again)
        return rough + (exact - rough).detach()  # the value of one, the gradient of the other


def step(run: Callable[..., Tensor], model: nn.Module, *args: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    out = run(*args)
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def compiled(
    model: nn.Module, inner: str, *rules: dict[str, Any], preset: str | None = None
) -> Any:
    torch._dynamo.reset()
    config = {"preset": preset, "rules": list(rules)}
    options = {"config": config, "inner": inner}
    return torch.compile(model, backend="dropit", fullgraph=True, options=options)


def is_packed(row: Row) -> bool:
    return "keep" not in row.codec


def regions_inputs() -> list[Row]:
    rows = backend.compiled_graphs()[-1].report.rows
    return [r for r in rows if r.op == "checkpoint"]


@pytest.mark.parametrize("inner", INNERS[:2])  # the third draws other random numbers
def test_a_region_is_exact_forwards_and_made_again_from_its_packed_input(inner: str) -> None:
    x, model = torch.randn(16, 32), Region()
    expected, gradients = step(RecomputedFromCopy.forward.__get__(model), model, x)
    exact, dense = step(model, model, x)
    found, ours = step(compiled(model, inner, ROUGH), model, x)
    assert torch.equal(found, exact)
    torch.testing.assert_close(expected, exact)
    for a, b, whole in zip(ours, gradients, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(a, whole, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("inner", [*INNERS, "inductor"])
def test_saved_bytes_are_those_of_the_packed_input(inner: str) -> None:
    x, model = torch.randn(16, 32), Region(p=0.0)
    run = compiled(model, inner, ROUGH)
    assert 16 * 64 * 3 // 8 < saved_bytes(run, x) <= 16 * 64 * 4 // 8  # codes and scales
    (row,) = regions_inputs()
    assert row.codec.startswith("quant")
    assert row.kept_bytes == saved_bytes(run, x)
    assert saved_bytes(compiled(model, inner), x) == 4 * 16 * 64
    if inner != "eager":
        run(x)
        partition = backend.compiled_graphs()[-1].partitions[-1]
        assert partition.packs_in_backward == partition.unpacks_in_forward == ()


def within(h: Tensor) -> Tensor:
    """A region in a region that reads nothing itself."""
    inner: Tensor = checkpoint(lambda w: w.exp(), h + 1, use_reentrant=False)
    return inner


BODIES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda h: h,
    lambda h: h.view(-1),
    lambda h: h + 1,
    lambda h: h * 2,
    lambda h: h.sum(),
    lambda h: nn.functional.dropout(h, 0.0, True),
    lambda h: (h.exp(), h + 1)[1],
)
NUMBER, WHOLE = 8, 4 * 16 * 64


@pytest.mark.parametrize(
    ("bodies", "dense"),
    [
        (BODIES, NUMBER),
        ((within,), WHOLE),
        ((lambda h: nn.functional.linear(h, torch.ones(8, 64)),), WHOLE),  # only its shape is read
        ((lambda h: nn.functional.avg_pool1d(h, 2),), WHOLE),  # and its packed call keeps no shape
    ],
    ids=["none", "an inner region", "a constant", "an op of a row"],
)
def test_a_region_whose_backward_reads_nothing_keeps_nothing(bodies: Any, dense: int) -> None:
    class Keeps(Region):
        def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
            return [checkpoint(b, self.first(x), use_reentrant=False) + 1 for b in bodies]

    x, model = torch.randn(16, 32), Keeps()
    assert saved_bytes(model, x) == dense
    run = compiled(model, "eager", preset="balanced")
    kept = saved_bytes(run, x)
    told = backend.compiled_graphs()[-1].report
    assert (told.dense_bytes, told.kept_bytes) == (dense, kept)
    if len(bodies) == 1:  # that of `h` itself is no region of a graph
        traced = dropit_fx.transform(model, preset="balanced", example_args=(x,))
        assert dropit_fx.report(traced).kept_bytes == saved_bytes(traced, x)


def test_a_region_whose_result_is_not_used_keeps_nothing() -> None:
    class Unused(Region):
        def forward(self, x: Tensor) -> Tensor:
            unused = checkpoint(torch.exp, self.first(x).exp(), use_reentrant=False)
            assert unused is not None
            return self.first(x).sin()

    x, model = torch.randn(16, 32), Unused()
    run = compiled(model, "eager", preset="balanced")
    kept = saved_bytes(run, x)
    told = backend.compiled_graphs()[-1].report
    assert (told.dense_bytes, told.kept_bytes) == (saved_bytes(model, x), kept)


class ReadsItsInput(nn.Module):
    """A region behind values without a gradient, whose op reads the region's own input."""

    def __init__(self, body: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 32))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.body, x.relu(), self.weight, use_reentrant=False)
        return h.relu().relu()


TARGETS = torch.arange(16)
READERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a product": lambda h, w: h * w,
    "a division": lambda h, w: w / (h + 1),
    "a matrix product": lambda h, w: h @ w.T,
    "a loss, its targets": lambda h, w: nn.functional.nll_loss(w + h, TARGETS),
    "a lookup, its indices": lambda h, w: w[h.long().clamp(0, 15)[:, 0]],
    "one whose result is not read": lambda h, w: (h * w, h + w)[1],
}


@pytest.mark.parametrize("preset", ["balanced", "lossless"])
@pytest.mark.parametrize("body", READERS.values(), ids=READERS)
def test_a_region_that_reads_its_own_input_keeps_it(body: Any, preset: str) -> None:
    x, model = torch.randn(16, 32), ReadsItsInput(body)
    traced = dropit_fx.transform(model, example_args=(x,), preset=preset)
    assert dropit_fx.report(traced).kept_bytes == saved_bytes(traced, x)
    run = compiled(model, "eager", preset=preset)
    kept = saved_bytes(run, x)
    told = backend.compiled_graphs()[-1].report
    assert (told.dense_bytes, told.kept_bytes) == (saved_bytes(model, x), kept)


def _nested(h: Tensor, w: Tensor) -> Tensor:
    again: Tensor = checkpoint(DECIDING["a selection"], h * 2, w, use_reentrant=False)
    return again


DECIDING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a selection": lambda h, w: h.gather(1, (h @ w.T).topk(4).indices),
    "a sort": lambda h, w: (h @ w.T).sort().values,
    "the experts of a token": lambda h, w: w[(h @ w.T).argmax(1)] * h,
    "a selection in a region inside": _nested,
}
NOT_DECIDING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "positions": lambda h, w: w[torch.arange(h.shape[0]).flip(0)] * h,
    "a constant": lambda h, w: w[torch.zeros_like(h[:, 0]).long()] * h,
    "of a weight": lambda h, w: h.gather(1, w.argsort(1)[:, :4]),
    "the largest of neighbours": lambda h, w: F.max_pool1d(h * w, 2),
}


class Decides(ReadsItsInput):
    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = checkpoint(self.body, x * 2, self.weight, use_reentrant=False)
        return h


@pytest.mark.parametrize("way", ["transform", "compile"])
@pytest.mark.parametrize("name", [*DECIDING, *NOT_DECIDING])
def test_a_region_that_decides_by_values_is_made_again_from_these(name: str, way: str) -> None:
    model, config = Decides((DECIDING | NOT_DECIDING)[name]), {"preset": None, "rules": [ROUGH]}
    x = torch.randn(16, 32, requires_grad=True)
    if way == "transform":
        run: Any = dropit_fx.transform(model, example_args=(x,), config=config)
        told = dropit_fx.report(run)
    else:
        run = compiled(model, "eager", ROUGH)
        run(x)
        told = backend.compiled_graphs()[-1].report
    row = next(r for r in told.rows if r.op == "checkpoint" and not r.region)
    assert is_packed(row) != (name in DECIDING), row
    assert row.reason == (REASON if name in DECIDING else "")
    if name in DECIDING:
        dense, packed = step(model, model, x)[1], step(run, model, x)[1]
        for want, got in zip(dense, packed, strict=True):
            assert torch.equal(want, got)


def test_numbers_in_a_region_that_leads_nowhere_are_not_counted() -> None:
    class Nowhere(Region):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).relu()
            unused = checkpoint(lambda h: (h * 0.5).exp() / 3, h, use_reentrant=False)
            assert unused is not None
            return h.sin()

    x, model = torch.randn(16, 32), Nowhere()
    run = compiled(model, "eager", preset="balanced")
    kept = saved_bytes(run, x)
    told = backend.compiled_graphs()[-1].report
    assert (told.dense_bytes, told.kept_bytes) == (saved_bytes(model, x), kept)


class Chain(Region):
    """Eight regions, each of which is made again from the result of the one before."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(8):
            h = checkpoint(self.region, h, use_reentrant=False)
        return h


@pytest.mark.parametrize("inner", INNERS)
def test_dense_inputs_are_freed_in_the_forward(inner: str) -> None:
    x, model = torch.randn(4096, 32), Chain(p=0.0)
    size = len(x) * 64 * 4
    keep = peak_memory(compiled(model, inner), x)
    # seven results of regions go; packed, eight inputs take an eighth each; one is unpacked
    assert peak_memory(compiled(model, inner, ROUGH), x) < keep - (7 - 1 - 1) * size


class ReadsAView(nn.Module):
    """A region reads a view of what is derived, which nothing else reads in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv3d(4, 4, 1)
        self.norm = nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.softmax(F.relu(torch.sin(x)), -1).reshape(1, 4, 2, 2, -1)
        self.mix(h)
        return self.norm(checkpoint(self.region, h, use_reentrant=False))

    def region(self, h: Tensor) -> Tensor:
        return F.gelu(F.max_pool1d(h.reshape(2, 4, -1), 1, 2))


@pytest.mark.parametrize("inner", INNERS)
def test_a_region_reads_a_view_that_it_alone_reads(inner: str) -> None:
    x, model = torch.randn(4, 8).requires_grad_(), ReadsAView()
    exact, dense = step(model, model, x)
    found, ours = step(compiled(model, inner, preset="balanced"), model, x)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())


def test_the_graph_shows_what_happens() -> None:
    graphs: list[Any] = []

    def look(gm: Any, inputs: list[Any]) -> Any:
        backend.rewrite_dynamo_graph(gm, inputs, make_config({"rules": [ROUGH]}))
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Region(), backend=look, fullgraph=True)(torch.randn(4, 32))
    (outer,) = graphs
    (call,) = outer.graph.find_nodes(op="call_function", target=packed_call.packed_checkpoint)
    assert [p.target for p in call.kwargs["packed"].values()] == [packed_call.pack]
    body = outer.get_submodule(call.args[0].target)
    (again,) = body.graph.find_nodes(op="call_function", target=packed_call.stand_in)
    assert [n.op for n in again.args] == ["placeholder", "placeholder"]
    assert len(again.args[0].users) == 1


def test_a_region_of_two_calls_keeps_its_inputs() -> None:
    class Twice(Region):
        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.region, self.first(x), use_reentrant=False)
            return checkpoint(self.region, h + 1, use_reentrant=False)

    def share(gm: Any, inputs: list[Any]) -> Any:
        calls = [n for n in gm.graph.nodes if n.target in op_table.CHECKPOINT.targets]
        calls[1].args[0].target = calls[0].args[0].target
        gm.recompile()
        record = backend.rewrite_dynamo_graph(gm, inputs, make_config({"rules": [ROUGH]}))
        assert record is not None
        reasons.extend(r.reason for r in record.report.rows if r.op == "checkpoint")
        return gm.forward

    reasons: list[str] = []
    x, model = torch.randn(4, 32), Twice(p=0.0)
    _, dense = step(model, model, x)
    torch._dynamo.reset()
    _, ours = step(torch.compile(model, backend=share, fullgraph=True), model, x)
    assert reasons == ["its region is called more than once"] * 2
    assert len(ours) == len(dense)


class Stack(nn.Module):
    """Two regions, each of which takes a mask, positions and a table of angles beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def block(self, h: Tensor, mask: Tensor, positions: Tensor, layer: int) -> Tensor:
        return h + torch.tanh(self.layers[layer](h)) * mask + positions / 64

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[0](x)
        mask = torch.where(x > 0, -torch.inf, 0.0).exp()
        positions = torch.arange(64)
        for layer in (1, 2):
            h = checkpoint(self.block, h, mask, positions, layer, use_reentrant=False)
        return h


@pytest.mark.parametrize("inner", INNERS)
def test_masks_and_positions_stay_as_they_are(inner: str) -> None:
    x, model = torch.randn(32, 64), Stack()
    exact, dense = step(model, model, x)
    found, ours = step(compiled(model, inner, ROUGH | {"bits": 8}), model, x)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())
    rows = regions_inputs()
    assert [(r.shape, r.codecs[0]) for r in rows if is_packed(r)] == [((32, 64), "quant")] * 2
    kept = {r.shape: r.reason for r in rows if not is_packed(r)}
    assert set(kept) == {(32, 64), (64,)}
    assert all("no gradient goes there" in reason for reason in kept.values())


def test_another_reader_shares_the_copy() -> None:
    class Both(Region):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            inside = checkpoint(self.region, h, use_reentrant=False)
            return inside + torch.softmax(h, -1) + nn.functional.layer_norm(h, (64,))

    norm = {"op": "layer_norm", "codec": "quant", "bits": 6, "block": 64}
    x, model = torch.randn(16, 32), Both(p=0.0)
    exact, dense = step(model, model, x)
    for inner in INNERS:
        found, ours = step(compiled(model, inner, ROUGH, norm), model, x)
        torch.testing.assert_close(found, exact)
        rows = backend.compiled_graphs()[-1].report.rows
        assert [is_packed(r) for r in rows if r.op == "checkpoint+layer_norm"] == [True]
        for a, b in zip(ours, dense, strict=True):
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.1 * b.abs().max().item())


@pytest.mark.parametrize("inner", INNERS[:2])  # the third computes in other ops
def test_a_codec_of_plain_ops_leaves_the_forward_exact(
    monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    """What packs and unpacks has no name of its own in a joint graph."""
    shorter = Codec(
        name="shorter",
        serves=frozenset({Use.REDUCE}),
        pack=lambda flat, options: (flat.to(torch.bfloat16),),
        unpack=lambda parts, options, numel, dtype: parts[0].to(dtype),
        nbytes=lambda numel, dtype, options: 2 * numel,
    )
    monkeypatch.setitem(CODEC, "shorter", shorter)
    x, model = torch.randn(16, 32), Region(p=0.0)
    exact, dense = step(model, model, x)
    run = compiled(model, inner, {"op": "checkpoint", "codec": "shorter"})
    found, ours = step(run, model, x)
    assert torch.equal(found, exact)
    assert [r.codecs for r in regions_inputs()] == [("shorter",)]
    assert not all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01 * b.abs().max().item())


@pytest.mark.parametrize("inner", INNERS[:2])  # the third computes in other ops
def test_a_copy_by_channel_leaves_the_forward_exact(inner: str) -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            inside = checkpoint(lambda h: torch.tanh(h) * h, h, use_reentrant=False)
            return inside + self.norm(h)

    x, model = torch.randn(8, 3, 16, 16), Maps()
    exact, _ = step(model, model, x)
    found, _ = step(compiled(model, inner, preset="balanced"), model, x)
    assert torch.equal(found, exact)
    rows = backend.compiled_graphs()[-1].report.rows
    assert [is_packed(r) for r in rows if "checkpoint" in r.op] == [True]


class Nested(Region):
    """A region in a region."""

    def outer(self, h: Tensor) -> Tensor:
        return checkpoint(self.region, torch.sin(h), use_reentrant=False) + h

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = checkpoint(self.outer, self.first(x), use_reentrant=False)
        return h


class NestedAtOnce(Region):
    """A region whose own input goes into regions in it."""

    def outer(self, h: Tensor) -> Tensor:
        inside = checkpoint(self.region, h, use_reentrant=False)
        return checkpoint(torch.sin, inside, use_reentrant=False) + h

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = checkpoint(self.outer, self.first(x), use_reentrant=False)
        return h


@pytest.mark.parametrize("inner", INNERS[:2])
@pytest.mark.parametrize("model", [Region, Nested, NestedAtOnce])
def test_regions_in_regions_are_exact_forwards(model: type[Region], inner: str) -> None:
    x, module = torch.randn(16, 32), model()
    exact, dense = step(module, module, x)
    found, ours = step(compiled(module, inner, ROUGH), module, x)
    assert torch.equal(found, exact)
    assert any(map(is_packed, regions_inputs()))
    assert not all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))


@pytest.mark.parametrize("inner", INNERS[:2])
@pytest.mark.parametrize("model", [Region, Nested, NestedAtOnce])
def test_dropout_in_a_region_has_one_mask(model: type[Region], inner: str) -> None:
    x, module = torch.randn(64, 32), model(p=0.5)
    _, dense = step(module, module, x)
    _, ours = step(compiled(module, inner, ROUGH | {"bits": 8}), module, x)
    for a, b in zip(ours, dense, strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("inner", INNERS)
def test_selective_checkpoints_keep_their_inputs(inner: str) -> None:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = op is torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    class Selective(Region):
        def forward(self, x: Tensor) -> Tensor:
            context = functools.partial(create_selective_checkpoint_contexts, policy)
            h: Tensor = checkpoint(
                self.region, self.first(x), use_reentrant=False, context_fn=context
            )
            return h

    x, model = torch.randn(16, 32), Selective(p=0.0)
    exact, dense = step(model, model, x)
    found, ours = step(compiled(model, inner, ROUGH), model, x)
    torch.testing.assert_close(found, exact)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b)
    assert ["selective" in r.reason for r in regions_inputs()] == [True]


def test_without_gradients_nothing_is_packed_and_eval_is_exact() -> None:
    x, model = torch.randn(16, 32), Region()
    run = compiled(model, "eager", ROUGH)
    run(x)
    model.eval()
    with torch.no_grad():
        assert torch.equal(run(x), model(x))
    assert torch.equal(run(x), model(x))


@pytest.mark.parametrize("inner", INNERS[:2])
def test_sizes_may_change_from_step_to_step(inner: str) -> None:
    """Dynamo then hands them to the region as numbers, among its inputs."""
    model = Region(p=0.0)
    run = torch.compile(
        model, backend="dropit", dynamic=True, options={"preset": "balanced", "inner": inner}
    )
    before = len(backend.compiled_graphs())
    for batch in (16, 24, 40, 7):
        x = torch.randn(batch, 32)
        (exact, dense), (found, ours) = step(model, model, x), step(run, model, x)
        assert torch.equal(found, exact)
        flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (ours, dense)]
        assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99
        assert saved_bytes(run, x) < 0.3 * saved_bytes(model, x)
    # AOTAutograd starts again where a float (dropout's rate) has to be a constant
    assert len(backend.compiled_graphs()) - before == (1 if inner == "eager" else 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_not_hidden(bad: float) -> None:
    x, model = torch.randn(16, 32), Region(p=0.0)
    x[3, 4] = bad
    for inner in INNERS:
        _, ours = step(compiled(model, inner, ROUGH), model, x)
        assert any(not g.isfinite().all() for g in ours)


@pytest.mark.parametrize("inner", INNERS)
def test_autocast_goes_with_it(inner: str) -> None:
    x, model = torch.randn(64, 32), Region(p=0.0)

    def lowered(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run(x).float()

        return call

    exact, dense = step(lowered(model), model, x)
    found, ours = step(lowered(compiled(model, inner, ROUGH | {"bits": 8})), model, x)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.02)
    for a, b in zip(ours, dense, strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.995
    assert {r.dtype for r in regions_inputs()} == {"bfloat16"}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.slow
def test_transformers_own_checkpointing(name: str) -> None:
    small = {"vocab_size": 200, "bos_token_id": 0, "eos_token_id": 0}
    model: Any
    if name == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, attn_pdrop=0.0, **small)
        )
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, **small,
            )
        )  # fmt: skip
    model.train().gradient_checkpointing_enable()
    ids = torch.randint(0, 200, (4, 32))

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits

    whole = Logits()
    exact, dense = step(whole, whole, ids)
    for inner in INNERS[:2]:
        run = compiled(whole, inner, preset="balanced")
        found, ours = step(run, whole, ids)
        assert torch.equal(found, exact)
        flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (ours, dense)]
        assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.98
        packed = [r for r in regions_inputs() if is_packed(r) and r.codecs[0] != "drop"]
        assert {(r.shape, r.codecs[0]) for r in packed} == {((4, 32, 64), "quant")}
        assert len(packed) == 2
        assert saved_bytes(run, ids) < saved_bytes(whole, ids) * 0.8


def test_one_region_of_each_input_of_many() -> None:
    """Every position of a packed input, alone and together with the others."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 32) for _ in range(3))

        def region(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return torch.sigmoid(a * b + c * a)

        def forward(self, x: Tensor, which: int) -> Tensor:
            values = [layer(x) for layer in self.layers]
            values = [v if which >> i & 1 else v.detach() for i, v in enumerate(values)]
            h: Tensor = checkpoint(self.region, *values, use_reentrant=False)
            return h

    x, model = torch.randn(16, 8), Three()
    for which, inner in itertools.product((1, 2, 4, 6, 7), INNERS[:2]):
        exact, dense = step(model, model, x, which)
        found, ours = step(compiled(model, inner, ROUGH | {"bits": 8}), model, x, which)
        assert torch.equal(found, exact)
        assert sum(is_packed(r) for r in regions_inputs()) == which.bit_count()
        for a, b in zip(ours, dense, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * b.abs().max().item())


class Statistics(nn.Module):
    """A region that writes into buffers: a norm's statistics and an average of its own."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm, self.last = norm, nn.Linear(16, 4)
        self.register_buffer("average", torch.ones(16))

    def region(self, h: Tensor) -> Tensor:
        self.average.mul_(0.5).add_(h.detach().mean(0), alpha=0.5)
        return self.last(self.norm(h.view(-1, 4, 4)).view(-1, 16) * self.average.clone())

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = checkpoint(self.region, self.first(x), use_reentrant=False)
        return h


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
@pytest.mark.parametrize("preset", ["lossless", "balanced"])
def test_what_a_region_writes_into_is_written_once(norm: Any, preset: str) -> None:
    model = Statistics(norm(4, affine=True, track_running_stats=True))
    dense = copy.deepcopy(model)
    run = compiled(model, "eager", preset=preset)
    x = torch.randn(64, 8)
    (run(x).square().sum() + run(x + 1).square().sum()).backward()
    outs = [dense.region(dense.first(x + i)).square().sum() for i in range(2)]
    sum(outs).backward()
    for found, expected in zip(model.buffers(), dense.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    for a, b in zip(model.parameters(), dense.parameters(), strict=True):
        if preset == "lossless":
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def set_rows(buffer: Tensor, h: Tensor) -> Tensor:
    buffer[1:3, ::2] = h.detach()[:2, :4]
    return buffer


WRITERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "setitem": set_rows,
    "diagonal": lambda buffer, h: buffer.diagonal().add_(1),
    "mT": lambda buffer, h: buffer.mT[0].mul_(1.5),
    "unbind": lambda buffer, h: buffer.unbind(0)[2].add_(2),
    "lerp_": lambda buffer, h: buffer.lerp_(h.detach().mean(0).expand(8, 8), 0.5),
    "out=": lambda buffer, h: torch.add(buffer, 1, out=buffer),
    "foreach": lambda buffer, h: torch._foreach_add_([buffer], 1.0),
    "batch_norm": lambda buffer, h: nn.functional.batch_norm(
        h.detach(), buffer[0], buffer[1], training=True
    ),
    "max_norm": lambda buffer, h: nn.functional.embedding(torch.arange(8), buffer, max_norm=1.0),
}


class Writer(nn.Module):
    """A region that writes into a buffer in one of many ways, and reads it."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any], checkpoints: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("buffer", torch.ones(8, 8))
        self.write, self.checkpoints = write, checkpoints

    def region(self, h: Tensor) -> Tensor:
        written = self.write(self.buffer, h)
        held = written if isinstance(written, Tensor) and written.shape == (8, 8) else self.buffer
        return torch.tanh(self.last(h) @ held)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if not self.checkpoints:
            return self.region(h)
        out: Tensor = checkpoint(self.region, h, use_reentrant=False)
        return out


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("way", ["compiled", "transform"])
def test_whatever_a_region_writes_into_is_seen(
    write: Callable[[Tensor, Tensor], Any], way: str
) -> None:
    """Compiled code writes once, as without a checkpoint; what is traced, as eager PyTorch."""
    model, dense = Writer(write, True), Writer(write, way == "transform")
    x = torch.randn(16, 8)
    if way == "compiled":
        run = compiled(model, "eager", preset="lossless")
    else:
        run = dropit_fx.transform(model, preset="lossless", example_args=(x,))
    for scale in (1, 2):
        found, ours = step(run, model, x * scale)
        exact, theirs = step(dense, dense, x * scale)
        assert torch.equal(found, exact)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(model.buffer, dense.buffer)


# What transform traces ----------------------------------------------------------------------------


class Parts(nn.Module):
    """Regions in a row and one inside of another, leaf modules in it, a mask, a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 16)
        self.rows = nn.Sequential(
            *[nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2)) for _ in range(4)]
        )
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def inner(self, h: Tensor, mask: Tensor) -> Tensor:
        return torch.sin(self.lstm(h)[0] * 0.5) ** 2 * mask

    def outer(self, h: Tensor, mask: Tensor) -> Tensor:
        inside = checkpoint(self.inner, torch.exp(-h), mask, use_reentrant=False)
        return self.last(torch.sin(inside))

    def forward(self, x: Tensor) -> Tensor:
        mask = (x.sum(-1, keepdim=True) > 0).float()
        h = checkpoint_sequential(self.rows, 2, self.first(x), use_reentrant=False)
        return checkpoint(
            self.outer, h, mask, use_reentrant=False, preserve_rng_state=True, debug=False
        )  # type: ignore[no-any-return]


class Asking(Parts):
    """The same, which asks for values that only ``torch.export`` knows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 3 and len(x.shape) else x


TRACED = {"symbolic": Parts, "export": Asking, "region": Region}


@pytest.mark.parametrize(
    ("name", "preset"),
    [("symbolic", "balanced"), ("export", "lossless"), ("region", "lossless"), ("region", "max")],
)
def test_what_a_traced_model_checkpoints_is_made_again(name: str, preset: str) -> None:
    model = TRACED[name]()
    x = torch.randn(16, 32) if name == "region" else torch.randn(8, 6, 8)
    packed = dropit_fx.transform(model, example_args=(x,), preset=preset)
    report = dropit_fx.report(packed)
    exact, dense = step(model, model, x)
    assert report.dense_bytes == saved_bytes(model, x)
    assert list(packed.state_dict()) == list(model.state_dict())
    for run in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        found, ours = step(run, run, x)  # chance is drawn as in the dense run, twice
        assert report.kept_bytes == saved_bytes(run, x)
        assert torch.equal(found, exact)
        if preset == "lossless":
            assert all(map(torch.equal, ours, dense))
        flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (ours, dense)]
        assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.95
    regions = [r for r in report.rows if r.op == "checkpoint" and not r.region]
    assert any(map(is_packed, regions)) == (preset != "lossless")
    assert {r.where.rpartition(":")[0] for r in regions} == {__file__}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_what_a_traced_region_writes_into_is_written_as_in_the_dense_model(norm: Any) -> None:
    model = Statistics(norm(4, affine=True, track_running_stats=True))
    dense, x = copy.deepcopy(model), torch.randn(64, 8)
    packed = dropit_fx.transform(model, example_args=(x,), preset="balanced")
    for run in (packed, dense):
        step(run, run, x)
    for found, expected in zip(model.buffers(), dense.buffers(), strict=True):
        assert torch.equal(found, expected)
    reasons = {r.reason for r in dropit_fx.report(packed).rows if r.op == "checkpoint"}
    assert "its region writes into a buffer again when it is made again" in reasons


def test_a_traced_region_under_autocast_and_compiled() -> None:
    model, x = Region(p=0.0), torch.randn(16, 32)
    packed = dropit_fx.transform(model, example_args=(x,), preset="lossless")

    def lowered(run: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out: Tensor = run(x)
            return out.float()

        return call

    exact, dense = step(lowered(model), model, x)
    for run in (packed, torch.compile(packed, backend="aot_eager", fullgraph=True)):
        found, ours = step(lowered(run), packed, x)
        assert torch.equal(found, exact)
        for a, b in zip(ours, dense, strict=True):
            torch.testing.assert_close(a, b)


def lowered(model: Region, h: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.body(h)  # type: ignore[no-any-return]


def gated(model: Region, h: Tensor) -> Tensor:
    with torch.no_grad():
        gate = h.sigmoid() * 2
    return torch.tanh(model.body(h)) * gate


def gated_and_lowered(model: Region, h: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        gate = model.body(h)
    return torch.tanh(model.body(h)) * gate


class Blocks(Region):
    """A region that begins with a block under autocast, or without gradients; export nests it."""

    def __init__(self, block: Callable[[Region, Tensor], Tensor]) -> None:
        super().__init__(p=0.0)
        self.block = block

    def region(self, h: Tensor) -> Tensor:
        return torch.sin(self.block(self, h)) + h

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 2 and len(x.shape) else x


@pytest.mark.parametrize("preset", ["lossless", "balanced"])
@pytest.mark.parametrize("block", [lowered, gated, gated_and_lowered])
def test_a_block_under_autocast_belongs_to_the_region_that_it_is_in(
    block: Any, preset: str
) -> None:
    model, x = Blocks(block), torch.randn(16, 32)
    packed = dropit_fx.transform(model, example_args=(x,), preset=preset)
    report = dropit_fx.report(packed)
    assert [r.op for r in report.rows if not r.region] == ["checkpoint"]
    assert report.dense_bytes == saved_bytes(model, x)
    for run in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert report.kept_bytes == saved_bytes(run, x)
        (exact, dense), (found, ours) = step(model, model, x), step(run, run, x)
        assert torch.equal(found, exact)
        assert len(ours) == len(dense)
        if preset == "lossless":
            assert all(map(torch.equal, ours, dense))


def test_a_region_that_raises_marks_nothing_afterwards() -> None:
    def wrong(x: Tensor) -> Tensor:
        raise ValueError("as a tracer raises")

    with pytest.raises(ValueError, match="tracer") as raised, marking():
        checkpoint(
            lambda x: checkpoint(wrong, x, use_reentrant=False), torch.ones(1), use_reentrant=False
        )
    assert raised.tb is not None  # which holds what the region left open
    assert "custom" not in torch.fx.traceback.current_meta


def test_a_selective_checkpoint_is_not_traced_through() -> None:
    class Selective(Region):
        def forward(self, x: Tensor) -> Tensor:
            context = functools.partial(create_selective_checkpoint_contexts, [])
            h: Tensor = checkpoint(self.region, x, use_reentrant=False, context_fn=context)
            return h

    with pytest.raises(dropit_fx.CaptureError, match="a selective checkpoint"):
        dropit_fx.transform(Selective(), example_args=(torch.randn(4, 64),))


@pytest.mark.parametrize("alone", [False, True])
def test_a_layer_that_checkpoints_itself_when_it_is_called(alone: bool) -> None:
    class Layer(nn.Linear):
        def __call__(self, *args: Any) -> Any:
            return checkpoint(super().__call__, *args, use_reentrant=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(super().forward(torch.exp(x)))

    model, x = nn.Sequential(nn.Linear(8, 8), Layer(8, 8)), torch.randn(16, 8)
    bytes_of_dense = saved_bytes(model, x)
    modules = "1" if alone else None
    made = dropit_fx.transform(model, modules=modules, preset="lossless", example_args=(x,))
    assert saved_bytes(made, x) == bytes_of_dense
    assert any(r.op == "checkpoint" for r in dropit_fx.report(made).rows)


def test_models_that_checkpoint_in_training_mode_alone() -> None:
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        vocab_size=50, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).train()
    model.gradient_checkpointing_enable()
    ids = {"input_ids": torch.randint(0, 50, (2, 16))}
    packed = dropit_fx.transform(model, example_kwargs=ids)
    rows = [r for r in dropit_fx.report(packed).rows if r.op == "checkpoint" and not r.region]
    assert [r.codecs for r in rows if is_packed(r)] == [("quant",)]
    for training in (True, False):
        for m in (packed, model):
            m.train(training)
        (a, _), (b, _) = (step(lambda run=m: run(**ids)[0], m) for m in (packed, model))
        assert torch.equal(a, b)
