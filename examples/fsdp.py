"""Trains a small ViT on scikit-learn's digits with FSDP2 (`fully_shard`), dense and packed.

    torchrun --nproc-per-node 2 examples/fsdp.py

The blocks are rewritten in place first, then each is sharded, and the root with what is left: the
gathered weights of a block are freed after its forward, and gathered again for its backward. A
block is the least that can be sharded, since a rewritten block calls no module inside it. With
--compile, the backend "dropit" rewrites the blocks. On CPU the ranks talk by gloo, on CUDA by NCCL,
which has never been run.
"""

import sys
from collections.abc import Sequence

from ranks import run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from training import DENSE

from dropit_fx import transform


def wrap(model: nn.Module, variant: str, compiled: bool, x: Tensor) -> nn.Module:
    if variant != DENSE and not compiled:
        transform(model, modules="blocks.*", preset=variant, example_args=(x,))
    plug_in = {} if variant == DENSE else {"backend": "dropit", "options": {"preset": variant}}
    for block in model.blocks:
        if compiled:
            block.compile(**plug_in)
        fully_shard(block, reshard_after_forward=True)
    return fully_shard(model)


def main(argv: Sequence[str] | None = None) -> int:
    return run("fsdp", __doc__, wrap, argv)


if __name__ == "__main__":
    sys.exit(main())
