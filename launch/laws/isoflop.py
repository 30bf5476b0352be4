"""Parabola of each compute budget, without a law: ``allometry isoflop``."""

from __future__ import annotations

import math
from typing import Any, Literal

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.laws.commands import IsoFlop as IsoFlopCommand
from allometry.launch.laws.predict import LEVEL, interval
from allometry.launch.laws.sources import assignments, rows_with
from allometry.launch.text import number, table
from allometry.laws.isoflop import IsoFlop, Resampled, exponent, isoflop_optima, resampled
from allometry.laws.observations import Observations

ALWAYS = 0.95
"""Share of samples with a vertex below which an interval is reported to leave samples out."""
BIASED = (
    "a loss is no parabola in ln N, so vertices are biased where sizes lie wide or to one side of "
    "them; trim (--within) and compare with `allometry fit` and `allometry optimum`"
)


def profiled(asked: IsoFlopCommand) -> Report:
    """Return each budget's vertex and the exponents of C of the best N and D, with intervals.

    Raises UserError: an option has an invalid value, the rows have no N, loss, and D or C, or no
    budget has three sizes.
    """
    observations, counted = _observations(asked)
    each, within = asked.flops_per_parameter_token, _share(asked.within, "--within", math.inf)
    tolerance = _share(asked.tolerance, "--tolerance", 0.0)
    optima = isoflop_optima(observations, each, tolerance, within)
    if not optima:
        raise UserError(
            f"no three sizes of the {len(observations)} rows have the same FLOPs within "
            f"{asked.tolerance:g} %; raise --tolerance, or say where the FLOPs stand (--map C=...)"
        )
    samples = asked.bootstraps
    drawn = None
    if samples:
        drawn = resampled(observations, optima, each, samples=samples, seed=asked.seed)
    used = sum(len(one.rows) + len(one.trimmed) for one in optima)
    notes = _notes(optima, drawn, samples, len(observations) - used)
    powers = {name: _power(optima, drawn, name) for name in ("N", "D")}
    about = {"C": counted, **{k: v for k, v in observations.conventions.items() if k != "C"}}
    facts = {
        "rows": len(observations),
        "level": LEVEL,
        "budgets": [_facts(one, i, drawn) for i, one in enumerate(optima)],
        "exponents": powers,
        "conventions": about,
        "notes": notes,
    }
    head = ["FLOPs", "rows", "N", "95 % interval", "D", "D/N", "loss"]
    lines = [table([head, *(_cells(one, i, drawn) for i, one in enumerate(optima))])]
    if powers["N"]["value"] is not None:
        grows = (f"{name} grows as C^{_with_interval(power)}" for name, power in powers.items())
        lines.append(", ".join(grows))
    lines += [f"{name}: {about[name]}" for name in ("C", "N", "loss", "left out") if name in about]
    return Report(facts, "\n".join([*lines, *(f"note: {note}" for note in notes)]))


def _observations(asked: IsoFlopCommand) -> tuple[Observations, str]:
    """Return the rows, and the convention by which their FLOPs are counted."""
    if asked.rows.curves:
        raise UserError("--curves: a parabola is through finished runs; leave it out")
    each = asked.flops_per_parameter_token
    if not (math.isfinite(each) and each > 0.0):
        raise UserError(f"--flops-per-parameter-token={each:g} must be a positive number")
    named = "C" in assignments(asked.rows.mapping, "--map")
    names = ("N", "C" if named else "D", "loss")
    observations = rows_with(asked.rows, names, names)
    for name in names:
        observations[name]  # raises UserError if the runs have no such column
    if "C" not in observations.columns:
        return observations, f"{each:g} N D"
    return observations, observations.conventions.get("C", "as the rows say")


def _share(percent: float | None, flag: str, absent: float) -> float:
    if percent is None:
        return absent
    if not (math.isfinite(percent) and percent > 0.0):
        raise UserError(f"{flag}={percent:g} must be a positive number of percent")
    return percent / 100.0


def _power(
    optima: list[IsoFlop], drawn: Resampled | None, name: Literal["N", "D"]
) -> dict[str, float | None]:
    power = exponent(optima, name)
    low, high = (drawn and drawn.exponents[name]) or (None, None)
    return {"value": None if power is None else power[0], "low": low, "high": high}


def _with_interval(power: dict[str, Any]) -> str:
    known = interval(power["low"], power["high"], 3)
    value = number(power["value"], 3)
    return value if known == "-" else f"{value} (95 % interval {known})"


def _facts(one: IsoFlop, index: int, drawn: Resampled | None) -> dict[str, Any]:
    of: dict[str, Any] = {}
    for name in ("N", "D", "loss"):
        low, high = (drawn and getattr(drawn, name)[index]) or (None, None)
        of[name] = {"value": getattr(one, name), "low": low, "high": high}
    return {
        "flops": one.flops,
        "rows": len(one.rows),
        "trimmed": len(one.trimmed),
        **of,
        "tokens_per_parameter": one.D / one.N,
        "problem": one.problem,
    }


def _cells(one: IsoFlop, index: int, drawn: Resampled | None) -> list[str]:
    low, high = (drawn and drawn.N[index]) or (None, None)
    rows = f"{len(one.rows)} of {len(one.rows) + len(one.trimmed)}"
    there = [number(one.D), number(one.D / one.N, 3), number(one.loss)]
    if one.problem is not None:
        return [number(one.flops), rows, one.problem]
    return [number(one.flops), rows, number(one.N), interval(low, high, 4), *there]


def _notes(optima: list[IsoFlop], drawn: Resampled | None, samples: int, without: int) -> list[str]:
    """Return notes on missing results and their reasons."""
    notes = []
    if without:
        notes.append(f"{without} rows belong to budgets of fewer than three sizes and are left out")
    inner = [i for i, one in enumerate(optima) if one.problem is None]
    if len(inner) < 2:
        notes.append("no exponents: they take two budgets with a least value among their sizes")
    if samples and inner and drawn is None:
        notes.append("no intervals: a budget of three sizes leaves no residuals; run more sizes")
    if drawn is not None and (loose := [i for i in inner if drawn.vertices[i] < ALWAYS]):
        notes.append(
            f"at {', '.join(number(optima[i].flops) for i in loose)} FLOPs noise as the residuals' "
            f"takes the least value out of the sizes in {1 - ALWAYS:.0%} of the samples or more; "
            "these are left out, so the intervals there are too narrow"
        )
    return [*notes, BIASED]
