"""Scores of checkpoints (scores.jsonl), and their decrease since the start of a stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from allometry.launch.figures.branches import taken_over
from allometry.launch.figures.figure import GREY, Column, Figure, Panel, Series, known
from allometry.launch.report.inputs import Inputs, Shown
from allometry.launch.report.losses import NO_RUNS
from allometry.launch.report.section import Section
from allometry.laws.scores import Row, read_scores

TASKS = 12
_FIRST = ("acc", "exact_match")
"""Preferred metrics of a task; a task without these is shown by its first metric."""
_TOKENS = "training tokens"

_Of = dict[str, list[Row]]
"""Rows of a run's tasks by step, one metric for each task."""


def scores(inputs: Inputs) -> Section:
    """Return each task's score over the run, and changes of scores and losses in each stage."""
    title = "Scores"
    found = [_of_run(one) for one in inputs.runs]
    names = list(dict.fromkeys(name for of in found for name in of))
    if not names:
        why = "no run was evaluated (allometry evaluate)" if inputs.runs else NO_RUNS
        return Section("scores", title, absent=why)
    runs = [(one, of) for one, of in zip(inputs.runs, found, strict=True) if of]
    panels = tuple(_task(name, runs) for name in names[:TASKS])
    changes = tuple(panel for panel in _stages(runs, inputs.runs) if panel.series)
    notes = ()
    if len(names) > TASKS:
        notes = (f"Left out, as more than {TASKS} were evaluated: {', '.join(names[TASKS:])}.",)
    text = (
        "Scores of kept checkpoints by the lm-evaluation-harness, with one standard error; grey is "
        "what guessing gives. Changes are against the first checkpoint of the stage that was "
        "evaluated: of a branch, the last one up to the step at which it branches. Scores below 0 "
        "and held-out losses above 0 are what was unlearnt."
    )
    figures = (Figure("scores", panels), *([Figure("stages", changes)] if changes else []))
    return Section("scores", title, text, figures, notes=notes)


def _of_run(one: Shown) -> _Of:
    """Return rows by task, of one metric, one answer filter and one number of shots."""
    by_task: _Of = {}
    for row in read_scores(one.run.folder):
        if isinstance(row.get("value"), int | float) and row.get("tokens") is not None:
            by_task.setdefault(str(row.get("task")), []).append(row)
    chosen = {}
    for task, rows in by_task.items():
        metrics = list(dict.fromkeys(str(row.get("metric")) for row in rows))
        metric = next((name for name in _FIRST if name in metrics), metrics[0])
        rows = [row for row in rows if row.get("metric") == metric]
        last = rows[-1]  # the most recent evaluation
        how = [last.get(key) for key in ("filter", "fewshot", "limit")]
        rows = [row for row in rows if [row.get(k) for k in ("filter", "fewshot", "limit")] == how]
        chosen[f"{task}, {metric}"] = rows
    return chosen


def _columns(rows: Sequence[Row]) -> tuple[Column, Column, Column]:
    """Return tokens, values and standard errors (NaN: unknown)."""
    return (
        np.array([float(row["tokens"]) for row in rows]),
        np.array([float(row["value"]) for row in rows]),
        np.array([np.nan if row.get("stderr") is None else row["stderr"] for row in rows], float),
    )


def _task(name: str, runs: Sequence[tuple[Shown, _Of]]) -> Panel:
    series: list[Series] = []
    ends: list[float] = []
    chances: list[float] = []
    for one, of in runs:
        rows = of.get(name, [])
        if not rows:
            continue
        x, y, error = _columns(rows)
        ends += [x[0], x[-1]]
        chances += [float(row["chance"]) for row in rows if row.get("chance") is not None]
        if np.isfinite(error).all():
            band = {"low": y - error, "high": y + error}
            series.append(
                one.series(x, y, f"{one.name}, standard error", style="band", named=False, **band)
            )
        series += one.curve(x, y, "tokens", style="joined")
    if chances:
        x = np.array([min(ends), max(ends)])
        series.append(Series("chance", x, np.full(2, chances[-1]), "dashed", GREY))
    metric = name.rsplit(", ", 1)[1]
    return Panel(name, _TOKENS, metric, tuple(series))


def _stages(runs: Sequence[tuple[Shown, _Of]], shown: Sequence[Shown]) -> Iterator[Panel]:
    """Yield changes since each stage began: of accuracies, and of held-out losses."""
    yield Panel(
        "scores since the stage began",
        _TOKENS,
        "change of the score",
        tuple(
            one.series(x, y, f"{one.name}, {name}", style="joined")
            for one, of in runs
            for name, rows in of.items()
            if "accuracy" in rows[-1]
            for x, y in _changes(one, *_columns(rows)[:2])
        ),
    )
    yield Panel(
        "held-out losses since the stage began",
        _TOKENS,
        "change of the loss (nats per token)",
        tuple(
            one.series(x, y, f"{one.name}, {key.removeprefix('validation/')}", style="joined")
            for one in shown
            for key in one.metrics
            if key.startswith("validation/")
            for x, y in _changes(one, *known(one.metrics["tokens"], one.metrics[key]))
        ),
    )


def _changes(one: Shown, x: Column, y: Column) -> Iterator[tuple[Column, Column]]:
    """Yield the curve of a run's own stage relative to its start, if it has two points."""
    fork = taken_over(one.run, "tokens")
    before = int((x <= fork).sum()) if np.isfinite(fork) else 0
    first = max(0, before - 1)
    if len(x) - first > 1:
        yield x[first:], y[first:] - y[first]
