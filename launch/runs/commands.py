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
        from allometry.launch.runs.gantt import draw_plan, run_and_step

        folder, step = run_and_step(runs)
        typer.echo(draw_plan(folder, step, out or Path("plan.png"), as_json=json))
        return
    from allometry.launch.runs.plot import draw

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
        float, typer.Option(help="smoothed losses: means over this share of the run so far")
    ] = 0.05,
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


@commands.command()
def forecast(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the run's folder")],
    schedule: Annotated[
        str | None,
        typer.Option(help="kind of another schedule, e.g. wsd; default: the run's own"),
    ] = None,
    decay_fraction: Annotated[
        float | None, typer.Option(help="share of the steps that the decay takes")
    ] = None,
    decay: Annotated[
        str | None, typer.Option(help="form of the decay: 1-sqrt, linear or exponential")
    ] = None,
    final_fraction: Annotated[float | None, typer.Option(help="last rate over peak rate")] = None,
    total_steps: Annotated[int | None, typer.Option(min=1, help="length of the run")] = None,
    decay_now: Annotated[
        bool,
        typer.Option(
            "--decay-now", help="as if the decay began now, a tenth of the run (--decay-fraction)"
        ),
    ] = False,
    together: Annotated[
        list[Path] | None,
        typer.Option(
            "--with", help="fit this run's curve as well: the same model; repeat for more"
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="a run to borrow from where this one has measured nothing yet"),
    ] = None,
    at_step: Annotated[
        int | None, typer.Option(min=1, help="forget what the run recorded after this step")
    ] = None,
    loss: Annotated[
        str, typer.Option(help="train, validation, train/NAME or validation/NAME")
    ] = "train",
    level: Annotated[float, typer.Option(help="probability of the interval")] = 0.95,
    json: Json = False,
) -> None:
    """Forecast the final loss of RUN from its curve: its own schedule, another, or a decay now."""
    from allometry.launch.runs.forecast import Request, run

    request = Request(
        run=folder,
        together=tuple(together or ()),
        like=like,
        schedule=schedule,
        decay_fraction=decay_fraction,
        decay=decay,
        final_fraction=final_fraction,
        total_steps=total_steps,
        decay_now=decay_now,
        at_step=at_step,
        loss=loss,
        level=level,
    )
    typer.echo(run(request, as_json=json))
