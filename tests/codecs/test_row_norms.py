"""What earlier steps tell of rows: less variance, no bias, and nothing of it in a model's state."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from op_calls import cotangent
from sampled_rows import (
    chances,
    hajek,
    hajek_of_uniform,
    packed_linear,
    skewed,
    weight_gradient,
    with_replacement,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dropit_fx
from dropit_fx import ConfigError, measure
from dropit_fx.bench import formats, trained
from dropit_fx.codecs import CODEC
from dropit_fx.compile import backend
from dropit_fx.kernels import row_norms
from dropit_fx.kernels.row_norms import DECAY, FLOOR, RowNorms, named, new_name

OPS = torch.ops.dropit
RULES: dict[str, Any] = {
    "preset": None,
    "rules": [{"op": "linear", "codec": "rows", "select": "wta_crs"}],
}


def known_of(dy: Tensor) -> Tensor:
    """What rows count for behind a step with this gradient."""
    squares = dy.square().sum(1)
    return (squares / squares.mean()).clamp(min=FLOOR).sqrt()


# --- unbiased, with less variance


def test_with_known_gradients_2000_draws_are_right_in_the_mean_and_vary_less() -> None:
    (rows, width, out), gamma, draws = (48, 6, 5), 0.7, 2000
    x, w = torch.randn(rows, width), torch.randn(out, width)
    sizes = torch.logspace(-1, 1, rows)[torch.randperm(rows)]
    layer, _ = packed_linear(x, w, gamma=gamma, select="wta_crs")

    def gradient(layer: Any, seed: int) -> Tensor:
        torch.manual_seed(seed)
        y = layer(x, w)
        return torch.autograd.grad(y, w, cotangent(y) * sizes[:, None])[0]

    exact = gradient(F.linear, 0)
    first = gradient(layer, 7)
    alone, _ = packed_linear(x, w, gamma=gamma, select="wta_crs", gradients=False)
    assert torch.equal(first, gradient(alone, 7))  # nothing is known yet
    away = torch.stack([gradient(layer, seed) - exact for seed in range(draws)])
    errors = away.std(0) / math.sqrt(draws)
    assert (away.mean(0).abs() < 3 * errors).all()
    variance = float(away.square().sum((1, 2)).mean())
    assert away.mean(0).norm() < 3 * math.sqrt(variance / draws)

    count, norms = math.ceil((1 - gamma) * rows), x.norm(dim=1)
    dy = cotangent(torch.empty(rows, out)) * sizes[:, None]
    assert variance == pytest.approx(hajek(x, dy, chances(norms * known_of(dy), count)), rel=0.1)
    assert variance < 0.5 * hajek(x, dy, chances(norms, count))
    assert variance < 0.5 * hajek(x, dy, torch.full((rows,), count / rows))


def collected(loss: str, first: int, moved: bool = False) -> list[formats.Sample]:
    """What the Linear layers of a pretrained encoder read of ten texts, from the first on."""
    encoder = trained.encoder

    def part(sequences: int, length: int) -> tuple[nn.Module, Tensor, int]:
        model, ids, mask_id = encoder(60, length)
        ids = ids[first : first + sequences]
        if moved:
            trained.loss_of(loss, model, ids, mask_id).backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            model.zero_grad()
        return model, ids, mask_id

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "encoder", part)
        return formats.collect(trained.trained(loss=loss, sequences=10))


def spread(x: Tensor, dy: Tensor, count: int, before: list[Tensor] | None) -> float:
    """The mean squared error of dW over some draws behind steps with such gradients."""
    exact, found = dy.t() @ x, []
    memory = RowNorms("test")
    for grad in before or ():
        memory.note(grad)
        known = memory.known(x)
    for seed in range(8):
        given = x, count, "wta_crs", torch.tensor([seed])
        index, weight = row_norms.select_rows(*given, known if before else None)
        estimate = (dy[index] * weight[:, None]).t() @ x[index]
        found.append(float((estimate - exact).square().sum()))
    return statistics.mean(found)


def errors_of(now: list[formats.Sample], *before: list[formats.Sample]) -> dict[str, float]:
    """The relative squared error of each way to choose three rows in ten, in the mean."""
    errors: dict[str, list[float]] = {}
    for sample, *earlier in zip(now, *before, strict=True):
        assert {e.name for e in earlier} == {sample.name}
        x, dy = sample.x, sample.dy
        count, norms = math.ceil(0.3 * len(x)), x.norm(dim=1)
        informed = norms * known_of(earlier[-1].dy)
        for name, value in {
            "uniform": hajek_of_uniform(x, dy, count),
            "wta_crs": spread(x, dy, count, [e.dy for e in earlier]),
            "column-row": with_replacement(x, dy, informed, count, winners=False),
            "wta_crs of |x|": spread(x, dy, count, None),
            "column-row of |x|": with_replacement(x, dy, norms, count, winners=False),
        }.items():
            errors.setdefault(name, []).append(value / float((dy.t() @ x).square().sum()))
    return {name: statistics.mean(found) for name, found in errors.items()}


def test_on_a_pretrained_encoder_wta_crs_is_below_the_rest_behind_a_step() -> None:
    """In the first step, from |x| alone, it is above uniform and below column-row sampling."""
    pytest.importorskip("transformers")
    mean = errors_of(collected("mlm", 0, moved=True), collected("mlm", 0))
    assert mean["wta_crs"] < 0.8 * mean["uniform"] < 0.95 * mean["wta_crs of |x|"]
    assert mean["wta_crs"] < 0.8 * mean["column-row"]
    assert mean["wta_crs of |x|"] < 0.9 * mean["column-row of |x|"]


def test_behind_batches_of_other_texts_it_is_no_worse_than_without() -> None:
    pytest.importorskip("transformers")
    steps = [collected("contrastive", 10 * i) for i in range(5)]
    mean = errors_of(steps[-1], *steps[:-1])
    assert mean["wta_crs"] < mean["wta_crs of |x|"]


# --- what is remembered


def test_steps_are_averaged_the_last_counts_most_and_the_floor_holds() -> None:
    memory, x = RowNorms("test"), torch.randn(2, 3)
    assert torch.equal(memory.known(x), torch.ones(2))
    memory.note(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))  # shares 2 and 0
    torch.testing.assert_close(memory.known(x), torch.tensor([2**0.5, FLOOR**0.5]))
    memory.note(torch.tensor([[0.0], [3.0]]))  # shares 0 and 2
    shares = torch.tensor([2 * DECAY, 2.0]) / (1 + DECAY)
    torch.testing.assert_close(memory.known(x), shares.sqrt())
    torch.testing.assert_close(memory.known(x), shares.sqrt())  # nothing came in between


def test_readers_of_one_copy_add_up() -> None:
    memory = RowNorms("test")
    memory.note(torch.tensor([[1.0], [0.0]]))
    memory.note(torch.tensor([[0.0], [1.0]]))
    assert torch.equal(memory.known(torch.randn(2, 3)), torch.ones(2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_a_step_that_overflows_or_has_no_gradient_does_not_count(bad: float) -> None:
    memory, x = RowNorms("test"), torch.randn(2, 3)
    memory.note(torch.tensor([[2.0], [1.0]]))
    before = memory.known(x)
    memory.note(torch.full((2, 2), bad))
    torch.testing.assert_close(memory.known(x), before)


def test_a_batch_of_another_size_is_chosen_by_its_norms_alone() -> None:
    memory = RowNorms("test")
    memory.note(torch.tensor([[3.0], [1.0]]))
    before = memory.known(torch.randn(2, 3))
    assert torch.equal(memory.known(torch.randn(5, 3)), torch.ones(5))
    memory.note(torch.randn(5, 1))
    assert torch.equal(memory.known(torch.randn(2, 3)), before)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 24), nn.Linear(24, 4))


def remembered() -> dict[str, RowNorms]:
    return dict(row_norms._BY_NAME)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """What a model remembers goes with it."""
    gc.collect()
    before = set(remembered())
    yield
    torch._dynamo.reset()
    gc.collect()
    assert set(remembered()) <= before


def test_it_is_no_part_of_the_state_and_survives_copies_and_pickles() -> None:
    model, x = network(), torch.randn(40, 16)
    ours = dropit_fx.transform(model, RULES, example_args=(x,))
    ours(x).square().sum().backward()
    report = dropit_fx.report(ours)
    assert report.kept_bytes == measure.saved_bytes(ours, x) < report.dense_bytes
    assert ours.state_dict().keys() == model.state_dict().keys()
    assert dict(ours.named_buffers()).keys() == dict(model.named_buffers()).keys()
    names = [m.name for m in ours.meta["dropit_row_norms"]]
    assert len(names) == 2
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [m.name for m in twin.meta["dropit_row_norms"]] == names
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
        twin(x).square().sum().backward()
        assert twin.get_parameter("2.weight").grad is not None
    del twin, ours
    gc.collect()
    assert not set(names) & set(remembered())


def test_what_a_graph_names_and_nobody_holds_is_not_missed() -> None:
    name = new_name("gone")
    x, seed = torch.randn(20, 3), torch.tensor([4])
    found = row_norms.select_known_rows(x, 5, name, seed)
    for one, other in zip(found, row_norms.select_rows(x, 5, "wta_crs", seed), strict=True):
        assert torch.equal(one, other)
    grad, index = torch.randn(20, 2), torch.tensor([3, 4], dtype=torch.int32)
    assert torch.equal(OPS.note_rows(grad, index, name), grad[3:5])


@pytest.mark.parametrize("way", ["transform", "transform, inductor", "aot_eager", "inductor"])
def test_eager_and_compiled_steps_remember(way: str) -> None:
    model = network()
    before = len(backend.compiled_graphs())
    if way.startswith("transform"):
        ours: Any = dropit_fx.transform(model, RULES, example_args=(torch.randn(40, 16),))
        ours = torch.compile(ours, dynamic=True) if "," in way else ours
    else:
        options = {"config": RULES, "inner": way}
        ours = torch.compile(model, backend="dropit", dynamic=True, options=options)
    known = set(remembered())
    sizes = torch.logspace(-2, 0, 40)[:, None]
    with torch.compiler.config.patch(force_disable_caches=True):
        for rows in (40, 40, 30, 40):
            out = ours(torch.randn(rows, 16))
            (out * sizes[:rows]).square().sum().backward()
        ours(torch.randn(40, 16))
    memories = [m for name, m in remembered().items() if way[:5] == "trans" or name not in known]
    assert len(memories) >= 2
    last = [m._sums[torch.device("cpu")] for m in memories]
    assert all(len(total) == 40 and total.argmax() > 20 for total, _ in last)
    assert all(weight > 1 for _, weight in last)
    if way in ("aot_eager", "inductor"):
        (record,) = backend.compiled_graphs()[before:]
        for partition in record.partitions:
            assert partition.packs_in_backward == ()
            assert partition.unpacks_in_forward == ()


def test_a_value_that_three_layers_read_is_chosen_by_the_gradients_of_all() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = self.first(x)
            return self.q(h), self.k(h), self.v(h)

    x, places = torch.randn(30, 8), torch.zeros(3, 30, 1)
    ours = dropit_fx.transform(Shared(), RULES, example_args=(x,))
    for one, place in zip(places, (4, 11, 25), strict=True):
        one[place] = 1
    sum((y * one).sum() for y, one in zip(ours(x), places, strict=True)).backward()
    (memory,) = ours.meta["dropit_row_norms"]
    known = memory.known(x)
    assert sorted(known.argsort(descending=True)[:3].tolist()) == [4, 11, 25]
    ours(x)[0].sum().backward(retain_graph=True)


def test_a_checkpointed_region_remembers_too() -> None:
    from torch.utils.checkpoint import checkpoint

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = network(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.head(checkpoint(self.body, x * 2, use_reentrant=False))

    x = torch.randn(40, 16)
    ours = dropit_fx.transform(Model(), RULES, example_args=(x,))
    for _ in range(3):
        ours(x).square().sum().backward()
    held = [m for g in ours.modules() for m in getattr(g, "meta", {}).get("dropit_row_norms", ())]
    assert len(held) >= 2
    assert any(m._sums for m in held)


def test_second_backwards_and_steps_in_pieces_go_on() -> None:
    x = torch.randn(40, 16)
    ours = dropit_fx.transform(network(), RULES, example_args=(x,))
    for _ in range(2):
        one, other = ours(x).sum(), ours(x).sum()  # two forwards, then their backwards
        other.backward(retain_graph=True)
        other.backward()
        one.backward()
    with torch.no_grad():
        ours(x)
    for parameter in ours.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_under_ddp_each_rank_remembers_its_own_rows() -> None:
    x, grads = torch.randn(40, 16), []
    plain = network()
    ours = dropit_fx.transform(plain, RULES, example_args=(x,))
    alone = dropit_fx.transform(copy.deepcopy(plain), RULES, example_args=(x,))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for model in (DistributedDataParallel(ours), alone):
            for seed in range(3):
                torch.manual_seed(seed)
                model.zero_grad()
                model(x).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(*grads)
    assert all(len(m._sums) == 1 for m in ours.meta["dropit_row_norms"])


def test_only_wta_crs_remembers_and_only_where_it_is_to() -> None:
    remembers = CODEC["rows"].remembers
    defaults = CODEC["rows"].defaults()
    found = {
        (select, on): remembers(defaults | {"select": select, "gradients": on})
        for select, on in itertools.product(("norm", "uniform", "wta_crs"), (True, False))
    }
    assert [pair for pair, yes in found.items() if yes] == [("wta_crs", True)]
    with pytest.raises(ConfigError, match="gradients = 1 for codec 'rows': true or false"):
        dropit_fx.load_config({"rules": [{"codec": "rows", "gradients": 1}]})


def test_the_gradient_is_right_whatever_is_remembered() -> None:
    """Of other data, of another scale, of a row that had nothing: weights make up for it."""
    x, w = skewed(30, 5), torch.randn(4, 5)
    layer, plan = packed_linear(x, w, gamma=0.5, select="wta_crs")
    exact = weight_gradient(F.linear, x, w)
    (name,) = {d.options["memory"] for d in plan.decisions if "memory" in d.options}
    wrong = torch.zeros(30, 1).index_fill(0, torch.arange(10), 1e6)
    away = []
    for seed in range(1500):
        named(name)._sums.clear()
        named(name)._seen[x.device] = wrong.square().sum(1)
        away.append(weight_gradient(layer, x, w, seed) - exact)
    stacked = torch.stack(away)
    errors = stacked.std(0) / math.sqrt(len(away))
    assert (stacked.mean(0).abs() < 3.5 * errors).all()
