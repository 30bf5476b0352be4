"""Measure the loss of quality and the memory saved by low-precision states, on a CPU.

    python benchmarks/precision.py [--only PART]... [--size 10m] [--kinds dense,moe] [--seeds 3]

`format` (seconds): random moments in E4M3, with and without expansion, rounded once and after each
step of an average.

`updates` (minutes): bytes of state per parameter and seconds of one update of all parameters, by
kind of state. Seconds are the CPU time of one thread, which depends little on other load.

`states`: a byte model on Python's library, trained by AdamW with moments in fp32, in FP8 as
configured by optimizer.states (nearest, stochastic), and in plain E4M3 with one scale per 128
elements (no expansion). Reported are the held-out loss after equal tokens, its difference to fp32
with the same seed and a 95 % interval, bytes of state per parameter, seconds of a step, and, on the
final moments of each fp32 run, the mean squared error of m / sqrt(v) by format. Each trial is
stored in --work when it ends, so that the same command continues after an interruption.

If torchao is installed, its FP8 and 8-bit states are included in all parts (compiled, as torchao
does).
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import torchao_states
from contenders.families import mixture
from contenders.formats import CASES, averaged, error_of_update, formats, once, plain
from contenders.machine import facts, source_bytes
from contenders.rules import SIZES, model, standard
from contenders.trials import Log, interval
from pydantic import TypeAdapter
from torch import Tensor

from allometry.configs.model import ModelConfig
from allometry.configs.optimization import AdamW
from allometry.optim.dre import Table
from allometry.optim.fp8_states import Fp8States
from allometry.optim.schedule import Schedule
from allometry.studies.sweeps.probe import Probe, sample
from allometry.studies.sweeps.workers import Workers

PARTS = ("format", "updates", "states")
LENGTH, SEQUENCES, HELD_OUT = 128, 8, 128
STATES: dict[str, dict[str, str]] = {
    "fp32": {"kind": "fp32"},
    "fp8": {"kind": "fp8"},
    "plain E4M3": {"kind": "fp8"},
    "fp8 at random": {"kind": "fp8", "rounding": "stochastic"},
    **{name: {"kind": "fp32"} for name in torchao_states.OPTIMIZERS},  # replaced below
}
LR = 2.0**-8


@dataclass(frozen=True, slots=True, order=True)
class Trial:
    kind: str
    states: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """Settings shared by all trials."""

    size: str
    steps: int
    beta2: float


def description(kind: str, size: str) -> ModelConfig:
    width, _ = SIZES[size]
    # The mixture uses 2 of 8 experts per token, together half as wide as the dense feed-forward.
    return model(size) if kind == "dense" else mixture(width, 8, 2, width, "softmax")


def compared() -> list[str]:
    """Return the kinds of states available on this machine."""
    left_out = torchao_states.OPTIMIZERS if torchao_states.missing() else ()
    return [name for name in STATES if name not in left_out]


def error_of_updates(states: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Return the mean over matrices of the mean squared error of m / sqrt(v), by format."""
    moments = [(s["exp_avg"], s["exp_avg_sq"]) for s in states if s["exp_avg"].dim() > 1]
    errors = {
        name: [error_of_update(m, v, to) for m, v in moments] for name, to in formats().items()
    }
    found = {name: statistics.fmean(each) for name, each in errors.items()}
    found["median ratio"] = statistics.median(
        b / a for a, b in zip(errors["expanded"], errors["plain"], strict=True)
    )
    return found


def probe_of(settings: Settings, trial: Trial) -> Probe:
    config = AdamW.model_validate(
        {"lr": LR, "beta2": settings.beta2, "states": STATES[trial.states]}
    )
    probe = Probe(description(trial.kind, settings.size), standard(), config, trial.seed)
    if trial.states == "plain E4M3":
        fp8 = probe.optimizer.param_groups[0]["fp8"]
        assert isinstance(fp8, Fp8States)
        cpu = torch.device("cpu")
        fp8._tables[cpu] = plain(Table.on(cpu))
    if trial.states in torchao_states.OPTIMIZERS:
        groups = probe.optimizer.param_groups
        probe.optimizer = torchao_states.optimizer(trial.states, groups)
    return probe


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        torchao_states.held_bytes(tensor)
        for p in parameters_of(optimizer)
        for tensor in optimizer.state[p].values()
    )


def run(settings: Settings, trial: Trial) -> dict[str, Any]:
    torch.set_num_threads(1)
    probe = probe_of(settings, trial)
    count = settings.steps * SEQUENCES
    pool = source_bytes(count + HELD_OUT, LENGTH)
    tokens = sample(pool[:-HELD_OUT], count, trial.seed)
    schedule = Schedule(_wsd(), settings.steps, settings.steps // 20)
    losses, seconds = [], []
    for step in range(1, settings.steps + 1):
        batch = tokens[(step - 1) * SEQUENCES : step * SEQUENCES]
        begun = time.process_time()
        losses.append(probe.step(batch, fraction=schedule.fraction(step), clip=1.0))
        seconds.append(time.process_time() - begun)
    parameters = parameters_of(probe.optimizer)
    found = {
        "held_out": probe.loss(pool[-HELD_OUT:]),
        "last_losses": losses[-20:],
        "bytes": state_bytes(probe.optimizer),
        "parameters": sum(p.numel() for p in parameters),
        "seconds_of_a_step": statistics.median(seconds),
    }
    if trial.states == "fp32":
        found["error_of_updates"] = error_of_updates([probe.optimizer.state[p] for p in parameters])
    return found


def _wsd() -> Any:
    from allometry.configs.optimization import ScheduleConfig

    return TypeAdapter(ScheduleConfig).validate_python({"kind": "wsd", "decay_fraction": 0.2})


def summary(kinds: Sequence[str], seeds: int, known: dict[Trial, Any]) -> list[dict[str, Any]]:
    rows = []
    for kind in kinds:
        base = [known[Trial(kind, "fp32", seed)] for seed in range(seeds)]
        for name in (s for s in STATES if all(Trial(kind, s, i) in known for i in range(seeds))):
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
    single = [once(case) for case in CASES]
    names = list(formats())
    for what, title in (("update", "MSE of m/sqrt(v)"), ("m", "error of m"), ("v", "error of v")):
        print(f"| {title} | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
        for row in single:
            print(
                f"| {row['case']} | "
                + " | ".join(f"{row[f'{n} {what}']:.3g}" for n in names)
                + " |"
            )
    for row in single:
        ratio = row["plain update"] / row["expanded update"]
        zeros = row["expanded m with zeros"]
        print(f"{row['case']}: plain / expanded {ratio:.2f}, expanded m with zeros {zeros:.4f}")
    averages = [averaged(0.95, 400), averaged(0.999, 300 if given.quick else 3000)]
    columns = [name for name in averages[0] if name not in ("beta", "steps")]
    print("\n| beta | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for row in averages:
        print(f"| {row['beta']} | " + " | ".join(f"{row[n]:.4f}" for n in columns) + " |")
    return {"once": single, "averages": averages}


def run_updates(given: argparse.Namespace) -> dict[str, Any]:
    """Time updates on one thread, with the gradients of one real step."""
    torch.set_num_threads(1)
    settings, rows = Settings(given.size, 1, given.beta2), []
    batch = source_bytes(SEQUENCES, LENGTH)
    for kind in given.kinds.split(","):
        for states in compared():
            probe = probe_of(settings, Trial(kind, states, 0))
            probe.step(batch)
            seconds = []
            for _ in range(3 if given.quick else 9):
                begun = time.process_time()
                probe.optimizer.step()
                seconds.append(time.process_time() - begun)
            count = sum(p.numel() for p in parameters_of(probe.optimizer))
            per_parameter = state_bytes(probe.optimizer) / count
            row = {"model": kind, "states": states, "bytes_per_parameter": per_parameter}
            rows.append({**row, "parameters": count, "seconds": statistics.median(seconds)})
    print(
        "| model | states | bytes/parameter | CPU ms/update | ns/parameter |\n|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['model']} | {row['states']} | {row['bytes_per_parameter']:.3f} "
            f"| {1e3 * row['seconds']:.1f} | {1e9 * row['seconds'] / row['parameters']:.1f} |"
        )
    return {"size": given.size, "rows": rows}


def run_states(given: argparse.Namespace) -> dict[str, Any]:
    settings = Settings(given.size, given.steps, given.beta2)
    log = Log(given.work / "states.jsonl", settings, Trial)
    kinds = given.kinds.split(",")
    asked = given.states.split(",") if given.states else compared()
    trials = [Trial(k, s, seed) for seed in range(given.seeds) for k in kinds for s in asked]
    with Workers(given.processes) as workers:
        missing = [trial for trial in trials if trial not in log.known]
        workers.run(partial(run, settings), missing, log.add)
    rows = summary(kinds, given.seeds, log.known)
    print("| model | states | held-out loss | change to fp32 | bytes/parameter | CPU s/step |")
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
        shown = ", ".join(f"{of} {each:.3g}" for of, each in error.items())
        print(f"MSE of m / sqrt(v) of {name}, mean of matrices: {shown}")
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
    parser.add_argument("--states", help="of the part states, by comma; default: all")
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
    runs = {"format": run_format, "updates": run_updates, "states": run_states}
    if torchao_states.missing():
        print(torchao_states.missing())
    result: dict[str, Any] = {**facts(), "torchao": torchao_states.version(), "quick": given.quick}
    for part in given.only or PARTS:
        result[part] = runs[part](given)
    path = given.json or Path(__file__).parent / "results" / (
        f"precision-cpu-{datetime.date.today().isoformat()}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
