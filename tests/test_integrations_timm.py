"""timm's training task, compiled as its train.py compiles it: `--torchcompile BACKEND`."""

import pytest
import timm
import torch
from timm.task import ClassificationTask
from torch import Tensor

from dropit_fx.backend import compiled_graphs


def losses(task: ClassificationTask, steps: int = 8) -> list[float]:
    torch.manual_seed(1)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    out = []
    for _ in range(steps):
        loss: Tensor = task(x, y)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


def make() -> ClassificationTask:
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=4
    )
    return ClassificationTask(model.train(), device=torch.device("cpu"), verbose=False)


def test_a_compiled_task_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPIT_GAMMA", "0.7")  # the script passes no options
    monkeypatch.setenv("DROPIT_INNER", "aot_eager")
    dense, packed = make(), make()
    packed.compile(backend="dropit", mode=None)
    before = len(compiled_graphs())
    found = losses(packed)
    (graph,) = compiled_graphs()[before:]
    assert graph.saved_bytes < 0.8 * graph.report.dense_bytes
    expected = losses(dense)
    assert found[0] == expected[0]  # the forward is exact
    assert found[-1] < 0.8 * found[0]
    assert abs(found[-1] - expected[-1]) < 0.2 * expected[0]


def test_lossless_has_the_losses_of_the_dense_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPIT_PRESET", "lossless")
    dense, packed = make(), make()
    packed.compile(backend="dropit_eager")
    assert losses(packed) == losses(dense)
