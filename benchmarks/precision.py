"""What precision costs in quality and saves in memory, on a CPU.

    python benchmarks/precision.py [--only PART] [--size 10m] [--kinds dense,moe] [--seeds 3]

`format`: moments drawn at random, rounded once and after each step of an average, in E4M3 expanded
and plain. Seconds.

`states`: a byte model on Python's library with AdamW whose moments are in fp32, in FP8 as
optimizer.states says (nearest, stochastic), and in plain E4M3 with one scale for 128 elements (no
expansion); held-out loss after equal tokens, its difference to fp32 of the same seed with a 95 %
interval, bytes of state for a parameter, seconds of a step; and on the final moments of each fp32
run the mean squared error of m / sqrt(v) of both formats. Each trial is kept in --work as soon as
it ends: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders.families import mixture
from contenders.formats import SPREADS, averaged, once, plain, rounded
from contenders.machine import facts, source_bytes
from contenders.rules import SIZES, model, standard
from pydantic import TypeAdapter
from scipy import stats
from torch import Tensor

from allometry.configs.model import ModelConfig
from allometry.configs.optimization import AdamW
from allometry.optim.dre import Table
from allometry.optim.fp8_states import Fp8States
from allometry.optim.schedule import Schedule
from allometry.studies.sweeps.probe import Probe, sample
from allometry.studies.sweeps.workers import Workers

PARTS = ("format", "states")
LENGTH, SEQUENCES, HELD_OUT = 128, 8, 128
STATES: dict[str, dict[str, str]] = {
    "fp32": {"kind": "fp32"},
    "fp8": {"kind": "fp8"},
    "fp8 at random": {"kind": "fp8", "rounding": "stochastic"},
    "plain E4M3": {"kind": "fp8"},
}
LR = 2.0**-8


@dataclass(frozen=True, slots=True, order=True)
class Trial:
    kind: str
    states: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """What all trials share."""

    size: str
    steps: int
    beta2: float


def description(kind: str, size: str) -> ModelConfig:
    width, _ = SIZES[size]
    # Of the mixture a token uses 2 of 8 experts, together as wide as half the dense feed-forward.
    return model(size) if kind == "dense" else mixture(width, 8, 2, width, "softmax")


def error_of_updates(states: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Mean over matrices of the mean squared error of m / sqrt(v), by format."""
    own = Table.on(torch.device("cpu"))
    errors: dict[str, list[float]] = {"fp8": [], "plain E4M3": []}
    for state in states:
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if m.dim() < 2:
            continue
        seen = v > 0.0
        for name, table in (("fp8", own), ("plain E4M3", plain(own))):
            root = rounded(v, table)[seen].double().sqrt()
            # What underflows to zero is divided by epsilon alone.
            exact = m[seen] / (v[seen].double().sqrt() + 1e-8)
            off = rounded(m, table)[seen] / (root + 1e-8) - exact
            errors[name].append(float(off.square().mean()))
    found = {name: statistics.fmean(each) for name, each in errors.items()}
    found["median ratio"] = statistics.median(
        b / a for a, b in zip(errors["fp8"], errors["plain E4M3"], strict=True)
    )
    return found


def run(settings: Settings, trial: Trial) -> dict[str, Any]:
    torch.set_num_threads(1)
    config = AdamW.model_validate(
        {"lr": LR, "beta2": settings.beta2, "states": STATES[trial.states]}
    )
    probe = Probe(description(trial.kind, settings.size), standard(), config, trial.seed)
    fp8 = probe.optimizer.param_groups[0].get("fp8")
    if trial.states == "plain E4M3":
        assert isinstance(fp8, Fp8States)
        cpu = torch.device("cpu")
        fp8._tables[cpu] = plain(Table.on(cpu))
    count = settings.steps * SEQUENCES
    pool = source_bytes(count + HELD_OUT, LENGTH)
    tokens = sample(pool[:-HELD_OUT], count, trial.seed)
    schedule = Schedule(_wsd(), settings.steps, settings.steps // 20)
    losses, begun = [], time.perf_counter()
    for step in range(1, settings.steps + 1):
        batch = tokens[(step - 1) * SEQUENCES : step * SEQUENCES]
        losses.append(probe.step(batch, fraction=schedule.fraction(step), clip=1.0))
    seconds = time.perf_counter() - begun
    parameters = [p for group in probe.optimizer.param_groups for p in group["params"]]
    states = [probe.optimizer.state[p] for p in parameters]
    held = sum(t.nbytes for state in states for t in state.values())
    found = {
        "held_out": probe.loss(pool[-HELD_OUT:]),
        "last_losses": losses[-20:],
        "bytes": held,
        "parameters": sum(p.numel() for p in parameters),
        "seconds_of_a_step": seconds / settings.steps,
    }
    if trial.states == "fp32":
        found["error_of_updates"] = error_of_updates(states)
    return found


def _wsd() -> Any:
    from allometry.configs.optimization import ScheduleConfig

    return TypeAdapter(ScheduleConfig).validate_python({"kind": "wsd", "decay_fraction": 0.2})


class Log:
    """A file of trials by settings, one line each."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, asdict(settings)
        self.known: dict[Trial, Any] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for row in map(json.loads, text.split("\n")[:-1]):
            if row["settings"] == self.settings:
                self.known[Trial(**row["trial"])] = row["found"]

    def add(self, trial: Trial, found: dict[str, Any]) -> None:
        self.known[trial] = found
        row = {"settings": self.settings, "trial": asdict(trial), "found": found}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def interval(differences: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of the 95 % interval of paired differences (Student's t)."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, float(stats.t.ppf(0.975, len(differences) - 1)) * error


def summary(kinds: Sequence[str], seeds: int, known: dict[Trial, Any]) -> list[dict[str, Any]]:
    rows = []
    for kind in kinds:
        base = [known[Trial(kind, "fp32", seed)] for seed in range(seeds)]
        for name in STATES:
            found = [known[Trial(kind, name, seed)] for seed in range(seeds)]
            relative = [
                100.0 * (one["held_out"] / other["held_out"] - 1.0)
                for one, other in zip(found, base, strict=True)
            ]
            mean, half = interval(relative)
            rows.append(
                {
                    "model": kind,
                    "states": name,
                    "held_out": statistics.fmean(one["held_out"] for one in found),
                    "change_percent": mean,
                    "half_95": half,
                    "bytes_per_parameter": found[0]["bytes"] / found[0]["parameters"],
                    "seconds": statistics.median(one["seconds_of_a_step"] for one in found),
                }
            )
    return rows


def run_format(given: argparse.Namespace) -> dict[str, Any]:
    single = [once(spread) for spread in SPREADS]
    print("| spread | MSE of m/sqrt(v), plain | expanded | ratio | m, plain | expanded | zeros |")
    print("|---|---|---|---|---|---|---|")
    for row in single:
        print(
            f"| {row['spread']} | {row['plain update']:.3g} | {row['expanded update']:.3g} "
            f"| {row['plain update'] / row['expanded update']:.2f} | {row['plain m']:.4f} "
            f"| {row['expanded m']:.4f} | {row['expanded m with zeros']:.4f} |"
        )
    averages = [averaged(0.95, 400), averaged(0.999, 300 if given.quick else 3000)]
    print("\n| beta | plain | a new exponent each step | expanded | at random |")
    print("|---|---|---|---|---|")
    for row in averages:
        print(
            f"| {row['beta']} | {row['plain']:.4f} | {row['fresh']:.4f} | {row['expanded']:.4f} "
            f"| {row['at random']:.4f} |"
        )
    return {"once": single, "averages": averages}


def run_states(given: argparse.Namespace) -> dict[str, Any]:
    settings = Settings(given.size, given.steps, given.beta2)
    log = Log(given.work / "states.jsonl", settings)
    kinds = given.kinds.split(",")
    trials = [Trial(k, s, seed) for seed in range(given.seeds) for k in kinds for s in STATES]
    with Workers(given.processes) as workers:
        missing = [trial for trial in trials if trial not in log.known]
        workers.run(partial(run, settings), missing, log.add)
    rows = summary(kinds, given.seeds, log.known)
    print("| model | states | held-out loss | change to fp32 | bytes/parameter | s/step |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        half = "" if row["half_95"] is None else f" ± {row['half_95']:.2f}"
        print(
            f"| {row['model']} | {row['states']} | {row['held_out']:.4f} "
            f"| {row['change_percent']:+.2f}{half} % | {row['bytes_per_parameter']:.3f} "
            f"| {row['seconds']:.2f} |"
        )
    errors = {
        f"{t.kind} {t.seed}": found["error_of_updates"]
        for t, found in log.known.items()
        if t.states == "fp32"
    }
    for name, error in errors.items():
        print(
            f"m / sqrt(v) of {name}: {error['plain E4M3']:.3g} plain, {error['fp8']:.3g} expanded, "
            f"median ratio of matrices {error['median ratio']:.2f}"
        )
    trials_of = [{**asdict(t), **found} for t, found in sorted(log.known.items())]
    return {"settings": asdict(settings), "rows": rows, "errors": errors, "trials": trials_of}


def arguments(asked: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all works")
    parser.add_argument("--only", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--kinds", default="dense,moe")
    parser.add_argument("--steps", type=int, default=500, help="of 1,024 tokens")
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-precision"))
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args(asked)
    if given.quick:
        given.size, given.seeds, given.steps = "tiny", 2, 20
    return given


def main() -> None:
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    runs = {"format": run_format, "states": run_states}
    result: dict[str, Any] = {**facts(), "quick": given.quick}
    for part in given.only or PARTS:
        result[part] = runs[part](given)
    path = given.json or Path(__file__).parent / "results" / (
        f"precision-cpu-{datetime.date.today().isoformat()}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
