"""Fit a law: ``allometry fit``, and the functions shared with ``allometry compare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.laws.commands import Fit as FitCommand
from allometry.launch.laws.commands import Fitting
from allometry.launch.laws.sources import assignments, notes_of_rows, numbers, observations_for
from allometry.launch.laws.text import Errors, certificate_words
from allometry.launch.text import counted, edge_words, finite, number, table
from allometry.laws.derive import HELD_OUT, mark_held_out
from allometry.laws.expressions import is_condition
from allometry.laws.fit.bootstrap import Bootstrap, bootstrap
from allometry.laws.fit.compare import GROUPS
from allometry.laws.fit.engine import Fit, FitOptions, fit, require_identified
from allometry.laws.fit.store import load_fit, save_fit
from allometry.laws.fit.validate import hold_out_largest, leave_one_group_out
from allometry.laws.forms.base import Form
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named

SAMPLES = 200
OPTIMA_SCATTER = 0.02
"""Smallest delta, in logs, at which Huber's loss weighs most optima of sweeps by their square."""
FEW_GROUPS = 10
"""Number of groups below which a bootstrap's interval is rough."""


def fit_options(fitting: Fitting, forms: Sequence[Form]) -> FitOptions:
    """Return the options for fitting these laws.

    Raises UserError: an option has an invalid value.
    """
    fixed = _fixed(fitting.fix)
    for name in fixed:
        for form in forms:
            known = [parameter.name for parameter in form.parameters]
            if name not in known:
                raise UserError(
                    f"--fix {name}: {form.name} has no such parameter; it has {', '.join(known)}"
                )
            parameter = form.parameters[known.index(name)]
            if not parameter.low <= fixed[name] <= parameter.high:
                raise UserError(
                    f"--fix {name}={fixed[name]:g} is outside of what {form.name} allows, "
                    f"{parameter.low:g} to {parameter.high:g}; choose a value in it"
                )
    if fitting.objective not in ("huber", "square"):
        raise UserError(f"--objective={fitting.objective} is not known; use huber or square")
    return FitOptions(
        loss=fitting.objective,  # type: ignore[arg-type]
        delta=fitting.delta,
        starts=fitting.starts,
        seed=fitting.seed,
        fixed=fixed,
    )


def _fixed(texts: Sequence[str]) -> dict[str, float]:
    """Return the fixed parameters, from NAME=VALUE texts and files of fits."""
    files = [text for text in texts if text.endswith(".json")]
    given = [text for text in texts if text not in files]
    fixed = numbers(assignments(given, "--fix"), "--fix")
    for file in files:
        for name, value in load_fit(Path(file)).fit.values.items():
            if name in fixed:
                raise UserError(f"--fix {file}: {name} is fixed already; give each parameter once")
            fixed[name] = value
    return fixed


@dataclass(frozen=True)
class Result:
    """A fit with its intervals and held-out errors; ``notes`` explain missing results."""

    fit: Fit
    bootstrap: Bootstrap | None
    errors: Errors | None
    notes: list[str]


def fitted(asked: FitCommand) -> Report:
    """Fit a law and report on the fit; writes the fit to ``out`` if given.

    Raises UserError: the law, the sources or an option cannot be used, or the data cannot identify
    a parameter.
    """
    form = form_named(asked.law)
    options = fit_options(asked.fitting, [form])
    observations = observations_for(asked.rows, [form], asked.fitting.hold_out)
    best = fit(form, observations, options)
    if best.unidentified:
        require_identified(best)
    result = _examined(best, asked)
    if asked.out is not None:
        held_out = result.errors and result.errors.to_json()
        extra = {"held_out": held_out, "notes": result.notes}
        save_fit(asked.out, best, result.bootstrap, extra)
    return Report(_facts(result, asked.out), _text(result, asked.out))


def _examined(best: Fit, asked: FitCommand) -> Result:
    observations, fitting = best.observations, asked.fitting
    notes = notes_of_rows(asked.rows, observations, [best.form])
    groups = len(set(observations.groups))
    sampled = None
    if asked.rows.sweeps and fitting.objective == "huber" and fitting.delta < OPTIMA_SCATTER:
        notes.append(
            f"optima of sweeps scatter by percents, and Huber's loss with delta {fitting.delta:g} "
            "hears little but the middle ones; --objective square hears all of them"
        )
    for name in best.vanished:
        notes.append(
            f"{name} went to 0: the data show no such term, and the fit is kept without it; "
            f"--fix {name}=0 holds it there, so that the other intervals know"
        )
    if loose := best.certificate.loose:
        notes.append(
            f"the data hardly say what {', '.join(loose)} of {best.form.name} "
            f"{'is' if len(loose) == 1 else 'are'}: with their scatter any plausible value fits; "
            "believe predictions inside of the fitted range, not these values"
        )
    if groups < 2 and asked.bootstraps is None:
        notes.append("no intervals: all rows belong to one group, and a bootstrap resamples groups")
    elif asked.bootstraps is None or asked.bootstraps > 0:
        sampled = bootstrap(best, asked.bootstraps or SAMPLES, fitting.seed)
        if sampled.failed:
            notes.append(
                f"{sampled.failed} of {sampled.failed + len(sampled)} bootstrap samples could not "
                "be fitted and are left out of the intervals"
            )
        notes += edge_words(sampled)
        if groups < FEW_GROUPS:
            notes.append(f"intervals rest on {groups} groups and are rough; add runs")
    nothing = groups < 2 and fitting.hold_out is None
    if nothing:
        notes.append("no held-out error: all rows belong to one group, so none can be left out")
    if nothing or fitting.hold_out == "none":
        return Result(best, sampled, None, notes)
    rows, by, how = holding_out(observations, [best.form], fitting.hold_out)
    if by == GROUPS:
        held = leave_one_group_out(best.form, rows, best.options, sampled=sampled)
    else:
        samples = 0 if sampled is None else len(sampled)
        held = hold_out_largest(best.form, rows, by, best.options, samples=samples)
        if held.fold is not None and (open_ones := held.fold.unidentified):
            notes.append(
                f"the rows that are not held out cannot identify {', '.join(open_ones)}, so the "
                "held-out error says little of the law and has no intervals; hold out fewer"
            )
    notes += held.notes
    return Result(best, sampled, Errors(held, how), notes)


def holding_out(
    observations: Observations, forms: Sequence[Form], text: str | None
) -> tuple[Observations, str, str]:
    """Return the rows, the rows to hold out (``compare``'s ``by``), and a description of these.

    ``text``: ``groups``, ``largest`` (of N, or of the first input of all laws), ``largest:COLUMN``,
    or a condition such as ``N > 1e9``. Raises UserError: any other text. For example,
    ``holding_out(rows, [form], "largest:N")``.
    """
    if text in (None, "groups"):
        groups = len(set(observations.groups))
        return observations, GROUPS, f"each of {groups} groups by the fit to the others"
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
    if not is_condition(text):
        raise UserError(
            f"--hold-out={text} is not known; use groups, largest, largest:COLUMN, none, or a "
            "condition such as 'N > 1e9'"
        )
    return mark_held_out(observations, text), HELD_OUT, f"those with {text}, by the fit to the rest"


def _text(result: Result, out: Path | None) -> str:
    best, form = result.fit, result.fit.form
    observations = best.observations
    rows = [["parameter", "value", "95 % interval", "unit"]]
    for parameter in form.parameters:
        name = parameter.name
        interval = "fixed" if name in best.options.fixed else "-"
        if result.bootstrap is not None and name not in best.options.fixed:
            low, high = result.bootstrap.interval(name)
            interval = f"{number(low)} to {number(high)}"
        rows.append([name, number(best.values[name]), interval, best.unit(parameter.unit)])
    paper = form.restated(best.values)
    restated = ", ".join(f"{name} = {number(value)}" for name, value in paper.items())
    groups = len(set(observations.groups))
    scale = "differences" if form.residual == "linear" else "log residuals"
    huber = best.options.loss == "huber"
    kind = f"Huber's loss (delta {best.options.delta:g})" if huber else "half the square"
    lines = [
        f"{form.name}: {form.equation}",
        f"fitted to {len(observations)} rows of {counted(groups, 'group')}",
        "",
        table(rows),
        *([f"as in the paper: {restated}"] if paper else []),
        "",
        f"objective  {best.objective:.6g}, the sum over rows of {kind} of {scale}",
        "optimum    " + "; ".join(certificate_words(best.certificate)),
    ]
    if result.bootstrap is not None and (error := result.bootstrap.form_error) is not None:
        size = number(error.scale, 2) if form.residual == "linear" else f"{100 * error.scale:.2g} %"
        lines.append(
            f"beyond     the form adds a standard deviation of {size} for each factor of e beyond "
            f"the data, by {counted(error.folds, 'fold')}"
        )
    if result.errors is not None:
        lines.append(f"held out   {result.errors.words()}")
    for name in [*(v.name for v in form.inputs), form.target.name, "left out"]:
        if name in observations.conventions:
            lines.append(f"{name:<10} {observations.conventions[name]}")
    lines += [f"note       {note}" for note in result.notes]
    if out is not None:
        lines.append(f"written    {out}")
    return "\n".join(lines)


def _facts(result: Result, out: Path | None) -> dict[str, Any]:
    best, sampled = result.fit, result.bootstrap
    restated = best.form.restated(best.values)
    parameters: dict[str, Any] = {}
    for parameter in best.form.parameters:
        name = parameter.name
        low, high = (None, None) if sampled is None else map(finite, sampled.interval(name))
        parameters[name] = {
            "value": finite(best.values[name]),
            "low": low,
            "high": high,
            "unit": best.unit(parameter.unit),
            "fixed": name in best.options.fixed,
        }
    certificate = {
        name: finite(value) if isinstance(value, float) else value
        for name, value in best.certificate.to_json().items()
    }
    return {
        "law": best.form.name,
        "equation": best.form.equation,
        "rows": len(best.observations),
        "groups": len(set(best.observations.groups)),
        "parameters": parameters,
        "restated": {name: finite(value) for name, value in restated.items()},
        "level": 0.95,
        "bootstraps": 0 if sampled is None else len(sampled),
        "form_error": sampled and sampled.form_error and asdict(sampled.form_error),
        "objective": best.objective,
        "certificate": certificate,
        "held_out": result.errors and result.errors.to_json(),
        "conventions": dict(best.observations.conventions),
        "notes": result.notes,
        "fit": None if out is None else str(out),
    }
