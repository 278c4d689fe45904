"""What holds tensors: objects of Python, and the nodes of autograd; and the storages that live."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from dropit_fx.private import (
    OpOverload,
    base_of,
    closed_over,
    pytree,
    raw_saved,
    schema,
    sequence_number,
    sparse_parts,
    storage_id,
)
from dropit_fx.private_hooks import weak_storage


class Box:
    """What autograd holds in a tensor's place; lives as long as the graph that saved the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def tensors(self) -> list[Any]:
        """The tensors that it holds; of other hooks, what holds them."""
        return [self.tensor]


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with storage that a tensor consists of: itself, or a subclass' inner tensors."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, name)
            if isinstance(inner, Tensor):  # a DTensor names its mesh too
                yield from plain_parts(inner)
    elif tensor.layout == torch.strided:
        yield tensor
    elif tensor.layout == torch.sparse_coo:
        yield from sparse_parts(tensor)
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:  # oneDNN's own layouts show no storage; its size is that of the dense tensor
        yield tensor.to_dense()


def alive(*kinds: type) -> list[Any]:
    """Objects of these classes, wherever they are held.

    A million objects may live: a set of classes is asked by ``map``, without a line of Python for
    each. By type(): isinstance() would ask lazy proxies for their __class__, which makes them
    import things.
    """
    classes, todo = set[type](), [*kinds]
    while todo:
        classes.add(kind := todo.pop())
        todo += kind.__subclasses__()
    everything = gc.get_objects()
    return [*itertools.compress(everything, map(classes.__contains__, map(type, everything)))]


def storages_alive() -> dict[int, Any]:
    """All storages that Python can reach, by key, each with a weak reference: none other has it.

    Tensors would not keep them: other data may be put in the place of theirs. That is how inputs
    are told from activations wherever `fn` finds them: arguments of any class, closures, globals,
    attributes of objects.
    """
    storages: dict[int, Any] = {}
    for tensor in alive(Tensor):
        try:
            storages.update((storage_id(part), weak_storage(part)) for part in plain_parts(tensor))
        except (RuntimeError, NotImplementedError, ValueError):
            continue  # without storage (functorch's, parameters of lazy modules) it saves nothing
    return storages


# each tells of memory that is there from step to step, in which each step puts tensors of its own
reused_memory: list[Callable[[], Iterable[Tensor]]] = []


def next_sequence_number() -> int:
    """The number of this thread's next autograd node: older nodes have lower ones."""
    with torch.enable_grad():
        node = torch.ones((), requires_grad=True).clone().grad_fn
    assert node is not None
    return sequence_number(node) + 1


def grad_fn_of(tensor: Tensor) -> Node | None:
    """The autograd node of a tensor; none for a view that autograd refuses to differentiate.

    Such a view was made under ``no_grad``, and what it is a view of was written to later. The
    error comes with the first question for its node: it is the model's to ask.
    """
    try:
        return tensor.grad_fn
    except RuntimeError:
        return None


def stays_with_caller(given: Tensor) -> bool:
    """Whether an input is a leaf, or a view of one, and not what an op has made."""
    base = base_of(given)
    return given.is_leaf or (base is not None and base.is_leaf)


def nodes_behind(result: Any, start: int) -> list[Node]:
    """The autograd nodes that lead to the tensors in `result` and are not older than `start`."""
    tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
    stack = [node for t in tensors if (node := grad_fn_of(t))]
    found: dict[Node, None] = {}
    while stack:
        node = stack.pop()
        # Leaves' nodes have the highest number there is: those of this and of an older graph alike.
        if node not in found and sequence_number(node) >= start:
            found[node] = None
            stack.extend(following for following, _ in node.next_functions if following)
    return list(found)


def kept_by(node: Node) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a node holds: saved, packed by hooks of `fn`'s own, or as an attribute."""
    for name, saved in raw_saved(node):
        full = f"{node.name()}.{name}" if name else node.name()
        yield from ((full, tensor) for tensor in tensors_in(saved))
    for value in attributes_of(node):
        yield from ((node.name(), tensor) for tensor in tensors_in(value))


def attributes_of(node: Node) -> list[Any]:
    """``ctx.x = x`` of a Python function escapes every hook, as does what its backward closes over.

    Compiled functions keep some tensors this way.
    """
    return [*getattr(node, "__dict__", {}).values(), *closed_over(node)]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in any structure, those in boxes among them."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Box):
            found += tensors_in(leaf.tensors)
        elif isinstance(leaf, Tensor):
            found.append(leaf)
    return found


def written_by(op: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among its arguments that a call of an op writes into, by the op's schema."""
    found: list[Tensor] = []
    for i, argument in enumerate(schema(op).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_in(args[i] if i < len(args) else kwargs.get(argument.name))
    return found
