"""examples/deit.py: the command lines of the published code, on a few images."""

import functools
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command_lines import command_lines
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import deit  # noqa: E402

LINES = len(command_lines("deit.py", {}))
FEW = ["--epochs", "1", "--batch-size", "2", "--workers", "0"]


def pixels(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the twelve blocks, which are alike, three."""
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=3))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four images."""
    folder, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for side in ("train", "val"):
        for name in ("n01", "n02"):
            (folder / side / name).mkdir(parents=True)
            for i, image in enumerate(pixels(rng, 4, 40)):
                Image.fromarray(image).save(folder / side / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images in the files of CIFAR-100."""
    folder, rng = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)
    (folder / "cifar-100-python").mkdir()
    for name in ("train", "test"):
        data = pixels(rng, 4, 32).transpose(0, 3, 1, 2).reshape(4, -1)
        labels = [0, 1, 2, 99]
        made = pickle.dumps({"data": data, "fine_labels": labels, "filenames": [""] * 4})
        (folder / "cifar-100-python" / name).write_bytes(made)
    names = [str(i) for i in range(100)]
    (folder / "cifar-100-python/meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a checkpoint of ImageNet: its head has another size."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"model": timm.create_model("deit_small_patch16_224").state_dict()}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("line", range(LINES))
def test_published_commands(
    line: int,
    imagenet: Path,
    cifar: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    arguments = command_lines("deit.py", {"WEIGHTS.pth": str(weights)})[line]
    data = imagenet if "IMNET" in arguments else cifar
    arguments = [str(data) if word == "PATH" else word for word in arguments]
    assert deit.main([*arguments, *FEW, "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "deit.json").read_text()).values()
    assert np.isfinite(found["epochs"][0]["loss"])
    assert list(tmp_path.glob("*.pth"))


def test_all_of_them_are_in_the_table() -> None:
    assert LINES == 4


@pytest.mark.slow
def test_lossless_is_dense_and_the_loss_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deit.Digits, "__len__", lambda self: 64)
    small = ["--batch-size", "16", "--epochs", "6", "--warmup-epochs", "1", "--lr", "0.03"]
    small += ["--model", "vit_tiny_patch16_224", "--presets", "lossless", "balanced"]
    assert deit.main([*small, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "deit.json").read_text())
    curves = {k: [e["loss"] for e in v["epochs"]] for k, v in found.items()}
    assert curves["lossless"] == curves["dense"]
    assert all(curve[-1] < 0.97 * curve[0] for curve in curves.values())
    assert found["balanced"]["saved_bytes"] < 0.12 * found["dense"]["saved_bytes"]


def test_options_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="needs --data-path"):
        deit.main(["--data-set", "CIFAR"])
    with pytest.raises(SystemExit):
        deit.main(["--presets", "balancd"])
    assert "is no preset and no file" in capsys.readouterr().err
