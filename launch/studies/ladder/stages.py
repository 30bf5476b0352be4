"""Stages of ``allometry ladder``: train a ladder, fit its law, predict and verify its target."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from allometry.configs.errors import UserError
from allometry.configs.format import duration, first_names
from allometry.configs.ladder import SbatchLaunch, load_ladder
from allometry.configs.loader import PRESET, yaml_text
from allometry.launch.studies.ladder import text
from allometry.laws.areas import areas_of
from allometry.laws.fit.store import load_fit, save_fit
from allometry.laws.ladder import (
    Prediction,
    TargetState,
    fit_rungs,
    load_prediction,
    measure_target,
    predict_target,
    save_prediction,
)
from allometry.laws.losses import LossChoice
from allometry.laws.runs import read_run
from allometry.optim.schedule import resolve_schedule
from allometry.scaling.batch import BatchPlan
from allometry.scaling.count import count_parameters
from allometry.studies.ladder.plan import LadderPlan, plan_ladder
from allometry.studies.ladder.run import Ended, train_runs, write_config
from allometry.studies.ladder.sbatch import offer_scripts
from allometry.studies.ladder.share import PlannedRun
from allometry.studies.ladder.state import check_stored, only_one, state_of

Only = Literal["rungs", "target"]
Say = Callable[[str], None]
FIT, PREDICTION, LADDER = "fit.json", "prediction.json", "ladder.yaml"


def open_ladder(path: str) -> LadderPlan:
    """Return the plan of a ladder's file or folder. Raises UserError.

    For example, ``open_ladder("runs/ladder")`` or ``open_ladder("ladder.yaml")``.
    """
    if not path.startswith(PRESET) and (Path(path) / LADDER).is_file():
        path = str(Path(path) / LADDER)
    return plan_ladder(*load_ladder(path))


def run(plan: LadderPlan, only: Only | None, parallel: int | None, say: Say) -> dict[str, Any]:
    """Train the remaining rungs, predict the target, and train the target.

    Returns ``status`` after training, with the signal that ``stopped`` it and the ``prediction``.
    With ``launch.kind: sbatch`` scripts are written instead. Raises UserError: runs failed, or the
    rungs give no prediction, in which case the target is not trained.
    """
    if only == "target" and plan.target is None:
        raise UserError("--only=target: the ladder has no target; add one or leave --only out")
    for planned in plan.runs:  # before the ladder's description is overwritten
        check_stored(planned)
    with only_one(plan.folder):
        save_ladder(plan)
        for planned in plan.runs:
            write_config(plan, planned)
        for note in plan.notes:
            say(f"note: {note}")
        if isinstance(plan.ladder.launch, SbatchLaunch):
            return _scripts(plan, only, parallel, say)
        at_once = parallel or plan.ladder.launch.parallel
        ended, prediction = Ended(), None
        if only != "target":
            ended = _train(plan, plan.rungs, at_once, say)
        if not ended.stopped and plan.target is not None and only != "rungs":
            if only is None:
                # Before the target is trained, so that its loss cannot be known.
                prediction = predict(plan, again=False)
                say(text.prediction_text(prediction))
            ended = _train(plan, [plan.target], at_once, say)
            if not ended.stopped and load_prediction(plan.folder / PREDICTION) is not None:
                prediction = predict(plan, again=False)
                say(text.prediction_text(prediction))
        if ended.stopped:
            say(f"stopped by {ended.stopped}; the same command goes on from here")
    return {
        **text.planned_facts(plan),
        "stopped": ended.stopped,
        "prediction": prediction.describe() if prediction else None,
    }


def _train(plan: LadderPlan, wanted: Sequence[PlannedRun], at_once: int, say: Say) -> Ended:
    begun = time.monotonic()
    ended = train_runs(plan, wanted, at_once, say)
    if ended.failed:
        name, reason = next(iter(ended.failed.items()))
        raise UserError(
            f"{len(ended.failed)} of {len(wanted)} runs failed, the first of them {name}: {reason}"
        )
    if not ended.stopped and time.monotonic() - begun > 1.0:
        say(f"{len(wanted)} run(s) done after {duration(time.monotonic() - begun)}")
    return ended


def _scripts(plan: LadderPlan, only: Only | None, parallel: int | None, say: Say) -> dict[str, Any]:
    wanted = {"rungs": plan.rungs, "target": [plan.target], None: plan.rungs}[only]
    written = offer_scripts(plan, [run for run in wanted if run is not None], parallel, say)
    if only is None and plan.target is not None:
        say("when they are done: allometry ladder predict, then allometry ladder run --only target")
    return {**text.planned_facts(plan), "scripts": [str(path) for path in written]}


def save_ladder(plan: LadderPlan) -> None:
    """Write the ladder's description, with absolute paths, into its folder."""
    plain = plan.ladder.model_dump(mode="json")
    if not plan.ladder.base.startswith(PRESET):
        plain["base"] = str(Path(plan.ladder.base).resolve())
    (plan.folder / LADDER).write_text(yaml_text(plain), encoding="utf-8")


def rungs_of_law(plan: LadderPlan) -> list[PlannedRun]:
    """Return the rungs with the target's schedule."""
    schedule = plan.target.schedule if plan.target else plan.rungs[0].schedule
    return [run for run in plan.rungs if run.schedule == schedule]


def fitted_rungs(plan: LadderPlan) -> list[PlannedRun]:
    """Return the rungs to which the law is fitted: all rungs with the target's schedule.

    Raises UserError: a rung is not done, or differs from the ladder's description.
    """
    rungs = rungs_of_law(plan)
    for run in rungs:
        check_stored(run)
    missing = [run.name for run in rungs if state_of(run).stage != "done"]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(rungs)} rungs are not done ({first_names(missing)}); "
            "train them with allometry ladder run"
        )
    return rungs


def fit(plan: LadderPlan) -> dict[str, Any]:
    """Fit the ladder's law to its rungs, write fit.json, and return the fit as JSON."""
    ladder = plan.ladder
    rungs = fitted_rungs(plan)
    fitted, resampled = fit_rungs(
        [run.folder for run in rungs],
        ladder.law,
        count=ladder.count,
        loss=ladder.loss,
        bootstraps=ladder.bootstraps,
        fixed=ladder.fix,
    )
    path, extra = plan.folder / FIT, {"ladder": str(plan.folder), "rungs": [r.name for r in rungs]}
    save_fit(path, fitted, resampled, extra)
    return text.fit_facts(fitted, resampled, str(path))


def predict(plan: LadderPlan, *, again: bool) -> Prediction:
    """Predict the target's loss and write prediction.json; compare with a measured loss.

    A prediction is not changed once its target is being trained: only the measurement is added,
    unless ``again`` requests a new prediction, which then records that it was made afterwards. If
    the ladder's law, options or rungs have changed since, the returned prediction has a warning,
    which is not stored. Raises UserError.
    """
    target = plan.target
    if target is None:
        raise UserError("the ladder has no target to predict; add target: {size: ..., tokens: ...}")
    for planned in plan.runs:
        check_stored(planned)
    path, state = plan.folder / PREDICTION, state_of(target)
    prediction = load_prediction(path)
    begun = state.step > target.parent_step
    same = prediction is not None and prediction.target["run"] == target.name and begun
    if prediction is None or again or not same:
        fit(plan)
        stored = load_fit(plan.folder / FIT)
        assert stored.bootstrap is not None
        stage: TargetState = "done" if state.stage == "done" else "partial" if begun else "planned"
        prediction = predict_target(
            stored.fit,
            stored.bootstrap,
            describe(plan, target),
            state=stage,
            step=state.step,
            runs=[run.name for run in rungs_of_law(plan)],
        )
    changed = _since(plan, target, prediction)
    if state.stage == "done" and "loss" not in changed:
        rungs = [run.folder for run in fitted_rungs(plan)]
        count, loss = plan.ladder.count, plan.ladder.loss
        prediction = measure_target(prediction, rungs, target.folder, count=count, loss=loss)
    save_prediction(path, prediction)
    return replace(prediction, warnings=(*prediction.warnings, *changed.values()))


def _since(plan: LadderPlan, target: PlannedRun, prediction: Prediction) -> dict[str, str]:
    """Return a sentence for each key that has changed in the ladder since the prediction."""
    other = {}
    if prediction.law != plan.ladder.law:
        other["law"] = f"is of law {prediction.law}, and the ladder now says {plan.ladder.law}"
    if prediction.target.get("N") != target.parameters:
        other["count"] = (
            f"counts N={prediction.target.get('N')}, and the ladder now counts {target.parameters} "
            f"({plan.ladder.count})"
        )
    if prediction.fix not in (None, plan.ladder.fix):
        other["fix"] = (
            f"was fitted with {_held(prediction.fix)} fixed, and the ladder now fixes "
            f"{_held(plan.ladder.fix)}"
        )
    if prediction.bootstraps not in (None, plan.ladder.bootstraps):
        other["bootstraps"] = (
            f"has an interval of {prediction.bootstraps} bootstraps, and the ladder now says "
            f"{plan.ladder.bootstraps}"
        )
    rungs = {run.name for run in rungs_of_law(plan)}
    if prediction.runs is not None and set(prediction.runs) != rungs:
        gone, new = sorted(set(prediction.runs) - rungs), sorted(rungs - set(prediction.runs))
        other["rungs"] = "is of other rungs than the ladder now has: " + "; ".join(
            f"{word} {first_names(names)}"
            for word, names in (("of", gone), ("not of", new))
            if names
        )
    rung = plan.rungs[0]
    if state_of(rung).stage == "done":
        loss = LossChoice.parse(plan.ladder.loss).describe(read_run(rung.folder))
        if loss != prediction.loss:
            other["loss"] = (
                f"is of another loss ({prediction.loss}), which the ladder does not measure now "
                f"({loss})"
            )
    again = "allometry ladder predict --again makes a new one"
    return {key: f"this prediction {text}; {again}" for key, text in other.items()}


def _held(fixed: Mapping[str, float] | None) -> str:
    """Return the fixed parameters as text."""
    return ", ".join(f"{name}={value:g}" for name, value in (fixed or {}).items()) or "nothing"


def describe(plan: LadderPlan, run: PlannedRun) -> dict[str, Any]:
    """Return the inputs of a law for a run before training, named as in ``from_runs``."""
    config = run.config
    counted = count_parameters(config.model)
    batch = BatchPlan(config.batch, config.data.sequence_length)
    schedule = resolve_schedule(config, batch)
    peak = config.optimizer.lr
    rates = [peak * schedule.fraction(step) for step in range(1, run.steps + 1)]
    s1, s2 = areas_of(rates, schedule.warmup_steps)
    experts = getattr(config.model, "experts", None)
    return {
        "run": run.name,
        "folder": str(run.folder),
        "N": run.parameters,
        "N_total": counted.total,
        "N_non_embedding": counted.non_embedding,
        "N_active": counted.active,
        "D": run.tokens,
        "C": run.flops,
        "M": run.tokens / run.parameters,
        "B": batch.full_sequences * batch.sequence_length,
        "S": run.steps,
        "S1": float(s1[-1]),
        "S2": float(s2[-1]),
        "lr": peak,
        "seed": config.run.seed,
        "width": config.model.width,
        "layers": config.model.num_layers,
        "experts": experts.num_experts if experts else 1,
        "experts_per_token": experts.experts_per_token if experts else 1,
    }
