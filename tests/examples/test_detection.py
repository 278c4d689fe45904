"""`examples/detection.py`: packing R-CNNs in place, its data, and the average precision.

The preset `lossless` is the oracle: with it every loss and every gradient has the bits of dense.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import command_lines
from PIL import Image
from torch import Tensor
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.ops import masks_to_boxes

import dropit_fx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import detection  # noqa: E402
from detection_data import (  # noqa: E402
    Coco,
    Images,
    Shapes,
    Target,
    as_coco,
    average_precision,
    batches,
    flip,
    steps,
)

FASTER, MASK = detection.MODELS
TINY = ["--min-size=64", "--max-size=96", "--proposals=8", "--rounds=1", "--workers=0"]


def settings(*more: str) -> Any:
    return detection.parse([*TINY, *more])


def gradients(model: torch.nn.Module, batch: detection.Batch) -> dict[str, Tensor]:
    """The loss and every gradient."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    loss = detection.loss_of(model, batch)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | found


# The script ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", [FASTER, MASK])
def test_the_script_trains_and_says_what_it_found(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset, epochs = {FASTER: ("lossless", 8), MASK: ("dropit", 16)}[model]
    options = f"--model {model} --presets {preset} --images 2 2 --batch-size 2 --epochs {epochs}"
    assert detection.main([*TINY, *options.split(), "--lr=0.004", f"--out={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (head,) = [line for line in lines if "AP50" in line]
    assert ("mask AP" in head) == (model == MASK)
    results = json.loads((tmp_path / f"{model}.json").read_text())["variants"]
    assert list(results) == ["dense", preset]
    for variant, got in results.items():
        assert any(line.startswith(variant) and f"{got['loss'][0]:.3f}" in line for line in lines)
        assert sum(got["loss"][-2:]) < 0.8 * sum(got["loss"][:2])
        assert 0 <= got["box_ap"] <= got["box_ap50"] <= 1
    dense, packed = results.values()
    assert packed["saved_bytes"] < dense["saved_bytes"]
    if preset == "lossless":
        same = ("loss", "box_ap", "box_ap50")
        assert [packed[key] for key in same] == [dense[key] for key in same]
    assert (tmp_path / f"{model}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("model", [FASTER, MASK])
def test_published_commands(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = resnet50().state_dict()
    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", lambda *_, **__: weights)
    write(tmp_path, Shapes(2, seed=0), Shapes(1, seed=1))
    line = command_lines("detection.py", {"PATH": str(tmp_path)})[model == MASK]
    assert detection.main([*line, "--epochs=1", *TINY, f"--out={tmp_path}"]) == 0
    assert "\ndropit " in capsys.readouterr().out
    written = json.loads((tmp_path / f"{model}.json").read_text())
    assert written["settings"]["lr"] == 0.0025
    assert written["settings"]["gamma"] == {FASTER: 0.9, MASK: 0.8}[model]
    assert list(written["variants"]) == ["dropit"]


def test_defaults_depend_on_the_data() -> None:
    assert detection.parse([]).min_size == 96
    full = detection.parse(["--dataset", "coco", "--data-path", "coco"])
    assert (full.backbone, full.min_size, full.levels, full.lr) == ("resnet50", 800, 4, 0.0025)
    with pytest.raises(SystemExit):
        detection.parse(["--dataset", "coco"])


# Packing ------------------------------------------------------------------------------------------


def test_lossless_is_dense_for_images_of_any_size() -> None:
    options = settings("--model", MASK)
    data = Shapes(5, seed=0)
    dense = detection.build(options, data.classes)
    packed = detection.build(options, data.classes)
    detection.pack(packed, detection.load(data, [0, 1], options), preset="lossless")
    assert list(packed.state_dict()) == list(dense.state_dict())
    for name, value in dense.state_dict().items():
        assert torch.equal(packed.state_dict()[name], value), name
    for indices in ([2, 3], [4]):
        batch = detection.load(data, indices, options)
        assert len({tuple(image.shape) for image in batch[0]}) == len(indices)
        expected, got = gradients(dense, batch), gradients(packed, batch)
        assert list(got) == list(expected)
        assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def test_inputs_of_layers_are_packed() -> None:
    options = settings("--model", MASK)
    data = Shapes(2, seed=0)
    model = detection.build(options, data.classes)
    batch = detection.load(data, [0, 1], options)
    detection.pack(model, batch, strategy="mink", gamma=0.8)
    rows = dropit_fx.report(model).rows
    for part in detection.PARTS:
        inside = [row.codec for row in rows if row.module.startswith(part)]
        assert any("mink(gamma=0.8)" in codec for codec in inside), part
    found = gradients(model, batch)
    assert all(value.isfinite().all() for value in found.values())


# Data ---------------------------------------------------------------------------------------------


def write(folder: Path, train: Images, val: Images) -> None:
    """Writes both data sets as COCO 2017 has them."""
    (folder / "annotations").mkdir(parents=True)
    for split, data in (("train", train), ("val", val)):
        (folder / f"{split}2017").mkdir()
        marked = as_coco(data)
        for index, name in enumerate(data.ids):
            pixels = (255 * data[index][0]).round().byte().permute(1, 2, 0)
            Image.fromarray(pixels.numpy()).save(folder / f"{split}2017" / f"{name}.png")
        path = folder / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(marked))


def test_shapes_are_the_same_each_time_and_their_boxes_fit() -> None:
    data, again = Shapes(6, seed=3), Shapes(6, seed=3)
    for index in range(len(data)):
        (image, target), (other, _) = data[index], again[index]
        assert torch.equal(image, other)
        assert image.shape == (3, *data.sizes[index])
        far = torch.tensor([0.0, 0.0, 1.0, 1.0])
        assert torch.equal(target["boxes"], masks_to_boxes(target["masks"]) + far)
        assert target["masks"].sum(0).max() == 1  # no shape hides another
        assert target["masks"].flatten(1).sum(1).min() > 50
    assert not torch.equal(data[0][0], Shapes(6, seed=4)[0][0])


def test_a_mirror_shows_boxes_where_it_shows_masks() -> None:
    image, target = Shapes(1, seed=0)[0]
    mirrored, seen = flip(image, target)
    far = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert torch.equal(seen["boxes"], masks_to_boxes(seen["masks"]) + far)
    back, same = flip(mirrored, seen)
    assert torch.equal(back, image)
    assert all(torch.equal(same[name], target[name]) for name in target)


def test_a_coco_folder_gives_back_what_was_written(tmp_path: Path) -> None:
    shapes = Shapes(3, seed=0)
    write(tmp_path, shapes, shapes)
    path = tmp_path / "annotations" / "instances_train2017.json"
    marked = json.loads(path.read_text())
    for one in marked["annotations"]:
        one["iscrowd"] = int(one["image_id"] == shapes.ids[1])
    path.write_text(json.dumps(marked))
    train, val = Coco(tmp_path, "train"), Coco(tmp_path, "val")
    assert train.ids == sorted({shapes.ids[0], shapes.ids[2]})
    assert val.ids == sorted(shapes.ids)
    for index, name in enumerate(val.ids):
        (image, target), (pixels, expected) = val[index], shapes[shapes.ids.index(name)]
        assert val.sizes[index] == tuple(image.shape[1:])
        assert (image - pixels).abs().max() < 0.5 / 255 + 1e-6
        for key in expected:
            assert torch.equal(target[key], expected[key]), key


@pytest.mark.parametrize("factor", [-1, 0, 3])
def test_batches_have_each_image_once(factor: int) -> None:
    data = Shapes(23, seed=0)
    made = list(batches(data, 4, factor, torch.Generator().manual_seed(0)))
    assert Counter(i for batch in made for i in batch) == Counter(range(23))
    assert len(made) == steps(data, 4, factor) == 6
    if factor == 0:  # two groups: upright, and the others
        upright = [{h > w for h, w in (data.sizes[i] for i in batch)} for batch in made]
        assert sum(len(kinds) == 2 for kinds in upright) <= 2


# Average precision --------------------------------------------------------------------------------


def seen(data: Images) -> list[tuple[int, Target]]:
    """What a model without fault would see."""
    found = []
    for index, name in enumerate(data.ids):
        target = data[index][1]
        found.append((name, target | {"scores": torch.ones(len(target["labels"]))}))
    return found


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision(kind: str) -> None:
    data = Shapes(4, seed=0)
    truth, perfect = data.truth(), seen(data)
    assert average_precision(truth, perfect, kind) == (1.0, 1.0)
    wrong = [(name, found | {"labels": found["labels"] % 3 + 1}) for name, found in perfect]
    assert average_precision(truth, wrong, kind) == (0.0, 0.0)
    assert average_precision(truth, [], kind) == (0.0, 0.0)


def test_a_shifted_box_counts_at_the_lesser_overlaps_only() -> None:
    data = Shapes(4, seed=0)
    shifted = []
    for name, found in seen(data):
        width = found["boxes"][:, 2] - found["boxes"][:, 0]
        boxes = found["boxes"].clone()
        boxes[:, [0, 2]] += 0.2 * width[:, None]  # an overlap of 0.8 / 1.2
        shifted.append((name, {**found, "boxes": boxes}))
    whole, half = average_precision(data.truth(), shifted, "bbox")
    assert half == 1.0
    assert whole == pytest.approx(0.4)  # 0.5, 0.55, 0.6, 0.65 of ten
