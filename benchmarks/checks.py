"""Measure the cost of the silent-corruption checks relative to a step, on two CPU processes.

    python benchmarks/checks.py [--preset dense_25m] [--steps 8] [--out FILE]

Trains a preset on random tokens with hdp 2 and every check at every step. The seconds of each check
are divided by the seconds of the following step of the same run. The checks are: comparison of
replicas, gradients computed two more times, and matrix products with known sums (at the start).
Prints medians and the share of a run at the default intervals; the goal is below 0.5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from allometry.configs.checks import CardsConfig, ChecksConfig
from allometry.configs.loader import load
from allometry.data.synthetic import write_random_store
from allometry.trainer.record import replicas, twice, writer
from allometry.trainer.step import TrainStep
from allometry.trainer.train import train

RANKS, PORT = 2, 29671
TWICE_EVERY = 1000  # interval in steps when the check is enabled
WARMUP_STEPS = 2


def timed(owner: Any, name: str, seconds: list[float]) -> None:
    """Replace a method by one that appends its seconds to ``seconds``."""
    real: Callable[..., Any] = getattr(owner, name)

    def method(*given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        result = real(*given, **named)
        seconds.append(time.perf_counter() - begun)
        return result

    setattr(owner, name, method)


def rank(number: int, preset: str, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}
    source = f"{{name: random, train: {folder}/random}}"
    config = load(
        f"preset:{preset}",
        [
            *(f"run.folder={folder}/run", f"data.sources=[{source}]", "data.tokenizer=null"),
            *("batch.sequences=4", "batch.micro_batch_sequences=2", "batch.ramp=null"),
            *(f"training.total_steps={steps}", "training.total_tokens=null"),
            *("training.compile=false", "training.deterministic=true"),
            *("schedule.warmup_steps=1", "evaluation.every_steps=null"),
            *("checkpoint.every_steps=null", "record.tensorboard=false"),
            "record.monitors={every_steps: null, singular_values_every_steps: null}",
            "record.checks={replicas_every_steps: 1, twice_every_steps: 1}",
        ],
    )
    found: dict[str, list[float]] = {name: [] for name in ("step", "replicas", "twice", "test")}
    timed(TrainStep, "__call__", found["step"])
    timed(replicas.Replicas, "between_steps", found["replicas"])
    timed(twice.ComputedTwice, "before_step", found["twice"])
    timed(twice.ProductTest, "before_step", found["test"])
    train(config, device=torch.device("cpu"), callbacks=[])
    (Path(folder) / f"rank-{number}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="dense_25m")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        vocab = load(f"preset:{asked.preset}").model.vocab_size
        write_random_store(Path(folder) / "random", 500_000, vocab, mean_length=1000)
        mp.spawn(rank, (asked.preset, asked.steps, folder), nprocs=RANKS)
        found = json.loads((Path(folder) / "rank-0.json").read_text())
    paired = {
        name: [check / step for check, step in zip(found[name], found["step"], strict=True)]
        for name in ("replicas", "twice")
    }
    medians = {name: statistics.median(found[name][WARMUP_STEPS:]) for name in ("step", *paired)}
    shares = {name: statistics.median(each[WARMUP_STEPS:]) for name, each in paired.items()}
    at_defaults = {
        "replicas": shares["replicas"] / (ChecksConfig().replicas_every_steps or 1),
        "twice": shares["twice"] / TWICE_EVERY,
    }
    facts = {
        "preset": asked.preset,
        "ranks": RANKS,
        "machine": platform.node(),
        "commit": writer.commit(),
        "torch": torch.__version__,
        "seconds": found,
        "median_seconds": medians,
        "share_of_a_step": shares,
        "self_test_seconds": found["test"][0],
        "cards_every_steps": CardsConfig().every_steps,
        "percent_of_a_run": {name: 100 * share for name, share in at_defaults.items()},
    }
    print(json.dumps({k: v for k, v in facts.items() if k != "seconds"}, indent=1))
    if asked.out is not None:
        asked.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
