"""``allometry fit``, and what it shares with ``allometry compare``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.launch.laws.sources import DataRequest, assignments, numbers, observations_for
from allometry.launch.laws.text import Errors, certificate_words, edge_words, finite, number, table
from allometry.laws.derive import HELD_OUT, mark_held_out
from allometry.laws.fit.bootstrap import Bootstrap, bootstrap
from allometry.laws.fit.compare import GROUPS
from allometry.laws.fit.engine import Fit, FitOptions, fit, require_identified
from allometry.laws.fit.store import save_fit
from allometry.laws.fit.validate import HeldOut, hold_out_largest, leave_one_group_out
from allometry.laws.forms.base import Form
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named

SAMPLES = 200
OPTIMA_SCATTER = 0.02
"""Least delta, in logs, with which Huber's loss hears most optima of sweeps out."""
FEW_GROUPS = 10
"""With fewer groups than this a bootstrap's interval is rough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """What ``fit`` and ``compare`` were asked for; None is an option that was not given."""

    data: DataRequest
    hold_out: str | None = None
    bootstraps: int | None = None
    starts: int | None = None
    seed: int = 0
    objective: str = "huber"
    delta: float = 1e-3
    fix: tuple[str, ...] = ()
    out: Path | None = None

    def options(self, forms: Sequence[Form]) -> FitOptions:
        """Return the fit's options. Raises UserError for one that is no option."""
        fixed = numbers(assignments(self.fix, "--fix"), "--fix")
        for name in fixed:
            for form in forms:
                known = [parameter.name for parameter in form.parameters]
                if name not in known:
                    raise UserError(
                        f"--fix {name}: {form.name} has no such parameter; it has "
                        f"{', '.join(known)}"
                    )
                parameter = form.parameters[known.index(name)]
                if not parameter.low <= fixed[name] <= parameter.high:
                    raise UserError(
                        f"--fix {name}={fixed[name]:g} is outside of what {form.name} allows, "
                        f"{parameter.low:g} to {parameter.high:g}; choose a value in it"
                    )
        if self.objective not in ("huber", "square"):
            raise UserError(f"--objective={self.objective} is not known; use huber or square")
        return FitOptions(
            loss=self.objective,  # type: ignore[arg-type]
            delta=self.delta,
            starts=self.starts,
            seed=self.seed,
            fixed=fixed,
        )


@dataclass(frozen=True)
class Result:
    """A fit with what was asked about it; ``notes`` say what could not be had, and why."""

    fit: Fit
    bootstrap: Bootstrap | None
    held_out: HeldOut | None
    errors: Errors | None
    notes: list[str] = field(default_factory=list)


def run_fit(law: str, request: FitRequest, *, as_json: bool) -> str:
    """Fit a law and return the report; with ``out`` the fit is written there.

    Raises:
        UserError: the law, the sources or an option cannot be used, or the data cannot identify a
            parameter.
    """
    form = form_named(law)
    options = request.options([form])
    observations = observations_for(request.data, [form])
    fitted = fit(form, observations, options)
    if fitted.certificate.unidentified:
        require_identified(fitted)
    result = _examined(fitted, request)
    if request.out is not None:
        extra = {"held_out": _held_out_json(result), "notes": result.notes}
        save_fit(request.out, fitted, result.bootstrap, extra)
    if as_json:
        return json.dumps(_as_json(result, request.out), indent=2)
    return _as_text(result, request.out)


def _examined(fitted: Fit, request: FitRequest) -> Result:
    observations, notes = fitted.observations, []
    groups = len(set(observations.groups))
    sampled = None
    if request.data.sweeps and request.objective == "huber" and request.delta < OPTIMA_SCATTER:
        notes.append(
            f"optima of sweeps scatter by percents, and Huber's loss with delta {request.delta:g} "
            "hears little but the middle ones; --objective square hears all of them"
        )
    if loose := fitted.certificate.loose:
        notes.append(
            f"the data hardly say what {', '.join(loose)} of {fitted.form.name} "
            f"{'is' if len(loose) == 1 else 'are'}: with their scatter any plausible value fits; "
            "believe predictions inside of the fitted range, not these values"
        )
    if groups < 2 and request.bootstraps is None:
        notes.append("no intervals: all rows belong to one group, and a bootstrap resamples groups")
    elif request.bootstraps is None or request.bootstraps > 0:
        sampled = bootstrap(fitted, request.bootstraps or SAMPLES, request.seed)
        if sampled.failed:
            notes.append(
                f"{sampled.failed} of {sampled.failed + len(sampled)} bootstrap samples could not "
                "be fitted and are left out of the intervals"
            )
        notes += edge_words(sampled)
        if groups < FEW_GROUPS:
            notes.append(f"intervals rest on {groups} groups and are rough; add runs")
    if groups < 2 and request.hold_out is None:
        notes.append("no held-out error: all rows belong to one group, so none can be left out")
        return Result(fitted, sampled, None, None, notes)
    if request.hold_out == "none":
        return Result(fitted, sampled, None, None, notes)
    rows, by, how = holding_out(observations, [fitted.form], request.hold_out)
    if by == GROUPS:
        held = leave_one_group_out(fitted.form, rows, fitted.options)
    else:
        held = hold_out_largest(fitted.form, rows, by, fitted.options)
    return Result(fitted, sampled, held, Errors.of(held, how), notes)


def holding_out(
    observations: Observations, forms: Sequence[Form], text: str | None
) -> tuple[Observations, str, str]:
    """Return the rows, by what to hold out (``compare``'s ``by``), and how to say it.

    ``text``: ``groups``, ``largest`` (of N, or of the first input of all laws), ``largest:COLUMN``,
    or a condition.

    Raises:
        UserError: it is none of them.
    """
    if text in (None, "groups"):
        number_of = len(set(observations.groups))
        how = f"each of {number_of} groups by the fit to the others"
        return observations, GROUPS, how
    assert text is not None
    kind, colon, column = text.partition(":")
    if kind == "largest" and not (colon and not column):
        inputs = [[variable.name for variable in form.inputs] for form in forms]
        shared = [name for name in inputs[0] if all(name in names for names in inputs)]
        if not column and not shared:
            raise UserError(
                f"--hold-out largest: the laws share no input; name a column (largest:COLUMN) of "
                f"{', '.join(observations.columns)}"
            )
        column = column or ("N" if "N" in shared else shared[0])
        at = number(float(observations[column].max()))
        return observations, column, f"{column} = {at}, the largest, by the fit to the others"
    if not any(sign in text for sign in "<>="):
        raise UserError(
            f"--hold-out={text} is not known; use groups, largest, largest:COLUMN, none, or a "
            "condition such as 'N > 1e9'"
        )
    return mark_held_out(observations, text), HELD_OUT, f"those with {text}, by the fit to the rest"


def _as_text(result: Result, out: Path | None) -> str:
    fitted, form = result.fit, result.fit.form
    observations = fitted.observations
    rows = [["parameter", "value", "95 % interval", "unit"]]
    for parameter in form.parameters:
        name = parameter.name
        interval = "fixed" if name in fitted.options.fixed else "-"
        if result.bootstrap is not None and name not in fitted.options.fixed:
            low, high = result.bootstrap.interval(name)
            interval = f"{number(low)} to {number(high)}"
        rows.append([name, number(fitted.values[name]), interval, fitted.unit(parameter.unit)])
    groups = len(set(observations.groups))
    scale = "differences" if form.residual == "linear" else "log residuals"
    kind = (
        f"Huber's loss (delta {fitted.options.delta:g})"
        if fitted.options.loss == "huber"
        else "half the square"
    )
    lines = [
        f"{form.name}: {form.equation}",
        f"fitted to {len(observations)} rows of {groups} group{'' if groups == 1 else 's'}",
        "",
        table(rows),
        "",
        f"objective  {fitted.objective:.6g}, the sum over rows of {kind} of {scale}",
        "optimum    " + "; ".join(certificate_words(fitted.certificate)),
    ]
    if result.errors is not None:
        lines.append(f"held out   {result.errors.words()}")
    for name in [*(v.name for v in form.inputs), form.target.name, "left out"]:
        if name in observations.conventions:
            lines.append(f"{name:<10} {observations.conventions[name]}")
    lines += [f"note       {note}" for note in result.notes]
    if out is not None:
        lines.append(f"written    {out}")
    return "\n".join(lines)


def _as_json(result: Result, out: Path | None) -> dict[str, Any]:
    fitted, sampled = result.fit, result.bootstrap
    parameters: dict[str, Any] = {}
    for parameter in fitted.form.parameters:
        name = parameter.name
        low, high = (None, None) if sampled is None else map(finite, sampled.interval(name))
        parameters[name] = {
            "value": finite(fitted.values[name]),
            "low": low,
            "high": high,
            "unit": fitted.unit(parameter.unit),
            "fixed": name in fitted.options.fixed,
        }
    certificate = {
        name: finite(value) if isinstance(value, float) else value
        for name, value in fitted.certificate.to_json().items()
    }
    return {
        "law": fitted.form.name,
        "equation": fitted.form.equation,
        "rows": len(fitted.observations),
        "groups": len(set(fitted.observations.groups)),
        "parameters": parameters,
        "level": 0.95,
        "bootstraps": 0 if sampled is None else len(sampled),
        "objective": fitted.objective,
        "certificate": certificate,
        "held_out": _held_out_json(result),
        "conventions": dict(fitted.observations.conventions),
        "notes": result.notes,
        "fit": None if out is None else str(out),
    }


def _held_out_json(result: Result) -> dict[str, Any] | None:
    if result.held_out is None or result.errors is None:
        return None
    return result.errors.to_json(result.held_out)
