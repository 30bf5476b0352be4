"""Work of the ladder commands: each function returns its report."""

from __future__ import annotations

import signal
import sys
from typing import cast

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.studies.ladder import stages, text
from allometry.launch.studies.ladder.commands import Fit, LadderCommand, Predict, Run


def run(asked: Run) -> Report:
    """Train the remaining runs. Progress is printed immediately, on stderr with --json."""
    if asked.only not in (None, "rungs", "target"):
        raise UserError(f"--only={asked.only} is not known; use rungs or target")
    if asked.dry_run:
        return status(asked)

    def say(line: str) -> None:
        print(line, file=sys.stderr if asked.json else sys.stdout, flush=True)

    only = cast(stages.Only | None, asked.only)
    facts = stages.run(stages.open_ladder(asked.file), only, asked.parallel, say)
    stopped = facts.get("stopped")
    code = 128 + signal.Signals[stopped] if stopped else 0  # as in shells
    return Report(facts, "", passed=not stopped, code=code)


def status(asked: LadderCommand) -> Report:
    """Report the progress of the ladder."""
    facts = text.planned_facts(stages.open_ladder(asked.file))
    return Report(facts, text.status_text(facts))


def fit(asked: Fit) -> Report:
    """Fit the ladder's law."""
    facts = stages.fit(stages.open_ladder(asked.file))
    return Report(facts, text.fit_text(facts))


def predict(asked: Predict) -> Report:
    """Predict the target's loss, or compare the prediction with the measured loss."""
    prediction = stages.predict(stages.open_ladder(asked.file), again=asked.again)
    return Report(prediction.describe(), text.prediction_text(prediction))
