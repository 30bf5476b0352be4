"""Ratio of replay by laws of small runs: ``allometry mix RUNS``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.figures.drawing import check_format, draw
from allometry.launch.laws.commands import MixReplay
from allometry.launch.laws.continual import HORIZONS, by_ratio, fit_of, law_of
from allometry.launch.laws.fit import FEW_GROUPS
from allometry.launch.laws.predict import LEVEL
from allometry.launch.laws.replay_figure import frontier_figure
from allometry.launch.laws.replay_mixture import of_sources
from allometry.launch.laws.replay_text import text_of
from allometry.launch.laws.sources import assignments, numbers
from allometry.launch.text import finite
from allometry.laws.collect import COUNTS, Unfinished
from allometry.laws.continual import critical_mixture_ratio, critical_shares
from allometry.laws.fit.store import load_fit
from allometry.laws.frontier import (
    GRID,
    LOSSES,
    DCpt,
    Frontier,
    Held,
    fit_d_cpt,
    held_out,
    repeated,
)
from allometry.laws.observations import Observations
from allometry.laws.replay import ReplayRows, replay_runs, replay_table
from allometry.laws.tables import is_table

OF_RUNS = ("count", "unfinished", "domain", "ends")
OF_TABLES = ("mapping", "where")
SHOWN = 6
"""Number of shares at which both losses are listed."""


def chosen(asked: MixReplay) -> Report:
    """Return the best ratio for a target, the critical ratios and both losses; draw the frontier.

    Raises UserError: the rows cannot be read or are too few, or no share of the runs satisfies the
    bound.
    """
    if not (asked.rise >= 0.0 and asked.bound > 0.0):
        raise UserError(
            f"--rise={asked.rise:g} --bound={asked.bound:g}: give percent of at least 0 and "
            "positive nats per token"
        )
    if asked.start is not None and not (math.isfinite(asked.start) and asked.start > 0.0):
        raise UserError(f"--start={asked.start:g} is no loss; give nats per token, above 0")
    if asked.out is not None:
        check_format(asked.out)
    half_life = _half_life(asked)
    read = _read(asked)
    size, tokens = _target(asked, read.rows)
    laws = fit_d_cpt(read.rows, bootstraps=asked.bootstraps, seed=asked.seed)
    held, notes = held_out(read.rows, asked.seed)
    start = read.start_at(size, laws.alpha)
    limit = start * (1.0 + asked.rise / 100.0)
    frontier = laws.at(np.linspace(*laws.span, GRID), size, tokens)
    place = frontier.best(limit)
    best = _at(frontier, place)
    ends = frontier.best_interval(limit, LEVEL)
    share = {"value": best["share"], "low": ends and ends[0], "high": ends and ends[1]}
    facts = {
        "new": list(read.new),
        "old": list(read.old),
        "rows": len(read.rows),
        "sizes": read.sizes,
        "at": {"N": size, "D": tokens},
        "start": start,
        "limit": limit,
        "share": share,
        "replay": 1.0 - best["share"],
        "general": best["general"],
        "domain": best["domain"],
        "frontier": [_at(frontier, int(i)) for i in np.linspace(0, GRID - 1, SHOWN).round()],
        "critical": _critical(asked, read, laws, size, tokens),
        **_quality(laws, held),
        "repetition": _repetition(asked, read, best["share"] * tokens, half_life),
        "mixture": of_sources(asked, read),
        "level": LEVEL,
    }
    facts["warnings"] = [*read.notes, *notes, *_warnings(facts, laws, frontier, place)]
    if asked.out is not None:
        draw(frontier_figure(read, laws, facts), asked.out)
        facts["picture"] = str(asked.out)
    return Report(facts, text_of(facts))


def _quality(laws: DCpt, held: Sequence[Held]) -> dict[str, Any]:
    """Return the laws' parameters, their fit quality and their held-out errors."""
    fitted = {
        which: {
            "parameters": dict(laws.fits[which].values),
            "fixed": dict(laws.fixed),
            "r_squared": finite(laws.r_squared(which)),
            "loose": list(laws.fits[which].certificate.loose),
        }
        for which in LOSSES
    }
    errors = [
        {
            "what": one.what,
            "rows": max(len(errors_n) for errors_n in one.errors.values()),
            **{which: float(np.abs(one.errors[which]).max()) for which in LOSSES},
            "ends": {which: float(np.abs(one.ends[which]).max()) for which in LOSSES},
        }
        for one in held
    ]
    return {"laws": fitted, "held_out": errors}


def _read(asked: MixReplay) -> ReplayRows:
    tables = [is_table(source) for source in asked.sources]
    if any(tables) and not all(tables):
        raise UserError("give run folders or tables, not both")
    for names, wrong, of in (
        (OF_RUNS, all(tables), "run folders"),
        (OF_TABLES, not all(tables), "tables"),
    ):
        for name in names:
            if wrong and getattr(asked, name):
                flag = "map" if name == "mapping" else name
                raise UserError(f"--{flag} belongs to {of}; leave it out")
    if all(tables):
        mapping = assignments(asked.mapping, "--map")
        return replay_table(asked.sources, mapping=mapping, where=asked.where, start=asked.start)
    options: dict[str, Any] = {}
    for name, choices in (("count", COUNTS), ("unfinished", get_args(Unfinished))):
        if (value := getattr(asked, name)) is not None:
            if value not in choices:
                raise UserError(f"--{name}={value} is not known; use {', '.join(choices)}")
            options[name] = value
    return replay_runs(
        asked.sources,
        domain=asked.domain,
        skip=asked.skip,
        ends=asked.ends,
        start=asked.start,
        **options,
    )


def _target(asked: MixReplay, rows: Observations) -> tuple[float, float]:
    given = numbers(assignments(asked.inputs, "--with"), "--with")
    for name, value in given.items():
        if name not in ("N", "D") or value <= 0.0:
            raise UserError(f"--with {name}={value:g}: give N and D, each above 0")
    size = given.get("N", float(rows["N"].max()))
    if len(np.unique(rows["N"])) == 1 and size != rows["N"][0]:
        raise UserError(
            f"--with N={size:g}: all runs have N={rows['N'][0]:g}, which says nothing of other "
            "sizes; add runs of another size or leave it out"
        )
    return size, given.get("D", float(rows["D"].max()))


def _at(frontier: Frontier, place: int) -> dict[str, Any]:
    """Return one share with both losses and their intervals."""
    found: dict[str, Any] = {"share": float(frontier.shares_S[place])}
    for which in LOSSES:
        found[which] = {
            "value": float(frontier.losses[which][place]),
            "low": float(frontier.low[which][place]) if frontier.low else None,
            "high": float(frontier.high[which][place]) if frontier.high else None,
        }
    return found


def _critical(
    asked: MixReplay, read: ReplayRows, laws: DCpt, size: float, tokens: float
) -> dict[str, Any]:
    """Return the critical ratio at the target by D-CPT, and by CMR for each size of the runs."""
    frontier = laws.at(np.linspace(*laws.span, GRID), size, tokens)
    limit = read.start_at(size, laws.alpha) + asked.bound
    try:
        place = frontier.best(limit, largest=True)
        at = _at(frontier, place)
        ends = frontier.best_interval(limit, LEVEL, largest=True) or (None, None)
        d_cpt: dict[str, Any] = {"ratio": at.pop("share"), "low": ends[0], "high": ends[1], **at}
        d_cpt["bounded"] = place < GRID - 1
    except UserError as error:
        d_cpt = {"ratio": None, "why": str(error)}
    cmr: list[dict[str, Any]] = []
    for one in read.sizes:
        try:
            cmr.append({"N": one, "ratio": _cmr(read.rows, one, tokens, asked)})
        except UserError as error:
            cmr.append({"N": one, "ratio": None, "why": str(error)})
    return {"bound": asked.bound, "d_cpt": d_cpt, "cmr": cmr}


def _cmr(rows: Observations, size: float, tokens: float, asked: MixReplay) -> float:
    """Return the critical ratio of one size by CMR.

    Fits each share, finds the ratios within the runs, and fits a law through these ratios.
    """
    of_size = rows.take(rows["N"] == size)
    columns = {"D": of_size["D"], "r": of_size["r"], "dloss": of_size["general"] - of_size["start"]}
    groups = by_ratio(Observations.of(columns))
    fits = {share: fit_of(share, part, asked.seed) for share, part in groups.items()}
    low = max(part["D"].min() for part in groups.values())
    high = min(part["D"].max() for part in groups.values())
    within = np.geomspace(low, high, HORIZONS)
    found = critical_shares(fits, within.tolist(), bound=asked.bound)
    if low <= tokens <= high:  # between the runs' horizons the ratio needs no law
        there = critical_shares(fits, [tokens], bound=asked.bound)
        if there.censored_T[0]:
            raise UserError(f"the largest share that was run, {there.shares_T[0]:g}, is within it")
        return float(there.shares_T[0])
    return critical_mixture_ratio(law_of(found, asked.seed), tokens)


def _half_life(asked: MixReplay) -> float | None:
    if asked.repetition is None:
        return None
    values = load_fit(asked.repetition).fit.values
    if "R_D" not in values:
        raise UserError(
            f"{asked.repetition} is no fit of repeated data; give one of data_constrained or "
            "data_constrained_tied"
        )
    return float(values["R_D"])


def _repetition(
    asked: MixReplay, read: ReplayRows, tokens: float, half_life: float | None
) -> dict[str, Any] | None:
    """Return the value of the new domain's epochs; None if its unique tokens are unknown."""
    unique = asked.unique or sum(read.unique.get(name, 0.0) for name in read.new)
    if unique < 0.0 or not math.isfinite(unique):
        raise UserError(f"--unique={unique:g} is no number of tokens; give one above 0")
    if not unique:
        return None
    one = repeated(tokens, unique) if half_life is None else repeated(tokens, unique, half_life)
    return {
        "tokens": one.tokens,
        "unique": one.unique,
        "epochs": one.epochs,
        "worth": one.worth,
        "last": one.last,
        "half_epochs": one.half,
        "by": "C4 (2305.16264)" if half_life is None else str(asked.repetition),
    }


def _warnings(facts: Mapping[str, Any], laws: DCpt, frontier: Frontier, place: int) -> list[str]:
    found = []
    rows = Observations.of({**{name: [value] for name, value in facts["at"].items()}, "r": [0.5]})
    found += [w for w in laws.fits["domain"].warnings_for(rows) if not w.startswith("r=")]
    if facts["at"]["N"] not in facts["sizes"]:
        found.append(
            f"the general loss before, {facts['start']:.4f}, is from those of the sizes "
            "that were run, by the exponent of N; give the model's own with --start"
        )
    for which in LOSSES:
        if left := len(laws.rows) - len(laws.fits[which].observations):
            found.append(
                f"of the {which} loss where none of its data is read, D-CPT has no D: the longest "
                f"runs alone are taken there, and {left} rows left out"
            )
    held = [f"{name} = {value:g}" for name, value in laws.fixed.items()]
    if held:
        found.append(
            f"held, as the runs cannot say: {', '.join(held)} (three sizes and three horizons can)"
        )
    if place == GRID - 1:
        found.append(
            f"the bound does not decide: {frontier.shares_S[-1]:g} is the largest share run"
        )
    groups = len(set(laws.rows.groups))
    if laws.samples and groups < FEW_GROUPS:
        found.append(f"intervals rest on {groups} cells of N and ratio and are rough; add runs")
    if not laws.samples:
        found.append("no intervals: they take bootstraps of two cells or more")
    return found
