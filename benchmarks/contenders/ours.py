"""Allometry as its users start it: a config, a token store, the command line."""

from __future__ import annotations

import json
from pathlib import Path

from allometry.data.synthetic import write_random_store
from contenders.shape import SHAPE, Shape


def write_store(folder: Path, shape: Shape = SHAPE) -> Path:
    """Write a store of random tokens under ``folder``; return its prefix."""
    prefix = folder / "random"
    write_random_store(prefix, 2_000_000, shape.vocab_size)
    return prefix


def write_config(
    path: Path,
    store: Path,
    run_folder: Path,
    *,
    dtype: str,
    steps: int,
    processes: int,
    stage: int,
    shape: Shape = SHAPE,
) -> None:
    """Write this benchmark's preset with the data, batch and optimizer of the contenders.

    A sequence is one stream of tokens (no document masks), because the other contenders do not
    support documents. The record has its default settings.
    """
    # JSON is a subset of YAML.
    config = {
        "base": "preset:dense_25m",
        "run": {"folder": str(run_folder)},
        "model": {
            "vocab_size": shape.vocab_size,
            "width": shape.width,
            "num_layers": shape.num_layers,
            "num_heads": shape.num_heads,
            "ffn_width": shape.ffn_width,
            "rope_theta": shape.rope_theta,
            "norm_eps": shape.norm_eps,
        },
        "data": {
            "sequence_length": shape.sequence_length,
            "packing": "concatenated",
            "sources": [{"name": "random", "train": str(store)}],
        },
        "batch": {
            "sequences": shape.sequences,
            "micro_batch_sequences": shape.sequences // processes,
        },
        "training": {
            "total_tokens": None,
            "total_steps": steps,
            "compute_dtype": dtype,
            "clip_grad_norm": shape.clip_grad_norm,
        },
        "optimizer": {
            "lr": shape.lr,
            "beta1": shape.beta1,
            "beta2": shape.beta2,
            "weight_decay": shape.weight_decay,
        },
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "parallel": {"zero": {"stage": stage}},
        "evaluation": {"every_steps": None},
        "checkpoint": {"every_steps": None},
    }
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def read_rows(run_folder: Path) -> tuple[list[float], list[float]]:
    """Return the seconds and losses of the steps of a finished run."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["time_s"] for row in rows], [row["loss"] for row in rows]


def read_allocator(run_folder: Path) -> str:
    """Return the allocator recorded in run.json."""
    facts = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    return str(facts["allocator"])
