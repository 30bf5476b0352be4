"""Compare laws by their errors on held-out rows: ``allometry compare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.laws.commands import Compare
from allometry.launch.laws.fit import fit_options, holding_out
from allometry.launch.laws.sources import notes_of_rows, observations_for
from allometry.launch.laws.text import Errors, sizes_of
from allometry.launch.text import finite, table
from allometry.laws.fit.compare import OTHER, Comparison, compare
from allometry.laws.registry import form_named


def compared(asked: Compare) -> Report:
    """Fit several laws to the same rows and list the laws in the order of their held-out errors.

    Raises UserError: as for a fit. A law that cannot be fitted to the rows is listed with its
    problem, unless no law can be fitted.
    """
    forms = [form_named(name) for name in law_names(asked.laws)]
    if len(forms) < 2:
        raise UserError("a comparison needs two laws; give --laws chinchilla,kappa")
    targets = list(dict.fromkeys(form.target.name for form in forms))
    if len(targets) > 1:
        raise UserError(
            f"these laws predict different things ({', '.join(targets)}) and cannot be compared; "
            "give laws of one of them"
        )
    options = fit_options(asked.fitting, forms)
    hold_out = asked.fitting.hold_out
    observations = observations_for(asked.rows, forms, hold_out)
    if hold_out == "none":
        raise UserError("--hold-out=none: laws are compared by what is held out; leave it out")
    rows, by, how = holding_out(observations, forms, hold_out)
    laws = [
        Compared(one, None if one.held_out is None else Errors(one.held_out, how))
        for one in compare(forms, rows, options, by)
    ]
    if all(law.errors is None for law in laws):
        raise UserError(str(laws[0].of.problem))
    laws.sort(key=Compared.rank)
    notes = notes_of_rows(asked.rows, observations, forms)
    for law in laws:
        notes += [f"{law.of.form.name}: {note}" for note in law.notes()]
    facts = {
        "rows": len(observations),
        "groups": len(set(observations.groups)),
        "laws": [law.to_json() for law in laws],
        "conventions": dict(observations.conventions),
        "notes": notes,
    }
    other = OTHER[options.loss]
    header = ["law", "params", "held-out mean", "max", f"by {other}", "fitted rows", "starts agree"]
    shown = table([[*header, "at a bound"], *(law.cells() for law in laws)])
    lines = [f"held out: {how}", "", shown, *_objectives(laws, options.loss, other)]
    return Report(facts, "\n".join([*lines, *(f"note: {note}" for note in notes)]))


def _objectives(laws: Sequence[Compared], asked: str, other: str) -> list[str]:
    """Return a line with the objective of the smaller held-out error for each law."""
    better: dict[str, list[str]] = {asked: [], other: []}
    for law in laws:
        if law.errors is not None and law.other is not None:
            better[asked if law.errors.mean <= law.other else other].append(law.of.form.name)
    said = [f"{objective} for {', '.join(names)}" for objective, names in better.items() if names]
    return [f"objective that holds out better: {'; '.join(said)}"] if said else []


@dataclass(frozen=True)
class Compared:
    """One law of a comparison, with errors of the same kind as the other laws'."""

    of: Comparison
    errors: Errors | None

    def rank(self) -> tuple[bool, bool, float]:
        """Return the sort key: by held-out error; failed laws last, fragile laws before them."""
        failed = self.errors is None
        return failed, bool(self.of.fragile), self.errors.mean if self.errors else 0.0

    def notes(self) -> list[str]:
        """Return reasons of a failed or fragile fit, and groups that could not be held out."""
        if self.errors is None:
            return [str(self.of.problem)]
        left_out = self.errors.held_out.notes
        more = [f"{len(left_out) - 1} more groups are not held out"] if len(left_out) > 2 else []
        return [
            *(f"fragile: {why}" for why in self.of.fragile),
            *(left_out[:1] if more else left_out),
            *more,
        ]

    @property
    def other(self) -> float | None:
        """Mean held-out error under the other objective."""
        if self.of.other is None or self.errors is None:
            return None
        held = self.of.other
        return finite(sizes_of(held.predicted, held.measured, self.errors.relative).mean())

    @property
    def in_sample(self) -> float | None:
        """Mean size of an error on the rows of the fit to all rows."""
        if self.of.fit is None or self.errors is None:
            return None
        rows = self.of.fit.observations
        measured = rows[self.of.form.target.name]
        return finite(sizes_of(self.of.fit.predict(rows), measured, self.errors.relative).mean())

    def cells(self) -> list[str]:
        """Return the law's row of the table."""
        first = [self.of.form.name, str(self.of.parameters)]
        if self.of.fit is None or self.errors is None or self.in_sample is None:
            return [*first, "-", "-", "-", "-", "not fitted", "-"]
        if self.of.fragile:
            first[0] += " (fragile)"
        sizes = [self.errors.say(value) for value in (self.errors.mean, self.errors.max)]
        sizes.append("-" if self.other is None else self.errors.say(self.other))
        certificate = self.of.fit.certificate
        agree = f"{certificate.agreeing} of {certificate.finished}"
        at_bounds = ", ".join(certificate.at_bounds) or "-"
        return [*first, *sizes, self.errors.say(self.in_sample), agree, at_bounds]

    def to_json(self) -> dict[str, Any]:
        """Return the law's fit and errors as plain data."""
        one, values = self.of, None
        if one.fit is not None:
            values = {name: finite(value) for name, value in one.fit.values.items()}
        return {
            "law": one.form.name,
            "parameters": one.parameters,
            "values": values,
            "held_out": self.errors and self.errors.to_json(),
            "in_sample": self.in_sample,
            "held_out_mean_by_other_objective": self.other,
            "fragile": list(one.fragile),
            "starts": None
            if one.fit is None
            else {"agree": one.fit.certificate.agreeing, "of": one.fit.certificate.finished},
            "at_bounds": None if one.fit is None else list(one.fit.certificate.at_bounds),
            "problem": one.problem,
        }


def law_names(texts: Sequence[str]) -> list[str]:
    """Return the laws of ``a,b`` and of ``a:column,column``, which is a single law.

    Raises UserError: a law is given twice. For example, ``law_names(["chinchilla,kappa"])`` returns
    ``["chinchilla", "kappa"]``.
    """
    names = [name for text in texts for name in ([text] if ":" in text else text.split(","))]
    names = [name.strip() for name in names]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--laws gives {name} twice; give each law once")
    return names
