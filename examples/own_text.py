"""From your own text to a model that generates: tokenize, train, export, generate.

    python examples/own_text.py my_texts/ --out mine --prompt "The function returns"

``my_texts/`` is a file, a folder or a pattern of text, JSON Lines or parquet; without it the text
is the documentation in Python's standard library. Everything is written to --out, and the same
command continues an interrupted run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from allometry.configs.loader import validate
from allometry.configs.source import Tree
from allometry.data.prepare import PrepareRequest, prepare
from allometry.interop.huggingface.convert import export_hf
from allometry.trainer.train import train


def main() -> None:
    """Do each step that is not done yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", nargs="?", default="builtin:python-prose")
    parser.add_argument("--out", type=Path, default=Path("own_text"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--prompt", default="The function returns")
    asked = parser.parse_args()
    store, folder, exported = asked.out / "store", asked.out / "run", asked.out / "hf"

    prepare(PrepareRequest(inputs=(f"text={asked.text}",), out=str(store), vocab_size=1024))
    source = {"train": str(store / "text.train"), "validation": str(store / "text.validation")}
    description = {  # the same keys as in a YAML file: docs/configuration.md
        "run": {"folder": str(folder)},
        "model": {
            **{"kind": "dense", "vocab_size": 1024, "width": 128, "num_layers": 4},
            **{"num_heads": 4, "ffn_width": 384},
        },
        "data": {
            **{"kind": "sequences", "sequence_length": 128},
            "tokenizer": str(store / "tokenizer.json"),
            "sources": [{"name": "text", "weight": 1.0, **source}],
        },
        "batch": {"sequences": 16, "micro_batch_sequences": 16},
        "training": {"total_steps": asked.steps, "compute_dtype": "fp32"},
        "optimizer": {"kind": "adamw", "lr": 3e-3},
        "schedule": {"kind": "wsd", "warmup_steps": 20},
    }
    train(validate(Tree(description)))  # continues from the latest checkpoint, if there is one
    if not exported.exists():
        export_hf(folder, exported)
    print(generated(exported, asked.prompt))


def generated(folder: Path, prompt: str) -> str:
    """Continue a prompt by 60 tokens with transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    made = model.generate(tokens, max_new_tokens=60, do_sample=True, temperature=0.7)
    return str(tokenizer.decode(made[0]))


if __name__ == "__main__":
    main()
