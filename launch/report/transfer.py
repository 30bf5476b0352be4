"""Figures of learning-rate sweeps: from files of trials, and among the runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from allometry.configs.format import human
from allometry.launch.figures.figure import Column, Figure, Panel, Series, ordered, star
from allometry.launch.report.inputs import Inputs, Shown
from allometry.launch.report.section import Section, Table
from allometry.laws.optimum import Sweep, drift, drift_interval, quadratic_optimum
from allometry.laws.regret import regrets
from allometry.laws.trials import TrialFile

LEAST_RATES = 3
NOT_LEARNT_FROM = ("run", "parallel", "evaluation", "checkpoint", "record")
"""Config sections in which the runs of a sweep may differ."""
HEAD = ("sweep", "size", "best learning rate", "log2", "loss there", "note")


def transfer(inputs: Inputs) -> Section:
    """Return the loss against the learning rate, a line for each size, and each minimum."""
    title = "Best learning rate"
    # Each size has the same colour in all files.
    sizes = sorted({(file.axis, size) for file in inputs.trials for size in file.losses})
    names, colours = [f"{axis} {size}" for axis, size in sizes], ordered([s for _, s in sizes])
    shades = dict(zip(names, colours, strict=True))
    drawn = [_of_trials(file, shades) for file in inputs.trials] + _of_runs(inputs.runs)
    if not drawn:
        why = (
            "no file of trials was given (--transfer) and there are no "
            f"{LEAST_RATES} runs that differ in optimizer.lr alone"
        )
        return Section("transfer", title, absent=why)
    panels, rows, notes = zip(*drawn, strict=True)
    text = (
        "Loss against the peak learning rate (logarithmic), the mean over seeds. A star marks the "
        "least loss: the vertex of the parabola through the best rate and its two neighbours. "
        "Where a rule carries over, the stars stand above each other. Rates that diverged are "
        "not drawn."
    )
    figure = Figure("transfer", panels, legend=True)
    table = Table(HEAD, tuple(row for some in rows for row in some))
    said = tuple(note for some in notes for note in some)
    return Section("transfer", title, text, (figure,), (table,), said)


Drawn = tuple[Panel, list[tuple[str, ...]], list[str]]


def _of_trials(file: TrialFile, shades: Mapping[str, str]) -> Drawn:
    sweeps, notes = {}, []
    for size in file.losses:
        sweeps[size], missing = file.sweep(size)
        if missing:
            notes.append(
                f"{file.path.name}, {file.axis} {size}: {missing} rates are left out, as not all "
                "seeds have them."
            )
    curves = {
        f"{file.axis} {size}": (np.array(sweep.log2_lrs), sweep.losses_RS.mean(axis=1))
        for size, sweep in sweeps.items()
    }
    octaves = drift(sweeps)
    same_seeds = len({sweep.losses_RS.shape[1] for sweep in sweeps.values()}) == 1
    low, high = drift_interval(sweeps) if same_seeds else (math.nan, math.nan)
    interval = f" (95 % over seeds: {low:.2f} to {high:.2f})" if math.isfinite(low) else ""
    if len(sweeps) > 1:
        said = "is not known: one has no interior optimum" if math.isnan(octaves) else ""
        notes.append(
            f"{file.path.name}: the best rate drifts over {file.axis} "
            f"{said or f'by {octaves:.2f} octaves{interval}'}."
        )
        if same_seeds:
            notes += _costs(file, sweeps)
    panel, rows = _panel(file.path.name, curves, shades, "held-out loss (nats per token)")
    return panel, rows, notes


def _costs(file: TrialFile, sweeps: Mapping[int, Sweep]) -> list[str]:
    """Return the cost of the smallest size's best learning rate at each other size."""
    base, said = min(sweeps), []
    for size, regret in regrets(sweeps).items():
        low, high = regret.percent_interval
        within = f" (95 % over seeds: {low:.2f} to {high:.2f})" if math.isfinite(high) else ""
        cost = f"costs {regret.percent:.2f} % of the loss at {size}{within}"
        if regret.nats == math.inf:
            cost = f"diverges at {size}"
        elif regret.problem is not None:
            cost = f"costs an unknown part of the loss at {size}: {regret.problem}"
        said.append(f"{file.path.name}: the best rate of {file.axis} {base} {cost}.")
    return said


def _of_runs(runs: tuple[Shown, ...]) -> list[Drawn]:
    """Return sweeps among the runs: runs that differ only in optimizer.lr, seed and folder."""
    alike: dict[str, list[Shown]] = {}
    for one in runs:
        alike.setdefault(_rest(one.run.config), []).append(one)
    curves: dict[str, tuple[Column, Column]] = {}
    for group in alike.values():
        by_rate: dict[float, list[float]] = {}
        for one in group:
            rate = float(one.run.config["optimizer"]["lr"])
            diverged = one.state.startswith("not finite")
            if rate > 0.0 and (diverged or one.state == "finished"):
                by_rate.setdefault(rate, []).append(math.inf if diverged else one.final_loss[0])
        if len(by_rate) < LEAST_RATES:
            continue
        rates = sorted(by_rate)
        one, model = group[0], group[0].run.config.get("model", {})
        name = f"width {model.get('width')}, {model.get('num_layers')} layers, "
        name += f"{human(one.metrics['tokens'][-1])} tokens"
        name = name if name not in curves else f"{name} ({one.name})"
        curves[name] = (np.log2(rates), np.array([np.mean(by_rate[rate]) for rate in rates]))
    if not curves:
        return []
    shades = dict(zip(curves, ordered(range(len(curves))), strict=True))
    panel, rows = _panel("runs of this report", curves, shades, "final loss (nats per token)")
    return [(panel, rows, [])]


def _rest(config: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if key not in NOT_LEARNT_FROM}
    kept["batch"] = {
        k: v for k, v in (config.get("batch") or {}).items() if k != "micro_batch_sequences"
    }
    kept["optimizer"] = {k: v for k, v in config.get("optimizer", {}).items() if k != "lr"}
    return json.dumps(kept, sort_keys=True, default=str)


def _panel(
    title: str, curves: Mapping[str, tuple[Column, Column]], shades: Mapping[str, str], y_label: str
) -> tuple[Panel, list[tuple[str, ...]]]:
    series, rows = [], []
    for name, (log2_lrs, losses) in curves.items():
        finite, colour = np.isfinite(losses), shades[name]
        series.append(Series(name, 2.0 ** log2_lrs[finite], losses[finite], "joined", colour))
        best = quadratic_optimum(log2_lrs.tolist(), losses.tolist())
        if best.interior:
            series.append(star(f"{name}, best", 2.0**best.log2_lr, best.loss, colour, named=False))
        loss = f"{best.loss:.4f}" if math.isfinite(best.loss) else "–"
        rate = f"{2.0**best.log2_lr:.4g}"
        rows.append((title, name, rate, f"{best.log2_lr:.2f}", loss, best.problem or ""))
    x_label = "peak learning rate"
    return Panel(title, x_label, y_label, tuple(series), x_log=True, x_ticks="plain"), rows
