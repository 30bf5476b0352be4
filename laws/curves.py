"""Observations from the course of runs, for laws of complete curves."""

# n rows, T steps of a run

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from allometry.configs.errors import UserError
from allometry.laws.collect import (
    CountName,
    check_record,
    count_of,
    distinct_names,
    expand,
    run_names,
)
from allometry.laws.comparable import check_comparable
from allometry.laws.losses import LossChoice, check_losses, loss_curve
from allometry.laws.observations import Column, LearningRates, Observations
from allometry.laws.runs import Run, read_run
from allometry.laws.tables import read_table

S1_TOLERANCE = 1e-3
"""Tolerance of interpolated learning rates, relative to the recorded sum S1."""


def curves_from_runs(
    folders: Sequence[str | Path],
    *,
    count: CountName = "non_embedding",
    loss: str = "train",
    bins: int | None = 200,
    planned: Callable[[Run], LearningRates] | None = None,
) -> Observations:
    """Return rows of the curves of runs, finished or not: each run is a group with its own rates.

    Columns: ``step``, ``loss`` (see ``from_runs``), ``N`` by ``count``, ``D``, ``C``, ``S1`` and
    ``S2`` at that step. Steps of the warm-up are left out, because no law of curves applies to
    them. ``bins``: the rows of a training loss, which is noisy, are averaged over at most this many
    intervals of equally many rows, and ``step`` is the middle of the interval (None: every row);
    held-out losses are not averaged.

    Learning rates are the recorded ones. If record.every_steps is above 1, the rates of steps in
    between are taken from ``planned``, the rates of a run's configuration, if these equal all
    recorded rates (they differ if the schedule was changed during the run), and are otherwise
    interpolated linearly (from 0 before the first step of a warm-up). In both cases the sum must
    equal the run's own S1, which is updated at every step.

    A branch (run.parent) includes its parent's rows. Steps that two runs share are rows of the
    parent, or of the first of its branches that are given: see ``conventions["left out"]``. Raises
    UserError: a folder has no run, no row is left after the warm-up, a loss is missing or not
    positive, or the recorded rates do not determine the rates in between.
    """
    choice = LossChoice.parse(loss)
    if bins is not None and bins < 1:
        raise UserError(f"--bins={bins} is no number of stretches; use 1 or more")
    runs = [read_run(path) for path in expand(folders)]
    for run in runs:
        check_record(run)
    check_comparable(runs, choice)
    parts: list[dict[str, Column]] = []
    groups: list[str] = []
    curves: dict[str, LearningRates] = {}
    names, shared = run_names(runs), shared_steps(runs)
    for run, name, taken_over in zip(runs, names, shared, strict=True):
        curves[name] = rates_of(run, planned)
        part = _rows(run, choice, count, curves[name], bins, taken_over)
        parts.append(part)
        groups += [name] * len(part["step"])
    binned = bins is not None and choice.kind == "train"
    left_out = [f"{name} to step {step}" for name, step in zip(names, shared, strict=True) if step]
    return Observations(
        columns={key: np.concatenate([part[key] for part in parts]) for key in parts[0]},
        groups=tuple(groups),
        curves=curves,
        conventions={
            "loss": f"{choice.kind} loss of {choice.source or 'the mixture'}, nats per token"
            + (f", means of at most {bins} stretches of a run" if binned else ""),
            "step": "counted from 1, after the warm-up",
            "N": f"{count} parameters",
            **({"left out": f"rows of another run: {', '.join(left_out)}"} if left_out else {}),
        },
    )


def shared_steps(runs: Sequence[Run]) -> list[int]:
    """Return for each run the step up to which its rows belong to another of these runs."""
    given = {run.folder.resolve() for run in runs}
    covered: dict[Path, int] = {}
    steps = []
    for run in runs:
        parent = run.config.get("run", {}).get("parent")
        if not parent:
            steps.append(0)
            continue
        step = int(parent["step"])
        trunk = Path(parent["folder"]).resolve()
        beside = run.folder.resolve().parent / trunk.name  # if the ladder was moved
        if trunk in given or beside in given:
            steps.append(step)
        else:
            steps.append(min(step, covered.get(beside, 0)))
            covered[beside] = max(step, covered.get(beside, 0))
    return steps


def rates_of(run: Run, planned: Callable[[Run], LearningRates] | None = None) -> LearningRates:
    """Return the learning rate of each step so far. Raises UserError: see ``curves_from_runs``."""
    check_record(run)
    warmup = int(run.record["plan"]["warmup_steps"])
    steps, rates, sums = (run.metrics[key] for key in ("step", "lr", "s1"))
    ends = (np.append(0, steps), np.append(0.0, rates)) if warmup > 0 else (steps, rates)
    filled = np.interp(np.arange(1, int(steps[-1]) + 1), *ends)
    if planned is not None and len(steps) < steps[-1]:
        plan = planned(run).rates[: len(filled)].copy()
        recorded = steps.astype(int) - 1
        skipped = run.metrics.get("skipped", np.zeros(len(steps))) == 1.0
        if len(plan) == len(filled):
            plan[recorded[skipped]] = 0.0  # no update, and every such step has a row
            if np.allclose(plan[recorded], rates, rtol=1e-9, atol=0.0):
                filled = plan
    missed = np.abs(np.cumsum(filled)[steps.astype(int) - 1] - sums) > S1_TOLERANCE * sums
    if missed.any():
        step = int(steps[np.argmax(missed)])
        raise UserError(
            f"{run.folder}: the recorded learning rates do not tell those between them (their sum "
            f"to step {step} misses the recorded s1); set record.every_steps: 1 and train again"
        )
    return LearningRates(filled, warmup)


def _rows(
    run: Run,
    choice: LossChoice,
    count: CountName,
    rates: LearningRates,
    bins: int | None,
    taken_over: int,
) -> dict[str, Column]:
    steps, losses = loss_curve(run, choice)
    after = steps > max(rates.warmup_steps, taken_over)
    steps, losses = steps[after], losses[after]
    check_losses(run, choice, steps, losses)
    if len(steps) == 0:
        raise UserError(
            f"{run.folder} has no recorded {choice.kind} loss of its own after its warm-up of "
            f"{rates.warmup_steps} steps; let it train on, or leave it out"
        )
    if bins is not None and choice.kind == "train" and len(steps) > bins:
        stretches = np.array_split(np.arange(len(steps)), bins)
        losses = np.array([losses[part].mean() for part in stretches])
        steps = np.array([np.round(steps[part].mean()) for part in stretches])
    columns = {"step": steps, "loss": losses, "N": np.full(len(steps), float(count_of(run, count)))}
    for name, key in (("D", "tokens"), ("C", "flops"), ("S1", "s1"), ("S2", "s2")):
        columns[name] = np.interp(steps, run.metrics["step"], run.metrics[key])
    for name in run.record.get("data", {}).get("sources", {}):
        share = run.metrics[f"tokens/{name}"][-1] / run.metrics["tokens"][-1]
        columns[f"r/{name}"] = np.full(len(steps), float(share))
    return columns


def curves_from_tables(
    paths: Sequence[str | Path],
    *,
    mapping: Mapping[str, str] | None = None,
    where: Sequence[str] = (),
    warmup_steps: int | None = None,
) -> Observations:
    """Return rows of curves in tables, one curve each, by columns ``step``, ``lr``, ``loss``.

    Columns may be mapped and rows selected as in ``read_table``; a row that is not selected still
    gives the learning rate of its step. Each file is a group with the file's name. Rates of steps
    without a row are interpolated linearly, and before the first row from 0: the warm-up, which
    ends at ``warmup_steps`` (None: at the first row). A file whose first row is step 1 has no
    warm-up unless ``warmup_steps`` is given. Rows of the warm-up are left out. Raises UserError: as
    ``read_table``; a loss is not positive; a file has two rows of one step; a step is not a whole
    number from 1; a rate is negative; two files have the same curve.
    """
    resolved = [Path(path).resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise UserError("the same file is given twice; give each curve once")
    names = distinct_names(resolved)
    parts: list[Observations] = []
    curves: dict[str, LearningRates] = {}
    for path, name in zip(paths, names, strict=True):
        others = {key: text for key, text in (mapping or {}).items() if key != "loss"}
        whole = read_table(path, ["step", "lr"], mapping=others)
        whole = whole.take(np.argsort(whole["step"], kind="stable"))
        curves[name] = _rates_of_rows(path, whole, warmup_steps)
        table = read_table(
            path, ["step", "lr", "loss"], mapping=mapping, where=where, positive=("loss",)
        )
        table = table.take(np.argsort(table["step"], kind="stable"))
        after = table["step"] > curves[name].warmup_steps
        if not after.any():
            raise UserError(
                f"{path} has no row after the warm-up of {curves[name].warmup_steps} steps; give a "
                "longer curve or another --warmup"
            )
        parts.append(table.take(after))
    for (one, first), (other, second) in combinations(zip(names, parts, strict=True), 2):
        if all(np.array_equal(first[key], second[key]) for key in ("step", "loss")):
            raise UserError(f"{one} and {other} hold the same curve; give each curve once")
    return Observations(
        columns={key: np.concatenate([part[key] for part in parts]) for key in parts[0].columns},
        groups=tuple(np.repeat(names, [len(part) for part in parts]).tolist()),
        curves=curves,
        conventions={
            "loss": f"{(mapping or {}).get('loss', 'loss')} of {', '.join(names)}",
            "step": "as in the files; rates between rows are on straight lines",
        },
    )


def _rates_of_rows(path: str | Path, table: Observations, warmup: int | None) -> LearningRates:
    steps, rates = table["step"], table["lr"]
    if (steps < 1).any() or (steps != np.round(steps)).any():
        raise UserError(f"{path} has a step that is no whole number from 1; map step to such a one")
    if (np.diff(steps) == 0).any():
        step = int(steps[np.argmax(np.diff(steps) == 0)])
        raise UserError(f"{path} has two rows of step {step}; give one curve in each file")
    if (rates < 0).any():
        raise UserError(f"{path} has a negative lr; map lr to the learning rate")
    first = int(steps[0])
    ends = warmup if warmup is not None else (0 if first == 1 else first)
    if first > 1:
        steps, rates = np.append(0, steps), np.append(0.0, rates)
    if 0 < ends < first:  # the warm-up ends before the first row, at the first row's rate
        steps, rates = np.insert(steps, 1, ends), np.insert(rates, 1, rates[1])
    filled = np.interp(np.arange(1, int(steps[-1]) + 1), steps, rates)
    return LearningRates(filled, ends)
