"""Run folders without training: losses follow a law, and all files have a run's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.loader import dump, load
from allometry.configs.run import RunConfig
from allometry.laws.areas import areas_of
from allometry.optim.schedule import resolve_schedule
from allometry.scaling.plan import RunPlan

Law = Callable[[float, np.ndarray], np.ndarray]
"""Function (N, D) -> loss of N parameters (without embedding and head) after D tokens [T]."""


def chinchilla(N: float, D_T: np.ndarray) -> np.ndarray:
    """Law for models with a few thousand parameters, between 2 and 6 nats."""
    return 1.5 + 60.0 / N**0.4 + 90.0 / D_T**0.4


def description(width: int = 32, **data: Any) -> dict[str, Any]:
    """Return the config of a run of 40 steps over two sources, as plain data."""
    return {
        "run": {"folder": "replaced", "seed": 0},
        "model": {
            "kind": "dense",
            "vocab_size": 64,
            "width": width,
            "num_layers": 2,
            "num_heads": 4,
            "ffn_width": 2 * width,
        },
        "data": {
            "sequence_length": 32,
            "sources": [
                {"name": name, "train": f"{name}.train", "validation": f"{name}.val", "weight": w}
                for name, w in (("web", 0.75), ("code", 0.25))
            ],
            **data,
        },
        "batch": {"sequences": 8, "micro_batch_sequences": 8},
        "training": {"total_steps": 40, "compute_dtype": "fp32"},
        "optimizer": {"lr": 1e-2},
        "schedule": {"kind": "cosine", "warmup_steps": 4},
        "evaluation": {"every_steps": 20, "sequences_per_source": 4},
    }


def fake_run(
    folder: Path,
    *overrides: str,
    width: int = 32,
    law: Law = chinchilla,
    noise: float = 0.0,
    stop: int | None = None,
    held_out: tuple[str, ...] = ("web", "code"),
    tokenizer: str = "aaaa",
    ending: str = "finished",
) -> RunConfig:
    """Write the four files of a run whose losses follow ``law``.

    Held-out losses are the law's plus 0.1 (web) and minus 0.3 (code); training losses are the law's
    times a normal number of spread ``noise`` (seeded by the run's seed). ``stop``: the last step
    taken, without a ``finished`` event.
    """
    folder.mkdir(parents=True)
    path = folder / "given.yaml"
    path.write_text(json.dumps(description(width)))
    config = load(path, [f"run.folder={folder}", *overrides])
    path.unlink()
    (folder / "config.yaml").write_text(dump(config))
    plan = RunPlan.of(config, 1)
    weights = {source.name: source.weight for source in config.data.sources}
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    sources = {name: _source(name, share, held_out, tokenizer) for name, share in shares.items()}
    record = {"plan": plan.describe(), "data": {"sources": sources}, "launches": []}
    (folder / "run.json").write_text(json.dumps(record))
    rows = _rows(config, plan, shares, law, noise, stop, held_out)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last: dict[str, Any] = {"event": ending if stop is None else "stopped"}
    events = [{"event": "started", "step": 0}, last | {"step": rows[-1]["step"]}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return config


def _source(name: str, share: float, held_out: tuple[str, ...], tokenizer: str) -> dict[str, Any]:
    def store(split: str, tokens: int) -> dict[str, Any]:
        return {"tokens": tokens, "tokenizer_sha256": tokenizer, "fingerprint": f"{name} {split}"}

    validation = store("validation", 500) if name in held_out else None
    return {"share": share, "train": store("train", 5000), "validation": validation}


def _rows(
    config: RunConfig,
    plan: RunPlan,
    shares: Mapping[str, float],
    law: Law,
    noise: float,
    stop: int | None,
    held_out: tuple[str, ...],
) -> list[dict[str, Any]]:
    total = plan.total_steps
    schedule = resolve_schedule(config, plan.batch)
    rates_T = np.array([config.optimizer.lr * schedule.fraction(s) for s in range(1, total + 1)])
    s1_T, s2_T = areas_of(rates_T, plan.warmup_steps)
    tokens_T = np.array([plan.batch.tokens_after(s) for s in range(1, total + 1)])
    loss_T = law(plan.parameters.non_embedding, tokens_T)
    normal_T = np.random.default_rng(config.run.seed).standard_normal(total)
    every, rows = config.evaluation.every_steps, []
    for step in range(1, (stop or total) + 1):
        i = step - 1
        evaluated = step == total or bool(every and step % every == 0)
        if step % config.record.every_steps and not evaluated:
            continue
        row = {
            "step": step,
            "tokens": int(tokens_T[i]),
            "flops": int(tokens_T[i]) * plan.flops_per_token.total,
            "loss": loss_T[i] * (1 + noise * normal_T[i]),
            "lr": rates_T[i],
            "s1": s1_T[i],
            "s2": s2_T[i],
        }
        for name, share in shares.items():
            read = int(tokens_T[i] * share)
            row |= {f"loss/{name}": loss_T[i], f"tokens/{name}": read}
            row |= {f"unique_tokens/{name}": min(read, 5000), f"epochs/{name}": read / 5000}
            if evaluated and name in held_out:
                row[f"validation/{name}"] = loss_T[i] + {"web": 0.1, "code": -0.3}[name]
        rows.append(row)
    return rows
