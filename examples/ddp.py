"""Trains a small ViT on scikit-learn's digits with DistributedDataParallel, dense and packed.

    torchrun --nproc-per-node 2 examples/ddp.py

The rewritten model is wrapped as any model is; each rank packs what it saves of its own share of
the batch. With --compile, PyTorch splits the model's graph by DDP's buckets, and the backend
"dropit" rewrites each part. On CPU the ranks talk by gloo, on CUDA by NCCL, which has never been
run.
"""

import sys
from collections.abc import Sequence

import torch
from ranks import run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import DENSE

from dropit_fx import transform


def wrap(model: nn.Module, variant: str, compiled: bool, x: Tensor) -> nn.Module:
    if compiled:
        plug_in = {} if variant == DENSE else {"backend": "dropit", "options": {"preset": variant}}
        return torch.compile(DistributedDataParallel(model), **plug_in)
    if variant != DENSE:
        model = transform(model, preset=variant, example_args=(x,))
    return DistributedDataParallel(model)


def main(argv: Sequence[str] | None = None) -> int:
    return run("ddp", __doc__, wrap, argv)


if __name__ == "__main__":
    sys.exit(main())
