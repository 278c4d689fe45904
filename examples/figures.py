"""Measures the figures of the documents and writes them into these.

    python examples/figures.py             # run every command (more than an hour)
    python examples/figures.py --write     # only rewrite the documents from examples/figures/*.json
    python examples/figures.py --tables    # the same without running their code blocks

Parts of a document between `<!-- name -->` and `<!-- end -->` come from here, and so do the `text`
blocks behind Python and console blocks.
"""

import argparse
import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dropit_fx import cli
from dropit_fx.bench.step import FIXED
from dropit_fx.codecs import CODECS
from dropit_fx.ops.table import CHECKPOINT, OP_RULES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "dropit_fx/README.md",
    "dropit_fx/presets/README.md",
    "passes/README.md",
    "examples/README.md",
    "examples/compared.md",
    "examples/timm_train.md",
    "examples/figures/README.md",
    "tests/README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
)
FIGURES = Path("examples/figures")
MIB = 2**20

DIGITS, BERT = (
    f"python examples/{name} --presets balanced max --seeds 5 --out {FIGURES}"
    for name in ("digits.py --no-compile", "bert.py")
)
LORA = f"python examples/bert.py --lora --presets adapters --seeds 5 --out {FIGURES}"
FREEZE = f"python examples/freeze.py --rates 0.5 0.6 0.8 0.95 --seeds 5 --out {FIGURES}"
STEPS = {
    name: f"dropit-fx bench step --model timm:{name} --batch 16 --json {FIGURES / name}.json"
    for name in ("deit_tiny_patch16_224", "resnet50")
}
BYTES = f"python examples/bytes.py --models deit_tiny_bf16 convnext_tiny gpt2 llama --out {FIGURES}"
FORMATS = f"dropit-fx bench formats --json {FIGURES}/formats.json"
PARETO = (
    "dropit-fx bench pareto --model timm:deit_tiny_patch16_224 --batch 16"
    f" --rounds 15 --json {FIGURES}/pareto_deit_tiny.json --plot {FIGURES}/pareto_deit_tiny.png"
)
DEIT_SMALL = (
    "dropit-fx bench pareto --model timm:deit_small_patch16_224 --batch 32"
    f" --variants balanced '*checkpoint' --rounds 5 --json {FIGURES}/pareto_deit_small.json"
)
GRADIENTS, GRADIENTS_DEIT = (
    f"dropit-fx bench gradients{model} --json {FIGURES}/gradients{file}.json"
    for model, file in (("", ""), (" --model deit", "_deit"))
)
CODECS_ALONE = f"dropit-fx bench codecs --json {FIGURES}/codecs.json --plot {FIGURES}/codecs.png"
PEAKS = f"dropit-fx bench peaks --json {FIGURES}/peaks.json"
KERNELS = f"dropit-fx bench kernels --json {FIGURES}/kernels.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="measure nothing, rewrite the documents"
    )
    parser.add_argument("--tables", action="store_true", help="rewrite their tables only")
    options = parser.parse_args(argv)
    if not (options.write or options.tables):
        commands = (DIGITS, BERT, LORA, FREEZE, *STEPS.values(), BYTES, PARETO, DEIT_SMALL)
        for command in (*commands, GRADIENTS, GRADIENTS_DEIT, CODECS_ALONE, FORMATS, KERNELS):
            print(f"$ {command}", flush=True)
            program = Path(sys.executable).with_name(command.split()[0])
            subprocess.run([program, *shlex.split(command)[1:]], cwd=ROOT, check=True)
    for name in DOCUMENTS:
        text = with_tables((ROOT / name).read_text())
        (ROOT / name).write_text(text if options.tables else with_output(text))
    return 0


def with_tables(text: str) -> str:
    """Makes the parts between `<!-- name -->` and `<!-- end -->` anew."""
    for name, make in SECTIONS.items():
        part = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        made = make()
        text = re.sub(part, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL)
    return text


# Blocks that are run ------------------------------------------------------------------------------


def blocks(text: str) -> Iterator[tuple[str, str, re.Match[str] | None]]:
    """Each fenced block: its language, its code, and the `text` block that follows it, if any."""
    fence = re.compile(r"^```(\w+)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
    follows = re.compile(r"\n```text\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
    for match in fence.finditer(text):
        yield match[1], match[2], follows.match(text, match.end())


def with_output(text: str) -> str:
    """Runs the blocks that have output and puts that in."""
    names: dict[str, Any] = {}
    pieces, at = [], 0
    for language, code, shown in blocks(text):
        if language == "python":
            output = run_python(code, names)
        elif language == "console" and shown:
            output = run_console(code)
        else:
            continue
        if shown:
            pieces += [text[at : shown.start(1)], output]
            at = shown.end(1)
    return "".join(pieces) + text[at:]


def run_python(code: str, names: dict[str, Any]) -> str:
    """Executes a block in the names that the blocks before it left."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "a document", "exec"), names)
    return plain(out.getvalue())


def run_console(code: str) -> str:
    """Runs the `dropit-fx` commands of a block in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for line in code.splitlines():
            program, *arguments = shlex.split(line.removeprefix("$ "), comments=True)
            assert program == "dropit-fx", line
            assert cli.main(arguments) == 0, line
    return plain(out.getvalue())


def plain(text: str) -> str:
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    return "\n".join(lines) + "\n" if lines else ""


# Tables -------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def codecs() -> str:
    rows = []
    for codec in (c for c in CODECS if c.name != "drop"):
        options = "<br>".join(
            f"`{o.name}` (default `{json.dumps(o.default)}`): {o.meaning}" for o in codec.options
        )
        rows.append([f"`{codec.name}`", ", ".join(sorted(codec.serves)), options or "none"])
    return markdown(["codec", "for tensors that the backward uses as", "options"], rows)


def ops() -> str:
    return ", ".join(f"`{rule.name}`" for rule in (*OP_RULES, CHECKPOINT)) + "."


def layout() -> str:
    """Every module with the first sentence of its docstring."""
    folders = sorted({path.parent for path in (ROOT / "dropit_fx").rglob("*.py")})
    lines = []
    for folder in (*folders, ROOT / "passes"):
        lines.append(f"{folder.relative_to(ROOT)}/")
        lines += [f"  {p.name:<18} {first_sentence(p)}" for p in sorted(folder.glob("*.py"))]
    return "```\n" + "\n".join(lines) + "\n```"


def tests() -> str:
    """Every file of tests with what it shows."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    rows = [[f"`{p.relative_to(ROOT)}`", first_sentence(p)] for p in files]
    return markdown(["file", "shows"], rows)


def first_sentence(path: Path) -> str:
    match = re.search(r'"""(.*?)(?:"""|\n\n)', path.read_text(), re.DOTALL)
    line = " ".join(match[1].split()) if match else ""
    return re.sub(r":\w+:(?=`)|`", "", line).removesuffix(".")


def results() -> str:
    """One line for each way to spend less memory on a step, and what training reached."""
    rows = []
    pareto = read_figures("pareto_deit_tiny")
    for name, said in WAYS.items():
        rows.append([f"DeiT-Ti, batch 16: {said}", *shares(pareto["variants"][name])])
    for name, said in (("dense", "dense"), ("balanced", "`balanced`")):
        step = read_figures("resnet50")["variants"][f"compiled, {name}"]
        rows.append([f"ResNet-50, batch 16: {said}", *shares(step)])
    gpt2 = read_figures("bytes")["models"]["gpt2"]["compiled"]
    sizes = [gpt2["packed"][k] / gpt2["dense"][k] for k in ("saved_bytes", "peak_bytes")]
    rows.append(
        ["GPT-2, 4 x 512 tokens, with its loss: `balanced`", *map("{:.1%}".format, sizes), ""]
    )
    trained = [
        f"{title}, {name}: {row[3]}"
        for file, model, title in (
            ("bert", "bert", "a pretrained BERT"),
            ("digits", "vit", "a ViT"),
        )
        for name, row in accuracies(file, model).items()
        if name in ("dense", "balanced")
    ]
    head = ["step", "saved", "peak", "time"]
    said = "Test accuracy over five seeds: " + "; ".join(trained) + "."
    return f"{markdown(head, rows)}\n\n{said}"


WAYS = {
    "dense": "dense",
    "checkpoint": "checkpoint per block",
    "budget=0.3": "memory budget 0.3",
    "balanced": "`balanced`",
    "max": "`max`",
    "balanced+checkpoint": "`balanced`, checkpoint per block",
}


def shares(step: dict[str, Any]) -> list[str]:
    """Of dense; of the dense step itself, in MiB."""
    if step["saved_ratio"] == 1:
        sizes = [f"{step[f'{kind}_bytes'] / MIB:.0f} MiB" for kind in ("saved", "peak")]
    else:
        sizes = [f"{step[f'{kind}_ratio']:.1%}" for kind in ("saved", "peak")]
    return [*sizes, f"{step['ratio']:.2f}"]


def accuracies(file: str, model: str) -> dict[str, list[str]]:
    """A row of what a training script wrote, for each way to train ``model`` eagerly."""
    from training import rows

    return {r[2]: r for r in rows(read_figures(file)) if r[:2] == (model, "eager")}


def read_figures(name: str) -> Any:
    return json.loads((ROOT / FIGURES / f"{name}.json").read_text())


def measured() -> str:
    tables = [
        (f"`{DIGITS}`", "digits", training_table),
        (f"`{BERT}`", "bert", bert_table),
        (f"`{LORA}`", "bert_lora", lora_table),
        (f"`{FREEZE}`", "freeze", freeze_table),
        *((f"`{command}`", name, step_table) for name, command in STEPS.items()),
        (f"`{PARETO}`", "pareto_deit_tiny", pareto_table),
        (f"`{DEIT_SMALL}`", "pareto_deit_small", said_table),
        (f"`{BYTES}`", "bytes", bytes_table),
        (f"`{GRADIENTS}`", "gradients", gradients_table),
        (f"`{GRADIENTS_DEIT}`", "gradients_deit", gradients_table),
        (f"`{CODECS_ALONE}`", "codecs", codecs_table),
        (f"`{FORMATS}`", "formats", formats_table),
        (f"`{KERNELS}`", "kernels", kernels_table),
        (f"`{PEAKS}`", "peaks", peaks_table),
    ]
    parts = []
    for command, name, table in tables:
        path = ROOT / FIGURES / f"{name}.json"
        if path.exists():
            parts += [command, table(json.loads(path.read_text()))]
    return "\n\n".join(parts)


def peaks_table(results: dict[str, Any]) -> str:
    """What became of the peaks that plans were asked for."""
    from dropit_fx.bench.peaks import HEAD, lines

    return markdown(HEAD, lines(results["rows"]))


def training_table(results: dict[str, Any]) -> str:
    """What a script wrote that `training.py` runs."""
    from training import HEAD, note, rows

    lines = [[", ".join(row[:3]), *row[3:]] for row in rows(results)]
    return markdown(["model", *HEAD[3:]], lines) + "\n\n" + note(results)


def bert_table(results: dict[str, Any]) -> str:
    about = (
        "A pretrained encoder learns to tell which of eight parts of SciPy a paragraph documents;"
        " its attention has dropout and runs as matmul, softmax, dropout and matmul."
    )
    return f"{training_table(results)} {about}"


def lora_table(results: dict[str, Any]) -> str:
    about = (
        "The same encoder, frozen: trained are LoRA's factors of rank 8 beside its linear layers,"
        " with dropout, and the classifier behind it."
    )
    return f"{training_table(results)} {about}"


def freeze_table(results: dict[str, Any]) -> str:
    """What `freeze.py` wrote, and how far freezing goes at the accuracy of training all layers."""
    from freeze import HEAD, as_good, rows

    rate, smaller = as_good(results)
    said = (
        f"The smallest total within one standard deviation of dense's accuracy: rate {rate:g},"
        f" {smaller:.1f} times smaller than dense."
        if smaller > 1
        else "No rate is smaller within one standard deviation of dense's accuracy."
    )
    note = (
        "Frozen: the least share of layers in a step. Sizes are the greatest of some steps of the"
        f" first seed, for a batch of {results['settings']['memory_batch']}; total: the peak,"
        " parameters and the optimiser's state."
    )
    return f"{markdown(HEAD, rows(results))}\n\n{note} {said}"


def step_table(results: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{row['saved_bytes'] / MIB:.1f} MiB",
            f"{row['saved_ratio']:.1%}",
            f"{row['peak_bytes'] / MIB:.1f} MiB",
            f"{row['peak_ratio']:.1%}",
            f"{row['whole_ratio']:.1%}",
            f"{row['ratio']:.2f}",
        ]
        for name, row in results["variants"].items()
    ]
    head = ["step", "saved", "of dense", "peak", "of dense", "whole, of dense", "time, of dense"]
    first = next(iter(results["variants"].values()))
    kinds = [f"{kind} {first[f'{kind}_bytes'] / MIB:.1f} MiB" for kind in FIXED]
    note = f"Whole: the peak, which has the gradients, and the rest of {', '.join(kinds)}."
    return f"{markdown(head, rows)}\n\n{note}"


def bytes_table(results: dict[str, Any]) -> str:
    rows = []
    for model in results["models"].values():
        for way in ("eager", "compiled"):
            dense, packed = model[way]["dense"], model[way]["packed"]
            saved, peak = (packed[k] / dense[k] for k in ("saved_bytes", "peak_bytes"))
            sizes = [f"{v['saved_bytes'] / MIB:.1f} MiB" for v in (dense, packed)]
            rows.append([f"{model['title']}, {way}", *sizes, f"{saved:.1%}", f"{peak:.1%}"])
    head = ["model", "saved, dense", "saved, balanced", "of dense", "peak, of dense"]
    note = "Images: batch 16 at 224 pixels; language models: 4 x 512 tokens; with their loss."
    return f"{markdown(head, rows)}\n\n{note}"


def said_table(results: dict[str, Any]) -> str:
    """The rows, and where a rival that loses nothing is better than one of ours."""
    from dropit_fx.bench.pareto import left_out, verdict

    said = "\n".join(f"- {line}" for line in (*left_out(results), *verdict(results)))
    return f"{step_table(results)}\n\n{said}"


def pareto_table(results: dict[str, Any]) -> str:
    picture = "![Memory against time: recomputed and packed](pareto_deit_tiny.png)"
    return f"{said_table(results)}\n\n{picture}"


def gradients_table(results: dict[str, Any]) -> str:
    rows = [
        [r["name"], f"{r['saved']:.1%}", f"{r['error']:.3f}", f"{r['cosine']:.4f}"]
        for r in results["rows"]
    ]
    note = f"All parameters of one model: {results['model']}."
    return f"{markdown(['preset', 'saved, of dense', 'relative error', 'cosine'], rows)}\n\n{note}"


def codecs_table(results: dict[str, Any]) -> str:
    """The codecs that no smaller one beats, of each model and kind of op."""
    rows = [
        [
            f"{model}, inputs of `{row['reads']}`",
            f"`{row['name']}`",
            row["paper"],
            f"{row['bits']:.2f}",
            f"{row['error']:.4f}",
            f"{row['cosine']:.4f}",
        ]
        for model, found in results.items()
        for row in found["rows"]
        if row["front"]
    ]
    titles = "; ".join(f"{model}: {found['title']}" for model, found in results.items())
    tried = sum(len(found["rows"]) for found in results.values())
    note = (
        "One codec at a time keeps the inputs of all such ops, the rest is kept exactly; error and"
        f" cosine are of the gradient of all parameters. The front of {tried} measurements, one"
        " draw each where rows or roundings are drawn; `wta_crs` behind a step with the same batch,"
        f" which favours it. {titles}."
    )
    head = ["of", "codec", "as in", "bits an element", "relative error", "cosine"]
    picture = "![Error of the gradient against bits, each codec by itself](codecs.png)"
    return f"{markdown(head, rows)}\n\n{note}\n\n{picture}"


def systems() -> str:
    """What the published systems keep tensors by, as codecs of the same pass, side by side."""
    if not (ROOT / FIGURES / "codecs.json").exists():
        return f"**Nothing has been measured yet**; `{CODECS_ALONE}` does it."
    found = read_figures("codecs")
    of: dict[tuple[str, str], dict[str, Any]] = {}
    for model, got in found.items():
        for row in got["rows"]:
            if row["paper"]:
                of.setdefault((row["paper"], row["reads"]), {"row": row})[model] = row
    rows = [
        [
            paper,
            f"`{mine['row']['name']}`",
            f"`{reads}`",
            *(f"{mine[model]['bits']:.2f}" for model in found),
            *(f"{mine[model]['error']:.4f}" for model in found),
            " and ".join(model for model in found if mine[model]["front"]) or "none",
        ]
        for (paper, reads), mine in sorted(of.items())
    ]
    figures = [f"{figure}, {model}" for figure in ("bits", "error") for model in found]
    return markdown(["as in", "here", "inputs of", *figures, "on the front of"], rows)


def formats_table(results: dict[str, Any]) -> str:
    """The formats that no smaller one beats, and the published one."""
    rows = [
        [row["name"], f"{row['bits']:.2f}", f"{row['error']:.3f}", f"{row['projection']:.3f}"]
        for row in results["rows"]
        if row["best"] or row["family"] == "published"
    ]
    note = (
        f"The inputs of all linear layers of one model: {results['model']}; formats that"
        " are the most accurate of their size, and the published one. The layers read"
        f" {results['tokens']:,} rows at most;"
        " rows that are drawn err less the more there are of them."
    )
    head = ["format", "bits an element", "relative error of dW", "projection on dW"]
    return markdown(head, rows) + "\n\n" + note


def kernels_table(results: dict[str, Any]) -> str:
    formats = results["dtypes"]["float32"]
    rows = [
        [
            name,
            f"{row['bits']:.2f}",
            f"{row['pack']['of_clone']:.1f}",
            f"{row['unpack']['of_clone']:.1f}",
        ]
        for name, row in formats.items()
        if name != "clone"
    ]
    shape = " x ".join(map(str, results["shape"]))
    note = f"fp32, {shape}, {results['threads']} threads; a clone of the tensor takes 1."
    return markdown(["format", "bits an element", "pack", "unpack"], rows) + "\n\n" + note


def gpu() -> str:
    """A table for each card that `make gpu` has run on, or that there was none."""
    parts = [gpu_tables(path) for path in sorted((ROOT / FIGURES).glob("gpu_*.json"))]
    if not parts:
        return (
            "**Nothing has been measured on a GPU.** `make gpu` does it on a machine that has one:"
            " the tests of `tests/gpu/`, then models and kernels, in nine minutes."
        )
    return "\n\n".join(parts)


def gpu_tables(path: Path) -> str:
    from dropit_fx.bench.gpu_tables import (
        KERNEL_HEAD,
        MODEL_HEAD,
        kernel_cells,
        line_of_tests,
        model_cells,
    )

    result = json.loads(path.read_text())
    versions = ("driver", "torch", "triton", "python", "timm", "transformers")
    about = ", ".join(f"{name} {result[name]}" for name in versions if result[name])
    parts = [f"`make gpu` on one {result['card']} ({about}; {result['date']})"]
    if result["tests"]:
        parts[0] += f"; {line_of_tests(result['tests'])}"
    if lines := model_cells(result["rows"]):
        note = (
            "bf16 autocast. Saved: what autograd keeps, counted by storage (of `save_on_cpu`, on"
            " the host). Peak: of PyTorch's allocator over a forward and its backward, gradients"
            " included, above the level before. Shares are of the dense step of the same mode."
            " Time: median, with the optimizer. Busy: of it, what the GPU works; the rest it waits"
            " for the host. Cosine: with the gradient of the dense step, all"
            " parameters; of a dense step, with its own second gradient."
        )
        parts += [markdown(MODEL_HEAD, lines), note]
    picture = path.with_suffix(".png")
    if picture.exists():
        parts.append(f"![Peak memory against time]({picture.name})")
    if lines := kernel_cells(result["rows"]):
        note = (
            "One bfloat16 tensor, larger than the caches. Of a copy: bytes read and written once, a"
            " second, of what a copy on the device moves. Transient: bytes an element of temporary"
            " memory, beyond what comes out."
        )
        parts += [markdown(KERNEL_HEAD, lines), note]
    trees = {row["sources"] for row in result["rows"]}
    if result["left_out"] or len(trees) > 1:
        parts.append(
            f"{len(result['left_out'])} rows had no time; the others were measured with"
            f" {len(trees)} version{'s' * (len(trees) > 1)} of the sources."
        )
    return "\n\n".join(parts)


def gpu_said() -> str:
    """What `balanced` keeps and takes of an eager step on each card that was measured."""
    results = [json.loads(p.read_text()) for p in sorted((ROOT / FIGURES).glob("gpu_*.json"))]
    if not results:
        return "**Nothing has been measured on a GPU yet**; `make gpu` does it, in nine minutes."
    link = "[On a GPU](examples/figures/README.md#on-a-gpu)"
    return "\n".join(f"{link}, {r['card']}, bf16, eager: {_eager_steps(r)}." for r in results)


def _eager_steps(result: dict[str, Any]) -> str:
    from dropit_fx.bench.gpu_models import MODELS

    last = [r for r in result["rows"] if r["sources"] == result["sources"]]  # of one tree
    eager = [r for r in last if r.get("mode") == "eager" and "failed" not in r]
    steps = {(r["model"], r["variant"]): r for r in eager}
    shares = []
    for model in (m for m in MODELS if {(m, "dense"), (m, "balanced")} <= steps.keys()):
        dense, mine = steps[model, "dense"], steps[model, "balanced"]
        kept = mine["saved_bytes"] / dense["saved_bytes"]
        time = mine["step_seconds"] / dense["step_seconds"]
        name = MODELS[model].title.partition(",")[0]
        shares.append(f"{name} keeps {kept:.0%} at {time:.1f}x the step")
    return ", ".join(shares)


SECTIONS: dict[str, Callable[[], str]] = {
    "results": results,
    "gpu_said": gpu_said,
    "codecs": codecs,
    "systems": systems,
    "ops": ops,
    "layout": layout,
    "tests": tests,
    "measured": measured,
    "gpu": gpu,
}

if __name__ == "__main__":
    sys.exit(main())
