"""One program, dense and packed: what differs, where nothing may.

The dense model in eager mode is the oracle. Settings that lose nothing have to give its gradients
to the last bit; those that round, gradients no further off than a dense run whose saved tensors
are disturbed about as much. What a backend of PyTorch itself gets otherwise is not held against
the packed model: it is compared with the dense model on the same backend.
"""

from __future__ import annotations

import copy
import itertools
import linecache
import math
import re
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from fuzz_programs import Program
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

import dropit_fx
from dropit_fx import api, measure
from dropit_fx.capture.trace import CaptureError
from dropit_fx.codecs import CODEC
from dropit_fx.codecs.codec import Codec
from dropit_fx.compile import backend
from dropit_fx.config import Config, make_config
from dropit_fx.private import storage_id

WAYS = ("transform", "dropit_eager", "aot", "inductor")
INNER = {"dropit_eager": "eager", "aot": "aot_eager_decomp_partition", "inductor": "inductor"}

# Formulas: every tensor goes through pack and unpack, without loss.
FORMULAS = {
    "preset": None,
    "force": True,
    "rules": [
        {"codec": "bitmask"},
        {"op": ["linear", "conv*", "*mm", "matmul"], "codec": "mink", "gamma": 0.0},
        {"op": "*", "codec": "quant", "bits": None},
    ],
}


NOTHING: dict[str, Any] = {"preset": None, "rules": []}


def _that_may_match_nothing(config: Config) -> Config:
    return replace(config, rules=tuple(replace(r, preset=True) for r in config.rules))


# Plans: "exact" decides as ``balanced`` does, and keeps every bit of what that rounds.
CONFIGS: dict[str, Config] = {
    "formulas": _that_may_match_nothing(make_config(FORMULAS)),
    "exact": make_config(preset="balanced"),
    "balanced": make_config(preset="balanced"),
    "lossless": make_config(preset="lossless"),
}
LOSSY = ("balanced",)


def _keep_all(codec: Codec) -> Codec:
    def pack(flat: Tensor, options: Any) -> tuple[Tensor, ...]:
        return flat.clone(), *(flat.new_empty(0) for _ in range(codec.buffers - 1))

    def unpack(parts: tuple[Tensor, ...], options: Any, numel: Any, dtype: torch.dtype) -> Tensor:
        return parts[0].clone()

    return replace(codec, pack=pack, unpack=unpack, pack_channels=None, unpack_channels=None)


@contextmanager
def _codecs_of(config: str) -> Iterator[None]:
    """For "exact", codecs that say what they say, and lose nothing."""
    swapped = {n: CODEC[n] for n in ("mink", "quant")} if config == "exact" else {}
    CODEC.update({n: _keep_all(c) for n, c in swapped.items()})
    try:
        yield
    finally:
        CODEC.update(swapped)


@dataclass(frozen=True)
class Fault:
    """What is wrong with one program in one way with one config.

    ``kind``: "crash", "output", "gradient", "buffer", "input", "bytes", "model" (the user's own
    was changed).
    """

    way: str
    config: str
    kind: str
    detail: str

    @property
    def key(self) -> str:
        """Equal for faults that are probably the same: names and numbers are left out."""
        plain = re.sub(r"0x[0-9a-f]+|\d+", "N", self.detail.split("\n")[0])
        plain = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", plain)[:160]
        told = self.kind == "crash" or plain.startswith("dense: ")
        return f"{self.way} {self.kind} {plain if told else ''}".strip()


@dataclass
class Verdict:
    """What came of one program: (way, config) of what passed, and its faults.

    ``rounded``: of what passed, where the last bits of a gradient differ, or most of a lossy one is
    dropped; with the kind of that.
    """

    skipped: str = ""
    passed: list[tuple[str, str]] = field(default_factory=list)
    rounded: list[tuple[str, str, str]] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


# Running ------------------------------------------------------------------------------------------

_numbers = itertools.count()
STEPS = 3  # of a model that is transformed; compiled, it would be compiled again for the last one


@dataclass
class Subject:
    """A program, ready to run. Its lines show in tracebacks."""

    program: Program

    def __post_init__(self) -> None:
        name = f"<program {next(_numbers)}>"
        lines = self.program.source.splitlines(keepends=True)
        linecache.cache[name] = (len(self.program.source), None, lines, name)
        self.file = name
        module = types.ModuleType("program")
        exec(compile(self.program.source, name, "exec"), module.__dict__)
        self.space = module.__dict__

    def forget(self) -> None:
        linecache.cache.pop(self.file, None)

    def model(self) -> nn.Module:
        """A fresh one, always the same."""
        torch.manual_seed(0)
        made: nn.Module = self.space["Program"]()
        return made.train(self.program.training)

    @contextmanager
    def without_regions(self) -> Iterator[None]:
        """What the program checkpoints, it calls as it is."""

        def call(function: Callable[..., Tensor], *args: Tensor, use_reentrant: bool) -> Tensor:
            return function(*args)

        before, self.space["checkpoint"] = self.space["checkpoint"], call
        try:
            yield
        finally:
            self.space["checkpoint"] = before

    def inputs(self, seed: int = 1) -> tuple[Tensor, ...]:
        """Those of one step; of the last, in another layout than a graph was traced with."""
        torch.manual_seed(seed)
        made: tuple[Tensor, ...] = self.space["inputs"]()
        return tuple(map(_relaid, made)) if seed == STEPS else made


def _relaid(x: Tensor) -> Tensor:
    """The same values, with the first dimension innermost in memory."""
    dims = tuple(reversed(range(x.dim())))
    return x.detach().permute(dims).contiguous().permute(dims).requires_grad_(x.requires_grad)


@dataclass
class Outcome:
    """All that a training step leaves."""

    outputs: list[Any]
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    inputs: list[Tensor]


def step(
    run: Callable[..., Any],
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    seed: int,
    between: Callable[[Any], None] = lambda out: None,
) -> Outcome:
    """Forward and backward for a random cotangent; ``between`` may do something to the graph."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = run(*inputs)
    tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    generator = torch.Generator().manual_seed(7)
    total: Any = 0
    for t in tensors:
        if t.requires_grad and _real(t).is_floating_point():
            t = _real(t).float()
            total = total + (t * torch.randn(t.shape, generator=generator)).sum()
    outputs = [(t.detach().clone(), t.requires_grad) for t in tensors]
    if isinstance(total, Tensor):
        between(total)
        total.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    grads |= {f"input {i}": t.grad for i, t in enumerate(inputs) if t.is_leaf}
    return Outcome(
        outputs,
        {n: None if g is None else g.detach().clone() for n, g in grads.items()},
        {n: b.detach().clone() for n, b in model.named_buffers()},
        [t.detach().clone() for t in inputs],
    )


def steps(run: Callable[..., Any], model: nn.Module, subject: Subject, count: int) -> list[Outcome]:
    """Some steps one after another, with other inputs and random numbers each."""
    return [step(run, model, subject.inputs(i + 1), 30 + i) for i in range(count)]


@contextmanager
def disturbed(seed: int) -> Iterator[None]:
    """Saved floats come back rounded about as much as ``balanced`` rounds them."""
    generator = torch.Generator().manual_seed(seed)

    def unpack(t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.numel() < 2:
            return t
        noise = torch.rand(t.shape, generator=generator) * 2 - 1
        return t + (noise * t.detach().abs().max().float() * 2**-4).to(t.dtype)

    def pack(t: Tensor) -> Tensor:
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


SEEDS = (1, 2, 3)  # of what is drawn to see how far gradients may move
_CONTRACTION = re.compile("(?:Mm|mm|Mv|Dot|Linear|Convolution)Backward")


def without_smaller_half(total: Tensor, spared: set[int], seed: int) -> None:
    """Drops the smaller half of what contractions have saved, but of the storages in ``spared``.

    A convolution saves the zeros of its padding too, of which a packed one knows nothing. Which of
    equal elements go is drawn: the output of a softmax over one element is all ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def pack(t: Tensor, padded: bool) -> Tensor:
        flat = t.detach().flatten()
        if storage_id(t) in spared:
            return t.detach()
        count = int(flat.count_nonzero()) if padded else flat.numel()
        order = torch.randperm(flat.numel(), generator=generator)
        largest = order[flat[order].abs().topk((count + 1) // 2).indices]
        return torch.zeros_like(flat).scatter(0, largest, flat[largest]).view(t.shape)

    todo, seen = [total.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        if _CONTRACTION.search(node.name()):
            hook = partial(pack, padded="Convolution" in node.name())
            for name in dir(node):
                there = name.startswith("_raw_saved_")
                if there and getattr(node, name.removeprefix("_raw")) is not None:
                    getattr(node, name).register_hooks(hook, lambda t: t)


# Comparing ----------------------------------------------------------------------------------------


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, where NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = _real(a), _real(b)
    return bool(torch.equal(a, b)) or (
        a.is_floating_point()
        and bool(torch.equal(a.isnan(), b.isnan()))
        and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    )


def _gap(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(b.shape)} {b.dtype} for {tuple(a.shape)} {a.dtype}"
    if not _real(a).is_floating_point():
        return "other integers"
    return f"relative error {relative(a, b):.2g}"


def _real(a: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(a.resolve_conj()) if a.is_complex() else a


def _double(a: Tensor) -> Tensor:
    return _real(a).double()


def relative(a: Tensor, b: Tensor) -> float:
    a, b = _double(a), _double(b)
    return float((a - b).norm() / a.norm().clamp(min=1e-30))


Close = Callable[[str, Tensor, Tensor], bool]


def differences(
    dense: Outcome, packed: Outcome, close: Close, loose: bool
) -> Iterator[tuple[str, str]]:
    """(kind, detail) of each; ``loose``: outputs, too, may be rounded otherwise."""
    equal = _near if loose else same
    if len(dense.outputs) != len(packed.outputs):
        yield "output", f"{len(packed.outputs)} for {len(dense.outputs)}"
    for i, ((a, wanted), (b, got)) in enumerate(zip(dense.outputs, packed.outputs, strict=False)):
        if not equal(a, b):
            yield "output", f"output {i}: {_gap(a, b)}"
        elif wanted != got:
            yield "output", f"output {i}: requires_grad {got} for {wanted}"
    for kind, ours, theirs in (
        ("buffer", packed.buffers, dense.buffers),
        ("input", _numbered(packed.inputs), _numbered(dense.inputs)),
    ):
        for name, value in theirs.items():
            if name not in ours or not equal(value, ours[name]):
                gap = _gap(value, ours[name]) if name in ours else "gone"
                yield kind, f"{name}: {gap}"
    for name, grad in dense.grads.items():
        got = packed.grads.get(name)
        if (grad is None) != (got is None):
            yield (
                "gradient",
                f"{name}: {'none' if got is None else 'one'}, where dense has "
                + ("none" if grad is None else "one"),
            )
        elif grad is not None and got is not None and not close(name, grad, got):
            yield "gradient", f"{name}: {_gap(grad, got)}"


def _numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"input {i}": t for i, t in enumerate(tensors)}


def _near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = _real(a), _real(b)
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    rough = a.dtype in (torch.bfloat16, torch.float16)
    tolerance = 0.03 if rough else 1e-4
    scale = float(a.nan_to_num().abs().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale + 1e-7, equal_nan=True)


# Checking -----------------------------------------------------------------------------------------


@dataclass
class Yardstick:
    """The dense outcomes, and how far gradients move when saved tensors are disturbed.

    ``dropped``: whether a gradient was as near only as dropping leaves it: where all values are
    about as large, most of it is gone with their smaller half.
    """

    subject: Subject
    dense: list[Outcome] = field(default_factory=list)
    bytes: int | None = None
    dropped: bool = False

    def rounding(self, name: str, a: Tensor, b: Tensor) -> bool:
        """Whether a gradient is as near as rounding leaves it, or dropping."""
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not bool(a.isfinite().all()):
            return True
        if not bool(b.isfinite().all()):
            return False
        whole = _whole(self.dense[0])
        gap = float((_double(a) - _double(b)).norm())
        bound = 0.25 * float(_double(a).norm()) + 0.02 * whole
        if gap <= bound or gap <= bound + 4 * self.moved[name]:
            return True
        self.dropped = gap <= bound + 4 * self.moved[name] + 1.5 * self.moved_by_dropping[name]
        return self.dropped

    def as_near_as_dense(self, name: str, a: Tensor, b: Tensor) -> bool:
        """Whether a gradient is about as far from the true one as the dense one is.

        The true one is the dense model's in double precision; where that is of no use, a number of
        units of the last bit has to do, its own or of all gradients: it may be nothing but noise.
        """
        at = next(i for i, outcome in enumerate(self.dense) if outcome.grads[name] is a)
        true = self.true[at].grads[name] if self.true else None
        if true is None or _within(LAST_BITS)(name, a, b):
            gap = float((_double(a) - _double(b)).norm())
            noise = LAST_BITS * torch.finfo(a.dtype).eps * _whole(self.dense[at])
            return _within(128)(name, a, b) or gap <= noise
        known = _double(true).isfinite() & _double(a).isfinite()  # the others are so in both
        if not torch.equal(_double(b).isfinite(), _double(a).isfinite()):
            return False
        theirs, ours = (float((_double(x) - _double(true))[known].norm()) for x in (a, b))
        return ours <= 8 * theirs + LAST_BITS * torch.finfo(a.dtype).eps * float(
            _double(true)[known].norm()
        )

    @cached_property
    def true(self) -> list[Outcome]:
        """The dense outcomes in double precision; none where casts or chance make them others."""
        model, found = self.subject.model()._apply(_doubled), []
        given = [self.subject.inputs(at + 1) for at in range(len(self.dense))]
        torch.set_default_dtype(torch.float64)
        try:
            for at, dense in enumerate(self.dense):
                inputs = tuple(map(_doubled, given[at]))
                found.append(step(model, model, inputs, 30 + at))
                pairs = zip(found[-1].outputs, dense.outputs, strict=True)
                if not all(_near_or_tiny(a.to(b.dtype), b) for (a, _), (b, _) in pairs):
                    return []
        except RuntimeError:
            return []
        finally:
            torch.set_default_dtype(torch.float32)
        return found

    @cached_property
    def moved(self) -> dict[str, float]:
        """How far disturbed saved tensors move each gradient: the furthest of some tries."""
        found = []
        for seed in SEEDS:
            try:
                with disturbed(seed):
                    found.append(self._gaps())
            except RuntimeError:
                return dict.fromkeys(self.dense[0].grads, float("inf"))
        return _furthest(found)

    @cached_property
    def moved_by_dropping(self) -> dict[str, float]:
        """How far each gradient moves without the smaller half of what contractions read."""
        with self.subject.without_regions():
            return _furthest(self._gaps(dropping=seed) for seed in SEEDS)

    def _gaps(self, dropping: int | None = None) -> dict[str, float]:
        model, inputs = self.subject.model(), self.subject.inputs(1)
        spared = {storage_id(t) for t in (*model.parameters(), *model.buffers(), *inputs)}

        def between(total: Tensor) -> None:
            if dropping is not None:
                without_smaller_half(total, spared, dropping)

        found = step(model, model, inputs, 30, between)
        gaps: dict[str, float] = {}
        for name, a in self.dense[0].grads.items():
            b = found.grads[name]
            gap = 0.0 if a is None or b is None else float((_double(a) - _double(b)).norm())
            gaps[name] = gap if gap == gap else float("inf")
        return gaps


def _furthest(tries: Iterable[dict[str, float]]) -> dict[str, float]:
    most: dict[str, float] = {}
    for found in tries:
        most = {name: max(gap, most.get(name, 0.0)) for name, gap in found.items()}
    return most


def _doubled(x: Tensor) -> Tensor:
    if not x.is_floating_point() and not x.is_complex():
        return x.detach()
    return (
        x.detach().to(torch.promote_types(x.dtype, torch.float64)).requires_grad_(x.requires_grad)
    )


def check(
    program: Program,
    ways: tuple[str, ...] = ("transform", "dropit_eager"),
    configs: Mapping[str, tuple[str, ...]] | None = None,
    count_bytes: bool = True,
) -> Verdict:
    """Runs a program dense, and packed in each way with each of the way's configs."""
    return check_subject(Subject(program), ways, configs, count_bytes)


def check_subject(
    subject: Subject,
    ways: tuple[str, ...] = ("transform", "dropit_eager"),
    configs: Mapping[str, tuple[str, ...]] | None = None,
    count_bytes: bool = True,
) -> Verdict:
    """The same for what is no program, but has a model and inputs as one."""
    verdict = Verdict()
    try:
        yard = Yardstick(subject)
        try:
            try:
                model = subject.model()
                yard.dense = steps(model, model, subject, STEPS)
            except RuntimeError:  # a view that this layout does not have
                model = subject.model()
                yard.dense = steps(model, model, subject, STEPS - 1)
            if count_bytes:
                yard.bytes = _saved(subject, model)
        except Exception as error:
            verdict.skipped = f"dense raises {type(error).__name__}"
            return verdict
        if ".data" in subject.program.source and _writes_unseen(subject, yard.dense):
            verdict.skipped = "dense keeps what is written to behind .data"
            return verdict
        for way in ways:
            wanted = (configs or {}).get(way, tuple(CONFIGS))
            trial = Trial(verdict, yard, way, wanted, count_bytes)
            trial.transformed() if way == "transform" else trial.compiled()
    finally:
        subject.forget()
    return verdict


def _writes_unseen(subject: Subject, dense: list[Outcome]) -> bool:
    """Whether saved tensors change until the backward, behind ``.data``, where autograd looks not.

    Dense gradients are those of other values then; a packed copy has the values as they were.
    """
    model = subject.model()

    def copied(t: Tensor) -> Tensor:
        if t.layout != torch.strided:
            return t.detach().clone()
        flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage().clone())
        return flat.as_strided(t.shape, t.stride(), t.storage_offset())

    with torch.autograd.graph.saved_tensors_hooks(copied, lambda t: t):
        found = steps(model, model, subject, len(dense))
    return bool(_wrong(dense, found, _same_gradient, False))


def _saved(subject: Subject, run: Callable[..., Any]) -> int | None:
    """What a call saves; None where inputs that are written into get a history."""
    given = subject.inputs(1)
    torch.manual_seed(30)
    found = measure.saved_bytes(run, *given)
    return None if any(not t.is_leaf for t in given) else found


@dataclass
class Trial:
    """One program in one way. It is traced once, for all configs: that takes most of the time."""

    verdict: Verdict
    yard: Yardstick
    way: str
    configs: tuple[str, ...]
    count_bytes: bool

    def found(self, config: str, kind: str, detail: str) -> None:
        self.verdict.faults.append(Fault(self.way, config, kind, detail))

    def refused(self, why: str) -> None:
        self.verdict.refused += [(self.way, name, why) for name in self.configs]

    def transformed(self) -> None:
        """By ``transform``."""
        subject = self.yard.subject
        model = subject.model()
        before = _pieces(model)
        with _captured_once():
            for name in self.configs:
                _restore(model, before)
                try:
                    run = dropit_fx.transform(model, CONFIGS[name], example_args=subject.inputs(1))
                except CaptureError as error:
                    self.refused(_refusal(error))
                    break
                except Exception as error:
                    self.found(name, "crash", _tell(error))
                    continue
                finally:
                    if changed := _changed(before, _pieces(model)):
                        self.found(name, "model", changed)
                self.run(name, run, run, lambda run=run: dropit_fx.report(run))

    def compiled(self) -> None:
        """By a backend of ``torch.compile``."""
        shared = self.way == "dropit_eager"
        if shared:
            self._compiled_together()
            return
        for name in self.configs:
            torch._dynamo.reset()
            model = self.yard.subject.model()
            options = {"config": CONFIGS[name], "inner": INNER[self.way]}
            self.run(name, torch.compile(model, backend="dropit", options=options), model, None)

    def _compiled_together(self) -> None:
        torch._dynamo.reset()
        counters.clear()
        model = self.yard.subject.model()
        before = _pieces(model)
        pieces = Pieces(self.configs)
        run = torch.compile(model, backend=pieces)
        for name in self.configs:
            _restore(model, before)
            pieces.chosen = name
            self.run(name, run, model, lambda name=name: pieces.report(name))
        self.dense = None

    def run(self, name: str, run: Any, model: nn.Module, report: Callable[[], Any] | None) -> None:
        """Some steps, and everything that may differ after them."""
        yard, way, lossy = self.yard, self.way, name in LOSSY
        count = len(yard.dense) if way == "transform" else STEPS - 1
        count = count if name == self.configs[0] else 1
        try:
            with _codecs_of(name):
                outcomes = steps(run, model, yard.subject, count)
        except CaptureError as error:
            self.refused(_refusal(error))
            return
        except Exception as error:
            if count == STEPS and "view size is not compatible" in str(error):
                # an exported graph has the views of its example's layout, and says so
                self.verdict.refused.append((way, name, "another layout than the example's"))
            elif way != "transform" and (why := _dense_fails(yard, way)):
                self.verdict.refused.append((way, name, f"dense raises {why} on that backend"))
            else:
                self.found(name, "crash", _tell(error))
            return
        loose = way in ("aot", "inductor")
        close = yard.rounding if lossy else _near_gradient if loose else _same_gradient
        yard.dropped = False
        wrong = _wrong(yard.dense, outcomes, close, loose)
        if not wrong and yard.dropped:
            self.verdict.rounded.append((way, name, "dropped"))
        if wrong and way != "transform":
            dense = _dense_compiled(yard, way, count)
            wrong = wrong if dense is None else _wrong(dense, outcomes, close, loose)
        if wrong and not lossy and not loose:
            kind = _kind_of_rounding(yard, outcomes, name)
            if kind:
                wrong = {}
                self.verdict.rounded.append((way, name, kind))
        for kind, detail in wrong.items():
            self.found(name, kind, detail)
        counted = False
        countable = self.count_bytes and yard.bytes is not None and name == "balanced"
        if countable and report is not None and not wrong:
            told, kept = report(), _saved(yard.subject, run)
            if told is not None and kept is not None:
                counted = self._count(name, told, kept)
        if not wrong and not counted:
            self.verdict.passed.append((way, name))

    def _count(self, name: str, told: Any, kept: int) -> bool:
        """Whether the report miscounts."""
        if told.kept_bytes != kept:
            why = f"said {told.kept_bytes}, kept {kept} (dense keeps {self.yard.bytes})"
            self.found(name, "bytes", why)
        elif told.dense_bytes != (dense := self._dense_bytes(told.dense_bytes)):
            self.found(name, "bytes", f"dense: said {told.dense_bytes}, kept {dense}")
        else:
            return False
        return True

    def _dense_bytes(self, told: int) -> int | None:
        """What the graph keeps dense that is rewritten.

        Inputs that a region does not use are left out of it, as Dynamo leaves them out, and what
        no backward reads is left out of Dynamo's.
        """
        yard, subject = self.yard, self.yard.subject
        regions = "checkpoint(" in subject.program.source
        if told == yard.bytes or (self.way == "transform" and not regions):
            return yard.bytes
        if self.way == "transform":
            plain = dropit_fx.transform(subject.model(), NOTHING, example_args=subject.inputs(1))
            return _saved(subject, plain)
        torch._dynamo.reset()
        return _saved(subject, torch.compile(subject.model(), backend=INNER.get(self.way, "eager")))


class Pieces:
    """A backend that compiles Dynamo's graphs with every config, and runs the chosen one."""

    __name__ = "pieces"

    def __init__(self, configs: tuple[str, ...]) -> None:
        self.configs = configs
        self.chosen = configs[0]
        self.reports: dict[str, list[Any]] = {name: [] for name in configs}

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        made: dict[str, Any] = {}
        for name in self.configs:
            before = len(backend.compiled_graphs())
            try:
                options = {"config": CONFIGS[name]}
                made[name] = backend.dropit_eager(_copied(gm), example_inputs, options=options)
            except Exception as error:
                made[name] = error
            self.reports[name] += backend.compiled_graphs()[before:]
            backend.forget_compiled_graphs(before)

        def run(*args: Any) -> Any:
            chosen = made[self.chosen]
            if isinstance(chosen, Exception):
                raise chosen
            return chosen(*args)

        return run

    def report(self, name: str) -> Any:
        """The report of a model that is compiled in one piece."""
        if counters["graph_break"] or counters["unimplemented"]:
            return None  # some of it runs outside of every graph
        found = self.reports[name]
        return found[0].report if len(found) == 1 else None


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph module that shares its tensors, and knows where its nodes are from."""
    tensors = itertools.chain(gm.parameters(), gm.buffers())
    memo = {id(t): t for t in tensors}
    memo |= {id(v): v for v in vars(gm).values() if isinstance(v, Tensor)}
    made = copy.deepcopy(gm, memo)
    for node, original in zip(made.graph.nodes, gm.graph.nodes, strict=True):
        node.meta = dict(original.meta)  # which regions it is in, for one
    return made


@contextmanager
def _captured_once() -> Iterator[None]:
    """``transform`` captures a model when it first sees it; later calls get copies of the graph."""
    real = api.capture
    known: dict[int, fx.GraphModule] = {}

    def capture(model: nn.Module, *args: Any) -> fx.GraphModule:
        if id(model) not in known:
            known[id(model)] = real(model, *args)
        return _copied(known[id(model)])

    api.capture = capture
    try:
        yield
    finally:
        api.capture = real


def _wrong(
    dense: list[Outcome], packed: list[Outcome], close: Close, loose: bool
) -> dict[str, str]:
    found: dict[str, str] = {}
    for at, (theirs, ours) in enumerate(zip(dense, packed, strict=False)):
        for kind, detail in differences(theirs, ours, close, loose):
            found.setdefault(kind, f"step {at + 1}, {detail}")
    return found


def _near_or_tiny(a: Tensor, b: Tensor) -> bool:
    """Near, or both what rounding leaves of a sum that is 0."""
    return _near(a, b) or (a.shape == b.shape and bool((a - b).abs().max() < 1e-5))


def _near_gradient(name: str, a: Tensor, b: Tensor) -> bool:
    return _near(a, b)


# What rounds a gradient otherwise, by what a program's source has to hold for it, and the most
# that it may move a gradient: in units of its last bit, or by ``_nearly``.
_RESULT_IS_SAVED = re.compile(
    r"\b(?:elu|selu|celu)_\(|(?:elu|selu|celu)\([^\n]*inplace=True|(?:ELU|SELU|CELU)\([^\n]*inplace"
)
_NORM = re.compile(r"norm\(|Norm\w*\(")
_ATTENTION = re.compile(r"attention\(|Multihead")
LAST_BITS = 4


def _kind_of_rounding(yard: Yardstick, outcomes: list[Outcome], config: str) -> str:
    """Why gradients that lose nothing still differ in their last bits; nothing where they may not.

    An op that finds its operand without gaps takes elements in vectors, whose functions round
    otherwise than those for one element; what an ELU wrote in place has a slope that PyTorch
    computes from the result; what a norm reads is packed, by the plan that is "exact", around the
    mean of each channel, in units of its deviation. Autocast casts a leaf once for all that read
    it, so that their gradients are summed in few bits; a packed call casts for itself, and they are
    summed after. Where attention's operands are rounded, a kernel of our own has its backward; both
    have terms that cancel out where attention is sharp, so that either is off by many units, and
    may be off by as many as the other. So has a norm's, which takes the mean of a gradient from it:
    the last bits of what comes to it are many of it.
    """
    source = yard.subject.program.source
    kinds: list[tuple[str, Close]] = [("last bits", _within(LAST_BITS))]
    if _RESULT_IS_SAVED.search(source):
        least = torch.finfo(torch.bfloat16).eps if "bfloat16" in source else 0.0
        kinds.append(("ELU in place", _within(16, least)))
    if config == "exact" and "autocast(" in source:
        kinds.append(("cast for each", _within(0, torch.finfo(torch.bfloat16).eps)))
    if config == "exact" and _NORM.search(source):
        kinds.append(("normalised", _nearly(yard)))
    if config == "exact" and _ATTENTION.search(source):
        kinds.append(("attention", yard.as_near_as_dense))
    if config == "formulas" and _NORM.search(source):
        kinds.append(("cancelled", yard.as_near_as_dense))
    return next((k for k, close in kinds if not _wrong(yard.dense, outcomes, close, False)), "")


def _within(bits: int, least: float = 0.0) -> Close:
    """Equal but for some units of the last bit, or for ``least``."""

    def close(name: str, a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        unit = torch.finfo(a.dtype).eps if _real(a).is_floating_point() else 0.0
        return same(a, b) or relative(a, b) < max(bits * unit, least)

    return close


def _nearly(yard: Yardstick) -> Close:
    whole = _whole(yard.dense[0])

    def close(name: str, a: Tensor, b: Tensor) -> bool:
        gap = float((_double(a) - _double(b)).norm()) if a.shape == b.shape else float("inf")
        return same(a, b) or gap < 1e-4 * float(_double(a).norm()) + 1e-5 * whole

    return close


def _whole(outcome: Outcome) -> float:
    """The sum of the norms of the gradients that are finite."""
    norms = [float(_double(g).norm()) for g in outcome.grads.values() if g is not None]
    return sum(norm for norm in norms if math.isfinite(norm))


def _same_gradient(name: str, a: Tensor, b: Tensor) -> bool:
    return same(a, b)


def _tell(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "dropit_fx" in f.filename]
    frames += [f for f in traceback.extract_tb(error.__traceback__) if "passes/" in f.filename]
    at = f" at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].name}" if frames else ""
    text = (str(error).strip() or " ").splitlines()
    first = next((t for t in text if t.strip()), "")
    return f"{type(error).__name__}{at}: {first[:300]}\n{str(error)[:2000]}"


def _pieces(model: nn.Module) -> dict[str, Any]:
    """What a model is made of: names of attributes, values of tensors."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name} attributes"] = sorted(vars(module)), module.training
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        found[name] = (type(tensor), id(tensor), tensor.detach().clone())
    return found


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    for name in before.keys() | after.keys():
        if name not in before or name not in after:
            return f"{name} is new or gone"
        a, b = before[name], after[name]
        if name.endswith(" attributes"):
            if a != b:
                return f"{name}: {set(a[0]) ^ set(b[0])}"
        elif a[:2] != b[:2] or not same(a[2], b[2]):
            return f"{name} has another value"
    return ""


def _restore(model: nn.Module, pieces: dict[str, Any]) -> None:
    """Gives parameters and buffers the values that they began with."""
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if name in pieces and not same(tensor, pieces[name][2]):
                tensor.copy_(pieces[name][2])


def _refusal(error: CaptureError) -> str:
    """The lines of the message that say why."""
    lines = [t.strip() for t in str(error).splitlines() if not t.startswith("no tracer takes")]
    return re.sub(r"\d+", "N", " | ".join(lines)[:240])


def _dense_compiled(yard: Yardstick, way: str, count: int) -> list[Outcome] | None:
    """The dense model on the same backend; None where it cannot run there."""
    torch._dynamo.reset()
    model = yard.subject.model()
    try:
        return steps(torch.compile(model, backend=INNER[way]), model, yard.subject, count)
    except Exception:
        return None


def _dense_fails(yard: Yardstick, way: str) -> str:
    """The exception that the dense model raises on that backend, or nothing."""
    torch._dynamo.reset()
    model = yard.subject.model()
    try:
        steps(torch.compile(model, backend=INNER[way]), model, yard.subject, 1)
    except Exception as error:
        return type(error).__name__
    return ""
