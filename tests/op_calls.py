"""Calls of every op of the table, as graphs whose operands are intermediate tensors.

Autograd's saved tensors count only where they are not the model's inputs, so each tensor argument
comes from a placeholder through a copy, which keeps its strides, and then through a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from dropit_fx.api import rewrite
from dropit_fx.codecs.codec import Codec, Options
from dropit_fx.config import load_config
from dropit_fx.ops.table import RULES, bind
from dropit_fx.passes.find_saved import NUMBER
from dropit_fx.passes.plan import Plan
from dropit_fx.private import minor
from dropit_fx.runtime.packed_call import PACKED_OPS

LOSSLESS: dict[str, Any] = {
    "preset": None,
    "force": True,
    "rules": [
        {"codec": "mink", "gamma": 0.0},
        {"codec": "bitmask"},
        {"codec": "quant", "bits": None},
    ],
}


@dataclass(frozen=True)
class T:
    """A tensor argument: its shape in memory, and the view of it that the op gets.

    ``make`` is for what has no gradient: class indices, masks, statistics. It gets the shape and a
    random generator; of what it returns, only floats take the dtype of the call. ``dtype`` is in
    the place of that where kernels take no other.
    """

    shape: tuple[int, ...]
    view: Callable[[Any], Any] = lambda x: x
    format: torch.memory_format = torch.contiguous_format
    make: Callable[[tuple[int, ...], torch.Generator], Tensor] | None = None
    dtype: torch.dtype | None = None

    def tensor(self, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """A fresh leaf."""
        dtype = self.dtype or dtype
        if self.make is not None:
            made = self.make(self.shape, generator)
            return made.to(dtype) if made.is_floating_point() else made
        x = torch.randn(self.shape, generator=generator).to(dtype)
        return x.contiguous(memory_format=self.format).requires_grad_()


@dataclass(frozen=True)
class Case:
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    copies: int = 0  # operands of which the op keeps a copy that it made inside
    rounds: str = ""  # why the last bits of its gradients may differ
    obstacle: str = ""  # why the row does not cover it
    not_alone: str = ""  # why its gradients are not asked for one by one

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Fresh leaves for the graph's placeholders, the same at every call."""
        generator = torch.Generator().manual_seed(7)
        return [spec.tensor(dtype, generator) for spec in self.specs()]

    def specs(self) -> list[T]:
        """Its tensor arguments, in the order of the graph's placeholders."""
        return [s for s in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(s, T)]


def case(name: str, *args: Any, **kwargs: Any) -> Case:
    return Case(name, args, kwargs)


def graph_of(target: Any, case: Case) -> fx.GraphModule:
    """A graph of one call of ``target``: a function, an overload, or the name of a method."""
    graph = fx.Graph()
    count = iter(range(99))

    def operand(spec: T) -> fx.Node:
        leaf = fx.Proxy(graph.placeholder(f"t{next(count)}"))
        return spec.view(leaf.clone()).node

    args, kwargs = pytree.tree_map_only(T, operand, (case.args, dict(case.kwargs)))
    call = graph.call_method if isinstance(target, str) else graph.call_function
    graph.output(call(target, args, kwargs))
    return fx.GraphModule({}, graph)


def pack_graph(
    graph: fx.GraphModule, tensors: list[Tensor], config: Mapping[str, Any]
) -> tuple[fx.GraphModule, Plan]:
    """A rewritten copy of ``graph``, and the plan behind it."""
    copy = fx.GraphModule(graph, fx.Graph())
    copy.graph.output(copy.graph.graph_copy(graph.graph, {}))
    plan = rewrite(copy, load_config(config), tuple(tensors), {})
    return copy, plan


def run(
    function: Callable[..., Any], tensors: list[Tensor], seed: int = 3
) -> tuple[Tensor, list[Tensor | None]]:
    """The result and the gradients of every tensor, for a random cotangent."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    torch.manual_seed(seed)
    out = function(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, cotangent(out), allow_unused=True))
    return out.detach(), [next(grads) if t.requires_grad else None for t in leaves]


def cotangent(out: Tensor) -> Tensor:
    """The random gradient of ``out`` that :func:`run` begins with."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(out.shape, generator=generator).to(out)


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit (NaN equals NaN)."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def packed_and_back(codec: Codec, x: Tensor, options: Options) -> Tensor:
    """``x`` as it comes back; its bytes are those that were predicted."""
    parts = codec.pack(x.reshape(-1), options)
    assert len(parts) == codec.buffers
    assert sum(t.nbytes for t in parts) == codec.nbytes(x.numel(), x.dtype, options)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in parts)
    back = codec.unpack(parts, options, x.numel(), x.dtype)
    assert back.dtype == x.dtype
    return back.view(x.shape)


def assert_agrees(call: Case, packed: Any, dense: Any) -> None:
    """Results to the last bit; gradients too, unless the case says why they are rounded anew."""
    assert_same(packed[0], dense[0])
    if call.rounds:
        eps = torch.finfo(dense[0].dtype).eps if dense[0].is_floating_point() else 0.0
        within = {"rtol": 2 * eps, "atol": eps} if eps > 1e-4 else {}  # of half precision, two ulps
        torch.testing.assert_close(packed[1], dense[1], equal_nan=True, **within)
    else:
        assert_same(packed[1], dense[1])


LAST = torch.channels_last
LAST3D = torch.channels_last_3d
GATHERED = "what is unpacked has no gaps, and its elements are taken in vectors"
# Operands of more than one block, and a part of one: rows with their weight, images with theirs.
BLOCKS, WEIGHT = T((7, 11, 40)), T((40,))
IMAGE, CHANNELS = T((5, 8, 9, 6)), T((8,))
IMAGE_LAST = T(IMAGE.shape, format=LAST)

BEFORE_2_14 = minor(torch.__version__) < (2, 14)


def turned(x: Any) -> Any:
    """The last two dimensions in the order of memory of their transposed."""
    return x.transpose(-1, -2)


def positive(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) + 0.5


def coins(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A mask that lets about two of three through, and the first of each row."""
    mask = torch.rand(shape, generator=generator) < 0.67
    mask[..., 0] = True
    return mask


def biases(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def classes(count: int, ignored: int | None = None) -> Any:
    """Indices of classes; with ``ignored``, every third is that number."""

    def make(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        found = torch.randint(count, shape, generator=generator)
        if ignored is not None:
            found.view(-1)[::3] = ignored
        return found

    return make


def pointwise(*settings: dict[str, Any], rounds: str = "") -> list[Case]:
    """Calls of a function of one tensor, without and with settings."""
    out = [
        case("1-D", T((33,))),
        case("4-D", T((2, 3, 5, 7))),
        case("scalar", T(())),
        case("transposed memory", T((6, 9), turned)),
        case("channels_last", T((2, 3, 5, 7), format=LAST)),
        Case("slice", (T((6, 9), lambda v: v[:, ::2]),), rounds=rounds),
        case("empty", T((0, 5))),
    ]
    return out + [case(f"{s}", T((4, 9)), **s) for s in settings]


def writes(target: Any) -> bool:
    """Whether a spelling writes into its first argument, going by its name."""
    name = target if isinstance(target, str) else target.__name__.split(".")[0]
    augmented = name.strip("_") in ("iadd", "isub", "imul", "itruediv", "ipow")
    return augmented or (name.endswith("_") and not name.endswith("__"))


def case_id(value: Any) -> str:
    if isinstance(value, Case):
        return value.name
    return str(getattr(value, "__name__", value))


def assert_packed(packed: fx.GraphModule, name: str) -> None:
    """The graph has one packed call, of this row."""
    calls = [n.target for n in packed.graph.nodes if n.target in PACKED_OPS.values()]
    assert calls == [PACKED_OPS[name]]


def reasons(plan: Plan) -> list[str]:
    """Why reads are kept, but for statistics and Python numbers: those stay as they are."""
    kept = [d for d in plan.decisions if not d.packed and d.reason != NUMBER]
    return sorted(d.reason for d in kept if d.read.read is None or not d.read.read.exact)


def kept_as_they_are(name: str, tensors: list[Tensor]) -> list[str]:
    """The reason for each tensor argument that is no float, where the row has no codes for it."""
    if any(r.bits is not None and r.like == r.operand for r in RULES[name].reads):
        return []
    kinds = [str(t.dtype).removeprefix("torch.") for t in tensors if not t.is_floating_point()]
    return [f"its dtype is {kind}" for kind in kinds]


def arguments(name: str, call: Case) -> list[str]:
    """Names of the tensor arguments, in the order of the placeholders."""
    bound = bind(RULES[name], call.args, call.kwargs) or {}
    return [n for n, a in bound.items() if isinstance(a, T)]
