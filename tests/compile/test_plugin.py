"""The plug-in under torch.compile: what the partition saves, recompiles, caches, options."""

import copy
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropit_fx
from dropit_fx import measure
from dropit_fx.compile import backend
from dropit_fx.compile.partition import KeepPacked


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8)
    )


class Convolutions(nn.Module):
    """Every convolution reads a ReLU's output: min-cut would rather save that and pack later."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        return torch.relu(self.c(torch.relu(self.b(x)))).mean((2, 3))


@pytest.fixture
def fresh():
    """No compile cache: a cached result has no partition to read."""
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


def last_partition():
    (partition,) = backend.compiled_graphs()[-1].partitions
    return partition


@pytest.mark.parametrize("inner", ["aot_eager", "aot_eager_decomp_partition", "inductor"])
@pytest.mark.parametrize(("build", "shape"), [(mlp, (16, 64)), (Convolutions, (4, 3, 16, 16))])
def test_packed_tensors_are_saved_and_unpacked_in_the_backward_only(fresh, build, shape, inner):
    model, x = build(), torch.randn(shape)
    compiled = torch.compile(model, backend="dropit", fullgraph=True, options={"inner": inner})
    compiled(x).sum().backward()
    partition = last_partition()
    assert partition.packs_in_backward == ()
    assert partition.unpacks_in_forward == ()
    packed = [v for v in partition.saved if v.packed]
    assert packed
    assert all(v.source.startswith("dropit.") for v in packed)
    assert measure.saved_bytes(compiled, x) == partition.saved_bytes


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_changing_batch_compiles_twice_at_most(inner):
    before = len(backend.compiled_graphs())
    model = mlp()
    options = {"inner": inner, "gamma": 0.5}
    compiled = torch.compile(model, backend="dropit", options=options)
    for batch in (8, 12, 20, 5):
        x = torch.randn(batch, 64)
        assert compiled(x).shape == (batch, 8)
        compiled(x).sum().backward()
    assert len(backend.compiled_graphs()) - before <= 2


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_floats_of_the_model_may_be_inputs_of_a_dynamic_graph(inner):
    """The momentum and epsilon of a norm: Dynamo reads them from tensors with ``item``."""
    model = Convolutions()
    dense, x = copy.deepcopy(model), torch.randn(4, 3, 16, 16)
    options = {"inner": inner, "preset": "lossless"}
    compiled = torch.compile(model, backend="dropit", dynamic=True, options=options)
    compiled(x).sum().backward()
    dense(x).sum().backward()
    assert any(row.codec != "keep" for row in backend.compiled_graphs()[-1].report.rows)
    for mine, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
    assert torch.equal(model.norm.running_mean, dense.norm.running_mean)


def test_a_rewritten_module_compiles_with_the_guard_in_one_line(fresh):
    x, read = torch.randn(16, 64), []
    rewritten = dropit_fx.transform(mlp(), example_args=(x,))
    guard = {"custom_partitioner_fn": KeepPacked(note=read.append)}
    compiled = torch.compile(rewritten, fullgraph=True, options=guard)
    compiled(x).sum().backward()
    assert read[0].packs_in_backward == ()
    assert read[0].unpacks_in_forward == ()
    assert measure.saved_bytes(compiled, x) == read[0].saved_bytes
    assert measure.saved_bytes(compiled, x) == measure.saved_bytes(rewritten, x)


def test_under_autocast_the_low_precision_tensor_is_packed(fresh):
    x, model = torch.randn(64, 64), mlp()
    dense = copy.deepcopy(model)
    compiled = torch.compile(
        model, backend="dropit", options={"inner": "aot_eager", "preset": "dropit"}
    )
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(x), dense(x)
        kept = measure.saved_tensors(compiled, x)
    assert torch.equal(out, expected)
    assert (816,) in [tuple(t.shape) for t in kept if t.dtype == torch.bfloat16]  # 8 blocks of 102
    out.float().sum().backward()
    expected.float().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad) == name.endswith("bias"), name


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Linear(64, 64), mlp()

    def forward(self, x):
        return checkpoint(self.body, torch.relu(self.first(x)), use_reentrant=False)


def test_bodies_of_checkpointed_regions_are_rewritten(fresh):
    x, model = torch.randn(16, 64), Checkpointed()
    dense = copy.deepcopy(model)
    options = {"inner": "aot_eager", "gamma": 0.0, "config": {"preset": "dropit", "force": True}}
    compiled = torch.compile(model, backend="dropit", fullgraph=True, options=options)
    compiled(x).sum().backward()
    dense(x).sum().backward()
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    inside = [r for r in backend.compiled_graphs()[-1].report.rows if r.region]
    assert any(r.codec.startswith("mink") for r in inside)
    # between forward and backward only the region's input stays, as without packing
    assert not [v for v in last_partition().saved if v.packed and v.source.endswith("sparsify")]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_rewritten_where_nothing_is_trained(context):
    before = len(backend.compiled_graphs())
    with context():
        torch.compile(mlp(), backend="dropit_eager")(torch.randn(4, 64))
    assert len(backend.compiled_graphs()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gama": 0.5}, "has no option 'gama'. Did you mean 'gamma'"),
        ({"max_autotun": True}, "Did you mean 'max_autotune'"),
        ({"gamma": 1.5}, "gamma = 1.5"),
        ({"inner": "inducto"}, "no inner backend 'inducto'. Did you mean 'inductor'"),
        ({"preset": "dropitt"}, "no preset 'dropitt'. Did you mean 'dropit'"),
    ],
)
def test_options_are_checked(options, message):
    compiled = torch.compile(mlp(), backend="dropit", options=options)
    with pytest.raises(Exception, match="ConfigError") as caught:
        compiled(torch.randn(4, 64))
    assert message in str(caught.value)


def test_the_environment_gives_defaults_to_callers_without_options(monkeypatch):
    monkeypatch.setenv("DROPIT_GAMMA", "0.5")
    monkeypatch.setenv("DROPIT_INNER", "aot_eager")
    torch.compile(mlp(), backend="dropit")(torch.randn(16, 64)).sum().backward()
    codecs = "+".join(r.codec for r in backend.compiled_graphs()[-1].report.rows)
    assert "quant(bits=5)" in codecs  # the preset stays what it is
    monkeypatch.setenv("DROPIT_BITS", "8")
    torch._dynamo.reset()
    torch.compile(mlp(), backend="dropit")(torch.randn(16, 64)).sum().backward()
    codecs = "+".join(r.codec for r in backend.compiled_graphs()[-1].report.rows)
    assert "quant(bits=8)" in codecs
    assert "bits=5" not in codecs
    monkeypatch.delenv("DROPIT_BITS")
    monkeypatch.setenv("DROPIT_STRATEGY", "mink")
    torch._dynamo.reset()
    torch.compile(mlp(), backend="dropit")(torch.randn(16, 64)).sum().backward()
    codecs = [r.codec for r in backend.compiled_graphs()[-1].report.rows]
    assert "mink(gamma=0.5)" in codecs
    monkeypatch.setenv("DROPIT_GAMMA", "half")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="DROPIT_GAMMA='half' is no number"):
        torch.compile(mlp(), backend="dropit")(torch.randn(16, 64))


def test_an_empty_variable_is_not_set_and_a_misspelt_one_is_a_warning(monkeypatch):
    for option in backend.OPTIONS:
        monkeypatch.setenv(f"DROPIT_{option.upper()}", "")
    monkeypatch.setenv("DROPIT_PRESETS", "max")
    monkeypatch.setenv("DROPIT_INNER", "aot_eager")
    with pytest.warns(UserWarning, match="PRESETS .* means nothing. Did you mean 'DROPIT_PRESET'?"):
        torch.compile(mlp(), backend="dropit")(torch.randn(16, 64)).sum().backward()
    monkeypatch.setenv("DROPIT_INNER", "dropit")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no inner backend 'dropit'"):
        torch.compile(mlp(), backend="dropit")(torch.randn(16, 64))


_CACHED = """
import sys, torch, dropit_fx
from dropit_fx.compile import inner
from torch._dynamo.utils import counters
version = inner.CACHE_VERSION
for asked in sys.argv[1:]:
    gamma, formula = asked.split(":")
    inner.CACHE_VERSION = version if formula == "same" else "another formula"
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    options = {"preset": "dropit", "gamma": float(gamma)}
    run = torch.compile(model, backend="dropit", options=options)
    run(torch.randn(64, 32)).sum().backward()
    found = counters["aot_autograd"]
    print("hits", found["autograd_cache_hit"], "misses", found["autograd_cache_miss"])
"""


@pytest.mark.slow
def test_compile_caches_hit_in_a_second_process_and_miss_after_a_change(tmp_path):
    def run(*asked: str) -> list[str]:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", _CACHED, *asked]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip().splitlines()

    hit, miss = "hits 1 misses 0", "hits 0 misses 1"
    assert run("0.9:same") == [miss]
    # the last one shows that what missed did so for what had changed
    assert run("0.9:same", "0.8:same", "0.9:changed", "0.9:same") == [hit, miss, miss, hit]


def test_views_that_autograd_refuses_stop_nothing(fresh):
    """Made under ``no_grad``, of what is written to later: an error only where they are used."""

    class Refused(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)

        def forward(self, x):
            h = self.first(x)
            with torch.no_grad():
                view = h[::2, ::2]
                h[..., ::2] *= 2
            h.mul_(2)
            return h.relu(), view

    model, x = Refused(), torch.randn(4, 8)
    wanted = torch.autograd.grad(model(x)[0].sum(), [*model.parameters()])
    run = torch.compile(model, backend="dropit_eager")
    found = torch.autograd.grad(run(x)[0].sum(), [*model.parameters()])
    assert all(map(torch.equal, found, wanted))
    assert dropit_fx.measure.saved_bytes(run, x) > 0


# --- what has no memory of its own, and modes


class Within(nn.Module):
    """Two layers, and between them what another says."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(16, 16), nn.Linear(16, 16), between

    def forward(self, x):
        return self.b(self.between(nn.functional.gelu(self.a(x))))


def batched(h):
    return torch.vmap(lambda row: nn.functional.gelu(row).sin())(h)


def differentiated(h):
    return torch.func.grad(lambda h: nn.functional.silu(h).pow(2).sum())(h)


def pushed_forward(h):
    return torch.func.jvp(lambda h: nn.functional.silu(h).pow(2), (h,), (h,))[1]


@pytest.mark.parametrize("between", [batched, differentiated, pushed_forward])
def test_a_graph_that_transforms_a_part_of_itself_is_compiled_as_it_is(between, caplog):
    model, x = Within(between), torch.randn(8, 16)
    expected = torch.autograd.grad(model(x).sum(), [*model.parameters()])
    out = torch.compile(model, backend="dropit_eager", fullgraph=True)(x)
    assert torch.equal(out, model(x))
    found = torch.autograd.grad(out.sum(), [*model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "nothing is packed: torch.func transforms a part of it" in caplog.text


def without_counting(h):
    with torch.inference_mode():
        scale = h.abs().mean().clone()
    return h * scale.clone().detach()


def test_a_part_in_inference_mode_is_no_obstacle():
    model, x = Within(without_counting), torch.randn(8, 16)
    out = torch.compile(model, backend="dropit_eager", options={"preset": "max"})(x)
    assert torch.equal(out, model(x))
    assert not torch.is_inference_mode_enabled()
    assert 0 < backend.compiled_graphs()[-1].report.ratio < 0.9


def test_nested_inputs_are_compiled_as_they_are(caplog):
    parts = [torch.randn(n, 16) for n in (3, 5, 2)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    out = torch.compile(model, backend="dropit_eager")(x)
    assert torch.equal(out.values(), model(x).values())
    assert "nothing is packed: an input is a nested tensor" in caplog.text


def test_a_place_in_memory_that_depends_on_values() -> None:
    class Narrowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, start: Tensor) -> Tensor:
            h = torch.nn.functional.gelu(self.first(x))
            return self.last(torch.narrow(h, 0, start, 2).tanh())

    model, x = Narrowed(), torch.randn(6, 8)
    packed = torch.compile(model, backend="dropit_eager", options={"preset": "lossless"})
    for start in (1, 3):
        found = []
        for run in (model, packed):
            model.zero_grad()
            run(x, torch.tensor(start)).square().sum().backward()
            found.append([p.grad for p in model.parameters()])
        assert all(map(torch.equal, *found))


@pytest.fixture
def soon():
    """What waits for itself is an error, no suite that stands still."""

    def ring(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 120, 1)  # again: it may wait while it unwinds, too
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("how", ["backward", "grad"])
def test_a_compiled_function_may_differentiate_itself(soon, how):
    model, x = mlp(), torch.randn(16, 64)

    def step(x):
        loss = model(x).square().mean()
        if how == "backward":
            loss.backward()
            return [p.grad for p in model.parameters()]
        return torch.autograd.grad(loss, list(model.parameters()))

    expected = [g.clone() for g in step(x)]
    model.zero_grad()
    options = {"inner": "aot_eager", "preset": "lossless"}
    before = len(backend.compiled_graphs())
    found = torch.compile(step, backend="dropit", options=options)(x)
    assert len(backend.compiled_graphs()) > before
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
