"""Commands about a ladder of runs: ``allometry ladder run|status|fit|predict``."""

from __future__ import annotations

from dataclasses import dataclass

from allometry.launch.command import Command, argument, option


@dataclass(frozen=True, kw_only=True)
class LadderCommand(Command):
    """A command about a ladder."""

    file: str = argument(
        "a YAML file of kind: ladder, preset:NAME, or a ladder's folder", paths=True
    )


@dataclass(frozen=True, kw_only=True)
class Run(LadderCommand):
    """Train what the ladder lacks, and predict its target before that is trained.

    Safe to interrupt and to run again: finished runs are left alone, others go on from their last
    checkpoint.
    """

    only: str | None = option("rungs, or target; default: rungs, prediction, target")
    parallel: int | None = option("runs at a time; default: the ladder's", min=1)
    dry_run: bool = option("print what would be trained, train nothing", False)


@dataclass(frozen=True, kw_only=True)
class Status(LadderCommand):
    """Say how far each run of the ladder is, and what is spent and left."""


@dataclass(frozen=True, kw_only=True)
class Fit(LadderCommand):
    """Fit the ladder's law to its rungs and write FOLDER/fit.json."""


@dataclass(frozen=True, kw_only=True)
class Predict(LadderCommand):
    """Predict the target's loss with an interval; once it is trained, say how right that was.

    The prediction is kept in FOLDER/prediction.json.
    """

    again: bool = option("predict anew, though the target has been trained", False)
