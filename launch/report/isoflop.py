"""IsoFLOP parabolas: loss over model size at equal compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allometry.launch.figures.figure import Figure, Panel, Series, ordered, star
from allometry.launch.report.inputs import Inputs, Shown
from allometry.launch.report.section import Section, Table
from allometry.laws.isoflop import TOLERANCE, IsoFlop, exponent, isoflop_optima
from allometry.laws.observations import Observations

ALONG = 60
HEAD = ("rows of", "FLOPs", "runs", "best N", "tokens there", "loss there", "note")


def isoflops(inputs: Inputs) -> Section:
    """Return parabolas of budgets with three or more sizes, of the runs and each fit's rows."""
    title = "IsoFLOP parabolas"
    drawn = [
        (name, rows, optima) for name, rows in _groups(inputs) if (optima := isoflop_optima(rows))
    ]
    if not drawn:
        why = (
            "no three finished runs of different sizes, nor rows of a fit, have the same FLOPs "
            f"(within {TOLERANCE:.0%})"
        )
        return Section("isoflop", title, absent=why)
    panels = tuple(_panel(name, rows, optima) for name, rows, optima in drawn)
    notes = []
    for name, _, optima in drawn:
        power = exponent(optima)
        if power is not None:
            notes.append(f"{name}: the best N grows as C to the power {power[0]:.3f}.")
    text = (
        "Loss against the number of parameters N at (nearly) equal compute C: a parabola in ln N "
        "through the runs of each budget, and its least point (star). The vertices are biased "
        "where the law is no parabola, even without noise; take numbers from a fitted law."
    )
    figure = Figure("isoflop", panels, legend=True)
    table = Table(HEAD, tuple(_row(name, one) for name, _, optima in drawn for one in optima))
    return Section("isoflop", title, text, (figure,), (table,), tuple(notes))


def _groups(inputs: Inputs) -> list[tuple[str, Observations]]:
    groups = []
    done = [one for one in inputs.runs if one.state == "finished" and one.parameters]
    done = [one for one in done if np.isfinite(one.final_loss[0])]
    for kind in sorted({one.final_loss[1] for one in done}):
        alike = [one for one in done if one.final_loss[1] == kind]
        groups.append((f"runs ({kind} loss)", _rows(alike)))
    for path, stored in inputs.fits:
        rows = stored.fit.observations
        columns = set(rows.columns)
        if not rows.curves and {"N", "loss"} <= columns and {"C", "D"} & columns:
            groups.append((str(path), rows))
    return groups


def _rows(runs: Sequence[Shown]) -> Observations:
    return Observations.of(
        {
            "N": [float(one.parameters["non_embedding"]) for one in runs],
            "D": [float(one.metrics["tokens"][-1]) for one in runs],
            "C": [float(one.metrics["flops"][-1]) for one in runs],
            "loss": [one.final_loss[0] for one in runs],
        },
        [one.name for one in runs],
    )


def _panel(title: str, rows: Observations, optima: Sequence[IsoFlop]) -> Panel:
    series: list[Series] = []
    for one, colour in zip(optima, ordered([o.flops for o in optima]), strict=True):
        sizes = rows["N"][one.rows]
        grid = np.geomspace(sizes.min(), sizes.max(), ALONG)
        label = f"C = {one.flops:.2e}"
        series.append(Series(label, grid, one.losses(grid), colour=colour))
        name, losses = f"{label}, measured", rows["loss"][one.rows]
        notes = tuple(rows.groups[row] for row in one.rows)
        series.append(Series(name, sizes, losses, "dots", colour, notes=notes, named=False))
        if one.problem is None:
            series.append(star(f"{label}, least", one.N, one.loss, colour, named=False))
    return Panel(title, "parameters N", "loss (nats per token)", tuple(series), x_log=True)


def _row(name: str, one: IsoFlop) -> tuple[str, ...]:
    best = (f"{one.N:.3e}", f"{one.D:.3e}", f"{one.loss:.4f}")
    return (name, f"{one.flops:.3e}", str(len(one.rows)), *best, one.problem or "")
