"""Every step that can still be run, dense and rewritten, and what each shows."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dropit_fx import measure
from dropit_fx.api import transform
from dropit_fx.capture.untouched import untouched
from dropit_fx.capture.untouched.values import equal_bits
from dropit_fx.check.compare import differing, finite, losses, paired, unlike
from dropit_fx.check.found import Check, Finding
from dropit_fx.check.step import Seen, Task, take_step
from dropit_fx.codecs import CODEC
from dropit_fx.config import Config, ConfigError, Rule
from dropit_fx.report.rows import FUSED, Report, merged, mib, report

Backend = Literal["transform", "dropit_eager", "dropit"]
BACKENDS: tuple[Backend, ...] = ("transform", "dropit_eager", "dropit")
COSINE = 0.9  # a gradient of less is worth a note
SHOWN = 5  # parameters whose gradients lose most
_FULL = {"random": "mink"}  # what keeps all, and multiplies nothing


@contextmanager
def surroundings(backend: Backend) -> Iterator[None]:
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


class Rewritten(NamedTuple):
    """What a rewritten model does, and what is said of it."""

    seen: Seen
    predicted: int  # bytes
    measured: int
    told: Report

    @property
    def fused(self) -> bool:
        """Whether a loss is computed with its layer, which rounds a sum otherwise."""
        return any(row.codec == FUSED for row in self.told.rows)


@dataclass
class Checker:
    """Runs what is left to run, and collects what it shows."""

    task: Task
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
        again = dense and self._try(
            "dense model", lambda: take_step(self.task, *[self.task.model] * 2)
        )
        if dense is None or again is None:
            return
        unrepeated = unlike(dense, again, exact=False)
        if unrepeated:
            where = f"from one seed, it does not repeat its own {_listed(unrepeated)}"
            self.say("dense model", False, f"{where}: nothing can be compared")
            return
        self.exact = self.backend != "dropit" and not unlike(dense, again, exact=True)
        if not self.task.model.training:
            self.say("mode", None, "eval, as it was given: train() it to check what training does")
        for name, derive in (("exact formats", False), ("values made again", True)):
            if derive and not (self.config.derive or self.config.loss_classes):
                continue
            config = _exact(self.config, derive)
            seen = self._try(name, functools.partial(self._packed, config))
            if seen is not None:
                self._compare_exact(name, *self._trained(dense, seen), self.exact and not derive)
        found = self._try("packed", lambda: self._packed(self.config, measured=True))
        if found is not None:
            self._compare(dense, found)

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

    def _dense(self) -> Seen:
        first = take_step(self.task, self.task.model, self.task.model)
        self.numbers["dense_bytes"] = self._measured(self.task.model)
        return first

    def _measured(self, runs: Callable[..., Any]) -> int:
        args, kwargs = self.task.inputs()
        return measure.saved_bytes(runs, *args, **kwargs)

    def _packed(self, config: Config, measured: bool = False) -> Rewritten:
        """A rewritten model; its bytes are 0 unless they are to be ``measured``."""
        model, (args, kwargs) = self.task.model, self.task.inputs()
        if self.backend == "transform":
            rewritten = transform(model, config, example_args=args, example_kwargs=kwargs)
            seen = take_step(self.task, rewritten, rewritten)
            told = report(rewritten)
            found = self._measured(rewritten) if measured else 0
            return Rewritten(seen, told.kept_bytes, found, told)
        from dropit_fx.compile import backend as plug_in

        torch.compiler.reset()
        before = len(plug_in.compiled_graphs())
        options: dict[str, Any] = {"config": config}
        if self.backend == "dropit":
            # chance as in eager mode, which draws masks in the order of memory
            options |= {"fallback_random": True, "layout_optimization": False}
        compiled = torch.compile(model, backend=self.backend, options=options)
        seen = take_step(self.task, compiled, model)
        graphs = plug_in.compiled_graphs()[before:]
        if not graphs:
            raise RuntimeError("the plug-in was handed no graph that it could rewrite")
        predicted = sum(g.saved_bytes for g in graphs)
        told = merged([g.report for g in graphs])
        return Rewritten(seen, predicted, self._measured(compiled) if measured else 0, told)

    def _compare_exact(self, name: str, dense: Seen, seen: Seen, exact: bool) -> None:
        wrong = differing(dense.gradients, seen.gradients, exact)
        how = "have the same bits" if exact else "are equal to rounding"
        text = f"{len(dense.gradients)} gradients {how}"
        if wrong:
            text = f"{len(wrong)} of {len(dense.gradients)} gradients differ: {_listed(wrong)}"
        self.say(f"gradients, {name}", not wrong, text)

    def _compare(self, dense: Seen, found: Rewritten) -> None:
        seen = found.seen
        self._outputs(dense, found)
        wrong = differing(dense.buffers, seen.buffers, self.exact)
        text = f"{len(dense.buffers)} buffers are as dense leaves them"
        self.say("buffers", not wrong, f"differ: {_listed(wrong)}" if wrong else text)
        self._chance(dense, seen)
        self._bytes(found.predicted, found.measured)
        stays = finite(seen) or not finite(dense)
        text = "output, loss and gradients are" if stays else "output, loss or gradients are not"
        text += "" if finite(dense) else ", or are not in the dense model either"
        self.say("finite", stays, text)
        self.numbers["first_loss"] = seen.loss
        self.say("first loss", None, f"{seen.loss:.6g}, dense {dense.loss:.6g}")
        self._untrained(found)
        self._gradients(*self._trained(dense, found))

    def _names(self, names: Iterable[str]) -> set[str]:
        """Names of parameters as gradients have them: of tied ones the first."""
        every = dict(self.task.model.named_parameters(remove_duplicate=False))
        firsts = {id(p): name for name, p in self.task.model.named_parameters()}
        return {firsts[id(every[name])] for name in names if name in every}

    def _trained(self, dense: Seen, found: Rewritten) -> tuple[Seen, Seen]:
        """Both without the gradients that a rule of the config changes."""
        left_out = self._names((*found.told.untrained, *found.told.shared))

        def kept(seen: Seen) -> Seen:
            gradients = {n: g for n, g in seen.gradients.items() if n not in left_out}
            return replace(seen, gradients=gradients)

        return kept(dense), kept(found.seen)

    def _untrained(self, found: Rewritten) -> None:
        """What no rule trains has no gradient."""
        told = found.told
        if not told.untrained and not told.shared:
            return
        wrong = [n for n in self._names(told.untrained) if found.seen.gradients.get(n) is not None]
        text = f"{len(told.untrained)} parameters get no gradient, as the config says"
        if told.shared:
            text += f"; {len(told.shared)} from some of their readers alone, and are not compared"
        text = f"these get a gradient all the same: {_listed(sorted(wrong))}" if wrong else text
        self.say("not trained", not wrong, text)

    def _outputs(self, dense: Seen, found: Rewritten) -> None:
        exact, wrong, dropped = self.exact and not found.fused, [], set[str]()
        for at, (theirs, ours) in enumerate(zip(dense.outputs, found.seen.outputs, strict=True)):
            if found.fused and self.config.drop_logits:
                dropped |= {n for n in theirs.keys() - ours.keys() if self._is_logits(theirs[n])}
            there = {name: tensor for name, tensor in theirs.items() if name not in dropped}
            wrong += [f"{n} (call {at + 1})" for n in differing(there, ours, exact)]
            if len(there) != len(ours):
                wrong.append(f"{len(ours)} tensors in the place of {len(there)} (call {at + 1})")
        how = "the same bits as dense" if exact else "equal to rounding"
        text = f"{len(dense.outputs[0]) - len(dropped)} tensors in two calls: {how}"
        text += f"; None as drop_logits asks for: {_listed(sorted(dropped))}" if dropped else ""
        self.say("output", not wrong, f"differs: {_listed(wrong)}" if wrong else text)

    def _is_logits(self, output: Tensor) -> bool:
        return output.dim() > 0 and output.shape[-1] >= self.config.loss_classes

    def _chance(self, dense: Seen, seen: Seen) -> None:
        """Where two calls of the dense model differ, those of the rewritten one do."""
        moved = [n for n, t in dense.outputs[0].items() if not equal_bits(t, dense.outputs[1][n])]
        frozen = [
            n
            for n in moved
            if n in seen.outputs[0] and equal_bits(seen.outputs[0][n], seen.outputs[1][n])
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

    def _gradients(self, dense: Seen, seen: Seen) -> None:
        whole, each = losses(paired(dense.gradients, seen.gradients))
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


def _exact(config: Config, derive: bool) -> Config:
    """The same rules in formats that lose nothing, also where that frees nothing.

    With ``derive`` what is made again, values and logits, may be rounded otherwise.
    """

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
    classes = config.loss_classes if derive else 0
    derive = derive and config.derive
    return replace(config, rules=rules, derive=derive, loss_classes=classes, force=True)


def _told(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:6])}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))
