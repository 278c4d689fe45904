"""``dropit-fx bench peaks``: whether plans keep their word, on many models, peak after peak.

Each model is planned for peaks from 100 down to 25 % of its dense step's, in eager mode and
compiled; a real step with each plan is measured. Beside them stand PyTorch's memory budgets of the
same shares, compiled. Nothing is timed. A row is written as soon as it is measured, and a run that
was cut goes on there, unless the sources have changed.
"""

from __future__ import annotations

import copy
import fnmatch
import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from dropit_fx.bench.gpu import begun, sources, write
from dropit_fx.bench.model_spec import SpecError, build_step
from dropit_fx.bench.pareto import Variant
from dropit_fx.capture.provenance import first_line
from dropit_fx.holders import tensors_in
from dropit_fx.measure import peak_memory
from dropit_fx.planner import PlanError, Step, plan_step
from dropit_fx.private import storage_id
from dropit_fx.private_inductor import recompiling
from dropit_fx.report.rows import plain_table
from dropit_fx.rewriting import Rewriter

EAGER, COMPILED, BUDGET = WAYS = "eager", "compiled", "budget"
SHARES = tuple(100 - 75 * number / 9 for number in range(10))  # percent of dense's peak
CLOSE = 0.95  # of the request: near enough below it
EXACT = 0.03  # the most that a predicted peak may be off
NUMBERS = 64  # bytes of single numbers, of which PyTorch makes tensors
CARD = "h100"  # whose seconds are told: none are measured
Row = dict[str, Any]
_SMALL = {  # of configs of transformers, those that a kind has
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 512,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "d_model": 64,
    "d_ff": 256,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 4,
    "dim": 64,
    "hidden_dim": 256,
    "n_layers": 2,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "embedding_size": 64,
}
MODELS = {  # name -> batch, and the side of images or the tokens of a text
    "timm:resnet18": (8, 64),
    "timm:deit_tiny_patch16_224": (4, 112),
    "timm:convnext_atto": (8, 64),
    "timm:efficientnet_b0": (8, 64),
    "timm:mobilenetv3_small_050": (16, 96),
    "timm:regnetx_002": (8, 64),
    "timm:mixer_s32_224": (4, 224),
    "timm:swin_tiny_patch4_window7_224": (2, 224),
    "torchvision:vgg11": (4, 64),
    "torchvision:densenet121": (4, 64),
    "torchvision:mobilenet_v2": (8, 64),
    "torchvision:shufflenet_v2_x0_5": (16, 96),
    "torchvision:squeezenet1_1": (8, 96),
    "tiny:bert": (8, 64),
    "tiny:gpt2": (8, 64),
    "tiny:llama": (8, 64),
    "tiny:t5": (8, 64),
    "tiny:distilbert": (8, 64),
    "tiny:vit": (8, 64),
    "tiny:qwen2": (8, 64),
}


def bench_peaks(
    models: Sequence[str] = (),
    ways: Sequence[str] = WAYS,
    inner: str = "inductor",
    json_path: str | None = None,
) -> Row:
    """Measures every model in every way at every peak, and prints what became of the requests.

    Args:
        models: Globs on the names of ``MODELS``; none: all.
        ways: Of ``WAYS``.
        inner: What compiles.
        json_path: Where each row is written.

    Returns:
        ``about``, ``sources``, and ``rows``: ``model``, ``way``, ``share`` (percent),
        ``requested``, ``predicted``, ``real`` and ``dense`` (bytes), ``feasible``, and ``why`` a
        row has no peak.

    Raises:
        SpecError: A glob matches no model.
        FileNotFoundError: The folder of the path is missing.
    """
    names = [n for n in MODELS if not models or any(fnmatch.fnmatch(n, m) for m in models)]
    if not names:
        raise SpecError(f"--models {' '.join(models)} matches none of {', '.join(MODELS)}")
    path = None if json_path is None else Path(json_path)
    if path is not None and not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder to write {path} into")
    about = {"torch": torch.__version__, "inner": inner, "sources": sources()}
    found = begun(path, about, {"models": list(MODELS), "rows": []})
    done = {(row["model"], row["way"], row["share"]) for row in found["rows"]}
    wanted = [(n, way) for n in names for way in ways]
    todo = [(n, w) for n, w in wanted if any((n, w, share) not in done for share in SHARES)]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(todo) * len(SHARES))
        for name, way in todo:
            bar.update(task, description=f"{name}, {way}")
            shares = [share for share in SHARES if (name, way, share) not in done]
            bar.advance(task, len(SHARES) - len(shares))
            for row in measure(name, way, shares, inner):
                found["rows"].append(row)
                bar.advance(task)
                if path is not None:
                    write(found, [path])
    Console().print(summary(found["rows"]))
    return found


def measure(name: str, way: str, shares: Sequence[float], inner: str) -> Iterator[Row]:
    """A row for each share; behind a peak that cannot be kept, lower ones are not tried."""
    torch.manual_seed(0)
    try:
        step = built(name)
        taken = {EAGER: _eager, COMPILED: _compiled, BUDGET: _budget}[way](step, inner)
    except Exception as error:  # of whatever class: the other models are measured
        yield from (_without(name, way, share, error) for share in shares)
        return
    refused: PlanError | None = None
    for share in shares:
        try:
            if refused is not None:
                raise refused
            yield {"model": name, "way": way, "share": share, "feasible": True} | taken(share)
        except Exception as error:
            refused = _refusal(error)
            yield _without(name, way, share, error)


def _without(name: str, way: str, share: float, error: Exception) -> Row:
    refusal = _refusal(error)
    said = {"feasible": False, "failed": refusal is None, "why": first_line(refusal or error)}
    return {"model": name, "way": way, "share": share} | said


def _refusal(error: BaseException | None) -> PlanError | None:
    """Where the planner says that a peak cannot be kept; a compiler wraps what it says."""
    if error is None or isinstance(error, PlanError):
        return error
    return _refusal(getattr(error, "inner_exception", None) or error.__cause__)


def built(name: str) -> Step:
    """The step of one of ``MODELS``."""
    batch, size = MODELS[name]
    if not name.startswith("tiny:"):
        model, args, kwargs = build_step(name, batch, size)
        return Step(model, args, kwargs)
    model, kwargs = _tiny(name.removeprefix("tiny:"), batch, size)
    return Step(model, (), kwargs)


def _tiny(kind: str, batch: int, size: int) -> tuple[nn.Module, dict[str, Any]]:
    """A small model of a kind of transformers', and a batch with labels."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.AutoConfig.for_model(kind)
    for key, value in _SMALL.items():
        if hasattr(config, key):
            setattr(config, key, value)
    if kind == "vit":
        config.image_size, config.patch_size = size, 8
        model = transformers.AutoModelForImageClassification.from_config(config)
        labels = torch.zeros(batch, dtype=torch.long)
        return model.train(), {"pixel_values": torch.randn(batch, 3, size, size), "labels": labels}
    if hasattr(config, "use_cache"):
        config.use_cache = False
    heads = {"t5": "AutoModelForSeq2SeqLM", "bert": "AutoModelForMaskedLM"}
    heads["distilbert"] = heads["bert"]
    if kind == "t5":
        config.decoder_start_token_id = 0
    head: Any = getattr(transformers, heads.get(kind, "AutoModelForCausalLM"))
    tokens = torch.randint(2, config.vocab_size, (batch, size))
    return head.from_config(config).train(), {"input_ids": tokens, "labels": tokens}


def _resident(step: Step) -> int:
    """Bytes of the model and its inputs, each storage once."""
    held = [*step.model.parameters(), *step.model.buffers()]
    held += tensors_in((step.args, step.kwargs))
    return sum({storage_id(t): t.untyped_storage().nbytes() for t in held}.values())


def _real(step: Step, module: Callable[..., Any]) -> int:
    """The peak of a real step."""
    with recompiling(100, 1000), step.real() as (args, kwargs):
        return _resident(step) + peak_memory(lambda: step.loss_of(module(*args, **kwargs)))


Taken = Callable[[float], Row]  # of a share of dense's peak


def _eager(step: Step, inner: str) -> Taken:
    rewriter = Rewriter(step.model, step.args, step.kwargs)

    def taken(share: float) -> Row:
        planned = plan_step(step, f"{share:.6f}%", rewriter=rewriter, device=CARD)
        real = _real(step, rewriter.rewritten(planned).module)
        return _figures(planned.asked, planned.predicted, real, planned.dense)

    return taken


def _compiled(step: Step, inner: str) -> Taken:
    from dropit_fx.compile import backend

    def taken(share: float) -> Row:
        torch.compiler.reset()
        before = len(backend.compiled_graphs())
        options: Any = {"peak": f"{share:.6f}%", "inner": inner}
        real = _real(step, torch.compile(step.model, backend="dropit", options=options))
        plans = [g.planned for g in backend.compiled_graphs()[before:] if g.planned is not None]
        if len(plans) != 1:
            raise RuntimeError(f"the step is {len(plans)} graphs, each planned by itself")
        return _figures(plans[0].asked, plans[0].predicted, real, plans[0].dense)

    return taken


def _budget(step: Step, inner: str) -> Taken:
    def peak(budget: float) -> int:
        torch.compiler.reset()
        own = copy.deepcopy(step.model)
        module = Variant("", budget=budget).compiled(own, inner)
        return _real(Step(own, step.args, step.kwargs), module)

    dense = peak(1.0)

    def taken(share: float) -> Row:
        return _figures(int(dense * share / 100), None, peak(share / 100), dense)

    return taken


def _figures(requested: int, predicted: int | None, real: int, dense: int) -> Row:
    return {"requested": requested, "predicted": predicted, "real": real, "dense": dense}


def summed(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """What became of the requests, by way: counts of rows, and of models at the end."""
    found = {}
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        taken = [row for row in mine if row["feasible"]]
        peaks: dict[str, list[int]] = defaultdict(list)
        for row in sorted(taken, key=lambda row: -row["share"]):
            peaks[row["model"]].append(row["real"])
        told = [row for row in taken if row["predicted"] is not None]
        found[way] = {
            "requests": len(mine),
            "feasible": len(taken),
            "failed": sum(row.get("failed", False) for row in mine),
            "kept": sum(map(_kept, taken)),
            "close": sum(_kept(row) and row["real"] >= CLOSE * row["requested"] for row in taken),
            "told": len(told),
            "exact": sum(abs(r["predicted"] / r["real"] - 1) <= EXACT for r in told),
            "models": len(peaks),
            "monotone": sum(all(a >= b for a, b in pairwise(of)) for of in peaks.values()),
        }
    return found


def _kept(row: Row) -> bool:
    below: bool = row["real"] <= row["requested"] + NUMBERS
    return below


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """The summary, for tables: a line for each way, under ``HEAD``.

    ``kept``: real peaks at or below the request; ``within 5 %``: and no further below; ``told to
    3 %``: predicted peaks that near the real ones; ``monotone``: models whose real peaks only fall.
    """
    made = []
    for way, one in summed(rows).items():
        exact = f"{one['exact']} of {one['told']}" if one["told"] else ""
        counts = [one["requests"], one["feasible"], one["failed"], one["kept"], one["close"]]
        made.append([way, *map(str, counts), exact, f"{one['monotone']} of {one['models']}"])
    return made


HEAD = (
    "way",
    "requests",
    "feasible",
    "failed",
    "kept",
    "within 5 %",
    "told to 3 %",
    "monotone",
)


def summary(rows: Sequence[Row]) -> Table:
    """The same for a terminal."""
    table = plain_table(*HEAD, figures=HEAD[1:])
    for line in lines(rows):
        table.add_row(*line)
    return table
