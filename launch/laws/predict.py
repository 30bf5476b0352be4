"""Predictions of a fit or of published coefficients: ``allometry predict``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.laws.commands import Predict
from allometry.launch.laws.downstream import Scores, scores_at
from allometry.launch.laws.sources import numbers
from allometry.launch.laws.text import doubts, narrowed
from allometry.launch.text import finite, number
from allometry.laws.cells import SMALL, unit_note
from allometry.laws.fit.bootstrap import EXACT, Bootstrap, Spread
from allometry.laws.fit.engine import Fit, predict
from allometry.laws.fit.store import StoredFit, load_fit
from allometry.laws.forms.base import Form
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named

LEVEL = 0.95


@dataclass(frozen=True)
class Law:
    """A form with values: from a fit, then with its intervals and range, or published.

    A fit that does not identify its parameters has no intervals.
    """

    form: Form
    values: Mapping[str, float]
    origin: str
    fit: Fit | None = None
    bootstrap: Bootstrap | None = None

    @classmethod
    def of(cls, file: Path | None, law: str | None, published: str | None) -> Law:
        """Return the law of a fit's file, or published coefficients of a named law.

        Raises UserError: both or neither are given, or the law or its coefficients do not exist.
        For example, ``Law.of(None, "chinchilla", "besiroglu")``.
        """
        if file is not None:
            if law is not None or published is not None:
                raise UserError(
                    f"{file} is a fit, which has its law and values; leave --law and --published "
                    "out, or the file"
                )
            stored = load_fit(file)
            fit, sampled = stored.fit, None if stored.fit.unidentified else stored.bootstrap
            return cls(fit.form, fit.values, str(file), fit, sampled)
        if law is None:
            raise UserError("no law is given; give the file of a fit, or --law and --published")
        form = form_named(law)
        if not form.published:
            raise UserError(f"{law} has no published coefficients here; fit it to runs first")
        known = ", ".join(form.published)
        if published is None:
            raise UserError(f"--law {law} needs --published NAME, one of {known}")
        if published not in form.published:
            raise UserError(f"{law} has no coefficients of {published!r}; use one of {known}")
        return cls(form, form.published[published], f"published by {published}")

    @property
    def unit(self) -> str:
        """Unit of the target."""
        unit = self.form.target.unit
        return unit if self.fit is None else self.fit.unit(unit)

    def predict(self, observations: Observations) -> NDArray[np.float64]:
        """Return the target [n] of these rows."""
        return predict(self.form, self.values, observations)

    def warnings(self) -> list[str]:
        """Return the reason for a missing interval, or doubts about the fit."""
        if self.fit is None:
            return [f"no interval; these coefficients were shown for: {self.form.valid}"]
        if unidentified := self.fit.unidentified:
            return [f"no interval: the data do not identify {', '.join(unidentified)}"]
        if self.bootstrap is None:
            return ["no interval: the fit was made without bootstraps"]
        return doubts(self.fit)


def predicted(asked: Predict) -> Report:
    """Predict at inputs NAME=VALUE (or NAME=VALUE,VALUE), by a fit's file or published values.

    Raises UserError: an input is missing, unknown or not a number, the law is a law of curves, or
    the score's fit (``downstream``) does not read the target of the first fit.
    """
    file, texts = _split(asked.arguments)
    law, noise = Law.of(file, asked.law, asked.published), asked.noise
    if noise and law.bootstrap is None:
        raise UserError(
            f"--noise widens an interval and {law.origin} has none; use a fit that was made with "
            "--bootstraps"
        )
    if not 0.0 < asked.level < 1.0:
        raise UserError(f"--level={asked.level:g} is no probability; use one as 0.95")
    observations = _inputs(law.form, texts)
    names = list(texts)
    spread = None
    if law.bootstrap is not None:
        spread = law.bootstrap.spread(observations, asked.level, noise=noise)
    points, warnings = _points(law, observations, names, spread)
    facts: dict[str, Any] = {
        "law": law.form.name,
        "from": law.origin,
        "unit": law.unit,
        "level": asked.level,
        "noise": noise,
        "predictions": points,
        "conventions": {} if law.fit is None else dict(law.fit.observations.conventions),
        "warnings": warnings,
    }
    kind = f"{100 * asked.level:g} % interval" + (" of one run" if noise else "")
    lines = [_table(observations, names, (law.form.target.name, law.unit), kind, points)]
    if spread is not None:
        lines.append(_parts_words(law, spread, noise=noise))
    if asked.downstream is not None:
        scores = _scores(law, asked, asked.downstream, observations)
        warnings = list(dict.fromkeys([*warnings, *scores.warnings]))
        facts["downstream"] = scores.describe()
        of = [scores.point(row) for row in range(len(points))]
        lines += ["", _table(observations, names, (scores.name, scores.unit), kind, of), ""]
    facts["warnings"] = warnings
    lines += [*conventions(law), *(f"warning: {warning}" for warning in warnings)]
    return Report(facts, "\n".join(lines))


def _table(
    observations: Observations,
    names: Sequence[str],
    predicts: tuple[str, str],
    kind: str,
    points: Sequence[Mapping[str, Any]],
) -> str:
    """Return the table of inputs, predictions and intervals; ``predicts``: name and unit."""
    name, unit = predicts
    rows = [[*names, f"{name} ({unit})", kind]]
    for row, point in enumerate(points):
        inputs = [number(float(observations[one][row])) for one in names]
        value = "nan" if point[name] is None else number(point[name])
        rows.append([*inputs, value, interval(point["low"], point["high"])])
    return narrowed(rows, len(names))


def _points(
    law: Law, observations: Observations, names: Sequence[str], spread: Spread | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the predictions with their intervals, and the warnings."""
    predicted = law.predict(observations)
    points: list[dict[str, Any]] = []
    for i, value in enumerate(predicted):
        inputs = {name: float(observations[name][i]) for name in names}
        point = {**inputs, law.form.target.name: finite(value), "low": None, "high": None}
        if spread is not None:
            point |= {"low": finite(spread.low_n[i]), "high": finite(spread.high_n[i])}
            point["half_widths"] = {
                "parameters": finite(spread.parameters_n[i]),
                "form": finite(spread.form_n[i]),
                "noise": finite(spread.noise_n[i]),
            }
        points.append(point)
    beyond = [] if law.fit is None else law.fit.warnings_for(observations)
    small = [
        note
        for one in law.form.inputs
        if _larger(law, one.name) and (note := unit_note(one, observations)) is not None
    ]
    cautions = law.form.cautions(law.values, observations)
    warnings = [*small, *beyond, *cautions, *law.warnings()]
    if law.bootstrap is not None and law.bootstrap.form_error is None and beyond:
        warnings.append(
            "the interval holds the uncertainty of the parameters alone: nothing could be held out "
            "to say how wrong the law's form is beyond the data (too few rows, or no input such as "
            "N, D or loss to cut them by)"
        )
    if spread is not None:
        warnings += _at_edges(predicted, spread.low_n, spread.high_n)
    return points, warnings


def _larger(law: Law, name: str) -> bool:
    """Return True if the fitted counts are too large to be read as millions or billions."""
    known = {} if law.fit is None else law.fit.observations.columns
    return name not in known or float(known[name].max()) >= SMALL


def _parts_words(law: Law, spread: Spread, *, noise: bool) -> str:
    """Return a sentence on the parts of the widest interval."""
    share = law.form.residual == "log"
    widest = int(np.argmax(np.hypot(spread.parameters_n, spread.form_n)))

    def size(part_n: NDArray[np.float64]) -> str:
        return f"{100 * part_n[widest]:.2g} %" if share else number(float(part_n[widest]), 2)

    which = "the widest interval" if len(spread.form_n) > 1 else "the interval"
    parts = [f"{size(spread.parameters_n)} of the law's parameters"]
    parts.append(f"{size(spread.form_n)} of its form, by held-out rows beyond the data")
    if noise:
        parts.append(f"{size(spread.noise_n)} of one run's scatter")
    return f"half of {which}, parts that add in quadrature: {'; '.join(parts)}"


def _scores(law: Law, asked: Predict, file: Path, observations: Observations) -> Scores:
    """Return the scores at the predicted losses."""
    if asked.noise:
        raise UserError(
            "--noise is of one run's loss, and the interval of --downstream is of the laws; leave "
            "one of them out"
        )
    if law.fit is None:
        raise UserError("--downstream goes with a fit of the loss; give its file, not --published")
    stored = StoredFit(law.fit, law.bootstrap, {})
    return scores_at(stored, Path(law.origin), file, observations, asked.level)


def _at_edges(
    predicted: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> list[str]:
    """Return a warning for each prediction at an end of its interval, or outside of it."""
    return [
        f"{number(value)} is {'at the edge' if least <= value <= most else 'outside'} of its "
        f"interval {interval(least, most)}: the samples lie to one side of the fit, so the "
        "interval is rough"
        for value, least, most in zip(predicted, low, high, strict=True)
        if most - least > EXACT * abs(value) and not least < value < most
    ]


def conventions(law: Law) -> list[str]:
    """Return the convention of each input of a fit, a line each, for inputs to be counted alike."""
    known = {} if law.fit is None else law.fit.observations.conventions
    names = [variable.name for variable in law.form.inputs]
    return [f"{name}: {known[name]}" for name in names if name in known]


def interval(low: float | None, high: float | None, digits: int = 5) -> str:
    """Return an interval as text, "-" without ends."""
    if low is None or high is None:
        return "-"
    return f"{number(low, digits)} to {number(high, digits)}"


def _split(arguments: Sequence[str]) -> tuple[Path | None, dict[str, list[str]]]:
    """Return the file of the fit, None if not given, and the inputs."""
    file: Path | None = None
    inputs: dict[str, list[str]] = {}
    for text in arguments:
        name, sign, values = text.partition("=")
        if not sign or text.endswith(".json"):
            if file is not None:
                raise UserError(
                    f"{text!r} is neither NAME=VALUE nor the first file; give one fit and inputs "
                    "such as N=7e9"
                )
            file = Path(text)
        elif name in inputs:
            raise UserError(f"{name} is given twice; give its values as {name}=1e9,2e9")
        else:
            inputs[name] = values.split(",")
    return file, inputs


def _inputs(form: Form, texts: Mapping[str, Sequence[str]]) -> Observations:
    names = [variable.name for variable in form.inputs]
    if "step" in names:
        raise UserError(
            f"{form.name} is a law of whole curves, which needs the learning rate of each step; "
            "use allometry forecast RUN, which fits such a law to the run's own curve"
        )
    for name in texts:
        if name not in names:
            raise UserError(f"{form.name} has no input {name!r}; it reads {', '.join(names)}")
    missing = [name for name in names if name not in texts]
    if missing:
        raise UserError(
            f"{form.name} needs {', '.join(f'{name}=VALUE' for name in missing)} "
            f"({', '.join(v.description for v in form.inputs if v.name in missing)})"
        )
    length = max(len(values) for values in texts.values())
    columns = {}
    for name, values in texts.items():
        if len(values) not in (1, length):
            raise UserError(
                f"{name} has {len(values)} values where another input has {length}; give one value "
                "or as many"
            )
        read = [numbers({name: value}, "input")[name] for value in values]
        columns[name] = np.resize(np.array(read), length)
        variable = form.inputs[names.index(name)]
        if (bad := variable.bad(columns[name])).any():
            raise UserError(
                f"{name}={values[int(bad.argmax()) % len(values)]} is no value that {form.name} "
                f"can read; give {variable.demand}"
            )
    return Observations.of(columns)
