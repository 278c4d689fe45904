"""What the tests know of a row of the op table: its record, in ``tests/ops/<family>.py``."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from op_calls import Case
from torch import Tensor, nn

Pairs = set[tuple[str, str]]  # (operand that is read, argument whose gradient reads it)


@dataclass(frozen=True, kw_only=True)
class Joint:
    """One formula for several gradients, which therefore mentions what only some of them read.

    Attributes:
        mentions: What stands in it.
        gradients: The arguments whose gradients it gives. That of ``bias`` reads nothing.
        linear: Operands that the op is linear in: their own gradients do not read them.
    """

    mentions: tuple[str, ...]
    gradients: tuple[str, ...]
    linear: tuple[str, ...] = ("weight",)

    def in_vain(self, operand: str, reader: str) -> bool:
        """Whether ``operand`` is mentioned, but not for the gradient of ``reader``."""
        return reader == "bias" or (operand == reader and operand in self.linear)


@dataclass(frozen=True)
class Entry:
    """An entry of ``derivatives.yaml`` behind a row.

    Composite ops have none of their own: linear is an mm or addmm, whose mat2 is the weight.

    Attributes:
        name: Of the entry.
        names: The row's names for its arguments and results.
        joint: Where one formula gives several gradients.
        amend: From what the formulas mention to what the row reads, with its reason.
    """

    name: str
    names: Mapping[str, str] = field(default_factory=dict)
    joint: Joint | None = None
    amend: Callable[[Pairs], Pairs] = lambda found: found


@dataclass(frozen=True)
class OpInfo:
    """PyTorch's own samples of arguments for an op.

    Attributes:
        name: In ``op_db``.
        variant: Of several OpInfos of that name.
        reseeds: It seeds where the op draws random numbers, in a way that Dynamo cannot follow: the
            plain function is called instead.
    """

    name: str
    variant: str = ""
    reseeds: bool = False


class Given(enum.Enum):
    """Arguments that are made where an op stands behind another one (``test_pairs``)."""

    X = "what the first op has made"
    MASK = "where that is positive"
    NUMBER = "a tensor with a number"
    INDEX = "numbers of columns"
    INDICES = "numbers of columns, for each row"
    TURNED = "its last two dimensions exchanged"
    WIDTH = "its last size, in a list"


@dataclass(frozen=True)
class Behind:
    """How a row is called behind another one, of which it gets one tensor.

    Attributes:
        args: Its arguments, or from a spelling to them.
        dims: The dimensions that it takes.
        spellings: Those that are tried, where it is not all of them.
        by_strides: PyTorch chooses its kernel by the strides.
    """

    args: tuple[Any, ...] | Callable[[Any], tuple[Any, ...]] = (Given.X,)
    dims: int = 4
    spellings: tuple[Any, ...] = ()
    by_strides: bool = False


class Calls(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@dataclass(frozen=True, kw_only=True)
class RowTests:
    """What the tests know of one row.

    ``op_cases.complaints`` says which of them a row lacks.

    Attributes:
        row: Its name in the op table.
        cases: Calls of it, a plain one first. Each parameter of the row's ``run`` is set by one, or
            named in its obstacle, or ``unset``.
        unset: Parameters that say nothing unless another one is set, which the row does not cover.
        spell: From a spelling and the first case to the call that this spelling takes.
        rounds_in_place: Why the last bits of its gradients differ where it writes into its input.
        rounds_on_cuda: Why they differ on CUDA.
        half_on_cpu: Whether PyTorch has a kernel for half precision on CPUs.
        lowered_on: Where autocast hands it the lower precision, and not everywhere: so its row does
            not say "lower".
        one_for_all: One formula serves several rows: another one shows each gradient alone.
        obstacles: (spelling, call) of what the row does not cover, beside those among ``cases``.

        big: A call whose operands take more than one block, and a part of one. For GEMMs and
            convolutions.
        quantised: Such calls for codec ``quant``.
        by_the_book: The gradients of the row from its arguments, the gradient of its result and a
            function that packs and unpacks, where it keeps more than its arguments.
        rounds_quantised: Why the last bits may differ from those of dense on unpacked tensors.
        large: The operands of a call of ``quantised`` that are not small beside the rest.
        tables: (function of ``step_tables``, call) for codec ``few_bit``.
        no_table: Settings for which there is no table.

        modules: Makes (layer, shape of its input) as users write them.
        op_info: PyTorch's samples, or why there are none.
        behind: How it is called behind any other op, or why it cannot be.

        entries: What stands behind it in ``derivatives.yaml``.
        instead: Operand of PyTorch's formula -> the one that the row reads, which says as much.
        steps: For ops of several steps, each with an entry: where the gradient of one goes on to.
        keeps: From what autograd is seen to keep, and the arguments that require grad, to what the
            row says.
        on_cuda: Operands that kernels of CUDA alone make.
        added: The argument that is added to a product: its gradient reads nothing.
        codes: How many values the lossless codes of a read tell apart, in windows of 3; 0 where it
            is the number of rows that are indexed.
    """

    row: str
    cases: Sequence[Case] = ()
    unset: tuple[str, ...] = ()
    spell: Callable[[Any, Case], Case] = lambda target, first: first
    rounds_in_place: str = ""
    rounds_on_cuda: str = ""
    half_on_cpu: bool = True
    lowered_on: tuple[str, ...] = ()
    one_for_all: bool = False
    obstacles: tuple[tuple[Any, Case], ...] = ()

    big: Case | None = None
    quantised: tuple[Case, ...] = ()
    by_the_book: Callable[[Mapping[str, Any], Tensor, Callable[[Tensor], Tensor]], Any] | None = (
        None
    )
    rounds_quantised: str = ""
    large: Callable[[Case], set[str]] | None = None
    tables: tuple[tuple[str, Case], ...] = ()
    no_table: Mapping[str, Any] = field(default_factory=dict)

    modules: Callable[[], list[tuple[nn.Module, tuple[int, ...]]]] = list
    op_info: OpInfo | str | None = None
    behind: Behind | str | None = None

    entries: tuple[Entry, ...] = ()
    instead: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, str] = field(default_factory=dict)
    keeps: Callable[[set[str], set[str]], set[str]] = lambda found, needs: found
    on_cuda: tuple[str, ...] = ()
    added: str = ""
    codes: int = 2
