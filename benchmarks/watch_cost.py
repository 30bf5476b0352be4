"""Measure the watchdog's cost per step: alternating windows with and without it in one launch.

    torchrun --nproc-per-node 2 benchmarks/watch_cost.py --windows 40

Each rank trains a small model on the CPU. In every second window the watchdog's thread runs, with
its heartbeats, samples and comparison of ranks; all ranks switch together. The script prints the
CPU seconds of the watchdog's thread divided by those of the step (the cost on a busy machine) and
the median of paired differences of wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from allometry.configs.execution import ParallelConfig
from allometry.parallel.mesh import open_mesh
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.watch import place
from allometry.trainer.watch.watchdog import Watchdog


def window(model: torch.nn.Module, x_BD: torch.Tensor, steps: int) -> float:
    """Take steps of a data-parallel model; return their seconds."""
    begun = time.perf_counter()
    for _ in range(steps):
        model.zero_grad()
        model(x_BD).square().mean().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
    return time.perf_counter() - begun


def thread_s(name: str) -> float:
    """Return the CPU seconds used by the threads with this name."""
    taken = 0.0
    for thread in threading.enumerate():
        if thread.name == name:
            text = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
            fields = text.rpartition(")")[2].split()
            taken += (int(fields[11]) + int(fields[12])) / 100
    return taken


def main() -> None:
    """Measure, and print on the main rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=20, help="pairs of windows")
    parser.add_argument("--steps", type=int, default=20, help="steps of a window")
    parser.add_argument("--width", type=int, default=512)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parallel, cpu = ParallelConfig(), torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder, open_mesh(parallel, cpu) as mesh:
        layers = [torch.nn.Linear(asked.width, asked.width) for _ in range(8)]
        model, x_BD = torch.nn.Sequential(*layers), torch.randn(256, asked.width)
        window(model, x_BD, asked.steps)
        differences, shares, plain = [], [], []
        for pair in range(asked.windows):
            seconds = {}
            for watched in (False, True) if pair % 2 else (True, False):
                dist.barrier()
                if not watched:
                    seconds[False] = window(model, x_BD, asked.steps)
                    continue
                with Watchdog(parallel, RunFolder(folder)) as watch:
                    watch.attach(mesh)
                    watch._place = place.Place(place.STEP)  # samples are taken within steps only
                    watch._mark = None
                    seconds[True] = window(model, x_BD, asked.steps)
                    shares.append(thread_s("watchdog") / seconds[True])
            plain.append(seconds[False])
            differences.append(seconds[True] / seconds[False] - 1)
        if mesh.is_main:
            print(
                json.dumps(
                    {
                        "step_s": statistics.median(plain) / asked.steps,
                        "thread_percent": 100 * statistics.mean(shares),
                        "paired_percent": 100 * statistics.median(differences),
                        "quartiles": [100 * q for q in statistics.quantiles(differences, n=4)],
                        "windows": asked.windows,
                    }
                )
            )


if __name__ == "__main__":
    main()
