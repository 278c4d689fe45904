"""One program, dense and packed: what differs, where nothing may.

The dense model in eager mode is the oracle. Settings that lose nothing have to give its gradients
to the last bit; those that round, gradients no further off than a dense run whose saved tensors
are disturbed about as much. What a backend of PyTorch itself gets otherwise is not held against
the packed model: it is compared with the dense model on the same backend.
"""

from __future__ import annotations

import copy
import gc
import itertools
import linecache
import re
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fuzz_programs import Program
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import dropit_fx
from dropit_fx import backend, measure
from dropit_fx.capture import CaptureError
from dropit_fx.config import Config, make_config
from dropit_fx.fake import concrete_fakes

WAYS = ("transform", "dropit_eager", "aot", "inductor")
INNER = {"dropit_eager": "eager", "aot": "aot_eager_decomp_partition", "inductor": "inductor"}

_EXACT = [
    {"codec": "bitmask"},
    {"op": ["linear", "conv*", "*mm", "matmul"], "codec": "mink", "gamma": 0.0},
    {"op": "*", "codec": "quant", "bits": None},
]


def _derived() -> Config:
    """Every value packed without loss, or derived: rules as of a preset, which may be derived."""
    config = make_config({"preset": None, "force": True, "derive": True, "rules": _EXACT})
    return replace(config, rules=tuple(replace(r, preset=True) for r in config.rules))


CONFIGS: dict[str, Config] = {
    "packed": replace(_derived(), derive=False),
    "derived": _derived(),
    "lossless": make_config(preset="lossless"),
    "balanced": make_config(preset="balanced"),
}
LOSSY = ("balanced",)


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
        return f"{self.way} {self.kind} {plain if self.kind == 'crash' else ''}".strip()


@dataclass
class Verdict:
    """What came of one program: counts of (way, what became of it), and its faults."""

    skipped: str = ""
    passed: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


# Running ------------------------------------------------------------------------------------------

_numbers = itertools.count()


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

    def inputs(self, seed: int = 1) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        made: tuple[Tensor, ...] = self.space["inputs"]()
        return made


@dataclass
class Outcome:
    """All that a training step leaves."""

    outputs: list[Any]
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    inputs: list[Tensor]


def step(
    run: Callable[..., Any], model: nn.Module, inputs: tuple[Tensor, ...], seed: int
) -> Outcome:
    """Forward and backward for a random cotangent."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = run(*inputs)
    tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    generator = torch.Generator().manual_seed(7)
    total: Any = 0
    for t in tensors:
        if t.requires_grad and t.is_floating_point():
            total = total + (t.float() * torch.randn(t.shape, generator=generator)).sum()
    outputs = [(t.detach().clone(), t.requires_grad) for t in tensors]
    if isinstance(total, Tensor):
        total.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    grads |= {f"input {i}": t.grad for i, t in enumerate(inputs) if t.is_leaf}
    return Outcome(
        outputs,
        {n: None if g is None else g.detach().clone() for n, g in grads.items()},
        {n: b.detach().clone() for n, b in model.named_buffers()},
        [t.detach().clone() for t in inputs],
    )


def steps(
    run: Callable[..., Any], model: nn.Module, subject: Subject, count: int = 2
) -> list[Outcome]:
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


# Comparing ----------------------------------------------------------------------------------------


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, where NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b)) or (
        a.is_floating_point()
        and bool(torch.equal(a.isnan(), b.isnan()))
        and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    )


def _gap(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(b.shape)} {b.dtype} for {tuple(a.shape)} {a.dtype}"
    if not a.is_floating_point():
        return "other integers"
    return f"relative error {relative(a, b):.2g}"


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / a.norm().clamp(min=1e-30))


def differences(
    dense: Outcome, packed: Outcome, close: Callable[[str, Tensor, Tensor], bool], loose: bool
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
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    rough = a.dtype in (torch.bfloat16, torch.float16)
    tolerance = 0.03 if rough else 1e-4
    scale = float(a.nan_to_num().abs().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale + 1e-7, equal_nan=True)


# Checking -----------------------------------------------------------------------------------------


@dataclass
class Yardstick:
    """The dense outcomes, and how far gradients move when saved tensors are disturbed."""

    subject: Subject
    dense: list[Outcome] = field(default_factory=list)
    moved: dict[str, float] | None = None
    bytes: int | None = None

    def rounding(self, name: str, a: Tensor, b: Tensor) -> bool:
        """Whether a gradient is as near as rounding leaves it."""
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not bool(a.isfinite().all()):
            return True
        if not bool(b.isfinite().all()):
            return False
        if self.moved is None:
            self.moved = self._moved()
        whole = sum(float(g.double().norm()) for g in self.dense[0].grads.values() if g is not None)
        gap = float((a.double() - b.double()).norm())
        return gap <= 0.25 * float(a.double().norm()) + 4 * self.moved[name] + 0.02 * whole

    def _moved(self) -> dict[str, float]:
        most: dict[str, float] = {}
        for seed in (1, 2, 3):
            model = self.subject.model()
            try:
                with disturbed(seed):
                    found = step(model, model, self.subject.inputs(1), 30)
            except RuntimeError:
                return dict.fromkeys(self.dense[0].grads, float("inf"))
            for name, a in self.dense[0].grads.items():
                b = found.grads[name]
                gap = 0.0 if a is None or b is None else float((a.double() - b.double()).norm())
                most[name] = max(most.get(name, 0.0), gap if gap == gap else float("inf"))
        return most


def check(
    program: Program,
    ways: tuple[str, ...] = ("transform", "dropit_eager"),
    configs: Mapping[str, tuple[str, ...]] | None = None,
    count_bytes: bool = True,
) -> Verdict:
    """Runs a program dense, and packed in each way with each of the way's configs."""
    verdict = Verdict()
    subject = Subject(program)
    try:
        model = subject.model()
        yard = Yardstick(subject)
        try:
            yard.dense = steps(model, model, subject)
            if count_bytes:
                yard.bytes = _saved(subject, model)
        except Exception as error:
            verdict.skipped = f"dense raises {type(error).__name__}"
            return verdict
        for way in ways:
            wanted = (configs or {}).get(way, tuple(CONFIGS))
            for name in wanted:
                _check_one(verdict, yard, way, name, count_bytes)
    finally:
        subject.forget()
    return verdict


def _saved(subject: Subject, run: Callable[..., Any]) -> int | None:
    """What a call saves; None where inputs that are written into get a history."""
    given = subject.inputs(1)
    torch.manual_seed(30)
    found = measure.saved_bytes(run, *given)
    return None if any(not t.is_leaf for t in given) else found


def _check_one(verdict: Verdict, yard: Yardstick, way: str, name: str, count_bytes: bool) -> None:
    def found(kind: str, detail: str) -> None:
        verdict.faults.append(Fault(way, name, kind, detail))

    before = len(verdict.faults)
    subject = yard.subject
    try:
        model = subject.model()
        if way == "transform":
            told = _pieces(model)
            torch.manual_seed(5)
            try:
                run: Any = dropit_fx.transform(model, CONFIGS[name], example_args=subject.inputs(1))
            finally:
                if changed := _changed(told, _pieces(model)):
                    found("model", changed)
            outcomes = steps(run, run, subject)
        else:
            torch._dynamo.reset()
            graphs = len(backend._compiled)
            options = {"config": CONFIGS[name], "inner": INNER[way]}
            run = torch.compile(model, backend="dropit", options=options)
            outcomes = steps(run, model, subject)
    except CaptureError as error:
        verdict.refused.append((way, name, str(error).splitlines()[0]))
        return
    except Exception as error:
        if way == "transform" or not _dense_fails(yard, way):
            found("crash", _tell(error))
            return
        verdict.refused.append((way, name, f"dense raises {type(error).__name__} there"))
        return
    lossy, loose = name in LOSSY, way in ("aot", "inductor")
    close = (
        yard.rounding
        if lossy
        else (lambda n, a, b: _near(a, b))
        if loose
        else (lambda n, a, b: same(a, b))
    )
    wrong: list[tuple[str, str]] = []
    for dense, packed in zip(yard.dense, outcomes, strict=True):
        wrong += differences(dense, packed, close, loose)
        if lossy:
            break
    if wrong and way != "transform" and (theirs := _dense_compiled(yard, way)) is not None:
        again: list[tuple[str, str]] = []
        for dense, packed in zip(theirs, outcomes, strict=True):
            again += differences(dense, packed, close, loose)
            if lossy:
                break
        wrong = again
    for kind, detail in dict(wrong).items():
        found(kind, detail)
    if count_bytes and not wrong and yard.bytes is not None:
        if way == "transform":
            report = dropit_fx.report(run)
            _count(found, yard, report, _saved(subject, run))
        elif len(backend._compiled) - graphs == 1 and way == "dropit_eager":
            _count(found, yard, backend._compiled[-1].report, _saved(subject, run))
    if len(verdict.faults) == before:
        verdict.passed.append((way, name))


def _count(found: Callable[[str, str], None], yard: Yardstick, report: Any, kept: Any) -> None:
    if kept is None:
        return
    if report.kept_bytes != kept:
        found("bytes", f"said {report.kept_bytes}, kept {kept} (dense keeps {yard.bytes})")
    elif report.dense_bytes != yard.bytes:
        found("bytes", f"dense: said {report.dense_bytes}, kept {yard.bytes}")


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


def _dense_compiled(yard: Yardstick, way: str) -> list[Outcome] | None:
    """The dense model on the same backend; None where it cannot run there."""
    torch._dynamo.reset()
    model = yard.subject.model()
    inner = INNER[way]
    run = torch.compile(model, backend=inner)
    return steps(run, model, yard.subject)


def _dense_fails(yard: Yardstick, way: str) -> bool:
    try:
        _dense_compiled(yard, way)
    except Exception:
        return True
    return False
