"""``allometry compare``: laws against each other, by what they say of held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.laws.commands import Compare
from allometry.launch.laws.fit import fit_options, holding_out
from allometry.launch.laws.sources import observations_for
from allometry.launch.laws.text import Errors, sizes_of
from allometry.launch.text import finite, table
from allometry.laws.fit.compare import Comparison, compare
from allometry.laws.registry import form_named


def compared(asked: Compare) -> Report:
    """Fit several laws to the same rows and list them in the order of their held-out errors.

    Raises UserError: as for a fit; a law that the rows cannot be fitted by is listed with its
    problem, unless all are.
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
    laws.sort(key=lambda law: float("inf") if law.errors is None else law.errors.mean)
    facts = {
        "rows": len(observations),
        "groups": len(set(observations.groups)),
        "laws": [law.to_json() for law in laws],
        "conventions": dict(observations.conventions),
    }
    header = ["law", "parameters", "held-out mean", "max", "fitted rows", "starts that agree"]
    problems = [f"{law.of.form.name}: {law.of.problem}" for law in laws if law.errors is None]
    shown = table([header, *(law.cells() for law in laws)])
    return Report(facts, "\n".join([f"held out: {how}", "", shown, *problems]))


@dataclass(frozen=True)
class Compared:
    """One law of a comparison, with errors of the same kind as the others'."""

    of: Comparison
    errors: Errors | None

    @property
    def in_sample(self) -> float | None:
        """The mean size of an error on the rows of the fit to all."""
        if self.of.fit is None or self.errors is None:
            return None
        rows = self.of.fit.observations
        measured = rows[self.of.form.target.name]
        return finite(sizes_of(self.of.fit.predict(rows), measured, self.errors.relative).mean())

    def cells(self) -> list[str]:
        """Return the law's row of the table."""
        first = [self.of.form.name, str(self.of.parameters)]
        if self.of.fit is None or self.errors is None or self.in_sample is None:
            return [*first, "-", "-", "-", "not fitted"]
        sizes = [self.errors.say(v) for v in (self.errors.mean, self.errors.max, self.in_sample)]
        certificate = self.of.fit.certificate
        return [*first, *sizes, f"{certificate.agreeing} of {certificate.finished}"]

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
            "problem": one.problem,
        }


def law_names(texts: Sequence[str]) -> list[str]:
    """Return the laws of ``a,b`` and of ``a:column,column``, which is one; each once.

    Raises UserError: one is given twice.
    """
    names = [name for text in texts for name in ([text] if ":" in text else text.split(","))]
    names = [name.strip() for name in names]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--laws gives {name} twice; give each law once")
    return names
