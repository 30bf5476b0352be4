"""Shares of the least loss by laws of mixtures: ``allometry mix best``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.laws.commands import MixBest
from allometry.launch.laws.predict import LEVEL
from allometry.launch.laws.sources import assignments, numbers
from allometry.launch.text import number, table
from allometry.laws.fit.store import StoredFit, load_fit
from allometry.laws.forms.mixture import DomainForm
from allometry.laws.mixing import mixture_intervals, optimal_mixture
from allometry.laws.observations import Observations

END = 1e-4
"""Distance from the smallest or largest share of the runs below which a share is at that end."""


def best(asked: MixBest) -> Report:
    """Return the best shares within the range of the runs, and each fit's loss at these shares.

    Raises UserError: a file is not a fit of a law of shares, the fits have different domains, an
    input of the fits is missing, or no mixture satisfies the bounds.
    """
    fits = named_fits(asked.fits)
    domains = _domains(fits)
    at = _inputs(fits, domains, numbers(assignments(asked.inputs, "--with"), "--with"))
    options: dict[str, Any] = {"at": at, "seed": asked.seed}
    ran = {"least": _ends(fits, domains, max, min), "most": _ends(fits, domains, min, max)}
    for name, texts in (("least", asked.least), ("most", asked.most)):
        options[name] = ran[name] | numbers(assignments(texts, f"--{name}"), f"--{name}")
    given = numbers(assignments(asked.weights, "--weight"), "--weight")
    for name in given:
        if name not in fits:
            raise UserError(f"--weight {name} is none of the fits; they are {', '.join(fits)}")
    options["weights"] = {name: given.get(name, 1.0) for name in fits}
    laws = {name: one.fit for name, one in fits.items()}
    found = optimal_mixture(laws, domains, starts=asked.starts, **options)
    sampled = {name: one.bootstrap for name, one in fits.items() if one.bootstrap is not None}
    warnings = [*_warnings(fits, found.shares, at), *_at_ends(found.shares, options, ran)]
    intervals = None
    if len(sampled) == len(fits):
        intervals = mixture_intervals(sampled, domains, level=LEVEL, **options)
    else:
        without = next(name for name in fits if name not in sampled)
        warnings.append(f"no intervals: {without} was fitted without bootstraps")
    if 2 * found.agreeing < found.starts:
        warnings.append(
            f"only {found.agreeing} of {found.starts} searches end here, so the laws have several "
            "minima: raise --starts and compare"
        )
    low_high = {name: (None, None) if intervals is None else intervals[name] for name in domains}
    shares = {
        name: {
            **dict(
                zip(("share", "low", "high"), (found.shares[name], *low_high[name]), strict=True)
            ),
            "run": [ran["least"][name], ran["most"][name]],
        }
        for name in domains
    }
    facts = {
        "shares": shares,
        "loss": found.loss,
        "losses": found.losses,
        "weights": options["weights"],
        "at": at,
        "level": LEVEL,
        "agreeing": found.agreeing,
        "starts": found.starts,
        "warnings": warnings,
    }
    return Report(facts, _text(facts))


def _text(facts: Mapping[str, Any]) -> str:
    rows = [["domain", "share", "95 % interval", "shares of the runs"]]
    for name, one in facts["shares"].items():
        shown = "-" if one["low"] is None else f"{one['low']:.4f} to {one['high']:.4f}"
        low, high = one["run"]
        rows.append([name, f"{one['share']:.4f}", shown, f"{low:.4f} to {high:.4f}"])
    losses = [["fit", "weight", "loss there"]]
    for name, loss in facts["losses"].items():
        losses.append([name, number(facts["weights"][name]), number(loss)])
    agree = f"{facts['agreeing']} of {facts['starts']} searches agree on it"
    warnings = (f"warning: {one}" for one in facts["warnings"])
    return "\n".join([table(rows), "", table(losses), agree, *warnings])


def named_fits(texts: Sequence[str]) -> dict[str, StoredFit]:
    """Return the fits by name, from NAME=FILE or FILE. Raises UserError like ``load_fit``.

    For example, ``named_fits(["code=a.json", "web.json"])`` returns fits named code and web.
    """
    fits: dict[str, StoredFit] = {}
    for text in texts:
        name, sign, file = text.partition("=")
        if not sign or Path(text).is_file():
            name, file = Path(text).stem, text
        if name in fits:
            raise UserError(f"two fits are called {name}; name them: NAME=FILE")
        fits[name] = load_fit(Path(file))
    return fits


def _domains(fits: Mapping[str, StoredFit]) -> tuple[str, ...]:
    """Return the domains, which are the same in all fits."""
    domains: tuple[str, ...] = ()
    for name, one in fits.items():
        form = one.fit.form
        if not isinstance(form, DomainForm):
            raise UserError(
                f"{name} is a fit of {form.name}, which reads no shares of domains; give fits of "
                "mixing_exponential:COLUMN,COLUMN or another law of shares"
            )
        if domains and set(form.domains) != set(domains):
            raise UserError(
                f"{name} is a fit over {', '.join(form.domains)} and another over "
                f"{', '.join(domains)}; give fits over the same domains"
            )
        domains = domains or form.domains
    return domains


def _inputs(
    fits: Mapping[str, StoredFit], domains: Sequence[str], given: Mapping[str, float]
) -> dict[str, float]:
    """Return the inputs other than shares; each must be given, and read by a fit."""
    read = [one.name for stored in fits.values() for one in stored.fit.form.inputs]
    others = [name for name in dict.fromkeys(read) if name not in domains]
    for name in given:
        if name not in others:
            raise UserError(f"--with {name}: no fit reads it besides shares; leave it out")
    missing = [name for name in others if name not in given]
    if missing:
        raise UserError(f"the fits also read {', '.join(missing)}; give --with {missing[0]}=VALUE")
    return dict(given)


def _ends(
    fits: Mapping[str, StoredFit], domains: Sequence[str], over_fits: Any, over_rows: Any
) -> dict[str, float]:
    """Return the largest minimum or smallest maximum of each share over the fits' runs."""
    rows = [one.fit.observations for one in fits.values()]
    return {name: float(over_fits(over_rows(one[name]) for one in rows)) for name in domains}


def _at_ends(
    shares: Mapping[str, float], asked: Mapping[str, Any], ran: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Return a warning for each share at an end of the runs' range, except the ends 0 and 1."""
    warnings = []
    for end, word in (("least", "least"), ("most", "largest")):
        for name, share in shares.items():
            edge = ran[end][name]
            if asked[end][name] == edge and abs(share - edge) < END and END < edge < 1.0 - END:
                warnings.append(
                    f"{name} is at the {word} share that was run, {edge:.4g}: run more, or let the "
                    f"search go beyond (--{end} {name}=...)"
                )
    return warnings


def _warnings(
    fits: Mapping[str, StoredFit], shares: Mapping[str, float], at: Mapping[str, float]
) -> list[str]:
    rows = Observations.of({name: [value] for name, value in {**shares, **at}.items()})
    found = [w for one in fits.values() for w in one.fit.warnings_for(rows)]
    return list(dict.fromkeys(found))
