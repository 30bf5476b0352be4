"""Share of a new domain in continued pretraining: ``allometry mix ratio`` and ``critical``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.laws.commands import MixCritical, MixRatio
from allometry.launch.laws.predict import LEVEL, interval
from allometry.launch.laws.sources import assignments, numbers, rows_with
from allometry.launch.text import number, table
from allometry.laws.continual import (
    CriticalShares,
    choose_ratio,
    critical_mixture_ratio,
    critical_shares,
    losses_at,
    ratio_interval,
)
from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.engine import Fit, FitOptions, fit
from allometry.laws.fit.store import StoredFit, load_fit
from allometry.laws.mixing import Predictor, Sample
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named

FRONTIER = 6
"""Number of shares at which both losses are listed."""
HORIZONS = 8
"""Number of horizons within the runs at which the critical ratio is found, to fit the law."""
ALIKE = 3
"""Number of decimals to which shares of one mixture agree."""


def ratio(asked: MixRatio) -> Report:
    """Return the largest share of the domain within the bound, and the losses around it.

    Raises UserError: a file is not a fit by r, an input is missing, or the bound is exceeded at the
    smallest share that was run.
    """
    general, domain = (_by_share(file) for file in (asked.general, asked.domain))
    at = numbers(assignments(asked.inputs, "--with"), "--with")
    _check_inputs((general, domain), at)
    if not (math.isfinite(asked.start) and asked.start > 0.0 and asked.rise >= 0.0):
        raise UserError(
            f"--start={asked.start:g} --rise={asked.rise:g}: give a positive loss and percent "
            "of at least 0"
        )
    bound = asked.start * (1.0 + asked.rise / 100.0)
    low, high = _range(general, domain)
    limits = {"at": at, "bound": bound, "low": low, "high": high}
    chosen = choose_ratio(general.fit, domain.fit, **limits)
    ends: tuple[float, float] | tuple[None, None] = (None, None)
    if general.bootstrap is not None and domain.bootstrap is not None:
        ends = ratio_interval(general.bootstrap, domain.bootstrap, level=LEVEL, **limits)
    shares = np.unique([*np.linspace(low, high, FRONTIER), chosen.share])
    general_n = losses_at(general.fit, 1.0 - shares, at)
    domain_n = losses_at(domain.fit, shares, at)
    rows = Observations.of({**{name: [value] for name, value in at.items()}, "r": [chosen.share]})
    warnings = [w for w in domain.fit.warnings_for(rows) if not w.startswith("r=")]
    if ends[0] is None:
        warnings.append("no interval: one of the fits was made without bootstraps")
    if not chosen.bounded:
        warnings.append(f"the bound does not decide: {high:.3g} is the largest share that was run")
    frontier = np.stack([shares, general_n, domain_n], axis=1).tolist()
    facts = {
        "share": {"value": chosen.share, "low": ends[0], "high": ends[1]},
        "general_loss": chosen.general_loss,
        "domain_loss": chosen.domain_loss,
        "bound": bound,
        "bounded": chosen.bounded,
        "at": at,
        "level": LEVEL,
        "frontier": [
            dict(zip(("share", "general", "domain"), row, strict=True)) for row in frontier
        ],
        "warnings": warnings,
    }
    head = ["domain share", "general loss", "domain loss"]
    shown = [[f"{share:.4f}", number(g), number(d)] for share, g, d in frontier]
    lines = [
        f"largest share of the domain {chosen.share:.4f} (95 % interval {interval(*ends, 4)}) with "  # type: ignore[call-arg]
        f"a general loss of at most {number(bound)}",
        f"there the general loss is {number(chosen.general_loss)}, the domain's "
        f"{number(chosen.domain_loss)}",
        "",
        table([head, *shown]),
        *(f"warning: {one}" for one in warnings),
    ]
    return Report(facts, "\n".join(lines))


def _by_share(file: Path) -> StoredFit:
    stored = load_fit(file)
    names = [one.name for one in stored.fit.form.inputs]
    if "r" not in names or stored.fit.form.target.name != "loss":
        raise UserError(
            f"{file} is a fit of {stored.fit.form.name}, which predicts "
            f"{stored.fit.form.target.name} from {', '.join(names)}; give a fit of the loss by r, "
            "as d_cpt"
        )
    return stored


def _check_inputs(fits: Sequence[StoredFit], at: Mapping[str, float]) -> None:
    read = {one.name for stored in fits for one in stored.fit.form.inputs} - {"r"}
    wrong = sorted(read ^ set(at))
    if wrong:
        said = "is read by no fit; leave it out" if wrong[0] in at else "is missing; give its value"
        raise UserError(f"--with {wrong[0]} {said} (the fits read {', '.join(sorted(read))} and r)")


def _range(general: StoredFit, domain: StoredFit) -> tuple[float, float]:
    """Return the range of the domain's share that the runs of both fits cover."""
    of_domain, of_general = domain.fit.observations["r"], 1.0 - general.fit.observations["r"]
    low = max(float(of_domain.min()), float(of_general.min()))
    high = min(float(of_domain.max()), float(of_general.max()))
    if low >= high:
        raise UserError(
            f"the fits share no range: the domain's has shares {of_domain.min():.3g} to "
            f"{of_domain.max():.3g}, the general one's leave the domain {of_general.min():.3g} to "
            f"{of_general.max():.3g}; r is the share of the corpus whose loss is predicted"
        )
    return low, high


def critical(asked: MixCritical) -> Report:
    """Return the critical ratio at each horizon, by the law through ratios within the runs.

    Raises UserError: a share has too few rows, the bound is exceeded at the smallest share, or the
    bound is reached at too few horizons.
    """
    texts = [text.strip() for text in asked.tokens.split(",")]
    horizons = [numbers({"--tokens": text}, "horizon")["--tokens"] for text in texts]
    if min(horizons) <= 0.0 or not asked.bound > 0.0:
        raise UserError("--tokens and --bound must be positive numbers")
    rows = rows_with(asked.rows, ("D", "r", "dloss"), ("D",), curve=asked.rows.curves)
    groups = by_ratio(rows)
    fits = {share: fit_of(share, part, asked.seed) for share, part in groups.items()}
    within = np.geomspace(
        max(part["D"].min() for part in groups.values()),
        min(part["D"].max() for part in groups.values()),
        HORIZONS,
    )
    found = critical_shares(fits, within.tolist(), bound=asked.bound)
    law = law_of(found, asked.seed)
    samples, warnings = _samples(fits, within, horizons, asked)
    ends: list[Any] = [(None, None)] * len(horizons)
    if len(samples):
        ends = np.quantile(samples, (0.5 - LEVEL / 2, 0.5 + LEVEL / 2), axis=0).T.tolist()
    beyond = [tokens for tokens in horizons if not within[0] <= tokens <= within[-1]]
    if beyond:
        warnings.append(
            f"{', '.join(map(number, beyond))} tokens are outside of the runs' {number(within[0])} "
            f"to {number(within[-1])}: the ratio is an extrapolation"
        )
    facts = {
        "shares": sorted(fits),
        "bound": asked.bound,
        "law": dict(law.values),
        "within": [
            {"tokens": float(tokens), "ratio": float(share), "at_least": bool(censored)}
            for tokens, share, censored in zip(
                found.tokens_T, found.shares_T, found.censored_T, strict=True
            )
        ],
        "ratios": [
            {"tokens": t, "ratio": critical_mixture_ratio(law, t), "low": low, "high": high}
            for t, (low, high) in zip(horizons, ends, strict=True)
        ],
        "level": LEVEL,
        "warnings": warnings,
    }
    return Report(facts, _critical_text(facts))


def _critical_text(facts: Mapping[str, Any]) -> str:
    rows = [["tokens", "critical ratio", "95 % interval", "by"]]
    for one in facts["within"]:
        by = "runs: at least this, the largest share" if one["at_least"] else "runs"
        rows.append([number(one["tokens"]), f"{one['ratio']:.3f}", "-", by])
    for one in facts["ratios"]:
        ends = interval(one["low"], one["high"], 3)
        rows.append([number(one["tokens"]), f"{one['ratio']:.3f}", ends, "law"])
    shares = ", ".join(number(share, 3) for share in facts["shares"])
    lines = [
        f"largest share of the domain at which the general loss rises by at most "
        f"{facts['bound']:g}, by runs at shares {shares}",
        table(rows),
    ]
    return "\n".join([*lines, *(f"warning: {one}" for one in facts["warnings"])])


def by_ratio(rows: Observations) -> dict[float, Observations]:
    """Return the rows of each share of the domain. Raises UserError: r is outside of [0, 1]."""
    shares = rows["r"].round(ALIKE)
    if not ((shares >= 0.0) & (shares <= 1.0)).all():
        raise UserError("r must be a share between 0 and 1 in every row; map it (--map r=COLUMN)")
    rows["dloss"]  # raises UserError if the runs have no such column
    return {float(share): rows.take(shares == share) for share in np.unique(shares)}


def fit_of(share: float, rows: Observations, seed: int) -> Fit:
    """Return the change of the general loss by tokens at one share. Raises UserError."""
    try:
        return fit(form_named("cmr_general"), rows, FitOptions(starts=32, seed=seed))
    except UserError as error:
        raise UserError(f"at a domain share of {share:g}: {error}") from None


def law_of(found: CriticalShares, seed: int) -> Fit:
    """Return the CMR law through critical shares. Raises UserError: there are fewer than three."""
    rows = found.observations()
    if len(rows) < 3:
        raise UserError(
            f"the bound decides at {len(rows)} of {HORIZONS} horizons within the runs and a law "
            "takes three; add runs of larger shares or lower --bound"
        )
    return fit(form_named("cmr_critical"), rows, FitOptions(starts=32, seed=seed))


def _samples(
    fits: Mapping[float, Fit],
    within: NDArray[np.float64],
    horizons: Sequence[float],
    asked: MixCritical,
) -> tuple[NDArray[np.float64], list[str]]:
    """Return the ratios [B, T] of bootstrap samples of all shares, and warnings about them."""
    none = np.empty((0, len(horizons)))
    if not asked.bootstraps:
        return none, []
    if any(len(set(one.observations.groups)) < 2 for one in fits.values()):
        return none, ["no intervals: a bootstrap draws groups, and a share has rows of one alone"]
    drawn = [
        bootstrap(one, max(asked.bootstraps, 2), asked.seed + i)
        for i, one in enumerate(fits.values())
    ]
    ratios: list[list[float]] = []
    count = min(len(one) for one in drawn)
    for index in range(count):
        laws: dict[float, Predictor] = {
            share: Sample(one, index) for share, one in zip(fits, drawn, strict=True)
        }
        try:
            law = law_of(critical_shares(laws, within.tolist(), bound=asked.bound), asked.seed)
            ratios.append([critical_mixture_ratio(law, tokens) for tokens in horizons])
        except UserError:
            continue
    if 2 * len(ratios) < count:
        return none, [f"no intervals: only {len(ratios)} of {count} samples have a ratio"]
    lost = count - len(ratios)
    return np.array(ratios), [f"{lost} of {count} samples have no ratio; left out"] if lost else []
