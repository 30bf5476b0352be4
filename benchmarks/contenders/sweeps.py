"""Learning-rate sweeps for a list of variants: stored trials, rows, lines of a table."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from allometry.laws.optimum import (
    Sweep,
    drift,
    drift_interval,
    exponent,
    exponent_interval,
)
from allometry.scaling.shapes import Axis
from allometry.studies.sweeps.outcome import Transfer
from allometry.studies.sweeps.runner import Runner
from allometry.studies.sweeps.transfer import TransferSweep
from allometry.studies.sweeps.trials import TrialLog
from contenders.families import (
    HELD_OUT,
    LENGTH,
    SEQUENCES,
    STEPS,
    Asked,
    Reading,
    Variant,
    optimizer,
)
from contenders.machine import source_bytes

QUICK_STEPS = 20
HEADER = (
    "| | log2 of the best rate | drift (95 % over seeds) | its power of the size (95 %) "
    "| single seeds apart | loss |\n|---|---|---|---|---|---|"
)


def run_variant(part: str, variant: Variant, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for the variant and one for each of its readings; print their lines."""
    steps = QUICK_STEPS if given.quick else STEPS
    sizes = _sizes(variant, given.quick)
    log_name = f"{part}-{variant.slug}-{steps}.jsonl"
    sweep = _sweep(variant, steps)
    log = TrialLog(given.work / log_name, sweep.settings())
    runner = Runner(sweep, variant.log2_lrs, 0.5, given.processes, known=log.known, done=log.add)
    found = runner.run(sizes, tuple(range(given.seeds_of[part])))
    sweeps = {size: found.sweep(size) for size in found.sizes}
    rows = [_row(variant.name, variant.asked, sweeps) | _raw(found)]
    for reading in variant.readings:
        shifted = under(reading, sweeps)
        rows.append(_row(reading.name, reading.asked, shifted) | {"read_off": variant.name})
    for row in rows:
        print(line(row), flush=True)
    return rows


def under(reading: Reading, sweeps: Mapping[int, Sweep]) -> dict[int, Sweep]:
    """Return the sweeps under the reading's rule."""
    first = min(sweeps)
    return {
        size: Sweep(
            tuple(rate + reading.power * math.log2(size / first) for rate in sweep.log2_lrs),
            sweep.losses_RS,
        )
        for size, sweep in sweeps.items()
    }


def _sizes(variant: Variant, quick: bool) -> tuple[int, ...]:
    if not quick:
        return variant.sizes
    return (10, 20) if variant.axis == Axis.HORIZON else variant.sizes[:2]


def _sweep(variant: Variant, steps: int) -> TransferSweep:
    # The order of data differs between seeds; for the longest horizon the selection differs too.
    longest = 2 * max(variant.sizes) if variant.axis == Axis.HORIZON else 4 * STEPS
    pool = source_bytes(longest * SEQUENCES + HELD_OUT, LENGTH)
    return TransferSweep(
        model=variant.model,
        parameterization=variant.config,
        optimizer=optimizer(variant.kind, 1.0),
        pool_PL=pool[:-HELD_OUT],
        held_out_HL=pool[-HELD_OUT:],
        axis=variant.axis,
        steps=steps,
        sequences=SEQUENCES,
    )


def _row(name: str, asked: Asked, sweeps: Mapping[int, Sweep]) -> dict[str, Any]:
    apart, power = drift(sweeps), exponent(sweeps)
    interval, reach = drift_interval(sweeps), exponent_interval(sweeps)
    expected = asked.exponent
    return {
        "name": name,
        "least": asked.least,
        "most": _finite(asked.most),
        "met": asked.least <= apart <= asked.most,
        "drift_octaves": _finite(apart),
        "drift_interval_95": [_finite(end) for end in interval],
        "exponent": _finite(power),
        "exponent_interval_95": [_finite(end) for end in reach],
        "expected_exponent": expected,
        "expected_inside": None if expected is None else reach[0] <= expected <= reach[1],
        "spread_of_seeds_octaves": [_finite(sweep.spread()) for sweep in sweeps.values()],
        "optima": [
            {
                "size": size,
                "log2_lr": optimum.log2_lr,
                "loss": _finite(optimum.loss),
                "problem": optimum.problem,
            }
            for size, optimum in ((size, sweep.optimum()) for size, sweep in sweeps.items())
        ],
    }


def _raw(found: Transfer) -> dict[str, Any]:
    """Return the sweep's description and every loss."""
    losses = [
        [trial.size, trial.log2_lr, trial.seed, _finite(loss)]
        for trial, loss in sorted(found.losses.items())
    ]
    return {**found.describe(), "losses": losses}


def line(row: Mapping[str, Any]) -> str:
    """Format a row as a line of a table; ? marks an optimum at an edge."""
    optima = row["optima"]
    rates = " / ".join(f"{o['log2_lr']:.2f}{'?' if o['problem'] else ''}" for o in optima)
    losses = " / ".join(_number(o["loss"], 3) for o in optima)
    seeds = row["spread_of_seeds_octaves"]
    spread = _number(None if None in seeds else float(np.mean(seeds)), 2)
    asked = ""
    if row["least"] > 0.0 or row["most"] is not None:
        bound = f"≥ {row['least']:g}" if row["least"] > 0.0 else f"≤ {row['most']:g}"
        asked = f", {bound}: {'met' if row['met'] else 'NOT MET'}"
    if row["expected_exponent"] is not None:
        inside = "inside" if row["expected_inside"] else "OUTSIDE"
        asked_power = f", {row['expected_exponent']:g}: {inside}"
    else:
        asked_power = ""
    return (
        f"| {row['name']} | {rates} | {_with_interval(row, 'drift')}{asked} "
        f"| {_with_interval(row, 'exponent')}{asked_power} | {spread} | {losses} |"
    )


def _with_interval(row: Mapping[str, Any], what: str) -> str:
    value = row["drift_octaves" if what == "drift" else "exponent"]
    low, high = row[f"{what}_interval_95"]
    return f"{_number(value, 2)} ({_number(low, 2)} to {_number(high, 2)})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
