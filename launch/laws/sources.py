"""What the commands about laws are given: run folders or tables, as one set of observations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.laws.collect import COUNTS, GROUPINGS, Unfinished, from_runs
from allometry.laws.curves import curves_from_runs, curves_from_tables
from allometry.laws.derive import derive
from allometry.laws.forms.base import Form
from allometry.laws.hyperparameters import sweep_optima
from allometry.laws.observations import LearningRates, Observations
from allometry.laws.runs import Run
from allometry.laws.tables import is_table, read_table
from allometry.optim.schedule import resolve_schedule
from allometry.scaling.batch import BatchPlan
from allometry.trainer.record.rates import rates_of


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRequest:
    """SOURCES and the options that say how to read them; None is an option that was not given."""

    sources: tuple[str, ...]
    mapping: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    group: str | None = None
    count: str | None = None
    loss: str | None = None
    last: float | None = None
    group_by: str | None = None
    unfinished: str | None = None
    bins: int | None = None
    warmup: int | None = None
    curves: bool | None = None
    sweeps: bool | None = None


_SWEPT = ("N", "D", "lr", "B", "loss")
_OF_RUNS = ("count", "loss", "last", "group_by", "unfinished", "bins", "curves")
_OF_FINISHED_RUNS = ("last", "group_by", "unfinished")
_OF_CURVES = ("bins", "warmup")
_CHOICES = {"count": COUNTS, "group_by": GROUPINGS, "unfinished": get_args(Unfinished)}


def observations_for(request: DataRequest, forms: Sequence[Form]) -> Observations:
    """Return what SOURCES hold for these laws.

    Raises:
        UserError: sources are of two kinds or cannot be read, laws want rows of two kinds, or an
            option was given that has no meaning for them.
    """
    tables = [is_table(source) or Path(source).is_file() for source in request.sources]
    if not all(request.sources):
        raise UserError("a source is an empty text; give run folders or tables")
    if any(tables) and not all(tables):
        raise UserError(
            f"{request.sources[tables.index(False)]} is not a table and "
            f"{request.sources[tables.index(True)]} is; give run folders or tables, not both"
        )
    of_curves = [_is_curve(form) for form in forms]
    if any(of_curves) and not all(of_curves) and not request.curves:
        raise UserError(
            f"{forms[of_curves.index(True)].name} is a law of whole curves and "
            f"{forms[of_curves.index(False)].name} of finished runs; fit them apart"
        )
    curve = of_curves[0] or bool(request.curves)
    _check_options(request, table=tables[0], curve=curve)
    mapping = assignments(request.mapping, "--map")
    if tables[0]:
        found = _of_tables(request, forms, mapping, curve=curve)
    else:
        found = derive(
            _of_runs(request, curve=curve),
            mapping=mapping,
            where=request.where,
            group=request.group,
        )
    if request.sweeps:
        found = sweep_optima(found)
    return _dropped(found, request.drop)


def assignments(texts: Sequence[str], flag: str) -> dict[str, str]:
    """Return NAME=VALUE texts as a mapping. Raises UserError for another text or a name twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not (name and sign and value):
            raise UserError(f"{flag} {text!r} is not NAME=VALUE; write as {flag} N=1e9")
        if name in found:
            raise UserError(f"{flag} gives {name} twice; give it once")
        found[name] = value
    return found


def numbers(texts: Mapping[str, str], flag: str) -> dict[str, float]:
    """Return the values as numbers. Raises UserError for what is none."""
    found = {}
    for name, text in texts.items():
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise UserError(f"{flag} {name}={text} is no number; write as {name}=1e9")
    return found


def _is_curve(form: Form) -> bool:
    return any(variable.name == "step" for variable in form.inputs)


def _check_options(request: DataRequest, *, table: bool, curve: bool) -> None:
    given = {field.name for field in fields(request) if getattr(request, field.name) is not None}
    for names, wrong, of in (
        (_OF_RUNS, table, "run folders, not to tables"),
        (_OF_FINISHED_RUNS, curve, "rows of finished runs, not of curves"),
        (_OF_CURVES, not curve, "laws of curves (or --curves)"),
        (("warmup",), not table, "tables of curves; runs say their own warm-up"),
        (("sweeps",), curve, "rows of finished runs, not to curves"),
        (("group",), table and curve, "rows of finished runs; each file is a curve of its own"),
    ):
        for name in names:
            if wrong and name in given:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} belongs to {of}; leave it out")
    if request.sweeps and (request.group is not None or request.group_by is not None):
        flag = "--group" if request.group is not None else "--group-by"
        raise UserError(f"{flag} does not go with --sweeps, each of which is a group; leave it out")
    if request.group is not None and request.group_by is not None:
        raise UserError("--group and --group-by both say whose a row is; give one of them")
    for name, choices in _CHOICES.items():
        if (value := getattr(request, name)) is not None and value not in choices:
            raise UserError(
                f"--{name.replace('_', '-')}={value} is not known; use {', '.join(choices)}"
            )


def _of_tables(
    request: DataRequest, forms: Sequence[Form], mapping: Mapping[str, str], *, curve: bool
) -> Observations:
    if curve:
        found = curves_from_tables(request.sources, mapping=mapping, warmup_steps=request.warmup)
        return derive(found, where=request.where, name="the tables") if request.where else found
    names = dict.fromkeys(name for form in forms for name in columns_of(form))
    if request.sweeps:
        names = dict.fromkeys(_SWEPT)
    return read_table(
        request.sources,
        list(names),
        mapping=mapping,
        where=request.where,
        group=request.group,
        positive=_SWEPT if request.sweeps else _positive(forms),
    )


def _positive(forms: Sequence[Form]) -> set[str]:
    """The columns that a law takes as positive: inputs, and targets whose logs are compared."""
    targets = {form.target.name for form in forms if form.residual == "log"}
    return targets | {one.name for form in forms for one in form.inputs if one.positive}


def columns_of(form: Form) -> list[str]:
    """Return the columns that a law reads and predicts."""
    return [*(variable.name for variable in form.inputs), form.target.name]


def _of_runs(request: DataRequest, *, curve: bool) -> Observations:
    def given(*names: str) -> dict[str, Any]:
        """The options that were given, as arguments; the others keep the library's defaults."""
        values = {name: getattr(request, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    if curve:
        options = given("count", "loss", "bins")
        return curves_from_runs(request.sources, **options, planned=planned_rates)
    return from_runs(request.sources, **given("count", "loss", "last", "group_by", "unfinished"))


def planned_rates(run: Run) -> LearningRates:
    """Return the rates of each step that a run's configuration plans."""
    config = RunConfig.model_validate(run.config)
    plan = BatchPlan(config.batch, config.data.sequence_length)
    return rates_of(resolve_schedule(config, plan), config.optimizer.lr)


def _dropped(observations: Observations, names: Sequence[str]) -> Observations:
    """The rows of other groups."""
    groups = np.array(observations.groups)
    for name in names:
        if name not in observations.groups:
            known = ", ".join(dict.fromkeys(observations.groups))
            raise UserError(f"--drop {name!r} is no group of the rows; the groups are {known}")
    kept = ~np.isin(groups, list(names))
    if not kept.any():
        raise UserError("--drop leaves no row; drop fewer groups")
    return observations.take(kept)
