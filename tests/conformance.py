"""Every op and module of PyTorch's own test tables, packed: ``make conformance``.

Each entry of ``op_db`` and ``module_db`` that has a gradient, with PyTorch's own samples of its
arguments, small ones and one of more than a block. They are the model's inputs, or activations
behind them. ``transform`` and the plug-in, ``lossless`` bit by bit and ``balanced`` as near as
rounding leaves it; in float32, and in the other dtypes where the op table has a row. What PyTorch
cannot do itself is found out by running it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import survey
import torch
import torch.utils._pytree as pytree
from fuzz_check import Subject, check_subject
from fuzz_programs import Program
from survey import Result
from torch import Tensor, nn

SAMPLES = 2  # of an entry; from as many as AMONG of PyTorch's
AMONG = 200
ENLARGED = 20  # the size of a dimension that PyTorch's samples make 5
MOST = 100_000  # elements of a sample
WAYS = ("transform", "dropit_eager")
CONFIGS = dict.fromkeys(WAYS, ("lossless", "balanced"))
DTYPES = {"float32": torch.float32, "float64": torch.float64} | {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Call = Callable[[list[Tensor]], Any]


@dataclass(frozen=True, eq=False)
class Sample:
    """A call of an op or a module.

    Attributes:
        tensors: Its tensor arguments.
        make: What takes them, a fresh one each time: an op, or a module.
    """

    tensors: list[Tensor]
    make: Callable[[], Callable[..., Any]]


class _Called(nn.Module):
    """A call as a model.

    Attributes:
        copied: Which of its arguments it gets as copies. None: as they are.
        results: How many tensors it returns, of which copies go on; None for one that is no tuple.
    """

    def __init__(
        self, call: Callable[..., Any], copied: tuple[bool, ...] | None, results: int | None
    ) -> None:
        super().__init__()
        self.call, self.copied, self.results = call, copied, results

    def run(self, *tensors: Tensor) -> Any:
        if self.copied is None:
            return self.call(*tensors)
        out = self.call(
            *(t.clone() if copy else t for t, copy in zip(tensors, self.copied, strict=True))
        )
        if self.results is None:
            return out.clone()
        return tuple(out[i].clone() for i in range(self.results))


@functools.cache
def _model_of(arity: int) -> type[_Called]:
    """With as many arguments: tracers have no use for ``*tensors``."""
    names = ", ".join(f"t{i}" for i in range(arity))
    space: dict[str, Any] = {}
    exec(f"def forward(self, {names}):\n    return self.run({names})", space)
    return type("Called", (_Called,), {"forward": space["forward"]})


@dataclass
class Called(Subject):
    """A sample, in the place of a random program."""

    sample: Sample = field(kw_only=True)
    behind: bool = False

    def __post_init__(self) -> None:
        self.space = {"checkpoint": None}

    def forget(self) -> None:
        pass

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        given = self.sample.tensors
        copied = tuple(t.is_floating_point() for t in given) if self.behind else None
        made = _model_of(len(given))(self.sample.make(), copied, self._results)
        return made.train(self.program.training)

    @functools.cached_property
    def _results(self) -> int | None:
        with torch.no_grad():
            found = self.sample.make()(*self.inputs())
        return len(found) if isinstance(found, tuple | list) else None

    def inputs(self, seed: int = 1) -> tuple[Tensor, ...]:
        given = self.sample.tensors
        return tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in given)


# Samples ------------------------------------------------------------------------------------------


@contextmanager
def _sizes(size: int) -> Iterator[None]:
    """PyTorch's samples have dimensions of that size where they have 5, and of 20 at most."""
    from torch.testing._internal import common_methods_invocations
    from torch.testing._internal.opinfo import core

    places = [(m, n) for m in (common_methods_invocations, core) for n in ("S", "M", "L")]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, max(size, 20) if name == "L" else max(size, 10 if name == "M" else 5))
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


@functools.cache
def _ops() -> dict[str, Any]:
    """Entries of ``op_db`` that have gradients, by name."""
    from torch.testing._internal import common_methods_invocations as cmi

    # they seed where chance is drawn, which no tracer follows
    cmi.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    return {
        ".".join(filter(None, (info.name, info.variant_test_name))): info
        for info in cmi.op_db
        if info.supports_autograd and torch.float32 in info.dtypes
    }


@functools.cache
def _modules() -> dict[str, Any]:
    from torch.testing._internal.common_modules import module_db

    return {info.name: info for info in module_db if not info.is_lazy}


@functools.cache
def _with_row() -> frozenset[str]:
    """Names in ``op_db`` of what the op table has a row for."""
    from op_cases import RECORDS

    infos = (record.op_info for record in RECORDS.values())
    named = (info for info in infos if info and not isinstance(info, str))  # else why there is none
    return frozenset(".".join(filter(None, (info.name, info.variant))) for info in named)


def _op_samples(info: Any, dtype: torch.dtype, size: int) -> Iterator[Sample]:
    with _sizes(size):
        torch.manual_seed(0)
        found = list(itertools.islice(info.sample_inputs("cpu", dtype, requires_grad=True), AMONG))
    for sample in found:
        leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        finish = sample.output_process_fn_grad

        def made(leaves: Any = leaves, spec: Any = spec, finish: Any = finish) -> Any:
            def call(*tensors: Tensor) -> Any:
                left = iter(tensors)
                x, args, kwargs = pytree.tree_unflatten(
                    [next(left) if isinstance(t, Tensor) else t for t in leaves], spec
                )
                return finish(info.op(x, *args, **kwargs))

            return call

        yield Sample([t for t in leaves if isinstance(t, Tensor)], made)


def _module_samples(info: Any, dtype: torch.dtype, training: bool) -> Iterator[Sample]:
    torch.manual_seed(0)
    found = info.module_inputs_func(info, "cpu", dtype, True, training)
    for sample in itertools.islice(found, AMONG):
        ctor, given = sample.constructor_input, sample.forward_input
        leaves, spec = pytree.tree_flatten((given.args, given.kwargs))

        def made(ctor: Any = ctor, leaves: Any = leaves, spec: Any = spec) -> Any:
            settings = {"device": "cpu", "dtype": dtype} | ctor.kwargs
            try:
                module = info.module_cls(*ctor.args, **settings)
            except TypeError:  # of those that have no parameters
                module = info.module_cls(*ctor.args, **ctor.kwargs).to(dtype)
            return _Layer(module, leaves, spec)

        yield Sample([t for t in leaves if isinstance(t, Tensor)], made)


class _Layer(nn.Module):
    """A module with the arguments of a sample that are no tensors."""

    def __init__(self, module: nn.Module, leaves: list[Any], spec: Any) -> None:
        super().__init__()
        self.module, self.leaves, self.spec = module, leaves, spec

    def forward(self, *tensors: Tensor) -> Any:
        left = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(left) if isinstance(t, Tensor) else t for t in self.leaves], self.spec
        )
        return self.module(*args, **kwargs)


def _elements(sample: Sample) -> int:
    return sum(t.numel() for t in sample.tensors)


def _chosen(samples: Iterator[Sample], limit: int) -> list[Sample]:
    """Some of them, the first and the largest among these."""
    found = [s for s in samples if s.tensors and _elements(s) <= MOST]
    found = [s for s in found if all(t.layout == torch.strided for t in s.tensors)]
    if len(found) <= limit:
        return found
    largest = max(found, key=_elements)
    step = max(1, len(found) // max(1, limit - 1))
    return list(dict.fromkeys([*found[::step][: limit - 1], largest]))


def subjects(item: str, thorough: bool) -> Iterator[tuple[str, Called]]:
    """The samples of an item, ``op/<name>/<dtype>`` or ``module/<name>/<dtype>``.

    All but the last of them, the largest, only where it is to be ``thorough``.
    """
    kind, name, word = item.split("/")
    dtype = DTYPES[word]
    if kind == "op":
        info = _ops()[name]
        small, large = (_op_samples(info, dtype, size) for size in (5, ENLARGED))
        samples = [("", s) for s in _chosen(small, SAMPLES)]
        with contextlib.suppress(Exception):  # some samples are of their own sizes alone
            samples += [(" enlarged", s) for s in _chosen(large, 1)]
        modes: tuple[bool, ...] = (True,)
    else:
        info = _modules()[name]
        modes = (True, False) if info.train_and_eval_differ else (True,)
        samples = [("", s) for s in _chosen(_module_samples(info, dtype, True), SAMPLES + 1)]
    seen, positions = set(), (False, True)
    if not thorough:
        samples, modes, positions = samples[-1:], modes[:1], (True,)
    for (how, sample), training, behind in itertools.product(samples, modes, positions):
        shapes = ", ".join("x".join(map(str, t.shape)) or "scalar" for t in sample.tensors)
        told = f"{item}{how} ({shapes}){'' if training else ' eval'}{' behind' if behind else ''}"
        if told in seen:
            continue
        seen.add(told)
        yield told, Called(Program("", training), sample=sample, behind=behind)


# Checking -----------------------------------------------------------------------------------------

begin = survey.quieten


def items() -> list[str]:
    """All there are: float32 first, then the other dtypes where the op table has a row."""
    out = [f"op/{name}/float32" for name in _ops()]
    out += [f"module/{name}/float32" for name in _modules()]
    for word, dtype in DTYPES.items():
        if word != "float32":
            known = ((name, info) for name, info in _ops().items() if name in _with_row())
            out += [f"op/{name}/{word}" for name, info in known if dtype in info.dtypes]
    return out


def check(item: str, thorough: bool = True) -> Iterator[Result]:
    """A result for each sample of an item in each position."""
    group = item.split("/")[1]
    try:
        found = list(subjects(item, thorough))
    except Exception as error:
        yield Result(item, group, "failed", f"its samples cannot be made: {error!r}")
        return
    for told, subject in found:
        with torch.random.fork_rng(devices=()):
            verdict = check_subject(subject, WAYS, CONFIGS)
        notes = {"rounded": [" ".join(r) for r in verdict.rounded]} if verdict.rounded else {}
        if verdict.skipped:
            yield Result(told, group, "stock", verdict.skipped)
        elif verdict.faults:
            lines = [f"{f.way}, {f.config}: {f.kind}: {f.detail}" for f in verdict.faults]
            yield Result(told, group, "failed", lines[0].split("\n")[0], {"faults": lines})
        elif verdict.refused:
            way, _, why = verdict.refused[0]
            yield Result(told, group, "refused", f"{way}: {why}", notes)
        else:
            yield Result(told, group, "passed", "", notes)


def main() -> int:
    given = survey.options(__doc__, "build/conformance.jsonl")
    chosen = [item for item in items() if re.search(given.only, item)]
    results = survey.run("conformance", chosen, given)
    parts: dict[str, list[Result]] = {}
    for item, result in ((r.item.split(" ")[0], r) for r in results):
        kind, _, word = item.split("/")
        parts.setdefault(f"{kind}s, {word}", []).append(result)
    return survey.tell(results, parts, "samples of")


if __name__ == "__main__":
    sys.exit(main())
