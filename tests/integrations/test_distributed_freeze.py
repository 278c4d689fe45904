"""FreezeScheduler on two ranks: they freeze the same layers, and what trains is averaged."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dropit_fx import transform
from dropit_fx.schedule import FreezeScheduler

RANKS, HALF, STEPS = 2, 16, 10


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU()) for _ in range(4)]
    return nn.Sequential(*layers, nn.Linear(32, 4))


def half(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(RANKS * step + rank)
    return (
        torch.randn(HALF, 32, generator=generator),
        torch.randint(4, (HALF,), generator=generator),
    )


def train(model: nn.Module, ranks: range) -> dict[str, Any]:
    """One process that takes the halves of all ranks in turn, or a rank that takes its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, _ = half(0, 0)
    scheduler = FreezeScheduler(model, 0.6, optimizer=optimizer, example_args=(x,))
    trained = []
    for step in range(STEPS):
        for rank in ranks:
            x, y = half(step, rank)
            (F.cross_entropy(model(x), y) / len(ranks)).backward()
        trained.append(scheduler.trained)
        optimizer.step()
        optimizer.zero_grad()
    weights = {n.removeprefix("module."): p.detach() for n, p in model.named_parameters()}
    return {"trained": trained, "weights": weights}


def made(preset: str | None) -> nn.Module:
    model = net()
    return transform(model, preset=preset, example_args=(half(0, 0)[0],)) if preset else model


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=120),
    )
    found: dict[str, Any] = {}
    for preset in (None, "lossless"):
        model = DistributedDataParallel(made(preset), find_unused_parameters=True)
        found[str(preset)] = train(model, range(rank, rank + 1))
    early = net()
    optimizer = torch.optim.AdamW(early.parameters())
    FreezeScheduler(early, 0.6, optimizer=optimizer)
    ddp = DistributedDataParallel(early, find_unused_parameters=True)
    try:
        for step in range(STEPS):
            x, y = half(step, rank)
            F.cross_entropy(ddp(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        found["early"] = str(error)
    torch.save(found, folder / f"rank{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("freeze")
    mp.spawn(work, args=(folder,), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}") for rank in range(RANKS)]


@pytest.mark.parametrize("preset", [None, "lossless"])
def test_ranks_train_the_layers_and_reach_the_weights_of_one_process(
    preset: str | None, ranks: list[dict[str, Any]]
) -> None:
    one = train(made(preset), range(RANKS))
    first, second = (found[str(preset)] for found in ranks)
    assert first["trained"] == second["trained"] == one["trained"]
    assert len(set(one["trained"])) > 3
    for name, weight in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-5)


def test_ranks_whose_weights_move_apart_are_told(ranks: list[dict[str, Any]]) -> None:
    """A layer that is frozen when DDP is made is not averaged later."""
    for found in ranks:
        assert "the weights of the ranks moved differently" in found["early"]
