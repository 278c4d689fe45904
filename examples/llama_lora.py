"""Trains LoRA adapters of a Llama with PEFT and Hugging Face's Trainer, or TRL's, dense and packed.

    python examples/llama_lora.py --presets adapters balanced
    python examples/llama_lora.py --sft --dora --rank 16

Nothing is downloaded: a token is a byte, and the base is a small Llama that is first trained as a
whole, on the first half of the text; the adapters see the second half. The text is --text, or what
the Python standard library's own modules say. All runs start from the same base and adapters, and
see the same batches. What comes out: the loss at the end, what a batch saves for the backward, and
the time. A model of one's own:

    python examples/llama_lora.py --model FOLDER --text book.txt --backend dropit

FOLDER is what `save_pretrained` wrote; its tokens are taken for bytes here, so that it is there to
show bytes and times. Needs the extra `test`.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from gpt2 import Windows, arguments, bar, table, train, windows
from rich.console import Console
from training import DENSE, positive, preset


def build(options: argparse.Namespace) -> Any:
    """The base, with random weights unless there is a folder of one."""
    torch.manual_seed(options.seed)
    if options.model:
        return transformers.AutoModelForCausalLM.from_pretrained(
            options.model, local_files_only=True
        )
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def adapted(base: Any, options: argparse.Namespace) -> Any:
    """A copy of the base with adapters beside all of its linear layers: they alone are trained."""
    torch.manual_seed(options.seed)
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        target_modules="all-linear",
        use_dora=options.dora,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(copy.deepcopy(base), config)


def sft() -> dict[str, Any]:
    """What makes TRL's trainer take rows of tokens as they are.

    Raises:
        SystemExit: TRL is not installed.
    """
    try:
        import datasets
        import tokenizers
        import trl
    except ImportError as error:
        raise SystemExit(
            f"--sft trains with TRL, and {error.name} is not installed: python -m pip install trl;"
            " or leave --sft out, and Hugging Face's Trainer trains"
        ) from error
    bytes_ = {chr(i) if i else "<eos>": i for i in range(256)}
    words = tokenizers.models.WordLevel(bytes_, unk_token="<eos>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="<eos>", pad_token="<eos>"
    )
    settings = partial(trl.SFTConfig, gradient_checkpointing=False)
    datasets.disable_progress_bars()

    def make(model: Any, args: Any, *, train_dataset: Windows, callbacks: Any) -> Any:
        rows = train_dataset.rows.tolist()
        return trl.SFTTrainer(
            model,
            args,
            train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    return {"make": make, "settings": settings}


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "--presets", nargs="+", type=preset, default=["adapters"], help="or config files"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a base that is trained")
    parser.add_argument("--base-steps", type=positive, default=150, help="of the base alone")
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--dropout", type=float, default=0.05, help="in front of the adapters")
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--sft", action="store_true", help="with TRL's SFTTrainer, if it is there")
    options = parser.parse_args(argv)
    how = sft() if options.sft else {}  # before anything is trained
    transformers.logging.set_verbosity_error()
    console = Console()
    data = windows(options)
    half = len(data) // 2
    before, after = copy.copy(data), copy.copy(data)
    before.rows, after.rows = data.rows[:half], data.rows[half:]
    base = build(options)
    runs = []
    with bar(console) as progress:

        def trained(variant: str, model: Any, data: Windows, steps: int, **how: Any) -> Any:
            line = progress.add_task(variant, total=steps)
            given = argparse.Namespace(**{**vars(options), "steps": steps})
            return train(
                variant, model, data, given, options.seed, partial(progress.advance, line), **how
            )

        if not options.model:
            learned = trained(DENSE, base, before, options.base_steps)
            console.print(f"base: loss {learned['first']:.3f}, then {learned['last']:.3f}")
        for variant in (DENSE, *options.presets):
            found = trained(variant, adapted(base, options), after, options.steps, **how)
            runs.append({"variant": variant, **found})
    console.print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
