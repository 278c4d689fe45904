"""Trains a small ViT and a small ResNet on scikit-learn's digits, dense and packed.

    python examples/digits.py --presets balanced max --seeds 3 --out build/digits

Every seed is trained as the model is and rewritten with each preset, from the same weights and with
the same batches. Then all are compiled, and one seed is trained compiled. What comes out: loss and
test accuracy, what is saved for the backward, the peak of memory, and the time of a step.
"""

import sys
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from training import Data, Example, Task, run


def vit() -> nn.Module:
    return VisionTransformer(
        img_size=16,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        embed_dim=96,
        depth=4,
        num_heads=3,
    )


def resnet() -> nn.Module:
    return ResNet(BasicBlock, (1, 1, 1, 1), channels=(16, 32, 64, 128), in_chans=1, num_classes=10)


@cache
def load(side: int) -> Data:
    """The images, 8 x 8, enlarged to `side` x `side`; a fixed quarter of them to test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(16).sub(0.5)[:, None]
    images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=0.25, stratify=digits.target, random_state=0
    )
    return Data(images[train], labels[train], images[test], labels[test])


DIGITS = Example(
    name="digits",
    tasks={
        "vit": Task(build=vit, data=lambda: load(16), batch=64, lr=1e-3, epochs=13),
        "resnet": Task(build=resnet, data=lambda: load(32), batch=64, lr=4e-3, epochs=7),
    },
    packages=("timm", "scikit-learn"),
)


def main(argv: Sequence[str] | None = None) -> int:
    return run(DIGITS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
