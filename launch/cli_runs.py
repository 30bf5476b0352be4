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


@commands.command()
def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="run folders, or a ladder's folder for all in it")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="page to write")] = Path("report.html"),
    fit: Annotated[
        list[Path] | None, typer.Option("--fit", help="a fit to draw (allometry fit --out)")
    ] = None,
    transfer: Annotated[
        list[Path] | None,
        typer.Option("--transfer", help="a sweep to draw (allometry transfer --trials)"),
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="folder for the same figures as PNG")
    ] = None,
    smooth: Annotated[
        float, typer.Option(help="share of a curve that its smoothed line averages over")
    ] = 0.02,
    title: Annotated[str, typer.Option(help="title of the page")] = "Allometry report",
    json: Json = False,
) -> None:
    """Write one page with the figures of runs, fits and sweeps; it needs no network."""
    from allometry.launch.report.report import Request, run

    request = Request(
        runs=tuple(runs or ()),
        out=out,
        fits=tuple(fit or ()),
        trials=tuple(transfer or ()),
        png=png,
        smoothing=smooth,
        title=title,
    )
    typer.echo(run(request, as_json=json))
