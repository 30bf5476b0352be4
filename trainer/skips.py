"""Record the steps without an update, their reasons, and the limits on their number."""

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
"""Reason for a skipped update; ``skip_steps``: named in ``training.skip_steps``."""


@dataclass
class Skips:
    """Steps of a run without an update: rejected by a ``Judge`` or named in the config.

    ``skipped`` contains the reason of each such step so far, and is part of a checkpoint; ``named``
    are the ranges of ``training.skip_steps``; ``rewinds_left`` is the number of rewinds still
    allowed. Every rank has an instance, and all instances reach the same decisions.
    """

    config: BadSteps | None
    named: tuple[StepRange, ...]
    skipped: dict[int, Reason]
    report: Reporter
    rewinds_left: int = 0
    go_back: tuple[int, ...] = ()
    """Bad steps for which the run must rewind to a checkpoint; empty: the run continues."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        skipped: dict[int, Reason],
        report: Reporter,
        folder: RunFolder,
        mesh: Mesh,
    ) -> Skips:
        """Return the skips of a launch that continues after ``skipped``; every rank calls this."""
        training, rewind = config.training, None
        if training.bad_steps is not None:
            rewind = training.bad_steps.rewind
        went_back = from_main_rank(mesh, lambda: len(rewinds(folder)), "reading rewinds.json")
        left = 0 if rewind is None else max(0, rewind.most - went_back)
        return cls(training.bad_steps, training.skip_steps, skipped, report, left)

    def passes_over(self, step: int) -> bool:
        """Return True if ``training.skip_steps`` names this step."""
        return names_step(self.named, step)

    def look(self, outcome: StepOutcome, loss: float) -> Reason | None:
        """Record and report a skipped step; return the reason, None if the step made its update.

        ``outcome`` is in host memory.
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
        """Describe the limit on bad steps that this step exceeds; None if the run may continue."""
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
