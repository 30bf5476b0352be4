"""Best learning rate and batch size of each sweep, and laws of both: ``allometry sweeps``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.laws.commands import Sweeps
from allometry.launch.laws.predict import interval
from allometry.launch.laws.sources import SWEPT, assignments, numbers, rows_with
from allometry.launch.text import number, table
from allometry.laws.hyperparameters import (
    EXPONENTS,
    Cell,
    HyperparameterLaw,
    PowerLaw,
    fit_hyperparameter_law,
    held_out_excess,
    nearest_excess,
)
from allometry.laws.observations import Observations
from allometry.laws.sensitivity import learning_rate_sensitivity
from allometry.scaling.hyperlaws import step_law


def swept(asked: Sweeps) -> Report:
    """Fit the laws of the best learning rate and batch size, and measure their errors.

    Raises UserError: an option has an invalid value, the rows are not sweeps, or the optima do not
    determine a law.
    """
    rows = _rows(asked)
    targets = [_target(text) for text in asked.at]
    options: dict[str, Any] = {"order": 3 if asked.cubic else 2, "within": asked.within / 100.0}
    law = fit_hyperparameter_law(rows, samples=asked.bootstraps, seed=asked.seed, **options)
    worth = {
        "the laws of the other sizes": held_out_excess(rows, **options),
        "Step Law": nearest_excess(rows, step_law),
    }
    octaves = np.array(list(law.octaves_from(step_law).values()))
    apart = dict(zip(("lr", "B"), np.sqrt((octaves**2).mean(axis=0)).tolist(), strict=True))
    sensitivity = _sensitivity(rows, asked.initial_loss)
    facts = {
        **law.to_json(),
        "level": 0.95,
        "excess": worth,
        "octaves_from_step_law": apart,
        "sensitivity": sensitivity,
        "predictions": [_prediction(law, at) for at in targets],
        "conventions": dict(rows.conventions),
    }
    head = ["N", "D", "best lr", "95 % interval", "best B", "95 % interval", "loss"]
    shown = [_cells(cell) for cell in law.cells]
    if sensitivity:
        head.append("sensitivity")
        for cell, cells in zip(law.cells, shown, strict=True):
            cells.append(number(sensitivity[cell.name], 4))
    lines = [table([head, *shown]), "", *_law_words("lr", law.rate), *_law_words("B", law.batch)]
    for name, excess in worth.items():
        if excess:
            mean, most = (100.0 * f(list(excess.values())) for f in (np.mean, np.max))
            lines.append(
                f"the run nearest to {name} is {mean:.3g} % above its sweep's best in the mean, "
                f"{most:.3g} % at most, over {len(excess)} sweeps"
            )
    lines.append(
        f"from Step Law (arXiv 2503.04715) the best lr differ by {apart['lr']:.2g} octaves (RMS), "
        f"the best B by {apart['B']:.2g}"
    )
    for one in facts["predictions"]:
        parts = [
            f"{name} = {number(one[name]['value'])} (95 % interval "
            f"{interval(one[name]['low'], one[name]['high'], 3)})"
            for name in ("lr", "B")
            if one[name] is not None
        ]
        lines.append(f"at N = {number(one['N'])}, D = {number(one['D'])}: {', '.join(parts)}")
    lines += [f"left out: {name}: {why}" for name, why in law.left_out.items()]
    about = rows.conventions
    lines += [f"{name}: {about[name]}" for name in ("N", "lr", "B", "loss") if name in about]
    return Report(facts, "\n".join(lines))


def _rows(asked: Sweeps) -> Observations:
    if asked.rows.sweeps or asked.rows.curves:
        flag = "--sweeps" if asked.rows.sweeps else "--curves"
        raise UserError(f"{flag}: this command reads every finished run of sweeps; leave it out")
    if not (math.isfinite(asked.within) and asked.within > 0.0):
        raise UserError(f"--within={asked.within:g} must be a positive number of percent")
    if asked.initial_loss is not None and not math.isfinite(asked.initial_loss):
        raise UserError(f"--initial-loss={asked.initial_loss:g} is no number")
    rows = rows_with(replace(asked.rows, sweeps=False), SWEPT, SWEPT)
    for name in SWEPT:
        rows[name]  # raises UserError if the runs have no such column
    return rows


def _target(text: str) -> dict[str, float]:
    """Return the N and D of ``N=7e9,D=1.4e11``."""
    at = numbers(assignments(text.split(","), "--at"), "--at")
    if set(at) != {"N", "D"} or min(at.values()) <= 0.0:
        raise UserError(f"--at {text!r} must give N and D, positive numbers: --at N=7e9,D=1.4e11")
    return at


def _sensitivity(rows: Observations, initial: float | None) -> dict[str, float]:
    """Return each sweep's sensitivity to lr, each lr at its best batch; {} without ``initial``."""
    if initial is None:
        return {}
    found = {}
    for n, d in sorted(set(zip(rows["N"].tolist(), rows["D"].tolist(), strict=True))):
        cell = rows.take((rows["N"] == n) & (rows["D"] == d))
        rates = np.unique(cell["lr"])
        losses = {float(rate): float(cell["loss"][cell["lr"] == rate].min()) for rate in rates}
        found[f"N={n:.4g} D={d:.4g}"] = learning_rate_sensitivity(losses, initial)
    return found


def _prediction(law: HyperparameterLaw, at: Mapping[str, float]) -> dict[str, Any]:
    said: dict[str, Any] = dict(at)
    for name, of in (("lr", law.rate), ("B", law.batch)):
        said[name] = None
        if of is not None:
            low, high = of.predict_interval(**at)
            said[name] = {"value": of.predict(**at), "low": low, "high": high}
    return said


def _cells(cell: Cell) -> list[str]:
    """Return a sweep's row of the table."""
    cells = [number(cell.at["N"], 4), number(cell.at["D"], 4)]
    for axis in ("lr", "B"):
        varied = axis in cell.surface.axes
        low, high = cell.surface.interval(axis) if varied else (None, None)
        cells += [number(cell.surface.best[axis], 4), interval(low, high, 3)]
    return [*cells, number(cell.surface.loss)]


def _law_words(name: str, law: PowerLaw | None) -> list[str]:
    if law is None:
        return [f"no law of the best {name}: it did not vary in every sweep"]
    low, high = law.interval("c")
    words = [f"c = {number(law.values['c'])} ({interval(low, high, 3)})"]
    for symbol in (EXPONENTS[key] for key in law.inputs):
        low, high = law.interval(symbol)
        words.append(f"{symbol} = {number(law.values[symbol], 4)} ({interval(low, high, 3)})")
    form = " ".join(f"{key}^{EXPONENTS[key]}" for key in law.inputs)
    return [
        f"best {name} = c {form}: {', '.join(words)}; sweeps are off by {law.octaves:.2g} octaves, "
        f"{law.misfit:.2g} more than their noise"
    ]
