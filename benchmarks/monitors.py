"""Measure the cost of monitors at their default interval, as a share of the step time.

    python benchmarks/monitors.py [--steps 60] [--preset demo] [--dtype fp32] [--threads 2]

Trains a 10.6M model (10 layers of width 256) on random tokens with monitors at every second step
and singular values at every fourth, so that plain and monitored steps alternate within one run.
Each part is timed separately: before the step (a forward pass of 4 sequences), after it (gradients
and updates), the metrics row, and the singular values. The share is the median time of the part
divided by the median step time and by the default interval: 100 steps for monitors, 1000 for
singular values. The goal is below 1 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from contenders.machine import facts

from allometry.configs.execution import MonitorConfig
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.data.synthetic import write_random_store
from allometry.trainer.record.monitors import Monitors
from allometry.trainer.step import TrainStep
from allometry.trainer.train import train

GOAL = 0.01
WARMUP_STEPS = 8
LOOK_EVERY, SINGULAR_EVERY = 2, 4
VOCABULARY = 256
SHAPE = {"width": 256, "num_layers": 10, "num_heads": 8, "num_kv_heads": 8, "ffn_width": 1024}
"""Model with 10.6M parameters."""

Times = dict[int, float]


@contextmanager
def timed(owner: type, name: str, into: Times, step_of: Callable[[Any], int]) -> Iterator[None]:
    """Context manager that adds the seconds of each call of a method to those of its step."""
    plain = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        found = plain(*args, **options)
        step = step_of(args)
        into[step] = into.get(step, 0.0) + time.perf_counter() - begun
        return found

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def description(given: argparse.Namespace, folder: Path) -> RunConfig:
    write_random_store(folder / "random", 4_000_000, VOCABULARY, mean_length=1000)
    shape = {} if given.quick else SHAPE
    return load(
        f"preset:{given.preset}",
        [
            f"run.folder={folder}/run",
            f"data.sources=[{{name: random, train: {folder}/random}}]",
            "data.tokenizer=null",
            f"training.total_steps={given.steps}",
            "training.total_tokens=null",
            f"training.compute_dtype={given.dtype}",
            "training.compile=false",
            "schedule.warmup_steps=1",
            "checkpoint.every_steps=null",
            "evaluation.every_steps=null",
            f"record.monitors.every_steps={LOOK_EVERY}",
            f"record.monitors.singular_values_every_steps={SINGULAR_EVERY}",
            f"model.vocab_size={VOCABULARY}",
            *(f"model.{key}={size}" for key, size in shape.items()),
        ],
    )


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run once; return the seconds of steps and of each part of the monitors, by step."""
    config = description(given, folder)
    names = ("step", "before", "after", "row", "singular")
    times: dict[str, Times] = {name: {} for name in names}
    number = [0]

    def remember(args: Any) -> int:
        number[0] = int(args[1])
        return number[0]

    with ExitStack() as stack:
        for owner, method, name, step_of in (
            (TrainStep, "__call__", "step", remember),
            (Monitors, "before_step", "before", remember),
            (Monitors, "after_step", "after", remember),
            (Monitors, "additions", "row", lambda args: int(args[1].step)),
            (Monitors, "_singular_values", "singular", lambda _args: number[0]),
        ):
            stack.enter_context(timed(owner, method, times[name], step_of))
        train(config, callbacks=[])
    return summary(times, config)


def summary(times: dict[str, Times], config: RunConfig) -> dict[str, Any]:
    """Return medians after the warm-up; ``after`` includes singular values at their steps."""
    steps = sorted(step for step in times["step"] if step > WARMUP_STEPS)
    looks = [step for step in steps if step % LOOK_EVERY == 0 and step % SINGULAR_EVERY]
    both = [step for step in steps if step % SINGULAR_EVERY == 0]
    assert looks, "too few steps for a look"
    assert both, "too few steps for singular values"

    def medians(names: Sequence[str], over: Sequence[int]) -> float:
        return statistics.median(sum(times[name][step] for name in names) for step in over)

    step_s = medians(["step"], steps)
    look_s, singular_s = medians(["before", "after", "row"], looks), medians(["singular"], both)
    defaults = MonitorConfig()
    every, singular_every = defaults.every_steps, defaults.singular_values_every_steps
    assert every is not None
    assert singular_every is not None
    share = (look_s / every + singular_s / singular_every) / step_s
    return {
        "batch_tokens": config.batch.sequences * config.data.sequence_length,
        "steps": len(steps),
        "step_s": step_s,
        **{f"{name}_s": medians([name], looks) for name in ("before", "after", "row")},
        "look_s": look_s,
        "singular_s": singular_s,
        "intervals": [every, singular_every],
        "share": share,
        "goal": GOAL,
        "met": share < GOAL,
        "seconds": {name: {str(k): v for k, v in found.items()} for name, found in times.items()},
    }


def text(found: dict[str, Any]) -> str:
    """Format the result as a sentence and a table."""
    rows = [
        ("step", found["step_s"]),
        ("before: activations", found["before_s"]),
        ("after: gradients, updates", found["after_s"]),
        ("row", found["row_s"]),
        ("one look", found["look_s"]),
        ("singular values", found["singular_s"]),
    ]
    table = [f"| {name} | {1e3 * s:.2f} | {s / found['step_s']:.3f} |" for name, s in rows]
    every, singular_every = found["intervals"]
    return "\n".join(
        [
            "| | ms | of a step |",
            "|---|---|---|",
            *table,
            f"looks every {every} steps, singular values every {singular_every}: "
            f"{found['share']:.3%} of the step; goal below {GOAL:.0%}: "
            f"{'met' if found['met'] else 'NOT MET'}",
        ]
    )


def arguments(asked: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the preset's own model, 16 steps")
    parser.add_argument("--preset", default="demo", help="what else the run is; batch included")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="file to write")
    given = parser.parse_args(asked)
    given.steps = 16 if given.quick else given.steps
    return given


def main(asked: Sequence[str] | None = None) -> None:
    given = arguments(asked)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given, Path(folder))
    print(text(found))
    if given.json is not None:
        result = {**facts(), "threads": given.threads, "dtype": given.dtype, **found}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
