"""``allometry predict`` and ``allometry optimum``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.launch.laws_sources import numbers
from allometry.launch.laws_text import finite, number, table
from allometry.laws.allocation import Allocation, compute_optimal, optimal_size
from allometry.laws.fit.bootstrap import EXACT, Bootstrap
from allometry.laws.fit.engine import Fit, predict
from allometry.laws.fit.store import load_fit
from allometry.laws.forms.base import Form
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named

LEVEL = 0.95
FLOPS_TOLERANCE = 0.1
"""Relative difference of FLOPs for each parameter and token beyond which ``optimum`` warns."""


@dataclass(frozen=True)
class Law:
    """A form with values: of a fit, then with its intervals and range, or published ones."""

    form: Form
    values: Mapping[str, float]
    origin: str
    fit: Fit | None = None
    bootstrap: Bootstrap | None = None

    @classmethod
    def of(cls, file: Path | None, law: str | None, published: str | None) -> Law:
        """Return the law of a fit's file, or published coefficients of a named law.

        Raises:
            UserError: both or neither are given, or there is none of that name.
        """
        if file is not None:
            if law is not None or published is not None:
                raise UserError(
                    f"{file} is a fit, which has its law and values; leave --law and --published "
                    "out, or the file"
                )
            stored = load_fit(file)
            return cls(stored.fit.form, stored.fit.values, str(file), stored.fit, stored.bootstrap)
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
        """The unit of what it predicts."""
        unit = self.form.target.unit
        return unit if self.fit is None else self.fit.unit(unit)

    def predict(self, observations: Observations) -> NDArray[np.float64]:
        """Return the target [n] of these rows."""
        return predict(self.form, self.values, observations)


def run_predict(
    arguments: Sequence[str], law: str | None, published: str | None, *, noise: bool, as_json: bool
) -> str:
    """Predict at inputs NAME=VALUE (or NAME=VALUE,VALUE), by a fit's file or published values.

    Raises:
        UserError: an input is missing, unknown or no number, or the law is one of curves.
    """
    file, texts = _split(arguments)
    found = Law.of(file, law, published)
    if noise and found.bootstrap is None:
        raise UserError(
            f"--noise widens an interval and {found.origin} has none; use a fit that was made with "
            "--bootstraps"
        )
    observations = _inputs(found.form, texts)
    predicted = found.predict(observations)
    low: Any = [None] * len(predicted)
    high: Any = [None] * len(predicted)
    if found.bootstrap is not None:
        low, high = found.bootstrap.predict_interval(observations, LEVEL, noise=noise)
    warnings = [] if found.fit is None else found.fit.warnings_for(observations)
    if found.fit is None:
        warnings = [f"no interval; these coefficients were shown for: {found.form.valid}"]
    elif found.bootstrap is None:
        warnings.append("no interval: the fit was made without bootstraps")
    warnings += _at_edges(predicted, low, high)
    target = found.form.target
    names = list(texts)
    points = [
        {
            **{name: float(observations[name][i]) for name in names},
            target.name: finite(predicted[i]),
            "low": None if low[i] is None else finite(low[i]),
            "high": None if high[i] is None else finite(high[i]),
        }
        for i in range(len(predicted))
    ]
    if as_json:
        content = {
            "law": found.form.name,
            "from": found.origin,
            "unit": found.unit,
            "level": LEVEL,
            "noise": noise,
            "predictions": points,
            "conventions": {} if found.fit is None else dict(found.fit.observations.conventions),
            "warnings": warnings,
        }
        return json.dumps(content, indent=2)
    kind = "95 % interval" + (" of one run" if noise else "")
    rows = [[*names, f"{target.name} ({found.unit})", kind]]
    for point in points:
        values = [number(float(point[name] or 0.0)) for name in names]
        interval = _interval(point["low"], point["high"])
        rows.append([*values, number(predicted[len(rows) - 1]), interval])
    return "\n".join([table(rows), *_counted(found), *(f"warning: {w}" for w in warnings)])


def _at_edges(predicted: NDArray[np.float64], low: Any, high: Any) -> list[str]:
    """A warning where a prediction is at an end of its interval, or outside of it."""
    return [
        f"{number(value)} is {'at the edge' if least <= value <= most else 'outside'} of its "
        f"interval {_interval(least, most)}: the samples lie to one side of the fit, so the "
        "interval is rough"
        for value, least, most in zip(predicted, low, high, strict=True)
        if least is not None and most - least > EXACT * abs(value) and not least < value < most
    ]


def _counted(law: Law) -> list[str]:
    """What each input of a fit counts, a line each, so that a prediction's are counted alike."""
    known = {} if law.fit is None else law.fit.observations.conventions
    names = [variable.name for variable in law.form.inputs]
    return [f"{name}: {known[name]}" for name in names if name in known]


def _interval(low: float | None, high: float | None, digits: int = 5) -> str:
    if low is None or high is None:
        return "-"
    return f"{number(low, digits)} to {number(high, digits)}"


def _split(arguments: Sequence[str]) -> tuple[Path | None, dict[str, list[str]]]:
    """The file of the fit, if one is given, and the inputs."""
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
        found = [numbers({name: value}, "input")[name] for value in values]
        columns[name] = np.resize(np.array(found), length)
        bad = form.inputs[names.index(name)].bad(columns[name])
        if bad.any():
            demand = form.inputs[names.index(name)].demand
            raise UserError(
                f"{name}={values[int(bad.argmax()) % len(values)]} is no value that {form.name} "
                f"can read; give {demand}"
            )
    return Observations.of(columns)


def run_optimum(
    file: Path | None,
    law: str | None,
    published: str | None,
    budgets: str,
    flops_per_parameter_token: float,
    others: Mapping[str, str],
    *,
    as_json: bool,
) -> str:
    """Return N, D and loss of the best use of each budget of FLOPs (``1e21,1e22``).

    Raises:
        UserError: a budget is no positive number, or the law says nothing of N and D.
    """
    found = Law.of(file, law, published)
    fixed = numbers(others, "--with")
    _check_others(found.form, fixed)
    rows: list[Allocation] = []
    for text in budgets.split(","):
        flops = numbers({"--flops": text.strip()}, "budget")["--flops"]
        rows.append(_best(found, flops, flops_per_parameter_token, fixed))
    warnings = list(dict.fromkeys(w for row in rows for w in row.warnings))
    if found.fit is None:
        warnings.append(f"no interval; these coefficients were shown for: {found.form.valid}")
    elif found.bootstrap is None:
        warnings.append("no interval: the fit was made without bootstraps")
    warnings += _other_flops(found, flops_per_parameter_token)
    if as_json:
        entries = [
            {
                "flops": row.flops,
                **{
                    name: {"value": getattr(row, name), **_low_high(row, name)}
                    for name in ("N", "D", "loss")
                },
                "tokens_per_parameter": row.tokens_per_parameter,
                "warnings": list(row.warnings),
            }
            for row in rows
        ]
        about = {"law": found.form.name, "from": found.origin, "level": LEVEL}
        about["flops_per_parameter_token"] = flops_per_parameter_token
        return json.dumps({**about, "optima": entries, "warnings": warnings}, indent=2)
    lines = [["FLOPs", "N", "95 % interval", "D", "D/N", "loss", "95 % interval"]]
    for row in rows:
        low, high = _low_high(row, "N"), _low_high(row, "loss")
        lines.append(
            [
                number(row.flops),
                number(row.N),
                _interval(low["low"], low["high"], 4),
                number(row.D),
                number(row.tokens_per_parameter, 3),
                number(row.loss),
                _interval(high["low"], high["high"], 4),
            ]
        )
    spent = (
        f"N in parameters, D in tokens = FLOPs / ({flops_per_parameter_token:g} N), loss in "
        f"{found.unit}"
    )
    return "\n".join([table(lines), spent, *_counted(found), *(f"warning: {w}" for w in warnings)])


def _other_flops(law: Law, per_token: float) -> list[str]:
    """A warning where the fitted runs spent other FLOPs for each N and D than are reckoned with."""
    columns = {} if law.fit is None else law.fit.observations.columns
    if not all(name in columns for name in ("C", "N", "D")):
        return []
    spent = columns["C"] / (columns["N"] * columns["D"])
    low, high = float(spent.min()), float(spent.max())
    if low > per_token * (1 - FLOPS_TOLERANCE) and high < per_token * (1 + FLOPS_TOLERANCE):
        return []
    return [
        f"the fitted runs spent {number(low, 3)} to {number(high, 3)} FLOPs for each parameter and "
        f"token and the budget is shared out by {per_token:g}; set --flops-per-parameter-token to "
        "what models of the optimum's size need"
    ]


def _low_high(row: Allocation, name: str) -> dict[str, float | None]:
    low, high = (None, None) if row.intervals is None else row.intervals[name]
    return {"low": low, "high": high}


def _check_others(form: Form, others: Mapping[str, float]) -> None:
    """Refuse an input that the law lacks, or that follows from the budget."""
    free = [one.name for one in form.inputs if one.name not in ("N", "D", "C", "M")]
    for name in others:
        if name not in free:
            raise UserError(
                f"--with {name}: {form.name} has "
                + (f"only {', '.join(free)} besides" if free else "no input besides")
                + " N, D and what follows from them; leave it out"
            )


def _best(law: Law, flops: float, per_token: float, others: Mapping[str, float]) -> Allocation:
    if law.fit is not None:
        return compute_optimal(
            law.fit, flops, per_token, bootstrap=law.bootstrap, level=LEVEL, others=others
        )
    if not (flops > 0.0 and per_token > 0.0):
        raise UserError(f"flops={flops} and {per_token} for each parameter and token must be > 0")
    product = flops / per_token
    size = optimal_size(law.form, law.values, product, flops, others)
    known = {"N": size, "D": product / size, "C": flops, "M": product / size**2, **others}
    names = [variable.name for variable in law.form.inputs]
    rows = Observations.of({name: [known[name]] for name in names})
    loss = float(law.predict(rows)[0])
    return Allocation(flops, size, product / size, loss, per_token, None, LEVEL, ())
