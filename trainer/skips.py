"""Steps of a run that make no update: which, why, and how many may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from allometry.configs.bad_steps import BadSteps, StepRange, names_step
from allometry.configs.run import RunConfig
from allometry.parallel.agree import from_main_rank
from allometry.parallel.mesh import Mesh
from allometry.trainer.record.callbacks import Reporter
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.rewinds import rewinds
from allometry.trainer.step import StepOutcome

Reason = Literal["not_finite", "spike", "skip_steps"]
"""Why the update of a step was skipped; ``skip_steps``: the configuration says so."""


@dataclass
class Skips:
    """Which steps of a run make no update: those that a ``Judge`` rejects or the run names.

    ``skipped`` has the reason of each so far, and is part of a checkpoint; ``named`` are those that
    ``training.skip_steps`` passes over; ``rewinds_left``: how often the run may still go back.
    Every rank has one, and all come to the same.
    """

    config: BadSteps | None
    named: tuple[StepRange, ...]
    skipped: dict[int, Reason]
    report: Reporter
    rewinds_left: int = 0
    go_back: tuple[int, ...] = ()
    """The bad steps for which the run is to go back to a checkpoint; empty: it goes on."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        skipped: dict[int, Reason],
        report: Reporter,
        folder: RunFolder,
        mesh: Mesh,
    ) -> Skips:
        """Return those of a launch that goes on after ``skipped``; every rank calls this."""
        training, rewind = config.training, None
        if training.bad_steps is not None:
            rewind = training.bad_steps.rewind
        went_back = from_main_rank(mesh, lambda: len(rewinds(folder)), "reading rewinds.json")
        left = 0 if rewind is None else max(0, rewind.most - went_back)
        return cls(training.bad_steps, training.skip_steps, skipped, report, left)

    def passes_over(self, step: int) -> bool:
        """Return whether the run is told to pass the batch of this step over."""
        return names_step(self.named, step)

    def look(self, outcome: StepOutcome, loss: float) -> Reason | None:
        """Record and report what was skipped; return why, None for a step that made its update.

        ``outcome`` is in the host's memory.
        """
        step, norm = outcome.step, float(outcome.grad_norm)
        if self.passes_over(step):
            self.skipped[step] = "skip_steps"
            if not self.passes_over(step - 1):
                self.report("steps_passed_over", step=step)
        elif outcome.verdict is not None and outcome.verdict[0]:
            finite = math.isfinite(loss) and math.isfinite(norm)
            self.skipped[step] = reason = "spike" if finite else "not_finite"
            measured = {"loss": loss, "grad_norm": norm}
            said = measured if finite else {key: str(value) for key, value in measured.items()}
            limits = zip(measured, outcome.verdict[1:].tolist(), strict=True)
            known = {f"{key}_limit": limit for key, limit in limits if math.isfinite(limit)}
            self.report("bad_step", step=step, reason=reason, **said, **known)
            wanted = None if self.config is None else self.config.rewind
            recent = self._recent(step)
            if wanted is not None and self.rewinds_left and len(recent) >= wanted.after_spikes:
                self.go_back = self.go_back or tuple(recent)
        return self.skipped.get(step)

    def beyond(self, step: int) -> str | None:
        """Return the limit on bad steps that this one is beyond, in words; None: it may go on."""
        rejected = self.skipped.get(step, "skip_steps") != "skip_steps"
        if self.config is None or self.go_back or not rejected:
            return None
        recent = self._recent(step)
        in_row = next(n for n, bad in enumerate([*reversed(recent), -1]) if bad != step - n)
        most_in_row, most = self.config.most_in_row, self.config.most_in_window
        if in_row > most_in_row:
            return f"{in_row} bad steps in a row (training.bad_steps.most_in_row={most_in_row})"
        if len(recent) > most:
            return (
                f"{len(recent)} bad steps within {self.config.window_steps} "
                f"(training.bad_steps.most_in_window={most})"
            )
        return None

    def _recent(self, step: int) -> list[int]:
        assert self.config is not None
        first = step - self.config.window_steps
        return sorted(s for s, why in self.skipped.items() if s > first and why != "skip_steps")
