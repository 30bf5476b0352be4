"""Compare runs stacked into one model with the same runs one after another: seconds and memory.

    python benchmarks/stacked.py [--device cuda] [--runs 6] [--widths 64 128] [--out FILE]

Trains a byte model of 2 layers on random bytes, 8 sequences of 64 tokens per step, in fp32. On a
CPU each variant uses one thread. ``alone`` is the run of one sweep process; ``stacked`` trains all
runs as one model. Both alternate within a round; a ratio is the time of R runs alone over R runs
stacked, as the median over rounds. Peak memory is measured in a separate process (on CUDA:
allocated memory). On CUDA ``alone`` is a stack of one run, and ``--runs`` defaults to 24. For
example, ``--runs 6 --widths 64`` compares six runs of width 64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders.machine import facts
from pydantic import TypeAdapter

from allometry.configs.model import DenseModel, ParameterizationConfig
from allometry.configs.optimization import AdamW, MuonH, OptimizerConfig
from allometry.studies.sweeps.probe import Probe
from allometry.studies.sweeps.stacked import StackedProbe

SEQUENCES, LENGTH = 8, 64
WARMUP = 2
RULES: dict[str, tuple[OptimizerConfig, dict[str, Any]]] = {
    "adamw": (AdamW(lr=2.0**-7), {"kind": "mup", "base_width": 64}),
    "muonh": (
        MuonH(lr=2.0**-5, weight_decay=0.0),
        {"kind": "hyperp", "base_width": 64, "base_layers": 2},
    ),
}


class Case:
    """Runs of one width and optimizer, alone or stacked, and their steps."""

    def __init__(self, width: int, vocabulary: int, rule: str, runs: int, device: str) -> None:
        self.model = DenseModel(
            vocab_size=vocabulary,
            width=width,
            num_layers=2,
            num_heads=width // 16,
            ffn_width=width * 5 // 2 // 16 * 16,
            qk_norm=True,
        )
        self.optimizer, settings = RULES[rule]
        self.how: ParameterizationConfig = TypeAdapter(ParameterizationConfig).validate_python(
            {"embedding_std": 0.5, **settings}
        )
        self.runs, self.device = runs, device
        rng = np.random.default_rng(0)
        self.tokens_RBL = rng.integers(0, vocabulary, (runs, SEQUENCES, LENGTH + 1))

    def stacked(self, runs: int) -> StackedProbe:
        optimizers = [
            self.optimizer.model_copy(update={"lr": self.optimizer.lr * 2.0 ** (-run / 4)})
            for run in range(runs)
        ]
        return StackedProbe(self.model, self.how, optimizers, range(runs), device=self.device)

    def seconds_stacked(self, probe: StackedProbe, steps: int) -> float:
        tokens = torch.from_numpy(self.tokens_RBL[: probe.model.runs]).to(self.device)
        return self._seconds(lambda: probe.step(tokens, clip=1.0), steps)

    def alone(self) -> list[Probe] | StackedProbe:
        if self.device != "cpu":
            return self.stacked(1)
        return [Probe(self.model, self.how, self.optimizer, seed) for seed in range(self.runs)]

    def seconds_alone(self, made: list[Probe] | StackedProbe, steps: int) -> float:
        """Return the seconds of a step of one run."""
        if isinstance(made, StackedProbe):
            return self.seconds_stacked(made, steps)
        times = [
            self._seconds(lambda probe=probe, tokens=tokens: probe.step(tokens, clip=1.0), steps)
            for probe, tokens in zip(made, self.tokens_RBL[: len(made)], strict=True)
        ]
        return statistics.mean(times)

    def _seconds(self, step: Any, steps: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        self._wait()
        return (time.perf_counter() - start) / steps

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def compare(case: Case, steps: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of steps alone and stacked, measured alternately."""
    alone, stacked = case.alone(), case.stacked(case.runs)
    case.seconds_alone(alone, WARMUP)
    case.seconds_stacked(stacked, WARMUP)
    pairs = [
        (case.seconds_alone(alone, steps), case.seconds_stacked(stacked, steps))
        for _ in range(rounds)
    ]
    return {
        "alone_ms": [1e3 * one for one, _ in pairs],
        "stacked_ms": [1e3 * many for _, many in pairs],
        "speedup": statistics.median(case.runs * one / many for one, many in pairs),
        "over_one": statistics.median(many / one for one, many in pairs),
    }


def peak_mib(case: Case, runs: int) -> float:
    """Return the peak MiB of a few steps of ``runs`` stacked runs, minus the initial memory."""
    if case.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        case.seconds_stacked(case.stacked(runs), WARMUP)
        return torch.cuda.max_memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
    before = resident_mib()
    if runs == 1:
        probe = Probe(case.model, case.how, case.optimizer, 0)
        case.seconds_alone([probe], WARMUP)
    else:
        case.seconds_stacked(case.stacked(runs), WARMUP)
    return resident_mib() - before


def resident_mib() -> float:
    """Return the peak resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def measured_apart(asked: argparse.Namespace, width: int, rule: str, runs: int) -> float:
    """Return ``peak_mib`` measured in a separate process."""
    command = [
        *(sys.executable, __file__, "--memory-of", str(runs), "--widths", str(width)),
        *("--rules", rule, "--runs", str(asked.runs), "--device", asked.device),
        *("--vocabulary", str(asked.vocabulary)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=int, help="default: 6, on CUDA 24")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", type=int, help="print the MiB of so many runs, and no more")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    asked.runs = asked.runs or (6 if asked.device == "cpu" else 24)
    torch.set_num_threads(1)
    rows = []
    for rule in asked.rules:
        for width in asked.widths:
            case = Case(width, asked.vocabulary, rule, asked.runs, asked.device)
            if asked.memory_of:
                print(peak_mib(case, asked.memory_of))
                return
            row = {"rule": rule, "width": width, **compare(case, asked.steps, asked.rounds)}
            row["one_mib"] = measured_apart(asked, width, rule, 1)
            row["stacked_mib"] = measured_apart(asked, width, rule, asked.runs)
            rows.append(row)
            print(
                f"{rule} width {width}: {asked.runs} runs alone over stacked "
                f"{row['speedup']:.2f}, stacked over one {row['over_one']:.2f}, "
                f"MiB {row['one_mib']:.0f} of one, {row['stacked_mib']:.0f} stacked",
                flush=True,
            )
    result = {"runs": asked.runs, "device": asked.device, "vocabulary": asked.vocabulary}
    result |= {"sequences": SEQUENCES, "length": LENGTH, "rows": rows, **facts()}
    if asked.out is not None:
        asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
