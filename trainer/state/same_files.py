"""Check that a run still reads the same files as in the steps taken."""

from __future__ import annotations

import math
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.data.reading import same_files
from allometry.optim.schedule import schedules_of


def check_read(config: RunConfig, facts: dict[str, Any], fingerprints: dict[str, Any]) -> None:
    """Raise UserError if the data or the schedule file differ from those of the steps taken."""
    _check_schedule_file(config, facts)
    _check_data(facts, fingerprints)


def _check_schedule_file(config: RunConfig, facts: dict[str, Any]) -> None:
    """Raise UserError if the file of a refined schedule differs from that of the steps taken."""
    stages = config.of_stages()
    if not any(one.schedule.reads_file for one in stages) or facts.get("weights_only", False):
        return
    since, skipped = rates_since(config, facts), {int(s) for s in facts.get("skipped", {})}
    s1 = since["s1"]
    for one, schedule in zip(stages, schedules_of(config), strict=True):
        first = max(schedule.first_step, since["step"] + 1)
        steps = range(first, min(facts["step"], schedule.total_steps) + 1)
        s1 += sum(one.optimizer.lr * schedule.fraction(s) for s in steps if s not in skipped)
    if not math.isclose(s1, facts["areas"]["s1"], rel_tol=1e-9):
        raise UserError(
            "the file of schedule.kind=refined changed, so that steps already taken would have had "
            "other learning rates; restore it or choose another run.folder"
        )


def rates_since(config: RunConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the step after which rates follow this config's schedule, and S1 at that step.

    The step is 0 unless the run branched with another ``optimizer.lr`` or ``schedule``; the facts
    of its checkpoints then record the step.
    """
    parent = config.run.parent
    if parent is not None and int(facts["step"]) != parent.step:
        parent = None
    if parent is not None and any(map(parent.may_change, ("schedule", "optimizer.lr"))):
        return {"step": parent.step, "s1": facts["areas"]["s1"]}
    known: dict[str, Any] = facts.get("rates_since", {"step": 0, "s1": 0.0})
    return known


def _check_data(facts: dict[str, Any], fingerprints: dict[str, Any]) -> None:
    for name, known in facts.get("data", {}).items():
        found = fingerprints.get(name, known)
        if found != known and same_files(found, known):
            raise UserError(
                f"data.sources {name}: select keeps other documents than those this run was "
                "started with (another score file, keep or side); restore it or choose another "
                "run.folder"
            )
        if found != known:  # missing sources are checked with the samples
            raise UserError(
                f"the token files of data source {name!r} are not the ones this run was started "
                f"with ({found} instead of {known}); restore them or choose "
                "another run.folder"
            )
