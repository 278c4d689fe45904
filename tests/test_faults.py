"""What goes wrong in the middle of a training: the next step is as if nothing had been."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import dropit_fx
from dropit_fx.kernels import cpu

WAYS = ("transform", "dropit_eager", "dropit")
ROWS = 64


def made(way: str) -> tuple[nn.Module, Any, Tensor]:
    """A model, what runs it packed, and its input."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(256)),
        *(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 8)),
    )
    x = torch.randn(ROWS, 64)
    if way == "transform":
        return model, dropit_fx.transform(model, example_args=(x,)), x
    options = {"inner": "aot_eager"} if way == "dropit" else {}
    return model, torch.compile(model, backend=way, options=options), x


def step(run: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of one step from a fixed seed."""
    model.zero_grad()
    torch.manual_seed(3)
    run(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Full(TorchDispatchMode):
    """Memory runs out at the op of that number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS[:2])  # compiled, a mode of the tests' own is not looked at
def test_memory_runs_out_and_a_smaller_batch_goes_on(way: str) -> None:
    model, run, x = made(way)
    expected, smaller = step(run, model, x), step(run, model, x[: ROWS // 2])
    stopped = 0
    for number in (3, 9, 16, 27, 41):  # in the forward, and in the backward
        with Full(number) as memory:
            try:
                step(run, model, x)
            except torch.OutOfMemoryError:
                stopped += 1
        assert memory.left <= 0
        assert_same(step(run, model, x[: ROWS // 2]), smaller)
    assert stopped == 5
    assert_same(step(run, model, x), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_backward_that_raises_leaves_nothing_behind(way: str) -> None:
    model, run, x = made(way)
    expected = step(run, model, x)
    kept = dropit_fx.measure.saved_bytes(run, x)

    def stop(grad: Tensor) -> Tensor:
        raise ArithmeticError("stopped")

    for parameter in (model[6].weight, model[0].weight):  # the first of the backward, the last
        handle = parameter.register_hook(stop)
        with pytest.raises(ArithmeticError, match="stopped"):
            step(run, model, x)
        handle.remove()
        assert_same(step(run, model, x), expected)
    assert dropit_fx.measure.saved_bytes(run, x) == kept


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_and_inference_mode_change_no_step(way: str) -> None:
    model, run, x = made(way)
    expected = step(run, model, x)
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_same(step(run, model, x), expected)
    with torch.inference_mode():
        assert run(x).is_inference()
    assert_same(step(run, model, x), expected)


def test_threads_train_models_of_their_own() -> None:
    kept = [made("transform") for _ in range(4)]
    found: dict[int, list[Tensor]] = {}

    def train(at: int) -> None:
        model, run, x = kept[at]
        model.zero_grad()
        run.eval()(x).square().sum().backward()  # chance is drawn from one generator for all
        found[at] = [p.grad for p in model.parameters()]

    threads = [threading.Thread(target=train, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    train(len(threads))  # by itself
    for at in range(len(threads)):
        assert_same(found[at], found[len(threads)])


def _train_in_child(model: nn.Module, run: Any, x: Tensor, told: Any) -> None:
    told.send([g.tolist() for g in step(run, model, x)])


def test_a_forked_process_trains_as_its_parent_does() -> None:
    model, run, x = made("transform")
    expected = step(run, model, x)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_train_in_child, args=(model, run, x, theirs))
    child.start()
    assert ours.poll(60)
    assert_same([torch.tensor(g) for g in ours.recv()], expected)
    child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader_feed_it(start: str) -> None:
    model, run, x = made("transform")
    loader = DataLoader(
        TensorDataset(x), batch_size=ROWS // 2, num_workers=1, multiprocessing_context=start
    )
    for at, (batch,) in enumerate(loader):
        assert_same(step(run, model, batch), step(run, model, x.chunk(2)[at]))


@pytest.mark.parametrize("content", [b"", b"no library"], ids=["empty", "text"])
def test_a_library_of_kernels_that_does_not_load_is_done_without(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    model, run, x = made("transform")
    expected = step(run, model, x)
    (tmp_path / "_cpu.so").write_bytes(content)
    monkeypatch.setattr(cpu, "EXTENSION_SUFFIXES", [".so"])
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    cpu.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert_same(step(run, model, x), expected)
    finally:
        cpu.library.cache_clear()
    (said,) = [r.message for r in caplog.records if "kernels" in r.message]
    assert said.startswith("dropit_fx: C kernels not usable (")


NOTHING_WRITTEN = """
import torch
from torch import nn
import dropit_fx
model, x = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)), torch.randn(32, 64)
packed = dropit_fx.transform(model, example_args=(x,))
for run in (packed, torch.compile(model, backend="dropit_eager")):
    run(x).sum().backward()
print(dropit_fx.report(packed).ratio < 1)
"""


def test_home_and_caches_that_cannot_be_written(tmp_path: Path) -> None:
    """Folders that are files: whoever runs the tests, nothing can be made in them."""
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    names = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TRITON_CACHE_DIR")
    env = os.environ | dict.fromkeys(names, str(nowhere)) | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", NOTHING_WRITTEN], env=env, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"
