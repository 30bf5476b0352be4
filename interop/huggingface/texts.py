"""Tokenizer and end-of-document token in exports and imports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from allometry.configs.run import RunConfig
from allometry.data.run_tokenizer import RunTokenizer, tokenizer_of
from allometry.data.tokenizer import (
    BESIDE,
    TOKENIZER_CONFIG,
)
from allometry.interop.huggingface.weights import CONFIG, read_json


def write_texts(folder: Path, text: RunTokenizer, longest: int) -> None:
    """Write the tokenizer and the generation config into an exported folder."""
    if text.end is not None:
        generation = {"_from_model_config": True, "eos_token_id": text.end[1]}
        write_json(folder / "generation_config.json", generation)
    if text.file is None:
        return
    text.keep(folder)
    config = folder / TOKENIZER_CONFIG
    if not config.exists():
        values: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
        }
        write_json(config, values)
    if text.end is None:
        return
    for file in (folder / name for name in BESIDE):
        if file.exists():  # a file from elsewhere may name the end of a chat turn instead
            write_json(file, read_json(file) | {"eos_token": text.end[0]})


def unsure(config: RunConfig, source: Path, tokenizer: Path | None) -> list[str]:
    """Return lines on tokenizer and end-of-document id that differ or could not be compared."""
    known = tokenizer_of(config.data)
    lines = []
    if tokenizer is None or known.file is None:
        lines.append(
            "tokenizer: whether the data were made with the model's is not known; give "
            "data.tokenizer and a tokenizer.json beside the model to have it checked"
        )
    theirs = read_json(source / CONFIG).get("eos_token_id")
    ids = theirs if isinstance(theirs, list) else [theirs]
    if known.end is not None and theirs is not None and known.end[1] not in ids:
        lines.append(
            f"end of documents: the data have {known.end[0]} ({known.end[1]}), the model's "
            f"config.json has eos_token_id {theirs}"
        )
    return lines


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write one JSON object, indented."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
