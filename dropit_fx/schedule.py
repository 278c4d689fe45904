"""Which layers a step trains: ``FreezeScheduler`` freezes those that moved least (SlimFit).

A frozen weight saves nothing for the backward: what only its gradient reads is neither packed nor
kept, in the model as it is and in the rewritten one, from the next forward on.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dropit_fx.measure import saved_bytes
from dropit_fx.private import compiled_in_place, uncompiled
from dropit_fx.words import closest, is_number, is_whole, matches, unmatched

HEADS = ("head", "head_dist", "heads", "fc", "classifier", "lm_head", "score")
UNSEEN = 1e7  # scale of the first guesses at an update, so that each layer has its turn


class FreezeScheduler:
    """Freezes, in each step, the share of layers whose weights moved least when last trained.

    SlimFit (arXiv 2305.18513, NAACL'24). A layer is a weight: each parameter that requires a
    gradient and is no bias; biases train always. Its update is the mean of |new - old| / |old| over
    one step; a frozen layer keeps that of its last step, and one that was never trained goes first.
    Frozen parameters have no ``.grad``, so that optimisers leave them and their state alone.

    The published schedule counts layers. This one also weighs them, where it is given example
    inputs: those that train together save no more than 1 - `rate` of what all would, or one layer
    where that is more by itself. So the peak falls in every step, whichever layers move. What
    several layers share counts for each of them: fewer may train than `rate` would let.

    What is copied is a sample of the weights that train, from ``optimizer.step()`` to its end; the
    model is not.

    Make it behind ``DistributedDataParallel(..., find_unused_parameters=True)``, and the optimiser
    before it. All ranks freeze the same layers.

    Args:
        model: Any module; also a rewritten, compiled or distributed one. Its parameters'
            ``requires_grad`` is changed, and nothing else of it, until :meth:`remove`.
        rate: Share of the layers that a step freezes at least, in [0, 1).
        optimizer: Its steps move the schedule. None: call :meth:`before_step` and
            :meth:`after_step` around each.
        example_args: Inputs to weigh the layers by, on the model's device; only shares matter, a
            small batch does. Costs two forwards for each layer, once. None: by count alone.
        example_kwargs: Keyword inputs.
        always: Globs on names of weights, or of modules: trained in every step, and not counted.
        variants: At most so many sets of layers that train together: each layer is in one of them,
            and a step trains the set that moved most. For ``torch.compile``, which makes a graph
            for each: keep it at or below its limit of graphs for a function (8 unless changed).
            None: any sets.
        sample: Elements of each weight, evenly spaced, whose mean is taken; at least 1.
        seed: Of the order in which layers have their first turn.

    Attributes:
        trained: Names of the layers that train now, in the model's order.
        frozen: Names of the others.
        nbytes: Layer -> bytes that it alone saves for its gradient; 0 without example inputs.
        sets: What may train together, where `variants` is given; else empty.

    Raises:
        ValueError: A number out of range, a glob that matches nothing, a model without layers, an
            optimiser that does not have all of them, a compiled model without `variants`, or too
            few of them for the rate.
        TypeError: The model is sharded, or the optimiser is none of PyTorch's.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        example_args: tuple[Any, ...] | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        always: str | Sequence[str] | None = None,
        variants: int | None = None,
        sample: int = 65536,
        seed: int = 0,
    ) -> None:
        if not is_number(rate) or not 0 <= rate < 1:
            raise ValueError(f"rate={rate!r}: the share of frozen layers, a number in [0, 1).")
        for name, value in (("sample", sample), ("variants", variants)):
            counts = is_whole(value) and value >= 1
            if not counts and not (name == "variants" and value is None):
                raise ValueError(f"{name}={value!r}: a whole number, 1 or more.")
        if variants is None and _is_compiled(model):
            raise ValueError(
                "the model is compiled, and torch.compile makes a graph for each set of layers that"
                " train together. Give variants=, the most of such sets."
            )
        self.rate, self._sample = float(rate), sample
        self._layers = _layers(_plain(model), (always,) if isinstance(always, str) else always)
        first = random.Random(seed)
        self._updates = {name: UNSEEN * (1 + first.random()) for name in self._layers}
        self._old: dict[str, Tensor] = {}  # samples, between before_step and after_step
        self._hooks: list[Any] = []
        self._count = len(self._layers) - int(round(self.rate * len(self._layers), 9))
        self.nbytes = dict.fromkeys(self._layers, 0)
        self._total = 0
        if optimizer is not None:
            self._check(optimizer)
        if example_args is not None or example_kwargs is not None:
            self._weigh(_plain(model), example_args or (), example_kwargs or {})
        self.sets: tuple[tuple[str, ...], ...] = ()
        if variants is not None:
            self.sets = partition(self.nbytes, self._count, self._room())
            if len(self.sets) > variants:
                raise ValueError(
                    f"variants={variants}: at rate={rate}, {len(self._layers)} layers need"
                    f" {len(self.sets)} sets for each of them to train in one. Give so many"
                    " variants, or a lower rate."
                )
        self.trained: tuple[str, ...] = ()
        self._choose()
        if optimizer is not None:
            self._hooks = [
                optimizer.register_step_pre_hook(lambda *_: self.before_step()),
                optimizer.register_step_post_hook(lambda *_: self.after_step()),
            ]

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the layers that do not train now."""
        return tuple(n for n in self._layers if n not in self.trained)

    def before_step(self) -> None:
        """Notes what the optimiser is about to change."""
        self._old = {n: self._sampled(n).clone() for n in self.trained}

    def after_step(self) -> None:
        """Measures what it has changed, and freezes the layers of the next step.

        A step that changed nothing (a learning rate of 0, a gradient scaler that skipped it) tells
        nothing, and the same layers train on.

        Raises:
            RuntimeError: :meth:`before_step` was not called, the ranks' weights differ, or compiled
                code gives the layers that train no gradient.
        """
        if not self._old:
            raise RuntimeError("after_step() measures since before_step(), which was not called.")
        old, self._old = self._old, {}
        moved = torch.stack([_relative(o, self._sampled(n)) for n, o in old.items()])
        found = dict(zip(old, _agreed(moved).tolist(), strict=True))
        if any(found.values()):
            self._updates |= found
            self._choose()
        elif self.sets and all(self._layers[n].grad is None for n in self.trained):
            raise RuntimeError(
                f"no gradient reached the layers that train now, {', '.join(self.trained)}:"
                " compiled code of this PyTorch does not see that requires_grad of parameters"
                " changes (2.11 does not, 2.14 does). Train in eager mode, or with a newer PyTorch."
            )

    def remove(self) -> None:
        """Thaws all layers, and follows the optimiser no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._thaw()

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` goes on from: plain numbers and names, also as JSON."""
        return {"updates": dict(self._updates), "trained": list(self.trained)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another scheduler of such a model stopped.

        Raises:
            ValueError: The state is of other layers.
        """
        others = set(state["updates"]) ^ set(self._layers)
        if others:
            raise ValueError(
                f"the state is of other layers: {min(others)!r} is in one of the two only. Load it"
                " into a FreezeScheduler of the same model with the same always=."
            )
        self._updates = {n: float(state["updates"][n]) for n in self._layers}
        self._freeze(state["trained"])

    def _check(self, optimizer: Any) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            kind = type(optimizer).__name__
            raise TypeError(f"optimizer is a torch.optim.Optimizer, not {kind}.")
        has = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in self._layers.items():
            if id(parameter) not in has:
                raise ValueError(
                    f"the optimizer does not have {name!r}. Give it all parameters; or set"
                    " requires_grad to False before, for what is never to train."
                )

    def _weigh(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """What each layer saves by itself; what several share counts for each of them."""

        def saved(*names: str) -> int:
            for name, parameter in self._layers.items():
                parameter.requires_grad_(name in names)
            return saved_bytes(model, *args, **kwargs)

        try:
            with torch.compiler.set_stance("force_eager"):
                alone, everything = saved(), saved(*self._layers)
                found = [everything, *(saved(n) for n in self._layers)]
        finally:
            self._thaw()
        if dist.is_initialized():
            first = next(iter(self._layers.values()))
            weights = torch.tensor(found, device=first.device)
            dist.all_reduce(weights, dist.ReduceOp.MAX)  # batches of ranks may differ
            found = weights.tolist()
        self._total, *each = (max(0, nbytes - alone) for nbytes in found)
        self.nbytes = dict(zip(self._layers, each, strict=True))

    def _thaw(self) -> None:
        for parameter in self._layers.values():
            parameter.requires_grad_(True)

    def _room(self) -> float:
        """Bytes that those may save together which train."""
        if not self.rate:
            return float("inf")
        return max((1 - self.rate) * self._total, *self.nbytes.values(), 0)

    def _choose(self) -> None:
        if self.sets:
            mean = [sum(self._updates[n] for n in names) / len(names) for names in self.sets]
            self._freeze(self.sets[mean.index(max(mean))])
        else:
            self._freeze(select(self._updates, self.nbytes, self._count, self._room()))

    def _freeze(self, trained: Sequence[str]) -> None:
        chosen = set(trained)
        self.trained = tuple(n for n in self._layers if n in chosen)
        for name, parameter in self._layers.items():
            parameter.requires_grad_(name in chosen)
            if name not in chosen:
                parameter.grad = None  # a gradient of zeros would let momentum go on

    def _sampled(self, name: str) -> Tensor:
        flat = self._layers[name].detach().reshape(-1)
        return flat[:: -(-flat.numel() // self._sample)]


def select(
    updates: Mapping[str, float], nbytes: Mapping[str, int], count: int, room: float
) -> tuple[str, ...]:
    """Those that moved most: at most `count`, and together at most `room` bytes.

    Args:
        updates: Layer -> its last relative update.
        nbytes: Layer -> what it saves for its gradient.
        count: How many, at least 1.
        room: At least what the largest of them saves: so the one that moved most always trains.
    """
    chosen: list[str] = []
    for name in sorted(updates, key=lambda n: -updates[n]):
        if len(chosen) < count and nbytes[name] <= room:
            chosen.append(name)
            room -= nbytes[name]
    return tuple(chosen)


def partition(nbytes: Mapping[str, int], count: int, room: float) -> tuple[tuple[str, ...], ...]:
    """Sets that have each layer once, of at most `count` layers and `room` bytes: few, not fewest.

    The largest first, each into the first set that has room for it.
    """
    sets: list[list[str]] = []
    for name in sorted(nbytes, key=lambda n: -nbytes[n]):
        for names in sets:
            if len(names) < count and sum(nbytes[n] for n in (*names, name)) <= room:
                names.append(name)
                break
        else:
            sets.append([name])
    return tuple(map(tuple, sets))


def _plain(model: nn.Module) -> nn.Module:
    """The model itself, where it is wrapped: names are its own."""
    inner = uncompiled(model)
    if isinstance(inner, DistributedDataParallel):
        return _plain(inner.module)
    return inner


def _is_compiled(model: nn.Module) -> bool:
    """Whether it, or a part of it, is."""
    return any(uncompiled(m) is not m or compiled_in_place(m) for m in model.modules())


def _layers(model: nn.Module, always: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The weights that may be frozen, by name.

    Raises:
        ValueError: There are none, or a glob matches nothing.
        TypeError: A weight is sharded.
    """
    weights = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad
        and not name.rpartition(".")[2].startswith("bias")
        and not name.endswith("_bias")
    }
    owners = {name: name.rpartition(".")[0] for name in weights}
    if always is not None:
        for glob in unmatched(always, (*weights, *owners.values())):
            near = closest(glob, (*weights, *owners.values()))
            raise ValueError(f"always={glob!r} matches no weight that trains.{near}")
        globs = tuple(always)
    else:
        globs = tuple(g for head in HEADS for g in (head, f"{head}.*"))
    layers = {
        name: p
        for name, p in weights.items()
        if not matches(name, globs) and not matches(owners[name], globs)
    }
    if not layers:
        raise ValueError("the model has no weight that may be frozen: none requires a gradient.")
    for name, parameter in layers.items():
        if type(parameter.data) is not Tensor:
            kind = type(parameter.data).__name__
            raise TypeError(
                f"{name!r} is a {kind}: weights that are sharded or packed cannot be frozen step by"
                " step. Use DistributedDataParallel, or freeze what never trains before sharding."
            )
    return layers


def _relative(old: Tensor, new: Tensor) -> Tensor:
    """Mean of |new - old| / |old| where old is not 0; where it always is, as if never trained."""
    old, new = old.float(), new.float()
    counts = old != 0
    total = torch.where(counts, (new - old).abs() / old.abs(), 0.0).sum()
    return torch.where(counts.any(), total / counts.sum().clamp(min=1), (new != old).any() * UNSEEN)


def _agreed(moved: Tensor) -> Tensor:
    """The same numbers on all ranks.

    Raises:
        RuntimeError: They differ by more than rounding: gradients are not averaged.
    """
    if not dist.is_initialized():
        return moved
    both = torch.stack((moved, -moved))
    dist.all_reduce(both, dist.ReduceOp.MAX)
    most, least = both[0], -both[1]
    if (most - least > 1e-3 * most).any():
        raise RuntimeError(
            "the weights of the ranks moved differently: a layer that was frozen when"
            " DistributedDataParallel was made is not averaged. Make FreezeScheduler behind it, of"
            " what it returned."
        )
    return most
