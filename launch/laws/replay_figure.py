"""Figure of ``allometry mix RUNS``: domain loss and general loss by the ratio of replay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from allometry.configs.format import human
from allometry.launch.figures.figure import GREY, Column, Figure, Panel, Series, ordered, star
from allometry.laws.frontier import DCpt, Frontier
from allometry.laws.observations import Observations
from allometry.laws.replay import ReplayRows

POINTS = 101
TARGET = "#D55E00"


def frontier_figure(read: ReplayRows, laws: DCpt, facts: Mapping[str, Any]) -> Figure:
    """Return both losses by the ratio of replay, and one by the other, with the measured points.

    Curves are drawn for each size at its longest horizon, and for the target with its interval.
    """
    shares = np.linspace(*laws.span, POINTS)
    at = facts["at"]
    target = laws.at(shares, at["N"], at["D"])
    by: dict[str, list[Series]] = {"domain": [], "general": [], "both": []}
    for size, colour in zip(read.sizes, ordered(read.sizes), strict=True):
        rows = _longest(read.rows, size)
        tokens = float(rows["D"].max())
        name = f"N = {human(size)}, D = {human(tokens)}"
        _add(by, name, laws.at(shares, size, tokens), colour, "line")
        points = {"style": "point", "colour": colour, "named": False}
        for which in ("domain", "general"):
            by[which].append(Series(f"{name}, run", 1.0 - rows["r"], rows[which], **points))
        by["both"].append(Series(f"{name}, run", rows["domain"], rows["general"], **points))
    name = f"target: N = {human(at['N'])}, D = {human(at['D'])}"
    for which in ("domain", "general"):
        if target.low:
            ends = {"low": target.low[which], "high": target.high[which]}
            band = Series(name, 1.0 - shares, target.losses[which], "band", TARGET, **ends)
            by[which].append(band)
    _add(by, name, target, TARGET, "dashed")
    replay, domain, general = facts["replay"], facts["domain"]["value"], facts["general"]["value"]
    chosen = f"chosen: replay {replay:.3f}"
    for which, x, y in (
        ("domain", replay, domain), ("general", replay, general), ("both", domain, general)
    ):  # fmt: skip
        by[which].append(star(chosen, x, y, TARGET))
    limit = f"most general loss: {facts['limit']:.4f}"
    by["general"].append(_level(limit, 1.0 - shares, facts["limit"]))
    by["both"].append(_level(limit, target.losses["domain"], facts["limit"]))
    old, new = ", ".join(read.old) or "general", ", ".join(read.new) or "domain"
    x, unit = "replay: share of old data in training", "nats per token"
    panels = (
        Panel(
            "Domain", x, f"held-out loss of {new} ({unit})", tuple(by["domain"]), x_ticks="plain"
        ),
        Panel(
            "General", x, f"held-out loss of {old} ({unit})", tuple(by["general"]), x_ticks="plain"
        ),
        Panel(
            "Frontier",
            f"held-out loss of {new} ({unit})",
            f"held-out loss of {old} ({unit})",
            tuple(by["both"]),
            x_ticks="plain",
        ),
    )
    return Figure("replay", panels)


def _add(by: dict[str, list[Series]], name: str, curve: Frontier, colour: str, style: Any) -> None:
    replay = 1.0 - curve.shares_S
    for which in ("domain", "general"):
        by[which].append(Series(name, replay, curve.losses[which], style, colour))
    domain, general = curve.losses["domain"], curve.losses["general"]
    by["both"].append(Series(name, domain, general, style, colour))


def _level(name: str, x: Column, y: float) -> Series:
    ends = np.array([float(x.min()), float(x.max())])
    return Series(name, ends, np.full(2, y), "dotted", GREY)


def _longest(rows: Observations, size: float) -> Observations:
    """Return the rows of this size with the largest D of their share."""
    of_size = rows.take(rows["N"] == size)
    kept = np.zeros(len(of_size), bool)
    for share in np.unique(of_size["r"]):
        alike = of_size["r"] == share
        kept |= alike & (of_size["D"] == of_size["D"][alike].max())
    return of_size.take(kept)
