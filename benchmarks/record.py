"""Measure the overhead of the training loop: record, hooks, display, stop flag, data transfer.

    python benchmarks/record.py [--preset demo] [--steps 60]

Trains a preset on random tokens with all default outputs (metrics, events, display, TensorBoard)
and compares the seconds between steps with the seconds inside steps. Prints a table and a JSON
line; the goal is below 1 % of the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from allometry.configs.loader import load
from allometry.data.synthetic import write_random_store
from allometry.trainer.step import TrainStep
from allometry.trainer.train import train

GOAL = 0.01
WARMUP_STEPS = 10


def measure(preset: str, steps: int, folder: Path) -> dict[str, Any]:
    base = load(f"preset:{preset}")
    write_random_store(folder / "random", 2_000_000, base.model.vocab_size, mean_length=1000)
    source = f"{{name: random, train: {folder}/random}}"
    config = load(
        f"preset:{preset}",
        [
            f"run.folder={folder}/run",
            f"data.sources=[{source}]",
            "data.tokenizer=null",
            f"training.total_steps={steps}",
            "training.total_tokens=null",
            "training.compile=false",
            "schedule.warmup_steps=1",
            "checkpoint.every_steps=null",
            "evaluation.every_steps=null",
        ],
    )
    starts, ends = [], []
    take = TrainStep.__call__

    def timed(self: TrainStep, step: int, batches: Any) -> Any:
        starts.append(time.perf_counter())
        outcome = take(self, step, batches)
        ends.append(time.perf_counter())
        return outcome

    TrainStep.__call__ = timed  # type: ignore[method-assign]
    try:
        train(config)
    finally:
        TrainStep.__call__ = take  # type: ignore[method-assign]
    inside = [e - s for s, e in zip(starts, ends, strict=True)][WARMUP_STEPS:-1]
    between = [s - e for s, e in zip(starts[1:], ends[:-1], strict=True)][WARMUP_STEPS:]
    share = sum(between) / (sum(between) + sum(inside))
    return {
        "preset": preset,
        "steps": len(inside),
        "threads": torch.get_num_threads(),
        "step_ms": 1e3 * statistics.median(inside),
        "between_ms_median": 1e3 * statistics.median(between),
        "between_ms_mean": 1e3 * statistics.mean(between),
        "share": share,
        "goal": GOAL,
        "met": share < GOAL,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.preset, given.steps, Path(folder))
    print(
        f"{found['preset']}: step {found['step_ms']:.1f} ms, between steps "
        f"{found['between_ms_mean']:.2f} ms (median {found['between_ms_median']:.2f}), "
        f"{found['share']:.2%} of the time; goal below 1 %: {'met' if found['met'] else 'NOT MET'}"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
