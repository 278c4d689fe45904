"""What a saved tensor was made of: told from the autograd nodes behind it.

A factor that is made of parameters alone (autocast's copy of a weight, a normalised weight, a
product of two thin ones) is a weight: the gradient of the input goes through it, and rounded it
would be wrong for every sample alike.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from dropit_fx.holders import grad_fn_of
from dropit_fx.private import sequence_number

ACTIVATION, WEIGHT, LEAF = "activation", "weight", "leaf"
_KEY = "dropit_origin"  # in the metadata of autograd nodes

# Whose index, which autograd does not see, is data
_LOOKUPS = ("Embedding", "EmbeddingBag", "Index", "IndexSelect", "Gather", "Take", "GridSampler")
# What makes of one tensor another with the same values, as far as the dtype lets it
_COPIES = (
    *("ToCopy", "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand"),
    *("Slice", "Select", "Split", "SplitWithSizes", "Chunk", "Unbind", "Squeeze", "Unsqueeze"),
    *("Alias", "AsStrided", "Clone"),
)
# Whose second operand, where nothing asks for its gradient, is a number or a mask as a rule
_POINTWISE = (
    *("Mul", "Div", "Add", "Sub", "Rsub", "Pow", "Where", "MaskedFill", "Maximum", "Minimum"),
    *("Lerp", "Clamp", "Addcmul", "Addcdiv"),
)


def origin_of(x: Tensor, names: dict[int, str] | None = None) -> str:
    """``ACTIVATION``, ``WEIGHT``, or ``LEAF``: a leaf that is no parameter, or a copy of one.

    Args:
        x: A tensor that requires a gradient.
        names: Is given the name of each autograd node that is seen, by its number.
    """
    node = grad_fn_of(x)
    if node is None:
        return WEIGHT if isinstance(x, nn.Parameter) else LEAF
    stack: list[Node] = [node]
    while stack:
        node = stack[-1]
        behind = [following for following, _ in node.next_functions]
        unknown = [] if _known(node) else [n for n in behind if n is not None and not _known(n)]
        if unknown:
            stack += unknown
            continue
        stack.pop()
        if not _known(node):
            metadata: Any = node.metadata
            kinds = [None if n is None else _known(n) for n in behind]
            metadata[_KEY] = _made_by(node.name(), kinds)
            if names is not None:
                names[sequence_number(node)] = node.name()
    return _known(node)


def _known(node: Node) -> str:
    """What was found out about a node, or ``""``."""
    leaf = getattr(node, "variable", None)
    if leaf is not None:
        return WEIGHT if isinstance(leaf, nn.Parameter) else LEAF
    metadata: Any = node.metadata
    return str(metadata.get(_KEY, ""))


def _made_by(name: str, behind: list[str | None]) -> str:
    """The origin of what a node made, from that of its operands; None: no gradient goes there."""
    op = name.rstrip("0123456789").removesuffix("Backward")
    kinds = set(filter(None, behind))
    if kinds == {LEAF} and len(behind) == 1 and op in _COPIES:
        return LEAF
    if kinds != {WEIGHT} or op in _LOOKUPS:
        return ACTIVATION
    return ACTIVATION if None in behind and op not in _POINTWISE else WEIGHT
