"""Commands about a ladder of runs: ``allometry ladder run|status|fit|predict``."""

from __future__ import annotations

from typing import Annotated

import typer

from allometry.configs.errors import UserError
from allometry.launch.options import Json

commands = typer.Typer()
ladder = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
commands.add_typer(
    ladder, name="ladder", help="Train small runs, fit a law to them, predict a larger run."
)

Ladder = Annotated[
    str, typer.Argument(help="a YAML file of kind: ladder, preset:NAME, or a ladder's folder")
]


@ladder.command()
def run(
    file: Ladder,
    only: Annotated[
        str | None, typer.Option(help="rungs, or target; default: rungs, prediction, target")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="runs at a time; default: the ladder's")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what would be trained, train nothing")
    ] = False,
    json: Json = False,
) -> None:
    """Train what the ladder lacks, and predict its target before that is trained.

    Safe to interrupt and to run again: finished runs are left alone, others go on from their last
    checkpoint.
    """
    from allometry.launch.studies import ladder as work
    from allometry.launch.studies.ladder_text import planned_facts, table

    if only not in (None, "rungs", "target"):
        raise UserError(f"--only={only} is not known; use rungs or target")
    plan = work.open_ladder(file)
    if dry_run:
        facts = planned_facts(plan)
        _print(facts, table(facts), as_json=json)
        return
    facts = work.run(plan, only, parallel, lambda line: typer.echo(line, err=json))  # type: ignore[arg-type]
    if json:
        _print(facts, "", as_json=True)


@ladder.command()
def status(file: Ladder, json: Json = False) -> None:
    """Say how far each run of the ladder is, and what is spent and left."""
    from allometry.launch.studies import ladder as work
    from allometry.launch.studies.ladder_text import planned_facts, table

    facts = planned_facts(work.open_ladder(file))
    _print(facts, table(facts), as_json=json)


@ladder.command()
def fit(file: Ladder, json: Json = False) -> None:
    """Fit the ladder's law to its rungs and write FOLDER/fit.json."""
    from allometry.launch.studies import ladder as work
    from allometry.launch.studies.ladder_text import fit_text

    facts = work.fit(work.open_ladder(file))
    _print(facts, fit_text(facts), as_json=json)


@ladder.command()
def predict(
    file: Ladder,
    again: Annotated[
        bool, typer.Option("--again", help="predict anew, though the target has been trained")
    ] = False,
    json: Json = False,
) -> None:
    """Predict the target's loss with an interval; once it is trained, say how right that was.

    The prediction is kept in FOLDER/prediction.json.
    """
    from allometry.launch.studies import ladder as work
    from allometry.launch.studies.ladder_text import prediction_text

    found = work.predict(work.open_ladder(file), again=again)
    _print(found.describe(), prediction_text(found), as_json=json)


def _print(facts: dict[str, object], text: str, *, as_json: bool) -> None:
    import json

    typer.echo(json.dumps(facts, indent=2) if as_json else text)
