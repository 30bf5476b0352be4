"""Commands for a ladder of runs: ``allometry ladder run|status|fit|predict``."""

from __future__ import annotations

from dataclasses import dataclass

from allometry.launch.command import Command, argument, option


@dataclass(frozen=True, kw_only=True)
class LadderCommand(Command):
    """Base class of the commands for a ladder."""

    file: str = argument("YAML file of kind: ladder, preset:NAME, or a ladder's folder", paths=True)


@dataclass(frozen=True, kw_only=True)
class Run(LadderCommand):
    """Train the remaining runs of the ladder, and predict its target before training it.

    Safe to interrupt and to run again: finished runs are not changed, others continue from their
    last checkpoint.
    """

    only: str | None = option("part to run: rungs or target; default: rungs, prediction, target")
    parallel: int | None = option("number of runs at a time; default: the ladder's", min=1)
    dry_run: bool = option("print the remaining runs without training", False)


@dataclass(frozen=True, kw_only=True)
class Status(LadderCommand):
    """Print the progress of each run of the ladder, with spent and remaining FLOPs."""


@dataclass(frozen=True, kw_only=True)
class Fit(LadderCommand):
    """Fit the ladder's law to its rungs and write FOLDER/fit.json."""


@dataclass(frozen=True, kw_only=True)
class Predict(LadderCommand):
    """Predict the target's loss with an interval; compare with the measurement once it is trained.

    The prediction is stored in FOLDER/prediction.json.
    """

    again: bool = option("repeat the prediction although the target has been trained", False)
