"""Trains torchvision's Faster or Mask R-CNN on objects and their boxes, dense and packed.

    python examples/detection.py
    python examples/detection.py --model maskrcnn_resnet50_fpn --presets dropit balanced

Without further options a small model, on a ResNet-18 of random weights, learns to find shapes that
are drawn on the fly; nothing is downloaded. All runs start from the same weights and see the same
images. What comes out: the loss, COCO's average precision of boxes and masks, what a step saves
for the backward, its peak of memory and its time; as a table, as JSON, and as a picture of boxes.

With COCO 2017 the defaults are those of torchvision's own training script, whose options this one
has. The two trainings of the paper:

    python examples/detection.py --dataset coco --data-path PATH --batch-size 2 --epochs 26 \\
        --lr-steps 16 22 --aspect-ratio-group-factor 3 --model fasterrcnn_resnet50_fpn \\
        --weights-backbone ResNet50_Weights.IMAGENET1K_V1 --strategy mink --gamma 0.9
    python examples/detection.py --dataset coco --data-path PATH --batch-size 2 --epochs 26 \\
        --lr-steps 16 22 --aspect-ratio-group-factor 3 --model maskrcnn_resnet50_fpn \\
        --weights-backbone ResNet50_Weights.IMAGENET1K_V1 --strategy mink --gamma 0.8

No tracer takes such a model whole: which boxes it goes on with depends on their scores. `pack`
rewrites the parts between these decisions in place. As in the paper, the first convolution and the
predictors stay dense: the one reads the images, which stay in memory anyway (or is frozen), and the
others are not rewritten.

Needs the extra `detection`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detection_data import Coco, Images, Shapes, Target, average_precision, batches, flip, steps
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, MultiStepLR
from torch.utils.data import DataLoader
from torchvision.models import get_weight
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid
from training import COSTS, DENSE, MIB, compact, curve, positive

import dropit_fx
from dropit_fx import measure
from dropit_fx.config import presets

Batch = tuple[list[Tensor], list[Target]]

MODELS = {"fasterrcnn_resnet50_fpn": FasterRCNN, "maskrcnn_resnet50_fpn": MaskRCNN}
PARTS = ("backbone", "roi_heads.box_head", "roi_heads.mask_head")  # all others are predictors
DATA: dict[str, dict[str, Any]] = {  # the defaults of options, by data set
    "shapes": {
        "backbone": "resnet18",
        "batch_size": 4,
        "epochs": 4,
        "lr_steps": [3],
        "min_size": 96,
        "max_size": 160,
        "levels": 3,
        "proposals": 32,
        "workers": 0,
    },
    "coco": {
        "backbone": "resnet50",
        "batch_size": 2,
        "epochs": 26,
        "lr_steps": [16, 22],
        "min_size": 800,
        "max_size": 1333,
        "levels": 4,
        "proposals": 512,
        "workers": 4,
    },
}
# of shapes, from random weights: with masks, twice as much ends in infinite losses
LEARNING_RATES = {"fasterrcnn_resnet50_fpn": 0.02, "maskrcnn_resnet50_fpn": 0.01}
SHOWN = 4  # images of the picture


# Models -------------------------------------------------------------------------------------------


def build(options: argparse.Namespace, classes: int) -> nn.Module:
    """A model as torchvision makes it: norms and two layers of a pretrained backbone freeze."""
    torch.manual_seed(options.seed)
    weights = get_weight(options.weights_backbone) if options.weights_backbone else None
    backbone = resnet_fpn_backbone(
        backbone_name=options.backbone,
        weights=weights,
        norm_layer=FrozenBatchNorm2d if weights else nn.BatchNorm2d,
        trainable_layers=3 if weights else 5,
        returned_layers=list(range(5 - options.levels, 5)),
    )
    sizes = tuple((32 << level,) for level in range(options.levels + 1))
    model = MODELS[options.model](
        backbone,
        classes,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        min_size=options.min_size,
        max_size=options.max_size,
        box_batch_size_per_image=options.proposals,
    )
    return model.to(options.device)


def pack(model: nn.Module, batch: Batch, config: Any = None, **settings: Any) -> None:
    """Rewrites the PARTS of a model in place, for images of any size and any number of boxes.

    Args:
        model: One of MODELS, in training mode.
        batch: Any: a run of a copy on it tells what the parts are called with.
        config: For `dropit_fx.transform`.
        **settings: For `dropit_fx.transform` as well.
    """
    known = dict(model.named_modules())
    parts = [name for name in PARTS if name in known]
    dropit_fx.transform(model, config, modules=parts, example_args=batch, **settings)


def make(variant: str, data: Images, options: argparse.Namespace) -> nn.Module:
    """A model, dense or packed with the preset that `variant` names."""
    model = build(options, data.classes).train()
    if variant != DENSE:
        pack(
            model,
            load(data, range(options.batch_size), options),
            options.config,
            preset=variant,
            strategy=options.strategy,
            gamma=options.gamma,
        )
    return model


# Training -----------------------------------------------------------------------------------------


def collate(batch: Sequence[tuple[Tensor, Target]]) -> Batch:
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def place(batch: Batch, options: argparse.Namespace) -> Batch:
    """A batch on the device; masks only for the model that reads them."""
    images, targets = batch
    names = ("boxes", "labels", "masks")[: 3 if "mask" in options.model else 2]
    moved = [{name: target[name].to(options.device) for name in names} for target in targets]
    return [image.to(options.device) for image in images], moved


def load(data: Images, indices: Sequence[int], options: argparse.Namespace) -> Batch:
    return place(collate([data[i % len(data)] for i in indices]), options)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return sum(model(*batch).values())


def train(
    model: nn.Module, data: Images, options: argparse.Namespace, tick: Callable[[], None]
) -> list[float]:
    """Trains with torchvision's recipe; gives the loss of each step."""
    torch.manual_seed(options.seed)  # the same choice of boxes for each variant
    chance = torch.Generator().manual_seed(options.seed)
    size, factor = options.batch_size, options.aspect_ratio_group_factor
    warm_up = max(1, min(1000, steps(data, size, factor) - 1))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    slow = LinearLR(optimizer, start_factor=1e-3, total_iters=warm_up)
    milestones = MultiStepLR(optimizer, options.lr_steps, gamma=options.lr_gamma)
    model.train()
    losses = []
    for epoch in range(options.epochs):
        order = list(batches(data, size, factor, chance))
        loader = DataLoader(
            data, batch_sampler=order, collate_fn=collate, num_workers=options.workers
        )
        for images, targets in loader:
            mirrored = torch.rand(len(images), generator=chance) < 0.5
            pairs = zip(images, targets, mirrored.tolist(), strict=True)
            batch = collate([flip(x, y) if mirror else (x, y) for x, y, mirror in pairs])
            loss = loss_of(model, place(batch, options))
            if not loss.isfinite():
                raise SystemExit(f"the loss is {loss.item()} at step {len(losses)}: lower --lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if epoch == 0:
                slow.step()
            losses.append(loss.item())
            tick()
        milestones.step()
    return losses


def find(
    model: nn.Module, data: Images, options: argparse.Namespace, tick: Callable[[], None]
) -> list[tuple[int, Target]]:
    """What the model sees in each image."""
    loader = DataLoader(data, batch_size=1, collate_fn=collate, num_workers=options.workers)
    model.eval()
    found = []
    with torch.no_grad():
        for image, (images, _) in zip(data.ids, loader, strict=True):
            (seen,) = model([images[0].to(options.device)])
            if "masks" in seen:
                seen["masks"] = seen["masks"][:, 0] > 0.5
            found.append((image, {name: value.cpu() for name, value in seen.items()}))
            tick()
    model.train()
    return found


def precision(data: Images, found: list[tuple[int, Target]], masks: bool) -> dict[str, float]:
    truth = data.truth()
    whole, half = average_precision(truth, found, "bbox")
    scores = {"box_ap": whole, "box_ap50": half}
    return scores | {"mask_ap": average_precision(truth, found, "segm")[0]} if masks else scores


# Measuring ----------------------------------------------------------------------------------------


def costs(
    models: Mapping[str, nn.Module], batch: Batch, rounds: int, seed: int
) -> dict[str, dict[str, float]]:
    """Saved bytes, peak bytes and seconds of a step, each with the weights of the first model.

    The same weights choose the same boxes. The models take turns, so that noise meets all.
    """
    weights = next(iter(models.values())).state_dict()
    for model in models.values():
        model.load_state_dict(weights)

    def step(model: nn.Module) -> Tensor:
        torch.manual_seed(seed)
        return loss_of(model, batch)

    seconds: dict[str, list[float]] = {variant: [] for variant in models}
    for _ in range(rounds + 1):  # one to warm up
        for variant, model in models.items():
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            step(model).backward()  # with reading the loss, which waits for the device
            seconds[variant].append(time.perf_counter() - start)
    return {
        variant: {
            "saved_bytes": measure.saved_bytes(step, model),
            "peak_memory": measure.peak_memory(step, model),
            "time": statistics.median(seconds[variant][1:]),
        }
        for variant, model in models.items()
    }


# Results ------------------------------------------------------------------------------------------


def table(variants: Mapping[str, Mapping[str, Any]]) -> Table:
    made = Table(header_style="bold", box=None, pad_edge=False)
    made.add_column("", no_wrap=True)
    first = next(iter(variants.values()))
    heads = {"box_ap": "box AP", "box_ap50": "AP50", "mask_ap": "mask AP"}
    precisions = {key: head for key, head in heads.items() if key in first}
    for column in ("loss", "at end", *precisions.values(), "saved, MiB", "peak, MiB", "time"):
        made.add_column(column, justify="right", no_wrap=True)
    for variant, got in variants.items():
        share = {key: got[key] / first[key] for key in COSTS}
        shown = {key: "" if got is first else f" ({share[key]:.0%})" for key in COSTS}
        edge = max(1, len(got["loss"]) // 10)
        made.add_row(
            variant,
            f"{statistics.mean(got['loss'][:edge]):.3f}",
            f"{statistics.mean(got['loss'][-edge:]):.3f}",
            *(f"{100 * got[key]:.1f}" for key in precisions),
            *(f"{got[key] / MIB:.1f}{shown[key]}" for key in COSTS[:2]),
            f"{share['time']:.2f}",
        )
    return made


def picture(data: Images, found: Mapping[str, list[tuple[int, Target]]]) -> Tensor:
    """A row of images for each variant, with what it is at least half sure of."""
    count = min(SHOWN, len(data))
    height, width = (max(size[d] for size in data.sizes[:count]) for d in (0, 1))
    tiles = []
    for seen in found.values():
        for index in range(count):
            target = seen[index][1]
            sure = target["scores"] > 0.5
            image = (255 * data[index][0]).byte()
            if "masks" in target and sure.any():
                image = draw_segmentation_masks(image, target["masks"][sure], alpha=0.4)
            labels = [str(label) for label in target["labels"][sure].tolist()]
            if labels:
                image = draw_bounding_boxes(image, target["boxes"][sure], labels, colors="white")
            tiles.append(F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])))
    return make_grid(tiles, nrow=count)


# The script ---------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def by_data(name: str, **how: Any) -> None:
        """An option whose default depends on the data set."""
        texts = (f"{data} {default[name]}" for data, default in DATA.items())
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, help=f"(default: {', '.join(texts)})", **how)

    parser.add_argument("--dataset", choices=DATA, default="shapes")
    parser.add_argument("--data-path", type=Path, metavar="DIR", help="of COCO 2017")
    parser.add_argument("--model", choices=MODELS, default="fasterrcnn_resnet50_fpn")
    by_data("backbone", metavar="NAME")
    parser.add_argument("--weights-backbone", metavar="NAME", help="of torchvision (default: none)")
    parser.add_argument(
        "--presets", nargs="+", choices=presets(), default=["dropit"], help="(default: dropit)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="rules before the preset's")
    parser.add_argument("--strategy", help="of what the preset drops")
    parser.add_argument("--gamma", type=float, help="the dropping rate")
    parser.add_argument("--packed-only", action="store_true", help="train the packed ones only")
    by_data("batch_size", type=positive)
    by_data("epochs", type=positive)
    rates = ", ".join(f"{rate} for {name}" for name, rate in LEARNING_RATES.items())
    parser.add_argument(
        "--lr", type=float, help=f"(default: coco 0.02 for 16 images, shapes {rates})"
    )
    by_data("lr_steps", type=positive, nargs="+", metavar="EPOCH")
    parser.add_argument("--lr-gamma", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", "--wd", type=float, default=1e-4)
    parser.add_argument("--aspect-ratio-group-factor", type=int, default=3, metavar="N")
    by_data("min_size", type=positive)
    by_data("max_size", type=positive)
    by_data("levels", type=positive)
    by_data("proposals", type=positive)
    by_data("workers", type=int)
    parser.add_argument(
        "--images",
        type=positive,
        nargs=2,
        default=[120, 40],
        metavar="N",
        help="shapes to train on and to test (default: 120 40)",
    )
    parser.add_argument("--rounds", type=positive, default=5, help="timed steps (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("build/detection"), metavar="DIR")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments()
    dataset = parser.parse_known_args(argv)[0].dataset
    parser.set_defaults(**DATA[dataset])
    options = parser.parse_args(argv)
    if options.lr is None:
        of_batch = 0.02 * options.batch_size / 16
        options.lr = of_batch if dataset == "coco" else LEARNING_RATES[options.model]
    if dataset == "coco" and options.data_path is None:
        parser.error("--dataset coco needs --data-path")
    return options


def read(options: argparse.Namespace) -> tuple[Images, Images]:
    """The images to train on, and those to test."""
    if options.dataset == "coco":
        return Coco(options.data_path, "train"), Coco(options.data_path, "val")
    train, test = options.images
    return Shapes(train, seed=1), Shapes(test, seed=2)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    data, test = read(options)
    console = Console()
    start = time.perf_counter()
    variants = [*([] if options.packed_only else [DENSE]), *options.presets]
    total = options.epochs * steps(data, options.batch_size, options.aspect_ratio_group_factor)
    models, found, results = {}, {}, {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for variant in variants:
            models[variant] = make(variant, data, options)
            line = progress.add_task(f"{variant}, train", total=total)
            losses = train(models[variant], data, options, partial(progress.advance, line))
            line = progress.add_task(f"{variant}, test", total=len(test))
            found[variant] = find(models[variant], test, options, partial(progress.advance, line))
            results[variant] = {"loss": curve(losses)} | precision(
                test, found[variant], "mask" in options.model
            )
    batch = load(data, range(options.batch_size), options)
    for variant, cost in costs(models, batch, options.rounds, options.seed).items():
        results[variant] |= cost
    console.print()
    console.print(table(results))

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.model}.json"
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
    }
    settings |= {"threads": torch.get_num_threads(), "seconds": round(time.perf_counter() - start)}
    path.write_text(compact({"settings": settings, "variants": results}) + "\n")
    seen = picture(test, found).permute(1, 2, 0).numpy()
    Image.fromarray(seen).save(path.with_suffix(".png"))
    console.print(
        f"\nBatch {options.batch_size}, {total} steps. Loss: of their first and last tenth. AP:"
        f" COCO's, of {len(test)} images. Saved, peak and time: of a step with the weights of the"
        f" first line. Written: {path}, {path.with_suffix('.png')}",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
