"""Test whether a rule for weight decay keeps the largest singular values constant over widths.

    python benchmarks/weight_decay.py [--quick] [--processes 2] [--seeds 3] [--work DIR]

arXiv 2510.15262: with AdamW at a constant rate η, training reaches a steady state in which weights
decay as fast as they grow, and the largest singular value of a hidden matrix is ∝ √(η/λ) d^0.75.
With η ∝ 1/d it grows as d^0.25 if λ is constant (coupled), falls as d^-0.25 if λ ∝ d (mup), and is
constant if λ ∝ √d (sqrt).

A byte model of 2 layers trains for --spans times 1/(ηλ) steps, with the η and λ of its hidden
matrices. Each value is the mean over the last span; its difference from the previous span shows
whether it is steady. At the base width all rules are equal. Trials are stored in --work when they
end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders.families import LENGTH, SEQUENCES, model, parameterization
from contenders.machine import facts, source_bytes
from contenders.trials import Log

from allometry.configs.optimization import AdamW
from allometry.scaling.roles import Role
from allometry.studies.sweeps.probe import Probe, sample
from allometry.studies.sweeps.workers import Workers

BASE = 64
RULES = {"coupled": 0.25, "mup": -0.25, "sqrt": 0.0}
"""Predicted power of the width, for each rule of hidden weight decay."""
BOUND, STEADY = 0.15, 0.05
LOOKS = 8
"""Measurements of the singular values per span."""
RESAMPLES = 1000


@dataclass(frozen=True, slots=True, order=True)
class Trial:
    rule: str
    width: int
    seed: int


def trial_of(rule: str, width: int, seed: int) -> Trial:
    """Return the trial of a rule; at the base width all rules are equal and share one trial."""
    return Trial(rule if width != BASE else "coupled", width, seed)


@dataclass(frozen=True)
class Settings:
    """Settings shared by all trials: η and λ at the base, and the length in units of 1/(ηλ)."""

    lr: float
    weight_decay: float
    spans: int


def span_of(probe: Probe) -> int:
    """Return 1/(ηλ) of the hidden matrices: the steps in which weights decay to 1/e."""
    (found,) = {
        round(1.0 / (group["lr"] * group["weight_decay"]))
        for group in probe.optimizer.param_groups
        if group["role"] == Role.HIDDEN.value
    }
    return found


def singular_values(settings: Settings, trial: Trial) -> dict[str, Any]:
    """Train; return the largest singular value of each hidden matrix at every measurement."""
    config = parameterization(
        kind="mup", embedding_std=1.0, base_width=BASE, weight_decay_rule=trial.rule
    )
    chosen = AdamW(lr=settings.lr, weight_decay=settings.weight_decay)
    probe = Probe(model(trial.width, 2), config, chosen, trial.seed)
    span = span_of(probe)
    steps = span * settings.spans
    tokens_PL = sample(source_bytes(steps * SEQUENCES, LENGTH), steps * SEQUENCES, trial.seed)
    hidden = {
        name: parameter.detach()
        for name, parameter in probe.model.named_parameters()
        if probe.specs[name].role is Role.HIDDEN
    }
    losses: list[float] = []
    looks: list[dict[str, float]] = []
    due = {round(span * look / LOOKS) for look in range(1, settings.spans * LOOKS + 1)}
    for step in range(steps):
        batch_BL = tokens_PL[step * SEQUENCES : (step + 1) * SEQUENCES]
        losses.append(probe.step(batch_BL, clip=1.0))
        if step + 1 in due:
            looks.append({n: float(torch.linalg.matrix_norm(w, 2)) for n, w in hidden.items()})
    return {"span": span, "steps": steps, "loss": float(np.mean(losses[-span:])), "looks": looks}


def mean_of_span(found: dict[str, Any], spans_back: int) -> float:
    """Return the geometric mean over matrices and a span's measurements, counted from the end."""
    looks = found["looks"]
    end = len(looks) - spans_back * LOOKS
    return math.exp(
        np.mean([math.log(v) for look in looks[end - LOOKS : end] for v in look.values()])
    )


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log2(widths), np.log2(values), 1)[0])


def by_matrix(found: dict[str, Any]) -> dict[str, float]:
    """Return the geometric mean over the last span and over layers, by kind of matrix."""
    kinds: dict[str, list[float]] = {}
    for look in found["looks"][-LOOKS:]:
        for name, value in look.items():
            kinds.setdefault(".".join(name.split(".")[2:-1]), []).append(math.log(value))
    return {kind: math.exp(np.mean(values)) for kind, values in kinds.items()}


def row_of(rule: str, widths: Sequence[int], seeds: int, known: dict[Trial, Any]) -> dict[str, Any]:
    found_WS = [[known[trial_of(rule, width, s)] for s in range(seeds)] for width in widths]
    logs_WS = np.log2([[mean_of_span(f, 0) for f in row] for row in found_WS])
    changes = [abs(mean_of_span(f, 0) / mean_of_span(f, 1) - 1) for row in found_WS for f in row]
    random = np.random.default_rng(0)
    drawn = [
        slope(widths, 2.0 ** logs_WS[:, random.integers(seeds, size=seeds)].mean(axis=1))
        for _ in range(RESAMPLES)
    ]
    kinds = {
        kind: slope(
            widths,
            [math.exp(np.mean([math.log(by_matrix(f)[kind]) for f in row])) for row in found_WS],
        )
        for kind in by_matrix(found_WS[0][0])
    }
    power = slope(widths, 2.0 ** logs_WS.mean(axis=1))
    interval = np.quantile(drawn, [0.025, 0.975]).tolist() if seeds > 1 else [None, None]
    return {
        "rule": rule,
        "predicted": RULES[rule],
        "slope": power,
        "slope_interval_95": interval,
        "slopes_by_matrix": kinds,
        "means": (2.0 ** logs_WS.mean(axis=1)).tolist(),
        "steps": [row[0]["steps"] for row in found_WS],
        "losses": [float(np.mean([f["loss"] for f in row])) for row in found_WS],
        "largest_change_in_last_span": max(changes),
        "steady": max(changes) < STEADY,
        "met": abs(power) <= BOUND if rule == "sqrt" else None,
    }


def line(row: dict[str, Any]) -> str:
    low, high = row["slope_interval_95"]
    interval = "" if low is None else f" ({low:+.2f} to {high:+.2f})"
    goal = "" if row["met"] is None else f", within ±{BOUND}: {'met' if row['met'] else 'NOT MET'}"
    steady = "" if row["steady"] else " NOT STEADY"
    return (
        f"| {row['rule']} | {row['predicted']:+.2f} | {row['slope']:+.3f}{interval}{goal} "
        f"| {' / '.join(f'{value:.3f}' for value in row['means'])} "
        f"| {' / '.join(map(str, row['steps']))} "
        f"| {row['largest_change_in_last_span']:.1%}{steady} "
        f"| {' / '.join(f'{loss:.3f}' for loss in row['losses'])} |"
    )


def arguments(asked: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two widths, one seed, short spans")
    parser.add_argument("--widths", default="64,128,256")
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument(
        "--lr", type=float, default=2.0**-6, help="η of hidden matrices at width 64"
    )
    parser.add_argument("--weight-decay", type=float, default=0.5, help="λ there")
    parser.add_argument(
        "--spans", type=int, default=4, help="length in units of 1/(ηλ), at least 2"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-weight-decay"))
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args(asked)
    if given.quick:
        given.widths, given.seeds, given.spans, given.weight_decay = "64,128", 1, 2, 8.0
    given.widths = [int(width) for width in given.widths.split(",")]
    given.rules = given.rules.split(",")
    return given


def main(asked: Sequence[str] | None = None) -> None:
    given = arguments(asked)
    given.work.mkdir(parents=True, exist_ok=True)
    settings = Settings(given.lr, given.weight_decay, given.spans)
    log = Log(given.work / "trials.jsonl", settings, Trial)
    trials = {
        trial_of(rule, width, seed)
        for rule in given.rules
        for width in given.widths
        for seed in range(given.seeds)
    }
    missing = sorted(trials - set(log.known), key=lambda t: -t.width)
    with Workers(given.processes) as workers:
        workers.run(partial(singular_values, settings), missing, log.add)
    rows = [row_of(rule, given.widths, given.seeds, log.known) for rule in given.rules]
    print(f"largest singular values of hidden matrices, widths {given.widths}, {given.seeds} seeds")
    print("| rule | predicted | power of d | means | steps | change in last span | loss |")
    print("|---|---|---|---|---|---|---|", *map(line, rows), sep="\n")
    result = {**facts(), "settings": asdict(settings), "widths": given.widths, "rows": rows}
    path = given.json or Path(__file__).parent / "results" / (
        f"weight-decay-cpu-{datetime.date.today().isoformat()}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
