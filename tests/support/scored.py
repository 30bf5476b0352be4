"""Trained tiny run with a tokenizer, and tiny tasks in this folder, scored by a reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from allometry.configs.loader import load
from allometry.interop.huggingface.weights import CheckpointWeights
from allometry.models.build import build_model
from allometry.scaling.parameterization import Parameterization

TASKS = Path(__file__).parent / "tasks"
VOCAB = 64


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer with words w0 to w63, ids equal to their numbers; w0 ends documents."""
    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["w0"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def documents() -> list[dict[str, Any]]:
    lines = (TASKS / "counting.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@torch.no_grad()
def log_likelihoods(folder: Path, step: int) -> list[list[float]]:
    """Return the log-likelihoods of each document's one-word answers from the run's own model."""
    config = load(folder / "config.yaml")
    weights = CheckpointWeights(folder / "checkpoints" / f"step-{step}")
    model = build_model(config.model, Parameterization.of_run(config), "fp32").eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(weights.read(name))
    found = []
    for one in documents():
        tokens_BL = torch.tensor([[int(word[1:]) for word in one["context"].split()]])
        logits_BLV = model(tokens_BL)
        assert isinstance(logits_BLV, Tensor)
        logs_V = logits_BLV[0, -1].double().log_softmax(-1)
        found.append([logs_V[int(word[1:])].item() for word in one["choices"]])
    return found
