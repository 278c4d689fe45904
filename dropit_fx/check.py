"""Is a model packed rightly? ``check`` compares it with itself, dense, on the user's own inputs.

The dense model and rewritten ones take the same steps from the same seed. What must be equal is
compared bit by bit, or to rounding where a compiler rounds otherwise; what a lossy format costs in
the gradient is shown. Each step runs in an ``untouched`` block, and leaves the model as it was.
"""

from __future__ import annotations

import functools
import html
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn

from dropit_fx import measure
from dropit_fx.api import transform
from dropit_fx.capture.untouched import untouched
from dropit_fx.codecs import CODEC
from dropit_fx.config import Config, ConfigError, Rule, make_config
from dropit_fx.private import pytree
from dropit_fx.report.rows import as_text, mib, report

Backend = Literal["transform", "dropit_eager", "dropit"]
BACKENDS: tuple[Backend, ...] = ("transform", "dropit_eager", "dropit")
COSINE = 0.9  # a gradient of less is worth a note
SHOWN = 5  # parameters whose gradients lose most
NEGLIGIBLE = 1e-4  # of the largest gradient of a parameter: smaller ones are not compared by share
SEED = 20_230_202
# The relative error that counts as rounding, by the itemsize of the dtype in bytes
ROUNDING = {8: 1e-9, 4: 1e-4, 2: 3e-2, 1: 1e-1}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked.

    Attributes:
        name: What it is: ``"output"``, ``"buffers"``, ...
        passed: Whether it is as it must be; None where it is shown and decides nothing.
        text: What was found, for people.
    """

    name: str
    passed: bool | None
    text: str


@dataclass(frozen=True, kw_only=True)
class GradientError:
    """What a gradient loses.

    Attributes:
        name: Of the parameter (``"input 0"`` for an input that requires a gradient).
        relative: Norm of the difference over the norm of the dense gradient.
        cosine: Between the two, 1 where they point the same way.
    """

    name: str
    relative: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class Check:
    """What ``check`` found; true where nothing failed.

    Attributes:
        findings: A line for each thing that was checked, in order.
        dense_bytes: Measured: what the dense model saves for the backward, in bytes.
        predicted_bytes: What the report says that the rewritten one saves, in bytes.
        measured_bytes: What it was seen to save, in bytes.
        relative_error: Of the gradient of all parameters: norm of the difference over the dense
            norm; NaN where it was not found.
        cosine: Between both gradients of all parameters; NaN where it was not found.
        worst: The parameters whose gradients lose most, worst first.
        first_loss: The loss of the first step, of the rewritten model; NaN where there was none.
    """

    findings: tuple[Finding, ...]
    dense_bytes: int = 0
    predicted_bytes: int = 0
    measured_bytes: int = 0
    relative_error: float = math.nan
    cosine: float = math.nan
    worst: tuple[GradientError, ...] = ()
    first_loss: float = math.nan

    def __bool__(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the findings that failed."""
        return tuple(f.name for f in self.findings if f.passed is False)

    @property
    def verdict(self) -> str:
        """One line: passed, or what failed."""
        if not self.failed:
            return "passed: nothing but what the formats lose is lost"
        return f"FAILED: {', '.join(self.failed)}"

    def table(self) -> Table:
        """The findings as a rich table."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("checked", "", "found"):
            table.add_column(name, overflow="fold")
        for f in self.findings:
            table.add_row(f.name, _WORDS[f.passed], f.text, style="red" if _fails(f) else "")
        return table

    def __str__(self) -> str:
        """The table as plain text, and the verdict."""
        return f"{as_text(self.table())}{self.verdict}\n"

    def _repr_html_(self) -> str:
        """For notebooks."""
        rows = "".join(
            f"<tr><td>{html.escape(f.name)}</td><td>{_WORDS[f.passed]}</td>"
            f"<td>{html.escape(f.text)}</td></tr>"
            for f in self.findings
        )
        return f"<table>{rows}</table><p><b>{html.escape(self.verdict)}</b></p>"


_WORDS = {True: "ok", False: "FAILED", None: ""}


def _fails(finding: Finding) -> bool:
    return finding.passed is False


def check(
    model: nn.Module,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    config: str | PathLike[str] | Mapping[str, Any] | Config | None = None,
    preset: str | None = None,
    backend: Backend = "transform",
    loss: Callable[[Any], Tensor] | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> Check:
    """Checks on a model and inputs of one's own that packing changes what it must and no more.

    The model runs a few training steps, dense and rewritten, in the mode that it is in and under
    the caller's autocast. It fails where:

    * the model cannot be captured, or a step raises an error (the text says which);
    * the dense model does not repeat itself from the same seed, so that nothing can be compared;
    * in two calls from one seed, outputs or buffers have other bits than dense's: so dropout has to
      draw dense's masks;
    * an output differs from call to call in dense and not in the rewritten model;
    * with every format made exact, a gradient has other bits than dense's; or, where values are
      made again in the backward (``derive``), differs by more than rounding;
    * the report's bytes are not those that are measured;
    * an output, the loss or a gradient is not finite where dense's is.

    Rounding is a relative error of 1e-4 in float32 and 3e-2 in 16 bits, of the whole and, measured
    against the root mean square of all gradients, of each tensor. It counts in the place of equal
    bits with ``backend="dropit"``, and where the dense model does not repeat its own bits. What the
    formats of the config lose in the gradient is shown and does not fail.

    Args:
        model: Any module; afterwards it is what it was: values, gradients, modes, attributes,
            random states. Meanwhile there is a copy of its parameters.
        example_args: Positional inputs: real ones, on the model's device.
        example_kwargs: Keyword inputs.
        config: As for ``transform``.
        preset: As for ``transform``.
        backend: ``"transform"``, or one of the plug-in's: ``"dropit_eager"``, ``"dropit"``. These
            two forget what else ``torch.compile`` has compiled, so that it is compiled again.
        loss: From the model's output to a scalar. Default: its ``loss`` if it has one, otherwise
            a fixed random projection of everything in it that has a gradient.
        progress: Called with what is done next, for people who wait.

    Returns:
        The findings; ``bool(check)`` is the verdict, ``print(check)`` shows both.

    Raises:
        ConfigError: The config cannot mean anything, or there is no such backend.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"no backend {backend!r}. Choose one of: {', '.join(BACKENDS)}.")
    settled = make_config(config, preset=preset)
    task = _Task(model, tuple(example_args), dict(example_kwargs or {}), loss or _default_loss)
    checker = _Checker(task, settled, backend, progress)
    with _surroundings(backend):
        checker.run()
    return checker.result()


def _exact(config: Config, derive: bool) -> Config:
    """The same rules in formats that lose nothing, also where that frees nothing."""

    def exact(rule: Rule) -> Rule | None:
        codec = CODEC[rule.codec]
        options = {k: v for k, v in {"gamma": 0.0, "bits": None}.items() if k in codec.defaults()}
        if codec.lossless(codec.defaults() | dict(rule.options)):
            return rule
        if codec.slope or not codec.lossless(codec.defaults() | options):
            return None
        return replace(
            rule, codec=_FULL.get(rule.codec, rule.codec), options=tuple(options.items())
        )

    rules = tuple(r for r in map(exact, config.rules) if r is not None)
    return replace(config, rules=rules, derive=derive, force=True)


_FULL = {"random": "mink"}  # what keeps all, and multiplies nothing


# One step ---------------------------------------------------------------------------------------


@dataclass
class _Task:
    """What is run: the model, its inputs, and the loss."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[[Any], Tensor]

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies: a model may write into what it is given."""

        def copied(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.detach().clone().requires_grad_(x.requires_grad)

        given: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
            copied, (self.args, self.kwargs)
        )
        return given


@dataclass
class _Seen:
    """What two calls and a backward leave."""

    outputs: list[dict[str, Tensor]] = field(default_factory=list)
    loss: float = math.nan
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def _default_loss(output: Any) -> Tensor:
    """The output's own loss, or a fixed random projection of all that has a gradient."""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.numel() == 1:
        return own
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if not tensors:
        raise ValueError("no tensor that the model returns has a gradient")
    generator = torch.Generator().manual_seed(SEED)
    parts = []
    for tensor in tensors:
        flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        weights = torch.randn(flat.shape, generator=generator).to(flat.device)
        parts.append((flat.float() * weights).sum() / math.sqrt(max(flat.numel(), 1)))
    return torch.stack([p.to(parts[0].device) for p in parts]).sum()


def _seed() -> None:
    torch.manual_seed(SEED)
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)


def _step(task: _Task, runs: Callable[..., Any], owner: nn.Module) -> _Seen:
    """Two calls from one seed, the first with its backward; leaves all in the model.

    Args:
        task: Of which the model holds the parameters.
        runs: What is called.
        owner: The module that holds the buffers.
    """
    seen = _Seen()
    args, kwargs = task.inputs()
    task.model.zero_grad(set_to_none=True)
    _seed()
    output = runs(*args, **kwargs)
    seen.outputs.append(_named(output))
    value = task.loss(output)
    if value.numel() != 1:
        raise ValueError(f"the loss has {value.numel()} elements: it must be a scalar")
    seen.loss = float(value.detach())
    torch.autograd.backward([value])
    del output, value
    seen.gradients = {n: p.grad for n, p in task.model.named_parameters() if p.requires_grad}
    for name, leaf in _named((args, kwargs), detached=False).items():
        if leaf.requires_grad:
            seen.gradients[f"input {name}"] = leaf.grad
    seen.outputs.append(_named(runs(*task.inputs()[0], **task.inputs()[1])))
    buffers = dict(task.model.named_buffers()) | dict(owner.named_buffers())
    seen.buffers = {n: b.detach().clone() for n, b in buffers.items()}
    task.model.zero_grad(set_to_none=True)
    return seen


def _named(tree: Any, detached: bool = True) -> dict[str, Tensor]:
    leaves = [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]
    return {str(i): t.detach().clone() if detached else t for i, t in enumerate(leaves)}


# Comparing --------------------------------------------------------------------------------------


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether both hold the same values, NaN in the same places."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.layout != torch.strided or torch.equal(a, b):
        return a.layout != torch.strided or torch.equal(a, b)
    return bool(((a == b) | ((a != a) & (b != b))).all())


Tensors = Mapping[str, Tensor | None]


def _differing(dense: Tensors, other: Tensors, exact: bool) -> list[str]:
    """The names that differ: in a bit, or by more than rounding."""
    names = [n for n in dense if (dense[n] is None) != (other.get(n) is None)]
    pairs = [(n, a, other[n]) for n, a in dense.items() if a is not None and n not in names]
    scale = _root_mean_square([a for _, a, _ in pairs])
    for name, a, b in pairs:
        assert b is not None
        if _equal(a, b):
            continue
        if exact or a.shape != b.shape or a.dtype != b.dtype or not a.dtype.is_floating_point:
            names.append(name)
            continue
        size = float(a.double().norm()) + scale * math.sqrt(a.numel())
        error = float((a.double() - b.double()).norm())
        if not error <= ROUNDING[a.dtype.itemsize] * size:
            names.append(name)
    return names


def _unlike(a: _Seen, b: _Seen, exact: bool) -> list[str]:
    """What of one step another does not repeat."""
    pairs: dict[str, tuple[Tensors, Tensors]] = {
        "output": (a.outputs[0], b.outputs[0]),
        "second output": (a.outputs[1], b.outputs[1]),
        "gradients": (a.gradients, b.gradients),
        "buffers": (a.buffers, b.buffers),
    }
    return [name for name, (x, y) in pairs.items() if _differing(x, y, exact)]


def _root_mean_square(tensors: list[Tensor]) -> float:
    floats = [t.detach() for t in tensors if t.dtype.is_floating_point and t.numel()]
    total = sum(float(t.double().square().sum()) for t in floats)
    return math.sqrt(total / max(sum(t.numel() for t in floats), 1))


def _finite(seen: _Seen) -> bool:
    tensors = [*seen.outputs[0].values(), *(g for g in seen.gradients.values() if g is not None)]
    return math.isfinite(seen.loss) and all(bool(t.isfinite().all()) for t in tensors)


def _losses(dense: Tensors, other: Tensors) -> tuple[GradientError, list[GradientError]]:
    """Of all parameters together, and of each, the worst first."""
    dots = {
        n: (
            float(a.double().norm()),
            float((b.double() - a.double()).norm()),
            _dot(a, b),
            _dot(b, b),
        )
        for n, a in dense.items()
        if a is not None and (b := other.get(n)) is not None and a.shape == b.shape
    }
    largest = max((size for size, *_ in dots.values()), default=0.0)
    each = [
        GradientError(
            name=n, relative=error / size, cosine=dot / max(size * math.sqrt(mine), 1e-300)
        )
        for n, (size, error, dot, mine) in dots.items()
        if size > NEGLIGIBLE * largest
    ]
    norm = math.sqrt(sum(size**2 for size, *_ in dots.values()))
    error = math.sqrt(sum(error**2 for _, error, *_ in dots.values()))
    mine = math.sqrt(sum(m for *_, m in dots.values()))
    dot = sum(d for _, _, d, _ in dots.values())
    whole = GradientError(
        name="all",
        relative=error / norm if norm else math.nan,
        cosine=dot / (norm * mine) if norm * mine else math.nan,
    )
    return whole, sorted(
        each, key=lambda e: -e.relative if math.isfinite(e.relative) else -math.inf
    )


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


# Running it all ---------------------------------------------------------------------------------


@contextmanager
def _surroundings(backend: Backend) -> Iterator[None]:
    """Gradients on, no compile caches, and the plug-in's list of graphs as it was."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        stack.enter_context(torch.random.fork_rng(devices))
        if backend == "transform":
            yield
            return
        from dropit_fx.compile import backend as plug_in

        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".*force_disable_caches")
        caches = torch.compiler.config.patch(force_disable_caches=True)  # type: ignore[attr-defined]
        stack.enter_context(caches)
        before = len(plug_in.compiled_graphs())
        try:
            yield
        finally:
            plug_in.forget_compiled_graphs(before)
            torch.compiler.reset()


@dataclass
class _Checker:
    task: _Task
    config: Config
    backend: Backend
    progress: Callable[[str], object]
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    exact: bool = True  # the dense model repeats its own bits, and inductor rounds nothing anew

    def result(self) -> Check:
        """What was found."""
        return Check(findings=tuple(self.findings), **self.numbers)

    def say(self, name: str, passed: bool | None, text: str) -> None:
        """Adds a finding."""
        self.findings.append(Finding(name=name, passed=passed, text=text))

    def run(self) -> None:
        """Every step that can still be run."""
        dense = self._try("dense model", self._dense)
        again = dense and self._try("dense model", lambda: _step(self.task, *[self.task.model] * 2))
        if dense is None or again is None:
            return
        unlike = _unlike(dense, again, exact=False)
        if unlike:
            where = f"from one seed, it does not repeat its own {_listed(unlike)}"
            self.say("dense model", False, f"{where}: nothing can be compared")
            return
        self.exact = self.backend != "dropit" and not _unlike(dense, again, exact=True)
        if not self.task.model.training:
            self.say("mode", None, "eval, as it was given: train() it to check what training does")
        for name, derive in (("exact formats", False), ("values made again", True)):
            if derive and not self.config.derive:
                continue
            config = _exact(self.config, derive)
            seen = self._try(name, functools.partial(self._packed, config))
            if seen is not None:
                self._compare_exact(name, dense, seen[0], self.exact and not derive)
        found = self._try("packed", lambda: self._packed(self.config, measured=True))
        if found is not None:
            self._compare(dense, *found)

    def _try(self, name: str, step: Callable[[], Any]) -> Any:
        """The result of a step; None, and a finding, where it fails."""
        self.progress(name)
        try:
            with untouched(self.task.model, values=True, generators=False):
                return step()
        except ConfigError:
            raise
        except Exception as error:  # the user's code runs: anything can be raised
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from error
            self.say(name, False, _told(error))
            return None

    def _dense(self) -> _Seen:
        first = _step(self.task, self.task.model, self.task.model)
        self.numbers["dense_bytes"] = self._measured(self.task.model)
        return first

    def _measured(self, runs: Callable[..., Any]) -> int:
        args, kwargs = self.task.inputs()
        return measure.saved_bytes(runs, *args, **kwargs)

    def _packed(self, config: Config, measured: bool = False) -> tuple[_Seen, int, int]:
        """What the rewritten model does, and its bytes: predicted, and as measured."""
        model, (args, kwargs) = self.task.model, self.task.inputs()
        if self.backend == "transform":
            rewritten = transform(model, config, example_args=args, example_kwargs=kwargs)
            seen = _step(self.task, rewritten, rewritten)
            predicted = report(rewritten).kept_bytes
            return seen, predicted, self._measured(rewritten) if measured else 0
        from dropit_fx.compile import backend as plug_in

        torch.compiler.reset()
        before = len(plug_in.compiled_graphs())
        options: dict[str, Any] = {"config": config}
        if self.backend == "dropit":
            # chance as in eager mode, which draws masks in the order of memory
            options |= {"fallback_random": True, "layout_optimization": False}
        compiled = torch.compile(model, backend=self.backend, options=options)
        seen = _step(self.task, compiled, model)
        graphs = plug_in.compiled_graphs()[before:]
        if not graphs:
            raise RuntimeError("the plug-in was handed no graph that it could rewrite")
        found = self._measured(compiled) if measured else 0
        return seen, sum(g.saved_bytes for g in graphs), found

    def _compare_exact(self, name: str, dense: _Seen, seen: _Seen, exact: bool) -> None:
        wrong = _differing(dense.gradients, seen.gradients, exact)
        how = "have the same bits" if exact else "are equal to rounding"
        text = f"{len(dense.gradients)} gradients {how}"
        if wrong:
            text = f"{len(wrong)} of {len(dense.gradients)} gradients differ: {_listed(wrong)}"
        self.say(f"gradients, {name}", not wrong, text)

    def _compare(self, dense: _Seen, seen: _Seen, predicted: int, measured: int) -> None:
        self._outputs(dense, seen)
        wrong = _differing(dense.buffers, seen.buffers, self.exact)
        text = f"{len(dense.buffers)} buffers are as dense leaves them"
        self.say("buffers", not wrong, f"differ: {_listed(wrong)}" if wrong else text)
        self._chance(dense, seen)
        self._bytes(predicted, measured)
        finite = _finite(seen) or not _finite(dense)
        text = "output, loss and gradients are" if finite else "output, loss or gradients are not"
        text += "" if _finite(dense) else ", or are not in the dense model either"
        self.say("finite", finite, text)
        self.numbers["first_loss"] = seen.loss
        self.say("first loss", None, f"{seen.loss:.6g}, dense {dense.loss:.6g}")
        self._gradients(dense, seen)

    def _outputs(self, dense: _Seen, seen: _Seen) -> None:
        wrong = []
        for at, (theirs, ours) in enumerate(zip(dense.outputs, seen.outputs, strict=True)):
            wrong += [f"{n} (call {at + 1})" for n in _differing(theirs, ours, self.exact)]
            if len(theirs) != len(ours):
                wrong.append(f"{len(ours)} tensors in the place of {len(theirs)} (call {at + 1})")
        how = "the same bits as dense" if self.exact else "equal to rounding"
        text = f"{len(dense.outputs[0])} tensors in two calls: {how}"
        self.say("output", not wrong, f"differs: {_listed(wrong)}" if wrong else text)

    def _chance(self, dense: _Seen, seen: _Seen) -> None:
        """Where two calls of the dense model differ, those of the rewritten one do."""
        moved = [n for n, t in dense.outputs[0].items() if not _equal(t, dense.outputs[1][n])]
        frozen = [
            n
            for n in moved
            if n in seen.outputs[0] and _equal(seen.outputs[0][n], seen.outputs[1][n])
        ]
        text = "drawn again in each call" if moved else "two calls of the dense model are equal"
        self.say("chance", not frozen, f"frozen in {_listed(frozen)}" if frozen else text)

    def _bytes(self, predicted: int, measured: int) -> None:
        self.numbers |= {"predicted_bytes": predicted, "measured_bytes": measured}
        dense = self.numbers["dense_bytes"]
        share = f", {measured / dense:.1%} of dense ({mib(dense)})" if dense else ""
        text = f"{mib(measured)} saved as predicted{share}"
        if predicted != measured:
            text = f"predicted {predicted} bytes, measured {measured}{share}"
        self.say("bytes", predicted == measured, text)

    def _gradients(self, dense: _Seen, seen: _Seen) -> None:
        whole, each = _losses(dense.gradients, seen.gradients)
        self.numbers |= {
            "relative_error": whole.relative,
            "cosine": whole.cosine,
            "worst": tuple(each[:SHOWN]),
        }
        note = ""
        if whole.cosine < COSINE:
            note = f": below {COSINE}; take more bits, or keep what the worst below read"
        text = f"relative error {whole.relative:.3f}, cosine {whole.cosine:.4f}{note}"
        self.say("gradient, as configured", None, text)
        for e in each[:SHOWN]:
            self.say(f"  {e.name}", None, f"relative error {e.relative:.3f}, cosine {e.cosine:.4f}")


def _told(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:6])}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))
