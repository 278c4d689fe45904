"""Two processes, DistributedDataParallel and FSDP2: gradients, saved bytes, checkpoints.

Each of the two takes half of a batch. The oracle is one process that takes the halves one after the
other and averages: each rank packs its own half, and nothing else is different.
"""

from __future__ import annotations

import copy
import datetime
import gc
import logging
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from dropit_fx import measure, pack_checkpoints, pack_saved, transform
from dropit_fx.compile import backend

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import ddp as ddp_example  # noqa: E402
import fsdp as fsdp_example  # noqa: E402

RANKS, HALF, WIDTH = 2, 32, 128
PRESETS = ("lossless", "balanced")
Grads = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Parameters for more than one of DDP's buckets, the first of which takes 1 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 10)
        self.blocks = nn.Sequential(*[Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(RANKS * HALF, 16, generator=generator)
    return x, torch.randint(10, (RANKS * HALF,), generator=generator)


def half(rank: int) -> tuple[Tensor, Tensor]:
    x, y = (t[rank * HALF : (rank + 1) * HALF] for t in batch())
    return x, y


def grads(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, y: Tensor) -> Grads:
    model.zero_grad()
    F.cross_entropy(run(x), y).backward()
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None
        whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        found[name.removeprefix("module.")] = whole.clone()
    return found


def mean_of_halves(run: Callable[[Tensor], Tensor], model: nn.Module) -> Grads:
    first, second = (grads(run, model, *half(rank)) for rank in range(RANKS))
    return {name: (first[name] + second[name]) / 2 for name in first}


def compare(
    run: Callable[[Tensor], Tensor],
    model: nn.Module,
    one: Callable[[Tensor], Tensor],
    one_model: nn.Module,
) -> dict[str, Any]:
    """What two ranks give beside what one process does."""
    x, y = half(dist.get_rank())
    return {
        "saved": measure.saved_bytes(run, x),
        "wanted saved": measure.saved_bytes(one, x),
        "dense saved": measure.saved_bytes(net(), x),
        "wanted": mean_of_halves(one, one_model),
        "first": grads(run, model, x, y),
        "again": grads(run, model, x, y),  # a second step: nothing of the first is left over
    }


# What each rank does ------------------------------------------------------------------------------


def rewritten(preset: str, modules: str | None = None) -> nn.Module:
    return transform(net(), modules=modules, example_args=(half(0)[0],), preset=preset)


def shard(model: nn.Module) -> nn.Module:
    for block in model.get_submodule("blocks"):
        fully_shard(block, reshard_after_forward=True)
    return fully_shard(model, reshard_after_forward=True)


def ddp(preset: str) -> dict[str, Any]:
    model, one = DistributedDataParallel(rewritten(preset)), rewritten(preset)
    return compare(model, model, one, one)


def fsdp(preset: str) -> dict[str, Any]:
    model, one = shard(rewritten(preset, "blocks.*")), rewritten(preset, "blocks.*")
    return compare(model, model, one, one)


def in_autocast(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    return run


def fsdp_autocast() -> dict[str, Any]:
    model, one = shard(rewritten("balanced", "blocks.*")), rewritten("balanced", "blocks.*")
    return compare(in_autocast(model), model, in_autocast(one), one)


OPTIONS = {"preset": "balanced", "inner": "aot_eager"}


def ddp_compiled(alone: dist.ProcessGroup) -> dict[str, Any]:
    # alone in its group, a rank is one process whose graph is split by buckets as well
    both, one = DistributedDataParallel(net()), DistributedDataParallel(net(), process_group=alone)
    graphs = len(backend.compiled_graphs())
    run = torch.compile(both, backend="dropit", options=OPTIONS)
    x, _ = half(dist.get_rank())
    run(x)
    graphs = len(backend.compiled_graphs()) - graphs
    run_one = torch.compile(one, backend="dropit", options=OPTIONS)
    return compare(run, both, run_one, one) | {"graphs": graphs}


def fsdp_compiled() -> dict[str, Any]:
    model, one = net(), net()
    for block in (*model.blocks, *one.blocks):
        block.compile(backend="dropit", options=OPTIONS)
    shard(model)
    return compare(model, model, one, one)


def checkpointed_net() -> nn.Module:
    """Checkpoints first, as torchtitan has it: they are sharded with the block inside of them."""
    model = net()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    pack_checkpoints(model, bits=6)
    return model


def in_pack_saved(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with pack_saved(bits=6):
            return model(x)

    return run


def eager(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    model, one = wrap(checkpointed_net()), checkpointed_net()
    return compare(model, model, one, one)


def eager_saved(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    model, one = wrap(net()), net()
    return compare(in_pack_saved(model), model, in_pack_saved(one), one)


def input_gradients() -> dict[str, Tensor]:
    """Of a sharded model in bfloat16, whose gathered weights are saved, at one bit and dense."""
    layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for part in (*layers, layers):
        fully_shard(part, mp_policy=policy)
    x = torch.ones(HALF, WIDTH).cumsum(0).requires_grad_()
    found = {}
    for name, run in (("dense", layers), ("packed", in_pack_saved(layers))):
        (found[name],) = torch.autograd.grad(run(x * 0.1).square().sum(), x)
    return found


def freed_weights(autocast: bool) -> list[int]:
    """Bytes that hold the weights of the blocks saved by a sharded forward, when it is over."""
    model = shard(rewritten("balanced", "blocks.*"))
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x, _ = half(dist.get_rank())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = in_autocast(model)(x) if autocast else model(x)
    shapes = {(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)}
    sizes = [t.untyped_storage().nbytes() for t in saved if tuple(t.shape) in shapes]
    out.sum().backward()
    return sizes


def checkpoints(folder: Path) -> dict[str, Tensor]:
    """Two steps with each engine; gives what the trained models answer, and saves them."""
    x, y = half(dist.get_rank())
    answers = {}
    for name, model in (
        ("ddp", DistributedDataParallel(rewritten("balanced"))),
        ("fsdp", shard(rewritten("balanced", "blocks.*"))),
    ):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            grads(model, model, x, y)
            optimizer.step()
        dcp.save(get_model_state_dict(model), checkpoint_id=folder / name)
        with torch.no_grad():
            answers[name] = model(batch()[0])
    return answers


def split_over_ranks() -> dict[str, Any]:
    """Tensor-parallel blocks by the plug-in, beside the same without it."""
    model = net()
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    x, y = batch()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dropit_fx").addHandler(handler)
    run = torch.compile(model, backend="dropit", options=OPTIONS)
    return {"dense": grads(model, model, x, y), "packed": grads(run, model, x, y), "said": said}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # searches for tensors need not walk through libraries
    store = dist.FileStore(str(folder / "store"), RANKS)
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=wait)
    alone = [dist.new_group([i]) for i in range(RANKS)][rank]
    found: dict[str, Any] = {f"ddp {preset}": ddp(preset) for preset in PRESETS}
    found |= {f"fsdp {preset}": fsdp(preset) for preset in PRESETS}
    found["fsdp autocast"] = fsdp_autocast()
    found["ddp compiled"] = ddp_compiled(alone)
    found["fsdp compiled"] = fsdp_compiled()
    for engine, wrap in (("ddp", DistributedDataParallel), ("fsdp", shard)):
        found[f"{engine} pack_checkpoints"] = eager(wrap)
        found[f"{engine} pack_saved"] = eager_saved(wrap)
    found["input gradients"] = input_gradients()
    found["split"] = split_over_ranks()
    found["freed"] = {how: freed_weights(how) for how in (False, True)}
    found["answers"] = checkpoints(folder)
    torch.save(found, folder / f"rank{rank}")
    dist.destroy_process_group()


# What has to come out -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(made,), nprocs=RANKS)
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}") for rank in range(RANKS)]


COMPARED = [f"{engine} {preset}" for engine in ("ddp", "fsdp") for preset in PRESETS]
COMPARED += ["fsdp autocast", "ddp compiled", "fsdp compiled"]
COMPARED += [f"{e} {how}" for e in ("ddp", "fsdp") for how in ("pack_checkpoints", "pack_saved")]


@pytest.mark.parametrize("what", COMPARED)
@pytest.mark.slow
def test_gradients_are_the_mean_of_what_one_process_finds(
    ranks: list[dict[str, Any]], what: str
) -> None:
    for found in ranks:
        assert len(found[what]["wanted"]) == len(dict(net().named_parameters()))
        for step in ("first", "again"):
            torch.testing.assert_close(found[what][step], found[what]["wanted"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_lossless_gradients_are_those_of_the_dense_model_on_the_joined_batch(
    ranks: list[dict[str, Any]], engine: str
) -> None:
    model = net()
    dense = grads(model, model, *batch())
    torch.testing.assert_close(ranks[0][f"{engine} lossless"]["first"], dense)
    packed = ranks[0][f"{engine} balanced"]["first"]  # which the comparison can tell from dense
    errors = {n: (packed[n] - dense[n]).norm() / dense[n].norm() for n in dense}
    assert 1e-3 < errors["blocks.0.up.weight"] < 0.2


@pytest.mark.parametrize("what", COMPARED)
def test_each_rank_saves_what_one_process_saves(ranks: list[dict[str, Any]], what: str) -> None:
    for found in ranks:
        assert found[what]["saved"] == found[what]["wanted saved"]
        if "lossless" not in what:
            assert found[what]["saved"] < 0.7 * found[what]["dense saved"]


def test_what_is_split_over_ranks_stays_dense_with_the_reason(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        torch.testing.assert_close(found["split"]["packed"], found["split"]["dense"])
        assert any("split over ranks (DTensor" in text for text in found["split"]["said"])


def test_graphs_that_ddp_splits_by_buckets_are_packed_each(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["ddp compiled"]["graphs"] > 1
        assert found["ddp compiled"]["saved"] < 0.3 * found["ddp compiled"]["dense saved"]


@pytest.mark.parametrize("autocast", [False, True])
def test_saved_weights_are_freed_with_the_gathered_ones(
    ranks: list[dict[str, Any]], autocast: bool
) -> None:
    for found in ranks:
        assert len(found["freed"][autocast]) >= 6  # two weights in each of three blocks
        assert not any(found["freed"][autocast])


def test_gathered_weights_are_never_packed(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert torch.equal(*found["input gradients"].values())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_checkpoint_of_two_ranks_loads_on_one(
    ranks: list[dict[str, Any]], folder: Path, engine: str, kind: str
) -> None:
    model = net() if kind == "dense" else rewritten("balanced", "blocks.*")
    state = copy.deepcopy(model.state_dict())
    dcp.load(state, checkpoint_id=folder / engine, no_dist=True)
    model.load_state_dict(state)
    x, _ = batch()
    answer, before = model(x), net()(x)
    assert (answer - before).norm() > 0.1 * before.norm()
    for found in ranks:
        torch.testing.assert_close(found["answers"][engine], answer.detach())


@pytest.mark.slow
@pytest.mark.parametrize("example", [ddp_example, fsdp_example], ids=["ddp", "fsdp"])
def test_examples_train_on_a_single_rank(
    example: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On two they take too long for a test."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": port}
    for name, value in (where | {"MASTER_ADDR": "localhost"}).items():
        monkeypatch.setenv(name, str(value))
    assert example.main(["--steps", "40", "--out", str(tmp_path)]) == 0
    found = {}
    for line in capsys.readouterr().out.splitlines():
        if match := re.match(r"(dense|balanced) +([\d. ]+)%$", line.strip()):
            found[match[1]] = [float(number) for number in match[2].split()]
    assert list(found) == ["dense", "balanced"]
    for start, end, _, _, accuracy in found.values():
        assert end < 0.97 * start
        assert accuracy > 15  # by chance: 10
    assert found["balanced"][2] < 0.25 * found["dense"][2]


def test_examples_say_how_they_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=r"torchrun --nproc-per-node 2 examples/ddp\.py"):
        ddp_example.main([])
