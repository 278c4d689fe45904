"""What `detection.py` learns from: shapes drawn on the fly or COCO, and the average precision."""

import bisect
import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert, masks_to_boxes

Target = dict[str, Tensor]  # boxes: (n, 4), x1 y1 x2 y2; labels: (n,); masks: (n, height, width)


class Images(Protocol):
    """A data set: images, (3, height, width) in [0, 1], with what is to be found in them."""

    classes: int  # the background is one of them
    sizes: Sequence[tuple[int, int]]  # height and width of each image
    ids: Sequence[int]  # by which `truth` names them

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Target]: ...

    def truth(self) -> COCO:
        """What the average precision is measured against."""


class Shapes:
    """Rectangles, ellipses and triangles of any colour on noise; the same for the same seed."""

    classes = 4

    def __init__(self, count: int, seed: int, side: int = 96) -> None:
        self.seeds = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(2**31, (count,), generator=self.seeds).tolist()
        sides = torch.randint(side * 3 // 4, side * 5 // 4, (count, 2), generator=self.seeds)
        self.sizes = [(h, w) for h, w in sides.tolist()]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        chance = torch.Generator().manual_seed(self.ids[index])
        height, width = self.sizes[index]
        image = torch.rand(3, 1, 1, generator=chance).expand(3, height, width).clone()
        free = torch.ones(height, width, dtype=torch.bool)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        labels, masks = [], []
        for _ in range(5):
            radius = torch.empty(2).uniform_(0.1, 0.25, generator=chance) * min(height, width)
            low, high = radius, torch.tensor([height, width]) - radius
            centre = low + torch.rand(2, generator=chance) * (high - low)
            v, u = (y - centre[0]) / radius[0], (x - centre[1]) / radius[1]
            label = int(torch.randint(1, self.classes, (), generator=chance))
            mask = _inside(label, u, v)
            colour = torch.rand(3, 1, generator=chance)
            if not (mask & ~free).any():
                image[:, mask] = colour
                free &= ~mask
                labels.append(label)
                masks.append(mask)
        image += 0.1 * torch.randn(image.shape, generator=chance)
        return image.clamp(0, 1), _target(torch.stack(masks), labels)

    def truth(self) -> COCO:
        made = COCO()
        made.dataset = as_coco(self)
        with _quiet():
            made.createIndex()
        return made


def _inside(label: int, u: Tensor, v: Tensor) -> Tensor:
    """Whether points are inside a shape that fills the square from -1 to 1."""
    if label == 1:
        return (u.abs() <= 1) & (v.abs() <= 1)
    if label == 2:
        return u**2 + v**2 <= 1
    return (v.abs() <= 1) & (u.abs() <= (1 + v) / 2)


def _target(masks: Tensor, labels: Sequence[int]) -> Target:
    boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])  # the far edge of a pixel
    return {"boxes": boxes, "labels": torch.tensor(labels), "masks": masks.to(torch.uint8)}


class Coco:
    """A folder as COCO 2017 has it: `train2017`, `val2017` and `annotations`."""

    classes = 91

    def __init__(self, folder: Path, split: str) -> None:
        self.images = folder / f"{split}2017"
        with _quiet():
            self.coco = COCO(folder / "annotations" / f"instances_{split}2017.json")
        self.ids = sorted(self.coco.imgs)
        if split == "train":  # nothing is learned from an image without an object
            self.ids = [i for i in self.ids if self.objects(i)]
        found = [self.coco.imgs[i] for i in self.ids]
        self.sizes = [(image["height"], image["width"]) for image in found]

    def objects(self, image: int) -> list[dict[str, Any]]:
        """What is marked in an image, without crowds and without what is thinner than a pixel."""
        marked = self.coco.imgToAnns[image]
        return [m for m in marked if not m.get("iscrowd") and min(m["bbox"][2:]) >= 1]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image = self.ids[index]
        path = self.images / self.coco.imgs[image]["file_name"]
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        height, width = self.sizes[index]
        marked = self.objects(image)
        boxes = torch.tensor([m["bbox"] for m in marked]).reshape(-1, 4)
        masks = [torch.from_numpy(self.coco.annToMask(m)) for m in marked]
        return pixels.permute(2, 0, 1) / 255, {
            "boxes": box_convert(boxes, "xywh", "xyxy").clamp(
                max=torch.tensor([width, height, width, height])
            ),
            "labels": torch.tensor([m["category_id"] for m in marked], dtype=torch.int64),
            "masks": torch.stack(masks) if masks else torch.zeros(0, height, width).byte(),
        }

    def truth(self) -> COCO:
        return self.coco


def as_coco(data: Images) -> dict[str, Any]:
    """A data set as a COCO file has it: every box, label and mask."""
    images, marked = [], []
    for index, (name, (height, width)) in enumerate(zip(data.ids, data.sizes, strict=True)):
        images.append({"id": name, "height": height, "width": width, "file_name": f"{name}.png"})
        for one in _records(name, data[index][1]):
            area = float(one["bbox"][2] * one["bbox"][3])
            if "segmentation" in one:
                area = float(rle.area(one["segmentation"]))
            marked.append({**one, "id": len(marked) + 1, "area": area, "iscrowd": 0})
    kinds = [{"id": label, "name": str(label)} for label in range(1, data.classes)]
    return {"info": {}, "images": images, "annotations": marked, "categories": kinds}


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Both as a mirror shows them, left for right."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    return image.flip(-1), target | {"boxes": boxes, "masks": target["masks"].flip(-1)}


def batches(data: Images, size: int, factor: int, chance: torch.Generator) -> Iterator[list[int]]:
    """One epoch in random order: as often as can be, a batch has images of like aspect ratios.

    Args:
        data: What is to be learned.
        size: Images of a batch; the last one may have fewer.
        factor: Groups of aspect ratios in a factor of two; negative for no groups.
        chance: Decides the order.
    """
    edges = [2 ** (i / factor) for i in range(-factor, factor + 1)] if factor > 0 else [1.0]
    groups: dict[int, list[int]] = defaultdict(list)
    for index in torch.randperm(len(data), generator=chance).tolist():
        height, width = data.sizes[index]
        group = groups[bisect.bisect_right(edges, width / height) if factor >= 0 else 0]
        group.append(index)
        if len(group) == size:
            yield group.copy()
            group.clear()
    left = [index for group in groups.values() for index in group]
    yield from (left[i : i + size] for i in range(0, len(left), size))


def steps(data: Images, size: int, factor: int) -> int:
    """The number of batches of an epoch."""
    return sum(1 for _ in batches(data, size, factor, torch.Generator()))


# Average precision --------------------------------------------------------------------------------


def average_precision(
    truth: COCO, found: Sequence[tuple[int, Target]], kind: str
) -> tuple[float, float]:
    """COCO's average precision over overlaps of 0.5 to 0.95, and that at 0.5.

    Args:
        truth: What there is.
        found: The id of each image, and its boxes, labels, scores, and masks of 0 and 1.
        kind: `"bbox"` or `"segm"`: what has to overlap.
    """
    results = [record for image, target in found for record in _records(image, target)]
    if not results:
        return 0.0, 0.0
    with _quiet():
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.params.imgIds = sorted(image for image, _ in found)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    whole, half = (float(score) for score in evaluation.stats[:2])
    return (whole, half) if whole >= 0 else (math.nan, math.nan)  # -1: there is nothing to find


def _records(image: int, target: Target) -> Iterator[dict[str, Any]]:
    """What is marked in an image, one by one, as COCO's files say it."""
    boxes = box_convert(target["boxes"], "xyxy", "xywh").tolist()
    for i, (box, label) in enumerate(zip(boxes, target["labels"].tolist(), strict=True)):
        record = {"image_id": image, "category_id": label, "bbox": box}
        if "scores" in target:
            record["score"] = target["scores"][i].item()
        if "masks" in target:
            code = rle.encode(np.asfortranarray(target["masks"][i].byte().cpu().numpy()))
            record["segmentation"] = code | {"counts": code["counts"].decode()}
        yield record


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """pycocotools prints as it goes."""
    return contextlib.redirect_stdout(io.StringIO())
