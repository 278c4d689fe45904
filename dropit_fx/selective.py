"""A plan as a policy of PyTorch's selective checkpoints: what it keeps whole is saved.

All else that the plan packs or makes again is computed again, so that nothing is lost: gradients
have the bits of the dense step. What is random is computed again, whatever the plan says: a region
that draws only some of its numbers again draws others. So is what an op writes into.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dropit_fx.capture import example_inputs
from dropit_fx.capture.fake import RealStorages, fake_mode_of, fake_state, fakes_of
from dropit_fx.capture.provenance import node_module
from dropit_fx.capture.trace import LOCK
from dropit_fx.capture.untouched import untouched
from dropit_fx.holders import tensors_in
from dropit_fx.ops.backwards import as_plain
from dropit_fx.passes.plan import Plan
from dropit_fx.passes.share_packed import by_site
from dropit_fx.private import FakeTensor, TorchDispatchMode, schema, storage_id
from dropit_fx.rewriting import Rewriter
from dropit_fx.rules import Config

IGNORED = torch.ops.aten.detach.default, torch.ops.prim.device.default  # by PyTorch's too
RANDOM = torch.Tag.nondeterministic_seeded
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class Op(NamedTuple):
    """One op of a forward."""

    name: str
    module: str  # of the node that runs it
    saved: bool  # its results are


def checkpoint_contexts(
    model: nn.Module,
    config: Config,
    example_args: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    module: str = "",
) -> Callable[[], Contexts]:
    """The ``context_fn`` of ``torch.utils.checkpoint`` that saves what a plan keeps whole.

    For ``checkpoint(block, x, use_reentrant=False, context_fn=...)`` in eager mode, where ``block``
    is the submodule that ``module`` names, or the model itself.

    Args:
        model: In the mode in which it trains, and without such checkpoints; nothing is changed in
            it.
        config: What ``dropit_fx.plan`` returned for the model, or any config.
        example_args: Positional inputs of the model, as for ``transform``.
        example_kwargs: Keyword inputs.
        module: Qualified name of what is checkpointed; ``""``: the whole model.

    Returns:
        A function without arguments. Where a forward runs other ops than the example's, what it
        returned raises a RuntimeError that names them.

    Raises:
        ValueError: The module is unknown, or runs no op of its own.
        CaptureError: No tracer takes the model.
    """
    if module not in dict(model.named_modules()):
        raise ValueError(f"module={module!r}: the model has no submodule of that name")
    ops = [op for op in saved_ops(model, config, example_args, example_kwargs) if _in(op, module)]
    if not ops:
        raise ValueError(f"module={module!r}: no op of the model's forward is of that module")

    def contexts() -> Contexts:
        made: Contexts = create_selective_checkpoint_contexts(_Policy(ops))  # type: ignore[no-untyped-call]
        return made

    return contexts


def saved_ops(
    model: nn.Module,
    config: Config,
    example_args: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Op, ...]:
    """The ops of a model's forward, and which of them a config saves; as the function above."""
    with LOCK, untouched(model, generators=True):
        args, kwargs = example_inputs.resolve(model, example_args, example_kwargs)
        rewriter = Rewriter(model, args, kwargs)
        kept = _kept_whole(rewriter.rewritten(config))
        leaves = list(example_inputs.placeholder_values(rewriter.module, args, kwargs))
        return _ops_of(rewriter.module, fakes_of(leaves), kept)


def _in(op: Op, module: str) -> bool:
    return not module or op.module == module or op.module.startswith(f"{module}.")


def _kept_whole(plan: Plan) -> set[str]:
    """The nodes whose values a plan keeps whole."""
    pairs = by_site(plan.sites, plan.decisions)
    return {site.name for site, decisions in pairs if not all(d.packed for d in decisions)}


class _Policy:
    """Called op after op; counts them."""

    def __init__(self, ops: list[Op]) -> None:
        self._ops, self._at = ops, 0

    def __call__(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if ctx.is_recompute:
            return CheckpointPolicy.PREFER_RECOMPUTE  # what was saved is known
        expected = self._ops[self._at] if self._at < len(self._ops) else None
        self._at += 1
        if expected is None or expected.name != str(op):
            named = "nothing more" if expected is None else expected.name
            raise RuntimeError(
                f"op {self._at} of the checkpoint is {op}, and {named} was planned: its forward"
                " does not run what the example's did, or it is not the module that was named"
            )
        saved = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
        return saved[not expected.saved]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the ops that a graph runs, which of them made each storage, and what is written."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.node: fx.Node
        self.ops: list[tuple[Any, fx.Node]] = []
        self.made: dict[int, int] = {}  # storage -> op
        self.written: set[int] = set()
        self.held: list[Any] = []  # so that no two storages have one place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if schema(func).is_mutable:
            self.written |= {storage_id(t) for t in tensors_in(args)}
        if func not in IGNORED:
            for tensor in tensors_in(out):
                self.made.setdefault(storage_id(tensor), len(self.ops))
            self.ops.append((func, self.node))
            self.held.append(out)
        return out


class _Run(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.recorder = recorder
        self.values: dict[str, int] = {}  # node -> storage

    def run_node(self, n: fx.Node) -> Any:
        self.recorder.node = n
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n.name] = storage_id(result)
        return result


def _ops_of(module: fx.GraphModule, fakes: tuple[Any, ...], kept: set[str]) -> tuple[Op, ...]:
    mode = fake_mode_of(fakes)
    recorder = _Recorder()
    with (
        torch.random.fork_rng(devices=()),
        mode,
        as_plain(FakeTensor),
        torch.enable_grad(),
        fake_state(module, mode),
        RealStorages(),
        recorder,
    ):
        run = _Run(module, recorder)
        run.run(*fakes)
    storages = {run.values[name] for name in kept if name in run.values} - recorder.written
    saved = {recorder.made[s] for s in storages if s in recorder.made}
    return tuple(
        Op(str(func), node_module(node), number in saved and RANDOM not in func.tags)
        for number, (func, node) in enumerate(recorder.ops)
    )
