"""Text output of the ladder commands."""

from __future__ import annotations

from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.format import human
from allometry.launch.text import edge_words, number, table
from allometry.laws.fit.bootstrap import Bootstrap
from allometry.laws.fit.engine import Fit
from allometry.laws.ladder import Prediction, unidentified
from allometry.laws.losses import LossChoice, final_loss
from allometry.laws.runs import read_run
from allometry.studies.ladder.plan import LadderPlan
from allometry.studies.ladder.share import PlannedRun
from allometry.studies.ladder.state import RunState, spent, stated


def planned_facts(plan: LadderPlan) -> dict[str, Any]:
    """Return the ladder and its progress, as JSON."""
    runs, problems = [], []
    for run in plan.runs:
        state, problem = stated(run)
        problems += [problem] if problem else []
        runs.append(
            {
                "name": run.name,
                "target": run.is_target,
                "folder": str(run.folder),
                "size": run.size,
                "schedule": run.schedule,
                "seed": run.config.run.seed,
                "parameters": run.parameters,
                "tokens": run.tokens,
                "steps": run.steps,
                "flops": run.flops,
                "own_flops": run.own_flops,
                "spent_flops": spent(run, state),
                "parent": run.parent,
                "parent_step": run.parent_step,
                "state": state.stage,
                "step": state.step,
                "loss": state.loss,
                "validation": state.validation,
                "final_loss": _final_loss(plan, run, state),
            }
        )
    return {
        "folder": str(plan.folder),
        "count": plan.ladder.count,
        "law": plan.ladder.law,
        "loss": plan.ladder.loss,
        "runs": runs,
        "notes": [*plan.notes, *problems],
        "flops": sum(run["own_flops"] for run in runs),
        "flops_spent": sum(run["spent_flops"] for run in runs),
        "flops_if_each_from_scratch": sum(run["flops"] for run in runs),
    }


def _final_loss(plan: LadderPlan, run: PlannedRun, state: RunState) -> float | None:
    """Return the loss to which a law is fitted; None if the run is not finished or lacks it."""
    if state.stage != "done":
        return None
    try:
        return final_loss(read_run(run.folder), LossChoice.parse(plan.ladder.loss))
    except UserError:
        return None  # the fit reports the problem


def status_text(facts: dict[str, Any]) -> str:
    """Return the runs of ``planned_facts``, a line each, and their cost."""
    rows = [
        ["run", "N", "D", "steps", "FLOPs", "", "state", "loss", "", "branches"],
        ["", "", "tokens", "", "added", "", "", "nats/token", "", "from, at step"],
    ]
    for run in facts["runs"]:
        begun = run["state"] != "done" and run["step"] > 0
        steps = f"{run['step']}/{run['steps']}" if begun else str(run["steps"])
        flops = f"{run['own_flops']:.2g}".replace("e+", "e")
        loss = "" if run["final_loss"] is None else f"{run['final_loss']:.4f}"
        sizes = [human(run["parameters"]), human(run["tokens"]), steps, flops]
        rows.append([run["name"], *sizes, "", run["state"], loss, "", _branch(run)])
    done = sum(run["state"] == "done" for run in facts["runs"])
    whole, alone = facts["flops"], facts["flops_if_each_from_scratch"]
    saved = f", {1 - whole / alone:.0%} less than from scratch" if alone > whole else ""
    lines = [
        table(rows, right=(1, 2, 3, 4, 7), gap=" "),
        f"{done} of {len(facts['runs'])} runs done; {facts['flops_spent']:.3g} of {whole:.3g} "
        f"FLOPs spent{saved}",
        f"N counts {facts['count']} parameters; loss is that of the law ({facts['loss']})",
        *(f"note: {note}" for note in facts["notes"]),
    ]
    return "\n".join(lines)


def _branch(run: dict[str, Any]) -> str:
    """Return a run's parent: the part of its name that differs from the run's own name."""
    if not run["parent"]:
        return ""
    own = run["name"].removeprefix("target-").split("-")
    parts = run["parent"].split("-")
    other = [part for part, mine in zip(parts, own, strict=False) if part != mine]
    name = "-".join(other) if other and len(parts) == len(own) else run["parent"]
    return f"{name} at {run['parent_step']}"


def fit_facts(fit: Fit, resampled: Bootstrap, path: str) -> dict[str, Any]:
    """Return a fit as JSON, without its observations."""
    plain = fit.to_json()
    return {
        "law": fit.form.name,
        "equation": fit.form.equation,
        "values": {name: float(value) for name, value in fit.values.items()},
        "units": {p.name: fit.unit(p.unit) for p in fit.form.parameters},
        "intervals": {name: list(resampled.interval(name)) for name in resampled.names},
        "fixed": list(fit.options.fixed),
        "objective": fit.objective,
        "certificate": plain["certificate"],
        "rows": len(fit.observations),
        "unidentified": unidentified(fit),
        "at_edges": edge_words(resampled),
        "file": path,
    }


def fit_text(facts: dict[str, Any]) -> str:
    """Return the fit of ``fit_facts`` as text."""
    rows = [["parameter", "value", "95 % interval", "unit"]]
    for name, value in facts["values"].items():
        low, high = facts["intervals"][name]
        interval = "-" if facts["unidentified"] else f"{number(low)} to {number(high)}"
        interval = "fixed" if name in facts["fixed"] else interval
        rows.append([name, number(value), interval, facts["units"][name]])
    lines = [f"{facts['law']}: {facts['equation']}", f"fitted to {facts['rows']} runs"]
    lines.append(table(rows))
    notes = [*([facts["unidentified"]] if facts["unidentified"] else []), *facts["at_edges"]]
    lines += [f"note: {note}" for note in notes]
    return "\n".join([*lines, f"written to {facts['file']}"])


def _interval(prediction: Prediction) -> str:
    if prediction.low is None or prediction.high is None:
        return "no interval"
    return f"{prediction.level:.0%} interval {prediction.low:.4f} to {prediction.high:.4f}"


def prediction_text(prediction: Prediction) -> str:
    """Return a prediction as text."""
    target = prediction.target
    lines = [
        f"{target['run']} (N {human(target['N'])} parameters, D {human(target['D'])} tokens)",
        f"{prediction.law} of {prediction.rungs} runs predicts {prediction.predicted:.4f} nats per "
        f"token, {_interval(prediction)}",
    ]
    if prediction.measured is not None:
        assert prediction.error is not None
        where = {True: ", inside its interval", False: ", OUTSIDE its interval", None: ""}
        lines.append(
            f"measured {prediction.measured:.4f} nats per token: the prediction is "
            f"{prediction.error:+.2%} off{where[prediction.covered]}"
        )
    if prediction.target_state == "done":
        lines.append("note: this prediction was made AFTER the target's run had ended")
    elif prediction.target_state == "partial":
        lines.append(
            f"note: the target stood at step {prediction.target_step} when it was predicted"
        )
    return "\n".join([*lines, *(f"note: {warning}" for warning in prediction.warnings)])
