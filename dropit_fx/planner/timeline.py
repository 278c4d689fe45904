"""The memory of one training step from op to op, told without running it: a timeline.

The step runs on fake tensors, forward, loss, backward and optimizer, and every storage is noted
when an op makes it and when the last that held it is gone. That is what a step on real tensors
does, since the same code holds the same tensors; what fake tensors do not tell is what an op takes
for itself while it runs, which ``workspaces.py`` measures in one step. Single numbers are counted
too: of ``x * 0.5``, PyTorch makes a tensor of the number, and autograd may keep it.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import flop_registry

from dropit_fx.capture.example_inputs import placeholder_values
from dropit_fx.capture.fake import RealStorages, fake_mode_of, fake_state, fakes_of
from dropit_fx.holders import grad_fn_of, tensors_in
from dropit_fx.measure import without_gradients
from dropit_fx.ops.backwards import as_plain
from dropit_fx.planner.errors import PlanError
from dropit_fx.planner.speeds import Speeds
from dropit_fx.planner.step import Step
from dropit_fx.planner.workspaces import Workspaces, spec_of_call, wrapped_bytes
from dropit_fx.private import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    pytree,
    raw_saved,
    schema,
    shows_saved,
    storage_id,
)
from dropit_fx.runtime.copies import Packed

FORWARD, BACKWARD, OPTIMIZER = PHASES = "forward", "backward", "optimizer"
RESIDENT = "parameters", "buffers", "inputs", "optimizer state"  # there from step to step
GRADIENTS, SAVED, TEMPORARY = "gradients", "saved tensors", "temporaries"


@dataclass(frozen=True)
class Lifetime:
    """One storage that the step makes: it is there in the ops from ``born`` to before ``freed``.

    Attributes:
        born: The number of the op that made it.
        freed: Of the first op that finds it gone; the number of all ops where it stays.
        nbytes: Its size.
        node: The node of the graph that made it, ``""`` outside of the forward.
        kind: ``"gradients"``, ``"saved tensors"`` (there when the backward begins) or
            ``"temporaries"``.
        reads: The numbers of the ops of the backward that read it.
    """

    born: int
    freed: int
    nbytes: int
    node: str
    kind: str
    reads: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The memory of one step.

    Attributes:
        resident: Bytes that are there from step to step, by what they are.
        ops: The name of each op, in order.
        phases: The number of the first op of each phase, in the order of ``PHASES``.
        lives: What the ops made.
        used: Bytes in use in each op, the resident ones and its own workspace among them.
        packs: The node that made each packed copy -> indices into ``lives``.
        values: The node that made a value -> index into ``lives``.
        host: Bytes that wait on the host between forward and backward.
        work: Of each op: bytes of the tensors that it reads and writes (0 of a view), its FLOPs,
            and the dtype of these.
    """

    resident: Mapping[str, int]
    ops: tuple[str, ...]
    phases: tuple[int, int, int]
    lives: tuple[Lifetime, ...]
    used: tuple[int, ...]
    packs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    values: Mapping[str, int] = field(default_factory=dict)
    host: int = 0
    work: tuple[tuple[int, int, torch.dtype], ...] = ()

    @property
    def peak(self) -> int:
        """The most bytes in use at one time."""
        return max(self.used, default=sum(self.resident.values()))

    @property
    def peak_op(self) -> int:
        """The number of the op in which that is."""
        return max(range(len(self.used)), key=self.used.__getitem__, default=0)

    def phase(self, op: int) -> str:
        """In which phase an op runs."""
        return PHASES[sum(op >= first for first in self.phases) - 1]

    def seconds(self, speeds: Speeds) -> float:
        """Of the step, op after op: of each the products, or the memory, whichever is longer."""
        return sum(max(speeds.moves(n), speeds.computes(f, of)) for n, f, of in self.work)

    def alive(self, op: int) -> dict[str, int]:
        """What is in use in an op, largest first: bytes by kind."""
        found = {k: n for k, n in self.resident.items() if n}
        for life in self.lives:
            if life.born <= op < life.freed:
                found[life.kind] = found.get(life.kind, 0) + life.nbytes
        own = self.used[op] - sum(found.values())
        if own > 0:
            found[TEMPORARY] = found.get(TEMPORARY, 0) + own
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def forecast(step: Step, module: nn.Module, workspaces: Workspaces | None = None) -> Timeline:
    """The timeline of a step of ``module`` in the place of the step's model.

    Args:
        step: Inputs, loss and optimizer.
        module: The model itself, its graph, or a rewritten graph.
        workspaces: What ops take for themselves; None: nothing.

    Raises:
        PlanError: Nothing that the step computes has a gradient, or the optimizer reads values.
    """
    leaves, spec = pytree.tree_flatten((step.args, step.kwargs))
    if isinstance(module, fx.GraphModule):
        leaves = list(placeholder_values(module, step.args, step.kwargs))
    fakes = fakes_of(leaves)
    mode = fake_mode_of(fakes)
    with (
        torch.random.fork_rng(devices=()),
        mode,
        as_plain(FakeTensor),
        torch.enable_grad(),
        fake_state(module, mode),
        without_gradients([*module.parameters(), *tensors_in(fakes)]),
    ):
        ledger = _Ledger(workspaces or {})
        ledger.hold("parameters", module.parameters())
        ledger.hold("buffers", module.buffers())
        ledger.hold("inputs", fakes)
        optimizer = _fake_optimizer(step.optimizer, mode, ledger)
        with RealStorages(), ledger:
            if isinstance(module, fx.GraphModule):
                out = _Noting(module, ledger).run(*fakes)
            else:
                args, kwargs = pytree.tree_unflatten(list(fakes), spec)
                out = module(*args, **kwargs)
            loss = step.loss_of(out)
            del out
            ledger.begin(BACKWARD)
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            ledger.begin(OPTIMIZER)
            ledger.mark(GRADIENTS, [t.grad for t in (*module.parameters(), *tensors_in(fakes))])
            if optimizer is not None:
                optimizer.step()
        return ledger.timeline()


def _fake_optimizer(
    optimizer: Optimizer | None, mode: FakeTensorMode, ledger: _Ledger
) -> Optimizer | None:
    """The optimizer over the fake parameters, with the state that its first step makes."""
    if optimizer is None:
        return None
    groups = [
        group | {"params": [mode.from_tensor(p) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    fake = copy.copy(optimizer)
    fake.param_groups, fake.state = groups, defaultdict(dict)
    trained = [p for group in groups for p in group["params"] if p.requires_grad]
    for p in trained:
        p.grad = torch.empty_like(p, requires_grad=False)
    try:
        fake.step()
    except Exception as error:  # of whatever class the optimizer is
        raise PlanError(
            f"the memory of {type(optimizer).__name__} cannot be told without running it:"
            f" {str(error).splitlines()[0]}. Plan without optimizer=, and ask for a peak less what"
            " its state takes."
        ) from error
    for p in trained:
        p.grad = None
    ledger.hold("optimizer state", tensors_in([*fake.state.values()]))
    return fake


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every storage that ops make, and when it is gone."""

    supports_higher_order_operators = True

    def __init__(self, workspaces: Workspaces) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.node = ""  # of the graph, while it runs
        self.packs: dict[str, tuple[int, ...]] = {}
        self.values: dict[str, int] = {}
        self._workspaces = workspaces
        self._resident = dict.fromkeys(RESIDENT, 0)
        self._held: list[Tensor] = []
        self._alive: dict[int, int] = {}  # storage -> life; -1: resident
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._lives: list[list[Any]] = []  # born, freed, nbytes, node, kind
        self._reads: dict[int, list[int]] = defaultdict(list)  # in the backward, of each life
        self._ops: list[str] = []
        self._work: list[tuple[int, int, torch.dtype]] = []
        self._used: list[int] = []
        self._level = 0
        self._phases: list[int] = []
        self._made: list[weakref.ref[Tensor]] = []  # by the last op, where it was given numbers
        self._asks = shows_saved()  # looked up here: where ops arrive, autograd is off

    def hold(self, kind: str, tensors: Any) -> None:
        """Counts tensors as resident, each storage once."""
        for tensor in (t for t in tensors_in(list(tensors)) if storage_id(t) not in self._alive):
            self._held.append(tensor)
            self._alive[storage_id(tensor)] = -1
            self._resident[kind] += tensor.untyped_storage().nbytes()

    def begin(self, phase: str) -> None:
        """The next op is the first of a phase; what is there when the backward begins is saved."""
        self._note_numbers()
        self._phases.append(len(self._ops))
        if phase == BACKWARD:
            for life in self._alive.values():
                if life >= 0:
                    self._lives[life][4] = SAVED

    def mark(self, kind: str, tensors: Any) -> None:
        """Says what these tensors are."""
        for tensor in tensors_in(list(tensors)):
            life = self._alive.get(storage_id(tensor), -1)
            if life >= 0:
                self._lives[life][4] = kind

    def lives_of(self, tensors: list[Tensor]) -> tuple[int, ...]:
        """The lives of the storages of some tensors that the step has made."""
        found = dict.fromkeys(self._alive.get(storage_id(t), -1) for t in tensors)
        return tuple(life for life in found if life >= 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # a question that fake tensors alone are asked
            return func(*args, **(kwargs or {}))
        self._note_numbers()
        at, before = len(self._ops), self._level
        self._ops.append(str(func))
        if len(self._phases) == 1:  # the backward
            for life in self.lives_of(tensors_in((args, kwargs))):
                self._reads[life].append(at)
        workspace = self._workspaces.get(spec_of_call(func, args, kwargs), 0)
        numbers = wrapped_bytes(func, args)
        out = func(*args, **(kwargs or {}))
        made, lives = tensors_in(out), len(self._lives)
        for tensor in made:
            self._note(tensor, at)
        self._work.append(_work(func, args, kwargs or {}, out, len(self._lives) > lives))
        self._used.append(max(before + workspace, self._level) + numbers)
        self._made = [weakref.ref(t) for t in made] if numbers and self._asks else []
        return out

    def _note_numbers(self) -> None:
        """What autograd keeps of the numbers that the last op was given: its node is there now."""
        for tensor in [ref() for ref in self._made]:
            node = None if tensor is None else grad_fn_of(tensor)
            for _, kept in raw_saved(node) if node is not None else ():
                if isinstance(kept, Tensor) and not kept.dim() and type(kept) is Tensor:
                    self._note(kept, len(self._ops) - 1)
        self._made = []

    def _note(self, tensor: Tensor, at: int) -> None:
        key = storage_id(tensor)
        if key in self._alive:
            return
        storage = tensor.untyped_storage()
        nbytes, number = storage.nbytes(), len(self._lives)
        self._lives.append([at, None, nbytes, self.node, TEMPORARY])
        self._alive[key] = number
        self._level += nbytes

        def gone(_: object) -> None:
            self._lives[number][1] = len(self._ops)
            self._level -= nbytes
            del self._alive[key], self._refs[key]

        self._refs[key] = weakref.ref(storage, gone)

    def timeline(self) -> Timeline:
        """What was noted."""
        resident, count = sum(self._resident.values()), len(self._ops)
        backward, optimizer = self._phases
        return Timeline(
            resident=self._resident,
            ops=tuple(self._ops),
            phases=(0, backward, optimizer),
            lives=tuple(
                Lifetime(
                    born=born,
                    freed=count if freed is None else freed,
                    nbytes=nbytes,
                    node=node,
                    kind=kind,
                    reads=tuple(self._reads[number]),
                )
                for number, (born, freed, nbytes, node, kind) in enumerate(self._lives)
            ),
            used=tuple(resident + used for used in self._used),
            packs=self.packs,
            values=self.values,
            work=tuple(self._work),
        )


def _work(func: Any, args: Any, kwargs: Any, out: Any, new: bool) -> tuple[int, int, torch.dtype]:
    """Bytes, FLOPs and their dtype of one op; ``new``: whether it made a storage."""
    tensors = [*tensors_in((args, kwargs)), *tensors_in(out)]
    dtype = tensors[0].dtype if tensors else torch.float32
    if not new and not (isinstance(func, OpOverload) and schema(func).is_mutable):
        return 0, 0, dtype  # a view
    count = flop_registry.get(getattr(func, "overloadpacket", None))
    flops = 0 if count is None else int(count(*args, **kwargs, out_val=out))
    return sum(t.numel() * t.element_size() for t in tensors), flops, dtype


class _Noting(fx.Interpreter):
    """Runs a graph as its code does, and tells a ledger which node is running and what it made."""

    def __init__(self, module: fx.GraphModule, ledger: _Ledger) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.ledger = ledger

    def run_node(self, n: fx.Node) -> Any:
        self.ledger.node = n.name
        result = super().run_node(n)
        self.ledger.node = ""
        self._note(n.name, result)
        return result

    def _note(self, name: str, result: Any) -> None:
        if isinstance(result, Packed):
            self.ledger.packs[name] = self.ledger.lives_of(list(result.parts))
        elif isinstance(result, Tensor):
            for life in self.ledger.lives_of([result]):
                self.ledger.values.setdefault(name, life)
