"""Is the final loss of a schedule known before it is trained? Tiny runs, constant, cosine and WSD.

    python benchmarks/forecast.py [--steps 1200] [--seeds 2] [--work DIR] [--out FILE]

A byte model on Python's own library, fp32, one process. For each seed three runs that differ in
their schedule alone; the WSD run's final loss is forecast from the other two, from its own curve
before its decay begins, and half through it. Forecasts are of the held-out loss (every 20 steps,
the same 128 sequences), whose last value is measured without the noise of a batch, and of the
training loss, whose final value is the mean of the last 5 % of the steps (its noise is printed).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders.machine import facts, source_bytes

from allometry.configs.run import RunConfig
from allometry.data.synthetic import write_store
from allometry.laws.forecast import Curve, Forecast, forecast
from allometry.laws.losses import LossChoice, loss_curve
from allometry.laws.runs import Run, read_run
from allometry.optim.schedule import resolve_schedule
from allometry.scaling.batch import BatchPlan
from allometry.trainer.rates import rates_of
from allometry.trainer.train import train

LENGTH, SEQUENCES, HELD_OUT, PIECE = 64, 16, 128, 2048
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"kind": "constant"},
    "cosine": {"kind": "cosine"},
    "wsd": {"kind": "wsd", "decay_fraction": 0.2, "final_fraction": 0.1},
}
WARMUP = 0.05


def write_data(folder: Path, tokens: int) -> None:
    """Pieces of source text; every 20th is held out."""
    rows = source_bytes(tokens // PIECE + 1, PIECE - 1)
    held = np.arange(len(rows)) % 20 == 7
    write_store(folder / "train", list(rows[~held]))
    write_store(folder / "validation", list(rows[held]))


def description(folder: Path, kind: str, seed: int, steps: int) -> RunConfig:
    source = {key: str(folder / key) for key in ("train", "validation")}
    return RunConfig.model_validate(
        {
            "run": {"folder": str(folder / f"{kind}-{seed}"), "seed": seed},
            "model": {
                "kind": "dense",
                "vocab_size": 128,
                "width": 64,
                "num_layers": 2,
                "num_heads": 4,
                "ffn_width": 192,
                "qk_norm": True,
            },
            "parameterization": {"kind": "sp"},
            "data": {
                "sequence_length": LENGTH,
                "packing": "concatenated",
                "sources": [{"name": "library", **source}],
            },
            "batch": {"sequences": SEQUENCES, "micro_batch_sequences": SEQUENCES},
            "training": {"total_steps": steps, "compute_dtype": "fp32"},
            "optimizer": {"lr": 1.5e-3},
            "schedule": {**SCHEDULES[kind], "warmup_steps": int(WARMUP * steps)},
            "evaluation": {"every_steps": 20, "sequences_per_source": HELD_OUT},
            "record": {
                "tensorboard": False,
                "monitors": {"every_steps": None, "singular_values_every_steps": None},
            },
        }
    )


def trained(folder: Path, kind: str, seed: int, steps: int) -> tuple[Run, RunConfig]:
    config = description(folder, kind, seed, steps)
    train(config, device=torch.device("cpu"), callbacks=[])
    return read_run(config.run.folder), config


def curve(run: Run, config: RunConfig, loss: str, until: int | None = None) -> Curve:
    plan = BatchPlan(config.batch, config.data.sequence_length)
    rates = rates_of(resolve_schedule(config, plan), config.optimizer.lr)
    steps, losses = loss_curve(run, LossChoice.parse(loss))
    kept = np.isfinite(losses) & (steps <= (until or steps[-1]))
    return Curve(run.folder.name, steps[kept].astype(np.int64), losses[kept], rates)


def measured(run: Run, loss: str) -> tuple[float, float]:
    """The final loss and the standard error of its measurement."""
    steps, losses = loss_curve(run, LossChoice.parse(loss))
    if loss != "train":
        return float(losses[np.isfinite(losses)][-1]), 0.0
    last = losses[steps > 0.95 * steps[-1]]
    return float(last.mean()), float(last.std(ddof=1) / np.sqrt(len(last)))


def line(name: str, found: Forecast, truth: float, noise: float) -> dict[str, Any]:
    facts = {
        "from": name,
        "forecast": found.loss,
        "low": found.low,
        "high": found.high,
        "measured": truth,
        "noise": noise,
        "error": found.loss / truth - 1.0,
        "covered": found.low <= truth <= found.high,
        "gain": found.quality.gain.mean,
        "unmeasured": list(found.quality.unmeasured),
        "values": found.values,
    }
    print(
        f"  {name:32} {found.loss:.4f} ({found.low:.4f} to {found.high:.4f}), measured "
        f"{truth:.4f} +- {noise:.4f}: {facts['error']:+.2%}"
        + ("" if facts["covered"] else "  OUTSIDE")
    )
    return facts


def judge(runs: dict[str, tuple[Run, RunConfig]], loss: str, steps: int) -> list[dict[str, Any]]:
    whole = {kind: curve(*found, loss) for kind, found in runs.items()}
    target = whole["wsd"].rates
    truth, noise = measured(runs["wsd"][0], loss)
    start = int(0.8 * steps)
    joint = [whole["constant"], whole["cosine"]]
    before = curve(*runs["wsd"], loss, until=start)
    halfway = curve(*runs["wsd"], loss, until=(start + steps) // 2)
    return [
        line("constant + cosine", forecast(joint, target), truth, noise),
        line("constant", forecast(joint[:1], target), truth, noise),
        line("cosine", forecast(joint[1:], target), truth, noise),
        line("its own stable phase", forecast([before], target), truth, noise),
        line("its own stable phase + cosine", forecast([before, joint[1]], target), truth, noise),
        line("itself, half through its decay", forecast([halfway], target), truth, noise),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.work or Path(tempfile.mkdtemp(prefix="allometry-forecast-"))
    folder.mkdir(parents=True, exist_ok=True)
    steps, results = arguments.steps, []
    if not (folder / "train.bin").exists():
        write_data(folder, int(1.1 * steps * SEQUENCES * LENGTH / 0.95) + 2 * HELD_OUT * LENGTH)
    begun = time.perf_counter()
    for seed in range(arguments.seeds):
        runs = {kind: trained(folder, kind, seed, steps) for kind in SCHEDULES}
        for loss in ("validation", "train"):
            print(f"seed {seed}, {loss} loss, WSD final:")
            found = judge(runs, loss, steps)
            results.append({"seed": seed, "loss": loss, "forecasts": found})
    seconds = time.perf_counter() - begun
    print(f"{seconds:.0f} s")
    if arguments.out:
        content = {**facts(), "steps": steps, "seconds": seconds, "results": results}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
