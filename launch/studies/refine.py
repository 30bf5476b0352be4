"""Learning-rate schedule from a run's gradient norms: ``allometry refine``."""

from __future__ import annotations

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.studies.commands import Refine
from allometry.laws.refine import refined_schedule, write_schedule


def refined(asked: Refine) -> Report:
    """Compute the schedule and write it."""
    if asked.optimizer not in ("adam", "sgd"):
        raise UserError(f"--optimizer={asked.optimizer} is not known; use adam or sgd")
    schedule = refined_schedule(asked.folder, asked.optimizer, asked.smoothing)
    write_schedule(schedule, asked.out)
    fractions, norm = schedule["fractions"], schedule["from"]["norm"]
    peak = 1 + fractions.index(max(fractions))
    facts = {"file": str(asked.out), "steps": len(fractions), "norm": norm, "peak_step": peak}
    text = f"{asked.out}: {len(fractions)} steps from {norm}, the peak at step {peak}"
    return Report(facts, text)
