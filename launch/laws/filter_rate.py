"""Share of a corpus to keep at given budgets: ``allometry mix filter-rate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.laws.commands import MixFilterRate
from allometry.launch.laws.mix import named_fits
from allometry.launch.laws.predict import LEVEL, interval
from allometry.launch.laws.sources import numbers
from allometry.launch.text import number, table
from allometry.laws.filter_rate import (
    PUBLISHED,
    RateChoice,
    choose_rate,
    published_share,
    rate_changes,
)
from allometry.laws.fit.store import StoredFit

BEYOND = 10.0
"""Changes of the choice are searched up to this factor below and above the budgets."""


def filter_rate(asked: MixFilterRate) -> Report:
    """Return the fit with the least compute-optimal loss at each budget.

    Raises UserError: a file is not a fit of N and D, the losses have different units, or a budget
    is not a positive number.
    """
    fits = named_fits(asked.fits)
    units = {name: one.fit.unit(one.fit.form.target.unit) for name, one in fits.items()}
    targets = {one.fit.form.target.name for one in fits.values()}
    if targets != {"loss"} or len(set(units.values())) > 1:
        said = ", ".join(f"{name}: {one.fit.form.target.name}" for name, one in fits.items())
        raise UserError(
            f"the fits must be of one loss, in one unit, of the same held-out tokens ({said}; "
            f"{', '.join(sorted(set(units.values())))}); fit each share's runs alike"
        )
    budgets = [
        numbers({"--flops": one.strip()}, "budget")["--flops"] for one in asked.flops.split(",")
    ]
    per_token = asked.flops_per_parameter_token
    chosen = [choose_rate(fits, one, per_token, level=LEVEL, seed=asked.seed) for one in budgets]
    changes = rate_changes(fits, min(budgets) / BEYOND, max(budgets) * BEYOND, per_token)
    warnings = _warnings(fits, chosen)
    facts = {
        "level": LEVEL,
        "unit": next(iter(units.values())),
        "choices": [_facts(one) for one in chosen],
        "changes": [
            {"flops": at, "before": before, "after": after} for at, before, after in changes
        ],
        "published": {
            corpus: [published_share(corpus, one) for one in budgets] for corpus in PUBLISHED
        },
        "warnings": warnings,
    }
    return Report(facts, _text(facts, chosen))


def _facts(one: RateChoice) -> dict[str, Any]:
    rates = {}
    for name, best in one.optima.items():
        low, high = (None, None) if best.intervals is None else best.intervals["loss"]
        rates[name] = {
            "N": best.N,
            "D": best.D,
            "loss": best.loss,
            "low": low,
            "high": high,
            "chance": None if one.chances is None else one.chances[name],
        }
    return {"flops": one.flops, "best": one.best, "rates": rates}


def _warnings(fits: Mapping[str, StoredFit], chosen: Sequence[RateChoice]) -> list[str]:
    warnings = [
        f"{name}: {said}"
        for one in chosen
        for name, best in one.optima.items()
        for said in best.warnings
    ]
    without = [name for name, one in fits.items() if one.bootstrap is None]
    if without:
        warnings.append(f"no chances: {without[0]} was fitted without bootstraps")
    return list(dict.fromkeys(warnings))


def _text(facts: Mapping[str, Any], chosen: Sequence[RateChoice]) -> str:
    rows = [["FLOPs", "kept", "N", "D", "loss", "95 % interval", "chance to be best"]]
    for one in facts["choices"]:
        for name, rate in one["rates"].items():
            rows.append(
                [
                    number(one["flops"]),
                    f"{name} *" if name == one["best"] else name,
                    number(rate["N"]),
                    number(rate["D"]),
                    number(rate["loss"]),
                    interval(rate["low"], rate["high"]),
                    "-" if rate["chance"] is None else f"{rate['chance']:.0%}",
                ]
            )
    changes = [
        f"at {number(one['flops'], 3)} FLOPs the choice changes from {one['before']} to "
        f"{one['after']}"
        for one in facts["changes"]
    ]
    published = ", ".join(
        f"{corpus} {' '.join(f'{share:.1%}' for share in shares)}"
        for corpus, shares in facts["published"].items()
    )
    return "\n".join(
        [
            table(rows),
            f"* the least loss, in {facts['unit']}, at the best N and D of each",
            *(changes or ["the choice is the same a factor of ten beyond these budgets"]),
            f"BETR's best shares at these budgets (arXiv 2507.12466): {published}",
            *(f"warning: {one}" for one in facts["warnings"]),
        ]
    )
