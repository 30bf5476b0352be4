"""Commands that read what runs left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from allometry.launch.options import Json

commands = typer.Typer()


@commands.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    hdp: Annotated[
        bool,
        typer.Option(
            "--hdp",
            help="draw which rank ran which documents in one step: RUN --hdp [STEP]; default: "
            "the last recorded step",
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="PNG to write; default: loss.png, plan.png")
    ] = None,
    json: Json = False,
) -> None:
    """Draw loss against tokens and against FLOPs for one or more runs, or one step's schedule."""
    if hdp:
        from allometry.launch.gantt import draw_plan, run_and_step

        folder, step = run_and_step(runs)
        typer.echo(draw_plan(folder, step, out or Path("plan.png"), as_json=json))
        return
    from allometry.launch.plot import draw

    typer.echo(draw(runs, out or Path("loss.png"), as_json=json))
