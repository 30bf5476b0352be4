"""Rows for the commands about laws: run folders or tables, as one set of observations."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.format import first_names
from allometry.configs.run import RunConfig
from allometry.launch.laws.commands import Rows
from allometry.laws.cells import by_cell, copies_note, row_notes
from allometry.laws.collect import COUNTS, GROUPINGS, Unfinished, from_runs
from allometry.laws.curves import curves_from_runs, curves_from_tables
from allometry.laws.derive import derive
from allometry.laws.downstream import smooth_checkpoints
from allometry.laws.expressions import is_condition
from allometry.laws.forms.base import Form
from allometry.laws.hyperparameters import sweep_optima
from allometry.laws.observations import Observations
from allometry.laws.tables import is_table, read_table
from allometry.trainer.record.rates import planned_rates

SWEPT = ("N", "D", "lr", "B", "loss")
"""Columns of sweeps."""
_OF_RUNS = ("count", "loss", "last", "group_by", "unfinished", "bins", "curves")
_OF_FINISHED_RUNS = ("last", "group_by", "unfinished")
_OF_CURVES = ("bins", "warmup")
_CHOICES = {"count": COUNTS, "group_by": GROUPINGS, "unfinished": get_args(Unfinished)}


def observations_for(
    rows: Rows, forms: Sequence[Form], hold_out: str | None = None
) -> Observations:
    """Return the rows of SOURCES for these laws, with the columns that ``hold_out`` reads.

    Rows of a table with equal inputs are one group, unless the user names a group column. Raises
    UserError: sources are of two kinds or cannot be read, laws need rows of two kinds, or an option
    does not apply to these rows.
    """
    of_curves = [any(one.name == "step" for one in form.inputs) for form in forms]
    if any(of_curves) and not all(of_curves) and not rows.curves:
        raise UserError(
            f"{forms[of_curves.index(True)].name} is a law of whole curves and "
            f"{forms[of_curves.index(False)].name} of finished runs; fit them apart"
        )
    inputs = list(dict.fromkeys(one.name for form in forms for one in form.inputs))
    names = [*inputs, *dict.fromkeys(form.target.name for form in forms)]
    positive = {form.target.name for form in forms if form.residual == "log"}
    positive |= {one.name for form in forms for one in form.inputs if one.positive}
    curve = of_curves[0] or rows.curves
    return rows_with(rows, names, positive, curve=curve, hold_out=hold_out, cells=inputs)


def rows_with(
    rows: Rows,
    names: Sequence[str],
    positive: Collection[str],
    *,
    curve: bool = False,
    hold_out: str | None = None,
    cells: Sequence[str] = (),
) -> Observations:
    """Return the rows of SOURCES: the columns ``names`` of tables, all columns of runs.

    ``positive``: names whose values must be above 0. ``curve``: rows are steps, not finished runs.
    ``hold_out``: a choice of rows, whose columns are read as well. ``cells``: rows of a table that
    are equal in these columns are one group, unless the user names a group column. Raises
    UserError: see ``observations_for``.
    """
    tables = [is_table(source) or Path(source).is_file() for source in rows.sources]
    if not all(rows.sources):
        raise UserError("a source is an empty text; give run folders or tables")
    if any(tables) and not all(tables):
        raise UserError(
            f"{rows.sources[tables.index(False)]} is not a table and "
            f"{rows.sources[tables.index(True)]} is; give run folders or tables, not both"
        )
    _check_options(rows, table=tables[0], curve=curve)
    mapping = assignments(rows.mapping, "--map")
    if tables[0]:
        observations = _of_tables(
            rows, names, positive, mapping, hold_out=hold_out, cells=cells, curve=curve
        )
    else:
        observations = derive(
            _of_runs(rows, curve=curve), mapping=mapping, where=rows.where, group=rows.group
        )
    if rows.sweeps:
        observations = sweep_optima(observations)
    if rows.smooth is not None:
        observations = smooth_checkpoints(observations, names, window=rows.smooth)
    for name in rows.drop:
        if name not in observations.groups:
            known = first_names(list(dict.fromkeys(observations.groups)), 8)
            raise UserError(f"--drop {name!r} is no group of the rows; the groups are {known}")
    kept = ~np.isin(np.array(observations.groups), list(rows.drop))
    if not kept.any():
        raise UserError("--drop leaves no row; drop fewer groups")
    return observations.take(kept)


def assignments(texts: Sequence[str], flag: str) -> dict[str, str]:
    """Return NAME=VALUE texts as a mapping. Raises UserError: another text, or a name twice.

    For example, ``assignments(["N=7e9"], "--with")`` returns ``{"N": "7e9"}``.
    """
    assigned: dict[str, str] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not (name and sign and value):
            raise UserError(f"{flag} {text!r} is not NAME=VALUE; {_form_of(flag)}")
        if name in assigned:
            raise UserError(f"{flag} gives {name} twice; give it once")
        assigned[name] = value
    return assigned


def _form_of(flag: str) -> str:
    """Return an example of NAME=VALUE for this option."""
    forms = {
        "--map": "--map N=COLUMN, or arithmetic on columns: --map 'D=C/(6*N)'",
        "--fix": "--fix PARAMETER=NUMBER as in --fix E=0, or the .json file of a fit",
        "--at": "--at N=7e9,D=1.4e11",
        "--with": "--with INPUT=NUMBER as in --with N=7e9",
    }
    return f"write as {forms.get(flag, f'{flag} DOMAIN=NUMBER, as in {flag} code=0.5')}"


def numbers(texts: Mapping[str, str], flag: str) -> dict[str, float]:
    """Return the values as numbers. Raises UserError: a value is not a finite number."""
    values = {}
    for name, text in texts.items():
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = math.nan
        if not math.isfinite(values[name]):
            raise UserError(f"{flag} {name}={text} is no number; give one such as 0.5 or 7e9")
    return values


def _check_options(rows: Rows, *, table: bool, curve: bool) -> None:
    for names, wrong, of in (
        (_OF_RUNS, table, "run folders, not to tables"),
        (_OF_FINISHED_RUNS, curve, "rows of finished runs, not of curves"),
        (_OF_CURVES, not curve, "laws of curves (or --curves)"),
        (("warmup",), not table, "tables of curves; runs say their own warm-up"),
        (("sweeps",), curve, "rows of finished runs, not to curves"),
        (("smooth",), not table, "tables of checkpoints; --last and --bins average runs"),
        (("smooth",), curve or rows.group is None, "rows of checkpoints with --group"),
        (("group",), table and curve, "rows of finished runs; each file is a curve of its own"),
    ):
        for name in names:
            value = getattr(rows, name)
            if wrong and value is not None and value is not False:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} belongs to {of}; leave it out")
    if rows.sweeps and (rows.group is not None or rows.group_by is not None):
        flag = "--group" if rows.group is not None else "--group-by"
        raise UserError(f"{flag} does not go with --sweeps, each of which is a group; leave it out")
    if rows.group is not None and rows.group_by is not None:
        raise UserError("--group and --group-by both say whose a row is; give one of them")
    for name, choices in _CHOICES.items():
        if (value := getattr(rows, name)) is not None and value not in choices:
            raise UserError(
                f"--{name.replace('_', '-')}={value} is not known; use {', '.join(choices)}"
            )


def notes_of_rows(rows: Rows, observations: Observations, forms: Sequence[Form]) -> list[str]:
    """Return notes on unusual rows; for run folders only a note on copied runs."""
    if rows.sweeps or observations.curves:
        return []
    inputs = list({one.name: one for form in forms for one in form.inputs}.values())
    target = forms[0].target.name
    if not is_table(rows.sources[0]):
        known = dict.fromkeys([*(one.name for one in inputs), "D", "lr", "seed", target])
        note = copies_note(observations, list(known))
        return [] if note is None else [note]
    grouped = rows.group is not None
    return row_notes(observations, inputs, target, grouped=grouped)


def _of_tables(
    rows: Rows,
    names: Sequence[str],
    positive: Collection[str],
    mapping: Mapping[str, str],
    *,
    hold_out: str | None,
    cells: Sequence[str],
    curve: bool,
) -> Observations:
    if curve:
        return curves_from_tables(
            rows.sources, mapping=mapping, where=rows.where, warmup_steps=rows.warmup
        )
    wanted = [*names, "D"] if rows.smooth is not None and "D" not in names else list(names)
    kind, _, column = (hold_out or "").partition(":")
    if kind == "largest" and column:
        wanted.append(column)
    marked = hold_out is not None and is_condition(hold_out) and not rows.sweeps
    observations = read_table(
        rows.sources,
        list(SWEPT) if rows.sweeps else wanted,
        mapping=mapping,
        where=rows.where,
        group=rows.group,
        positive=SWEPT if rows.sweeps else positive,
        held_out=hold_out if marked else None,
    )
    if rows.group is not None or rows.sweeps or not cells:
        return observations
    return by_cell(observations, cells)


def _of_runs(rows: Rows, *, curve: bool) -> Observations:
    def given(*names: str) -> dict[str, Any]:
        """Return the given options as arguments; the library's defaults apply to the others."""
        values = {name: getattr(rows, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    if curve:
        options = given("count", "loss", "bins")
        options["planned"] = lambda run: planned_rates(RunConfig.model_validate(run.config))
        return curves_from_runs(rows.sources, **options)
    return from_runs(rows.sources, **given("count", "loss", "last", "group_by", "unfinished"))
