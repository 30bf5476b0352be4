"""Measure the cost of training losses by source, as a share of the step time.

    python benchmarks/source_losses.py [--preset demo] [--steps 40] [--sources 8]

Trains a preset on random tokens of several sources, as sequences and as documents, and compares the
seconds in ``trainer/step.py: source_sums`` with the seconds of the steps. All of ``source_sums`` is
counted, although the loss of the mixture alone would need sums too. There is no other cost: the
sums are reduced together with the gradient norm, and copied to the host with the step's other
numbers. Prints a table and a JSON line; the goal is below 1 % of the step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.data.synthetic import write_random_store
from allometry.trainer import step as step_module
from allometry.trainer.step import TrainStep
from allometry.trainer.train import train

GOAL = 0.01
WARMUP_STEPS = 5


def described(preset: str, steps: int, sources: int, kind: str, folder: Path) -> RunConfig:
    vocab_size = load(f"preset:{preset}").model.vocab_size
    named = []
    for number in range(sources):
        prefix = folder / f"random-{number}"
        write_random_store(prefix, 500_000, vocab_size, mean_length=500, seed=number)
        named.append({"name": f"random-{number}", "train": str(prefix)})
    more = ["data.packing=per_document"]
    if kind == "documents":
        more = ["data.kind=documents", "data.max_document_tokens=256"]
        more += ["batch.micro_batch_sequences=1"]
    return load(
        f"preset:{preset}",
        [
            f"run.folder={folder}/{kind}",
            f"data.sources={json.dumps(named)}",
            "data.tokenizer=null",
            f"training.total_steps={steps}",
            "training.total_tokens=null",
            "training.compile=false",
            "schedule.warmup_steps=1",
            "checkpoint.every_steps=null",
            "evaluation.every_steps=null",
            *more,
        ],
    )


def measure(preset: str, steps: int, sources: int, kind: str, folder: Path) -> dict[str, Any]:
    config = described(preset, steps, sources, kind, folder)
    within, whole = [0.0], []
    sums, take = step_module.source_sums, TrainStep.__call__

    def timed(work: Callable[..., Any], add: Callable[[float], None]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = work(*arguments)
            add(time.perf_counter() - begun)
            return result

        return called

    def add_sums(seconds: float) -> None:
        within[-1] += seconds

    def add_step(seconds: float) -> None:
        whole.append(seconds)
        within.append(0.0)

    step_module.source_sums = timed(sums, add_sums)
    TrainStep.__call__ = timed(take, add_step)  # type: ignore[method-assign]
    try:
        train(config, device=torch.device("cpu"))
    finally:
        step_module.source_sums = sums
        TrainStep.__call__ = take  # type: ignore[method-assign]
    number = len(whole) - WARMUP_STEPS
    in_steps, in_sums = sum(whole[WARMUP_STEPS:]), sum(within[WARMUP_STEPS:])
    return {
        "preset": preset,
        "kind": kind,
        "sources": sources,
        "steps": number,
        "threads": torch.get_num_threads(),
        "step_ms": 1e3 * in_steps / number,
        "sums_ms": 1e3 * in_sums / number,
        "share": in_sums / in_steps,
        "goal": GOAL,
        "met": in_sums < GOAL * in_steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sources", type=int, default=8)
    given = parser.parse_args()
    for kind in ("sequences", "documents"):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(given.preset, given.steps, given.sources, kind, Path(folder))
        print(
            f"{kind}, {found['sources']} sources: step {found['step_ms']:.1f} ms, sums by source "
            f"{found['sums_ms']:.3f} ms, {found['share']:.3%}; goal below 1 %: "
            f"{'met' if found['met'] else 'NOT MET'}"
        )
        print(json.dumps(found))


if __name__ == "__main__":
    main()
