"""Runs disturbed by ``faults.py``: one small config and the overrides of each setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.data.synthetic import write_store

STEPS, SAVE_EVERY, VOCAB = 48, 8, 64
DENSE = {
    "kind": "dense",
    "vocab_size": VOCAB,
    "width": 64,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_width": 128,
    "qk_norm": True,
}
MOE = {key: value for key, value in DENSE.items() if key != "ffn_width"} | {
    "kind": "moe",
    "experts": {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 64},
    "router": {"gate": "sqrt", "balance": {"kind": "auxiliary", "coefficient": 0.1}},
}
DOCUMENTS = (
    *("data.kind=documents", "data.max_document_tokens=56", "batch.micro_batch_sequences=1"),
    *("parallel.context.min_chunk_tokens=4", "parallel.context.capacity_tokens=64"),
)
MUONH = ("optimizer.kind=muonh", "optimizer.weight_decay=0.0")
TENSOR = ("parallel.tp=2", "batch.micro_batch_sequences=8")  # one message per layer and batch
SETTINGS: dict[str, tuple[str, ...]] = {
    "zero0": (),
    "zero1": ("parallel.zero.stage=1",),
    "zero3": ("parallel.zero.stage=3",),
    "tp2": TENSOR,
    "pp2": ("parallel.pp=2",),
    "ep2": ("parallel.ep=2", "parallel.zero.stage=1"),
    "documents": DOCUMENTS,
    "muonh": (*MUONH, "parallel.zero.stage=1"),
    "muonh-pp2": (*MUONH, "parallel.pp=2"),
    "bf16": ("training.compute_dtype=bf16", "parallel.zero.stage=1"),
    "fp8-states": ("optimizer.states.kind=fp8", "parallel.zero.stage=1"),
    "moe-zero3": ("parallel.zero.stage=3",),
    "moe-tp2-muonh": (*MUONH, *TENSOR),
    "moe-pp2-bf16": ("training.compute_dtype=bf16", "parallel.pp=2"),
    "moe-documents-zero2": (*DOCUMENTS, "parallel.zero.stage=2"),
    "moe-ep2-muonh-fp8-states": (
        *(*MUONH, "optimizer.states.kind=fp8", "training.compute_dtype=bf16"),
        *("parallel.ep=2", "parallel.zero.stage=1"),
    ),
    "moe-tier-file-muonh": (
        *(*MUONH, "parallel.zero.stage=2", "parallel.zero.optimizer_states={nvme: SWAP}"),
    ),
    "tier-host": ("parallel.zero.stage=1", "parallel.zero.optimizer_states={device: 0.5}"),
    "tier-file": ("parallel.zero.stage=1", "parallel.zero.optimizer_states={nvme: SWAP}"),
}
"""Overrides of ``described`` by setting name; hdp takes the ranks that no other axis uses."""
MIXTURES = {"ep2", *(name for name in SETTINGS if name.startswith("moe-"))}


def described(setting: str, folder: Path, data: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Return the config of a setting in ``folder``, on the token stores made by ``write_data``."""
    sources = [
        {"name": n, "train": f"{data}/{n}.train", "validation": f"{data}/{n}.validation"}
        for n in ("up", "down")
    ]
    described: dict[str, Any] = {
        "run": {"folder": str(folder), "seed": 3},
        "model": MOE if setting in MIXTURES else DENSE,
        "data": {"sequence_length": 32, "sources": sources},
        "batch": {"sequences": 16, "micro_batch_sequences": 2},
        "training": {"total_steps": STEPS, "compute_dtype": "fp32"},
        "optimizer": {"lr": 1e-2},
        "schedule": {"kind": "wsd", "warmup_steps": 3, "decay_fraction": 0.3},
        "parallel": {"timeout_s": 20, "watch": {"first_step_s": 60}},
        "evaluation": {"sequences_per_source": 4},
        "checkpoint": {"every_steps": SAVE_EVERY},
        "record": {"tensorboard": False, "display_every_steps": STEPS},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".base.json")
    path.write_text(json.dumps(described))
    swap = folder.with_suffix(".swap")
    said = (*SETTINGS[setting], *overrides)
    return load(path, [each.replace("SWAP", str(swap)) for each in said])


def write_data(folder: Path) -> None:
    """Write two sources of short documents that a small model can learn: counting up and down."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, direction in (("up", 1), ("down", -1)):
        for split, documents in (("train", 2000), ("validation", 40)):
            lengths = rng.integers(5, 60, documents)
            starts = rng.integers(1, VOCAB, documents)
            texts = [
                np.append((s + direction * np.arange(n)) % (VOCAB - 1) + 1, 0)
                for s, n in zip(starts, lengths, strict=True)
            ]
            write_store(folder / f"{name}.{split}", texts)
