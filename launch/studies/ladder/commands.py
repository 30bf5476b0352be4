"""Commands about a ladder of runs: ``allometry ladder run|status|fit|predict``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer
from typing_extensions import override

from allometry.configs.errors import UserError
from allometry.launch.command import Command, Report, argument, option

if TYPE_CHECKING:
    from allometry.studies.ladder.plan import LadderPlan


@dataclass(frozen=True, kw_only=True)
class LadderCommand(Command):
    """A command about a ladder."""

    file: str = argument("a YAML file of kind: ladder, preset:NAME, or a ladder's folder")

    def plan(self) -> LadderPlan:
        """Return the ladder's plan. Raises UserError for a file that is none."""
        from allometry.launch.studies.ladder.stages import open_ladder

        return open_ladder(self.file)


@dataclass(frozen=True, kw_only=True)
class Run(LadderCommand):
    """Train what the ladder lacks, and predict its target before that is trained.

    Safe to interrupt and to run again: finished runs are left alone, others go on from their last
    checkpoint.
    """

    only: str | None = option("rungs, or target; default: rungs, prediction, target")
    parallel: int | None = option("runs at a time; default: the ladder's", min=1)
    dry_run: bool = option("print what would be trained, train nothing", False)

    @override
    def run(self) -> Report:
        from allometry.launch.studies.ladder import stages
        from allometry.launch.studies.ladder.text import status

        if self.only not in (None, "rungs", "target"):
            raise UserError(f"--only={self.only} is not known; use rungs or target")
        if self.dry_run:
            return status(self.plan())

        def say(line: str) -> None:
            typer.echo(line, err=self.json)

        return Report(stages.run(self.plan(), self.only, self.parallel, say), "")


@dataclass(frozen=True, kw_only=True)
class Status(LadderCommand):
    """Say how far each run of the ladder is, and what is spent and left."""

    @override
    def run(self) -> Report:
        from allometry.launch.studies.ladder.text import status

        return status(self.plan())


@dataclass(frozen=True, kw_only=True)
class Fit(LadderCommand):
    """Fit the ladder's law to its rungs and write FOLDER/fit.json."""

    @override
    def run(self) -> Report:
        from allometry.launch.studies.ladder import stages
        from allometry.launch.studies.ladder.text import fit_text

        facts = stages.fit(self.plan())
        return Report(facts, fit_text(facts))


@dataclass(frozen=True, kw_only=True)
class Predict(LadderCommand):
    """Predict the target's loss with an interval; once it is trained, say how right that was.

    The prediction is kept in FOLDER/prediction.json.
    """

    again: bool = option("predict anew, though the target has been trained", False)

    @override
    def run(self) -> Report:
        from allometry.launch.studies.ladder import stages
        from allometry.launch.studies.ladder.text import prediction_text

        prediction = stages.predict(self.plan(), again=self.again)
        return Report(prediction.describe(), prediction_text(prediction))
