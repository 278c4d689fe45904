"""The plug-in on real models and beside other features of torch.compile."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from models import CASE, differing, rewritten, step
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from dropit_fx import load_config, report, transform
from dropit_fx.compile import backend
from dropit_fx.compile.partition import SLACK, KeepPacked, Partition
from dropit_fx.config import make_config
from dropit_fx.measure import saved_bytes

LOSSLESS = {"config": {"preset": "dropit", "force": True}, "gamma": 0.0}


@pytest.fixture
def fresh() -> Iterator[None]:
    """No compile cache: a cached result has no partition to read."""
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8)
    )


def compiled_with(model: nn.Module, x: Tensor, options: dict[str, Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="dropit", fullgraph=True, options=options)
    compiled(x).sum().backward()
    return compiled


def last_partition() -> Partition:
    (partition,) = backend.compiled_graphs()[-1].partitions
    return partition


# --- saved means saved


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "resnet18", "gpt2"])
def test_the_partition_of_a_real_model_saves_packed_tensors_and_no_dense_copy(
    fresh: None, name: str
) -> None:
    case = CASE[name]
    model = case.model()
    args, kwargs = case.inputs()
    bytes_of = {}
    for config in ({"preset": None}, {"preset": "dropit"}):
        torch._dynamo.reset()
        options = {"config": config, "inner": "aot_eager_decomp_partition"}
        compiled = torch.compile(model, backend="dropit", fullgraph=True, options=options)
        step(compiled, args, kwargs)
        partition = last_partition()
        assert partition.packs_in_backward == ()
        assert partition.unpacks_in_forward == ()
        assert bool([v for v in partition.saved if v.packed]) == (config["preset"] == "dropit")
        assert saved_bytes(compiled, *args, **kwargs) == partition.saved_bytes
        bytes_of[config["preset"]] = partition.saved_bytes
    assert bytes_of["dropit"] < 0.85 * bytes_of[None]
    # every packed byte that the passes promised is saved, and packed
    rows = [r for r in backend.compiled_graphs()[-1].report.rows if r.codec != "keep"]
    promised = sum(r.kept_bytes for r in rows)
    assert sum(v.nbytes for v in partition.saved if v.packed) == promised > 0


@pytest.mark.parametrize("kind", ["symbolic", "exported"])
def test_a_rewritten_module_gives_the_same_gradients_under_aot_eager(kind: str) -> None:
    case = CASE["resnet18" if kind == "symbolic" else "gpt2"]
    _, made = rewritten(case.name, lossless=True)
    args, kwargs = case.inputs()
    made = copy.deepcopy(made)
    plain = step(copy.deepcopy(made), args, kwargs)
    compiled = step(torch.compile(made, backend="aot_eager", fullgraph=True), args, kwargs)
    assert differing(plain.output, compiled.output) == []
    assert differing(plain.gradients, compiled.gradients) == []
    assert differing(plain.buffers, compiled.buffers) == []


def test_the_guard_serves_any_backend_built_on_aot_autograd(fresh: None) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten()
    )
    x, read = torch.randn(4, 3, 16, 16), []
    made = transform(model, example_args=(x,))

    def as_it_is(graph: Any, inputs: Any) -> Any:
        return make_boxed_func(graph.forward)

    guarded = aot_autograd(
        fw_compiler=as_it_is, bw_compiler=as_it_is, partition_fn=KeepPacked(note=read.append)
    )
    torch.compile(made, backend=guarded, fullgraph=True)(x).sum().backward()
    (partition,) = read
    assert partition.packs_in_backward == partition.unpacks_in_forward == ()
    assert {v.packed for v in partition.saved} == {True}


def test_attention_runs_once_in_a_backward_whoever_reads_its_result(fresh: None) -> None:
    """PyTorch takes it to draw random numbers, and leaves calls that are alike apart."""
    model = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=64).bfloat16()
    x, read, calls = torch.randn(2, 3, 64, 64).bfloat16(), [], []

    def counted(graph: Any, inputs: Any) -> Any:
        names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        attends = [n.split(".")[1] for n in names if "scaled_dot_product" in n]
        calls.append([name.endswith("_backward") for name in attends])
        return make_boxed_func(graph.forward)

    guarded = aot_autograd(
        fw_compiler=counted, bw_compiler=counted, partition_fn=KeepPacked(note=read.append)
    )

    def rewritten(gm: Any, inputs: Any) -> Any:
        backend.rewrite_dynamo_graph(gm, inputs, make_config())
        return guarded(gm, inputs)

    torch.compile(model, backend=rewritten, fullgraph=True)(x).sum().backward()
    assert calls == [[False, False], [False, True, False, True]]
    said = backend.compiled_graphs()[-1].report
    assert read[0].saved_bytes == said.kept_bytes
    assert "drop+derived" in {r.codec for r in said.rows if "attention" in r.op}
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    error = torch.cat([g.flatten() for g in gradients]) - exact
    assert error.float().norm() < 0.1 * exact.float().norm()


# --- beside other features


def test_a_batch_that_changes_compiles_a_real_model_twice_at_most() -> None:
    before = len(backend.compiled_graphs())
    case = CASE["deit_tiny_patch16_224"]
    model = case.model()
    compiled = torch.compile(model, backend="dropit_eager", options=LOSSLESS)
    for batch in (8, 12, 20, 5):
        args, kwargs = case.inputs(batch)
        expected, found = step(copy.deepcopy(model), args, kwargs), step(compiled, args, kwargs)
        assert differing(expected.gradients, found.gradients) == []
    assert len(backend.compiled_graphs()) - before <= 2


class Regions(nn.Module):
    """Two checkpointed regions with dropout, one op between them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 32))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.parts[0], x, use_reentrant=False)
        return checkpoint(self.parts[1], torch.relu(x), use_reentrant=False)


def test_checkpointed_regions_with_dropout_have_the_gradients_of_the_dense_model() -> None:
    model, x = Regions(), torch.randn(16, 32)
    before = len(backend.compiled_graphs())
    dense = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    options = LOSSLESS | {"inner": "aot_eager"}
    packed = torch.compile(model, backend="dropit", fullgraph=True, options=options)
    expected, found = step(dense, (x,), {}), step(packed, (x,), {})
    assert differing(expected.output, found.output) == []
    assert differing(expected.gradients, found.gradients) == []
    (graph,) = backend.compiled_graphs()[before:]
    regions = {r.region for r in graph.report.rows if "mink" in r.codec}
    assert len(regions - {""}) == 2
    assert graph.report.kept_bytes < sum(r.kept_bytes for r in graph.report.rows)


def test_timm_gradient_checkpointing_and_packing_go_together(fresh: None) -> None:
    case = CASE["deit_tiny_patch16_224"]
    model = case.model()
    model.set_grad_checkpointing()
    args, kwargs = case.inputs()
    dense = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    options = LOSSLESS | {"inner": "aot_eager"}
    packed = torch.compile(model, backend="dropit", fullgraph=True, options=options)
    expected, found = step(dense, args, kwargs), step(packed, args, kwargs)
    assert differing(expected.gradients, found.gradients) == []


@pytest.mark.parametrize("preset", [None, "balanced"])
def test_the_inputs_of_checkpointed_regions_are_reported(preset: str | None) -> None:
    model, x = small_vit(depth=3)
    model.set_grad_checkpointing()
    options = {"config": {"preset": preset}}
    packed = torch.compile(model, backend="dropit_eager", fullgraph=True, options=options)
    measured = saved_bytes(packed, x)
    found = backend.compiled_graphs()[-1].report
    assert measured == found.kept_bytes
    inputs = [r for r in found.rows if "checkpoint" in r.op and not r.region]
    assert [r.shape for r in inputs] == [(16, 17, 192)] * 3
    assert {r.codecs for r in inputs} == {("keep",) if preset is None else ("quant",)}
    assert (found.kept_bytes < found.dense_bytes / 5) == (preset is not None)


@pytest.mark.parametrize("budget", [0.3, 0.7])
def test_a_memory_budget_and_lossless_packing_go_together(fresh: None, budget: float) -> None:
    model, x = mlp(), torch.randn(64, 64)
    expected = step(copy.deepcopy(model), (x,), {})
    with torch._functorch.config.patch(activation_memory_budget=budget):
        options = LOSSLESS | {"inner": "aot_eager_decomp_partition"}
        packed = torch.compile(model, backend="dropit", fullgraph=True, options=options)
        found = step(packed, (x,), {})
        assert saved_bytes(packed, x) == last_partition().saved_bytes
    for key, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[key], gradient)
    assert last_partition().unpacks_in_forward == last_partition().packs_in_backward == ()


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(0.5),
    "multinomial": lambda x: x[torch.multinomial(torch.ones(len(x)), len(x))],
    "rrelu": lambda x: nn.functional.rrelu(x, training=True),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(
        *(x[None],) * 3, dropout_p=0.3
    )[0],
}


@pytest.mark.parametrize(
    ("draw", "inner"),
    [*((d, "aot_eager_decomp_partition") for d in DRAWS), ("dropout", "aot_eager")],
)
def test_a_memory_budget_draws_no_random_number_again(fresh: None, draw: str, inner: str) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sin(DRAWS[draw](torch.sin(self.first(x))))
            return torch.sin(DRAWS[draw](torch.sin(self.second(x))))

    model, x, found = Noisy(), torch.randn(64, 32), []
    for budget in (1, 0):
        torch._dynamo.reset()
        with torch._functorch.config.patch(activation_memory_budget=budget):
            options = LOSSLESS | {"inner": inner}
            packed = torch.compile(model, backend="dropit", fullgraph=True, options=options)
            found.append(step(packed, (x,), {}).gradients)
    for gradients in found[1:]:
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][key])


def at_budget(model: nn.Module, x: Tensor, preset: str | None, budget: float) -> Partition:
    torch._dynamo.reset()
    options = {"config": {"preset": preset}, "inner": "aot_eager_decomp_partition"}
    with torch._functorch.config.patch(activation_memory_budget=budget):
        torch.compile(model, backend="dropit", fullgraph=True, options=options)(x)
    return last_partition()


def small_vit(depth: int = 1) -> tuple[Any, Tensor]:
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=depth)
    return model, torch.randn(16, 3, 64, 64)


@pytest.mark.parametrize("preset", ["balanced", "dropit"])
@pytest.mark.slow
def test_under_a_memory_budget_packed_tensors_stay_and_the_rest_is_recomputed(
    fresh: None, preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = small_vit()
    alone = at_budget(model, x, preset, 1)
    dense = backend.compiled_graphs()[-1].report.dense_bytes
    floor = alone.packed_bytes
    for budget in (0.5, 0.02):
        found = at_budget(model, x, preset, budget)
        assert found.packs_in_backward == found.unpacks_in_forward == ()
        assert found.packed_bytes == floor
        assert found.saved_bytes <= alone.saved_bytes
        asked = SLACK * budget * dense
        assert found.saved_bytes <= max(asked, floor)
        # where packing alone is within the budget, nothing is recomputed for it
        assert (found == alone) == (alone.saved_bytes <= asked)
        assert ("never recomputed" in caplog.text) == (floor > asked)
        if floor <= asked:
            assert found.saved_bytes <= at_budget(model, x, None, budget).saved_bytes
    assert found.saved_bytes == floor < alone.saved_bytes


@pytest.mark.slow
def test_a_memory_budget_changes_no_gradient_of_packed_tensors(fresh: None) -> None:
    case = CASE["resnet18"]
    model = case.model()
    args, kwargs = case.inputs(8)
    gradients, bytes_of = {}, {}
    for budget in (1, 0.2):
        torch._dynamo.reset()
        options = {"preset": "dropit", "inner": "aot_eager_decomp_partition"}
        with torch._functorch.config.patch(activation_memory_budget=budget):
            packed = torch.compile(copy.deepcopy(model), backend="dropit", options=options)
            gradients[budget] = step(packed, args, kwargs).gradients
        bytes_of[budget] = last_partition().saved_bytes
    assert bytes_of[0.2] < bytes_of[1]
    for key, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0.2][key], gradient)


@pytest.mark.slow
def test_the_guard_of_a_rewritten_module_takes_a_budget_of_what_the_dense_one_saves(
    fresh: None,
) -> None:
    model, x = small_vit()
    made, read = transform(model, example_args=(x,)), []
    told = report(made)
    budget = 1.1 * told.kept_bytes / told.dense_bytes  # packing alone is within it
    for size in (told.dense_bytes, None):  # None: estimated from below
        torch._dynamo.reset()
        guarded = aot_autograd(
            fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
            partition_fn=KeepPacked(note=read.append, dense_bytes=size),
        )
        with torch._functorch.config.patch(activation_memory_budget=budget):
            torch.compile(made, backend=guarded, fullgraph=True)(x)
    assert read[0].saved_bytes == told.kept_bytes
    assert read[0].packed_bytes == read[1].packed_bytes
    assert read[1].saved_bytes < read[0].saved_bytes


def test_each_piece_of_a_broken_graph_is_rewritten() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = mlp(), mlp()

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            torch._dynamo.graph_break()
            return self.second(h.repeat(1, 8))

    model, x = Broken(), torch.randn(16, 64)
    before = len(backend.compiled_graphs())
    packed = torch.compile(model, backend="dropit_eager", options=LOSSLESS)
    expected, found = step(copy.deepcopy(model), (x,), {}), step(packed, (x,), {})
    assert differing(expected.gradients, found.gradients) == []
    graphs = backend.compiled_graphs()[before:]
    assert len(graphs) == 2
    assert all(any("mink" in r.codec for r in g.report.rows) for g in graphs)


def test_timm_trains_a_task_by_the_name_of_the_backend(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROPIT_INNER", "aot_eager")  # the caller cannot pass options
    case = CASE["resnet18"]
    task = ClassificationTask(case.model(), nn.CrossEntropyLoss(), verbose=False)
    task.compile(backend="dropit")
    (x,), _ = case.inputs()
    task(x, torch.tensor([1, 2]))["loss"].backward()
    assert backend.compiled_graphs()[-1].report.kept_bytes > 0
    assert any(v.packed for v in last_partition().saved)


def test_autocast_compiled_packs_bfloat16_and_keeps_no_dense_copy(fresh: None) -> None:
    x = torch.randn(256, 64)
    sizes = {}
    for preset in (None, "dropit"):
        model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 8))
        with torch.autocast("cpu", torch.bfloat16):
            options = {"config": {"preset": preset}, "inner": "aot_eager"}
            compiled_with(model, x, options)
        sizes[preset] = last_partition()
        rows = backend.compiled_graphs()[-1].report.rows
    packed = [r for r in rows if "mink" in r.codec]
    assert {r.dtype for r in packed} == {"bfloat16"}
    whole = 256 * 512 * 2  # the input of the second linear, in bfloat16
    assert [v for v in sizes[None].saved if v.nbytes == whole]
    assert not [v for v in sizes["dropit"].saved if v.nbytes >= whole]


# --- options


def test_options_take_what_transform_takes(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("rules:\n- {module: '2', codec: mink, gamma: 0.25}\n")
    x = torch.randn(16, 64)
    for config in (str(file), load_config(file), {"rules": [{"codec": "mink", "gamma": 0.25}]}):
        torch._dynamo.reset()
        compiled = torch.compile(mlp(), backend="dropit_eager", options={"config": config})
        compiled(x).sum().backward()
        assert "mink(gamma=0.25)" in [r.codec for r in backend.compiled_graphs()[-1].report.rows]


def test_an_option_goes_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: dropit\nrules:\n- {module: '4', codec: keep}\n")
    monkeypatch.setenv("DROPIT_CONFIG", str(file))
    monkeypatch.setenv("DROPIT_GAMMA", "0.25")

    def codecs(**options: Any) -> list[str]:
        torch._dynamo.reset()
        torch.compile(mlp(), backend="dropit_eager", options=options)(torch.randn(16, 64))
        rows = backend.compiled_graphs()[-1].report.rows
        return [r.codec for r in rows if r.op.endswith("linear")]

    assert codecs() == ["mink(gamma=0.25)", "keep"]
    assert codecs(gamma=0.5) == ["mink(gamma=0.5)", "keep"]
    assert codecs(config={"preset": "dropit"}) == [
        "mink(gamma=0.25)",
        "bitmask(bits=1)+mink(gamma=0.25)",
    ]


def test_a_rule_that_matches_nothing_is_a_warning_since_there_may_be_other_graphs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"config": {"rules": [{"module": "nowhere.*", "codec": "mink"}]}}
    with caplog.at_level(logging.WARNING, "dropit_fx"):
        torch.compile(mlp(), backend="dropit_eager", options=options)(torch.randn(16, 64))
    assert "{module: nowhere.*, codec: mink} matched no saved tensor" in caplog.text


def test_another_inner_backend_works_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, x = mlp(), torch.randn(16, 64)
    options = LOSSLESS | {"inner": "aot_eager_default_partitioner"}
    with caplog.at_level(logging.WARNING, "dropit_fx"):
        packed = torch.compile(model, backend="dropit", options=options)
        expected, found = step(copy.deepcopy(model), (x,), {}), step(packed, (x,), {})
    assert differing(expected.gradients, found.gradients) == []
    assert "partitions by itself" in caplog.text


def test_the_plug_in_is_found_by_name_and_is_no_inner_backend_of_itself() -> None:
    assert {"dropit", "dropit_eager"} <= set(torch._dynamo.list_backends(exclude_tags=()))
    for inner in ("dropit", "dropit_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(mlp(), backend="dropit", options={"inner": inner})
        with pytest.raises(Exception, match=f"no inner backend '{inner}'"):
            compiled(torch.randn(4, 64))


def test_a_compiler_computes_the_statistics_of_a_batch_norm_and_of_its_packing_once() -> None:
    import torch._inductor.lowering
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    from dropit_fx.runtime import copies

    def statistics_and_norm(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _, mean, inverse = copies.standardise(x)
        return mean, inverse, torch.nn.functional.batch_norm(x, None, None, scale, scale, True)

    x, scale = torch.randn(4, 8, 5, 5, dtype=torch.bfloat16), torch.ones(8)
    traced = make_fx(statistics_and_norm, select_decomp_table(), tracing_mode="fake")(x, scale)
    traced.graph.eliminate_dead_code()
    once = fx_graph_cse(traced.graph)
    assert len([n for n in once.nodes if n.target is torch.ops.aten.var_mean.correction]) == 1


class WritesItsInput(nn.Module):
    """What the backward reads was made from an input that is overwritten afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        clipped = torch.nn.functional.relu6(x.view(-1)).view(4, 8)
        x *= 3
        return clipped * self.weight


@pytest.mark.parametrize("inner", ["aot_eager_decomp_partition", "inductor"])
def test_nothing_is_recomputed_from_an_input_that_has_been_overwritten(inner: str) -> None:
    """PyTorch's own backends raise an error (AOT), or give a wrong gradient (inductor)."""
    model, x = WritesItsInput(), torch.randn(4, 8)
    model(x.clone()).sum().backward()
    expected, model.weight.grad = model.weight.grad, None
    options = {"preset": "lossless", "inner": inner}
    given = x.clone()
    torch.compile(model, backend="dropit", options=options)(given).sum().backward()
    assert torch.equal(model.weight.grad, expected)
    assert torch.equal(given, 3 * x)
