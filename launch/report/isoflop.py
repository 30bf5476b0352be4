"""IsoFLOP parabolas: loss over the size of the model at equal compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allometry.launch.figures.figure import Figure, Panel, Series, ordered, star
from allometry.launch.report.inputs import Inputs, Shown
from allometry.launch.report.section import Section, Table
from allometry.laws.isoflop import TOLERANCE, IsoFlop, isoflop_optima, size_exponent
from allometry.laws.observations import Observations

ALONG = 60
HEAD = ("rows of", "FLOPs", "runs", "best N", "tokens there", "loss there", "note")


def isoflops(inputs: Inputs) -> Section:
    """A parabola for each budget with three sizes or more, of the runs and of each fit's rows."""
    title = "IsoFLOP parabolas"
    drawn = [
        (name, rows, optima) for name, rows in _groups(inputs) if (optima := isoflop_optima(rows))
    ]
    if not drawn:
        return Section(
            key="isoflop",
            title=title,
            absent=(
                "no three finished runs of different sizes, nor rows of a fit, have the same FLOPs "
                f"(within {TOLERANCE:.0%})"
            ),
        )
    panels = tuple(_panel(name, rows, optima) for name, rows, optima in drawn)
    notes = []
    for name, _, optima in drawn:
        power = size_exponent(optima)
        if power is not None:
            notes.append(f"{name}: the best N grows as C to the power {power[0]:.3f}.")
    text = (
        "Loss against the number of parameters N at (nearly) equal compute C: a parabola in ln N "
        "through the runs of each budget, and its least point (star). The vertices are biased "
        "where the law is no parabola, even without noise; take numbers from a fitted law."
    )
    return Section(
        key="isoflop",
        title=title,
        text=text,
        figures=(Figure(key="isoflop", panels=panels, legend=True),),
        tables=(
            Table(
                head=HEAD,
                rows=tuple(_row(name, one) for name, _, optima in drawn for one in optima),
            ),
        ),
        notes=tuple(notes),
    )


def _groups(inputs: Inputs) -> list[tuple[str, Observations]]:
    groups = []
    done = [one for one in inputs.runs if one.state == "finished" and one.parameters]
    done = [one for one in done if np.isfinite(one.final_loss[0])]
    kinds = {one.final_loss[1] for one in done}
    for kind in sorted(kinds):
        alike = [one for one in done if one.final_loss[1] == kind]
        groups.append((f"runs ({kind} loss)", _rows(alike)))
    for path, stored in inputs.fits:
        rows = stored.fit.observations
        wanted = {"N", "loss"}
        if rows.curves or not wanted <= set(rows.columns) or not {"C", "D"} & set(rows.columns):
            continue
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


def _panel(name: str, rows: Observations, optima: Sequence[IsoFlop]) -> Panel:
    series: list[Series] = []
    for one, colour in zip(optima, ordered([o.flops for o in optima]), strict=True):
        sizes = rows["N"][one.rows]
        grid = np.geomspace(sizes.min(), sizes.max(), ALONG)
        label = f"C = {one.flops:.2e}"
        series.append(Series(name=label, x=grid, y=one.losses(grid), colour=colour))
        series.append(
            Series(
                name=f"{label}, measured",
                x=sizes,
                y=rows["loss"][one.rows],
                style="dots",
                colour=colour,
                notes=tuple(rows.groups[row] for row in one.rows),
                named=False,
            )
        )
        if one.problem is None:
            series.append(star(f"{label}, least", one.N, one.loss, colour, named=False))
    return Panel(
        title=name,
        x_label="parameters N",
        y_label="loss (nats per token)",
        x_log=True,
        series=tuple(series),
    )


def _row(name: str, one: IsoFlop) -> tuple[str, ...]:
    return (
        name,
        f"{one.flops:.3e}",
        str(len(one.rows)),
        f"{one.N:.3e}",
        f"{one.D:.3e}",
        f"{one.loss:.4f}",
        one.problem or "",
    )
