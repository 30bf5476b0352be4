"""Parts of the gallery that a report does not have: experts, documents, certificate, target."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.json_file import read_object
from allometry.launch.figures.figure import GREY, Figure, Panel, Series, colours
from allometry.launch.figures.schedule import recorded_schedule
from allometry.launch.report import losses
from allometry.launch.report.inputs import Inputs
from allometry.launch.report.section import Section, Table
from allometry.laws.runs import read_lines


def curves(inputs: Inputs) -> Section:
    """Return the losses of all runs, and the longest run's with its forecasts."""
    section = losses.losses(inputs)
    forecast = [one for one in inputs.runs if "forecast/loss" in one.metrics]
    if section.absent or not forecast:
        return section
    target = max(forecast, key=lambda one: one.metrics["flops"][-1])
    alone = replace(inputs, runs=(target,))
    predicted, measured = losses.forecasts(alone).figures[0].panels[0], losses.losses(alone)
    curve = [one for one in measured.figures[0].panels[0].series if one.style != "dots"]
    begin = min(float(one.x.min()) for one in predicted.series)
    named = {"line": "forecast of the final loss", "band": "95 % interval", "star": "measured"}
    series = [
        *(_after(one, begin) for one in curve),
        *(replace(one, name=named[one.style], named=True) for one in predicted.series),
    ]
    panel = Panel(
        f"{target.name}: forecast of its own final loss",
        "training tokens so far",
        losses.LOSS,
        tuple(series),
    )
    text = (
        "Left: training loss of each run, each point the mean of the last 5 % of the run so far, "
        "and held-out loss (dots); a dotted part was copied from the run's trunk. Right: the run "
        "with the most FLOPs. Grey is its training loss, recorded and smoothed; at each point the "
        "coloured line is the forecast of its final training loss from its own curve up to there, "
        "with the 95 % interval; the star is the smoothed loss at its end."
    )
    over_tokens = section.figures[0].panels[0]
    smoothed = tuple(one for one in over_tokens.series if one.layer != "recorded")
    figure = Figure("curves", (replace(over_tokens, series=smoothed), panel), legend=True)
    return replace(section, text=text, figures=(figure,))


def _after(one: Series, begin: float) -> Series:
    kept = one.x >= begin
    name = "training loss" if one.layer == "smooth" else one.name
    return replace(one, name=name, x=one.x[kept], y=one.y[kept], colour=GREY)


def experts(folders: Sequence[Path]) -> Section:
    """Return each expert's share of tokens over the steps, a panel for each layer."""
    title = "Expert loads"
    figures = [_loads(folder, number) for number, folder in enumerate(folders, 1)]
    if not figures:
        return Section("experts", title, absent="no run has a file expert_load.jsonl")
    text = (
        "Share of a batch's token visits that each expert of a layer receives, by step; the dashed "
        "line is an even load. The shares of a layer sum to 1."
    )
    return Section("experts", title, text, tuple(figures))


def _loads(folder: Path, number: int) -> Figure:
    rows = read_lines(folder / "expert_load.jsonl")
    try:
        steps = np.array([float(row["step"]) for row in rows])
        layers = {key: np.array([row["load"][key] for row in rows]) for key in rows[0]["load"]}
        panels = tuple(_layer(key, steps, loads) for key, loads in layers.items())
    except (KeyError, TypeError, ValueError, IndexError):
        raise UserError(
            f"{folder}/expert_load.jsonl is damaged; restore it, or remove the folder"
        ) from None
    return Figure(f"experts-{number}", panels, legend=True)


def _layer(key: str, steps: Any, loads_SE: Any) -> Panel:
    """Return the panel of a layer; loads of S steps and E experts."""
    count = loads_SE.shape[1]
    series = [
        Series(f"expert {e}", steps, loads_SE[:, e] / loads_SE.sum(axis=1), colour=colour)
        for e, colour in enumerate(colours(range(count)))
    ]
    ends = np.array([steps.min(), steps.max()])
    even = Series("even load", ends, np.full(2, 1.0 / count), "dashed", GREY)
    return Panel(f"layer {key}", "step", "share of the layer's visits", (*series, even))


def documents(folders: Sequence[Path]) -> Section:
    """Return the schedule of the last recorded step of runs over whole documents."""
    title = "A step over whole documents"
    if not folders:
        return Section("documents", title, absent="no run has a file plans.jsonl")
    drawn = [recorded_schedule(folder, None) for folder in folders]
    figures = tuple(
        replace(figure, key=f"documents-{number}") for number, (figure, _) in enumerate(drawn, 1)
    )
    text = (
        "Each row is a rank and each bar a micro-batch of documents: pale is the forward pass, "
        "full colour the backward pass. Ranks that share a long document (a ring) are joined "
        "by a line. The documents and their places are those of a step that was trained; the times "
        "are the planner's, not measured."
    )
    return Section("documents", title, text, figures)


def certificates(paths: Sequence[Path]) -> Section:
    """Return the differences of each layout from one process."""
    title = "The same run in other layouts"
    if not paths:
        why = "no file of allometry verify is there"
        return Section("certificate", title, absent=why)
    head = (
        *("layout", "ranks", "gradients, fp64", "gradients, fp32", "parameters, fp64"),
        *("carried over", "resumed", "passed"),
    )
    tables = []
    for path in paths:
        try:
            found = read_object(path)
            rows = tuple(_layout(one) for one in found["layouts"])
        except (OSError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{path} is not a certificate; write it with allometry verify --out, or remove it"
            ) from None
        tables.append(Table(head, rows))
    text = (
        "Largest relative difference from the same model on one process: of the gradients of one "
        "step, of the parameters after two steps, of the loss after a checkpoint was moved "
        "from one process to the layout; and whether a resumed run has the same bits as an "
        "uninterrupted one."
    )
    return Section("certificate", title, text, tables=tuple(tables))


def _layout(one: Mapping[str, Any]) -> tuple[str, ...]:
    start = (str(one["layout"]), str(one["world_size"]))
    if one["refused"] is not None:
        return (*start, *("–",) * 5, f"not possible: {one['refused']}")
    double, single = one["steps"]["fp64"], one["steps"]["fp32"]
    return (
        *start,
        f"{double['gradients']['worst']:.1e}",
        f"{single['gradients']['worst']:.1e}",
        f"{double['parameters']['worst']:.1e}",
        "–" if one["loss"] is None else f"{one['loss']:.1e}",
        "same bits" if one["resume_bit_exact"] else "differs",
        "yes" if one["passed"] else "NO",
    )


def is_certificate(path: Path) -> bool:
    """Return True for a JSON file with layouts and a config's hash."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"layouts", "config_sha256"} <= set(found)
