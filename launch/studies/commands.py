"""Commands about what to tune and whether it carries over."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from allometry.configs.errors import UserError
from allometry.launch.options import OVERRIDES, Config, Json

commands = typer.Typer()


@commands.command(context_settings=OVERRIDES)
def suggest(
    context: typer.Context,
    config: Config,
    params: Annotated[
        float | None,
        typer.Option(min=1, help="parameters without embedding and head; default: the model's"),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="tokens of the run; default: the config's")
    ] = None,
    loss: Annotated[
        float | None,
        typer.Option(min=0.1, help="expected loss, nats per token, for MiniCPM's batch"),
    ] = None,
    json: Json = False,
) -> None:
    """Say what published laws hold for CONFIG: learning rate, batch, schedule, where to tune.

    Each with its source and the range behind it; further arguments override single keys.
    """
    from allometry.configs.loader import load
    from allometry.launch.studies.suggest import report

    for flag, value in (("--params", params), ("--tokens", tokens), ("--loss", loss)):
        if value is not None and not math.isfinite(value):
            raise UserError(f"{flag}={value:g} is not finite; give a number, as 1e9")
    run = load(config, context.args)
    n, d = (None if size is None else round(size) for size in (params, tokens))
    typer.echo(report(run, n, d, loss, as_json=json))


@commands.command(context_settings=OVERRIDES)
def coordcheck(
    context: typer.Context,
    config: Config,
    widths: Annotated[
        str | None, typer.Option(help="as 64,128,256; default: the model's narrowest")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="as 4,8,16; default where the parameterization has a rule")
    ] = None,
    experts: Annotated[str | None, typer.Option(help="as 4,8,16; by mssp's regime")] = None,
    lr: Annotated[
        float | None, typer.Option(help="constant rate, best a large one; default: the config's")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="steps on one batch")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="initial values and batches")] = 3,
    sequences: Annotated[int | None, typer.Option(min=1, help="default: 4, or by width")] = None,
    length: Annotated[int, typer.Option(min=2, help="tokens of a sequence, at most")] = 64,
    block_bound: Annotated[
        float | None, typer.Option(min=0.0, help="largest slope of a block; default: by kind")
    ] = None,
    logit_bound: Annotated[
        float | None, typer.Option(min=0.0, help="largest slope of the logits; default: by kind")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="default: cores")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="figure to write")] = Path(
        "coordcheck.png"
    ),
    json: Json = False,
) -> None:
    """Check that CONFIG's parameterization moves activations alike at every size.

    Trains small models of the family for a few steps on the config's data. Ends with code 1 where
    a movement grows or shrinks with the size; further arguments override single keys.
    """
    from allometry.configs.loader import load
    from allometry.launch.studies.coordcheck import Request, run

    request = Request(
        widths=widths,
        depths=depths,
        experts=experts,
        lr=lr,
        steps=steps,
        seeds=seeds,
        sequences=sequences,
        length=length,
        processes=processes,
        block_bound=block_bound,
        logit_bound=logit_bound,
        out=out,
    )
    text, passed = run(load(config, context.args), request, as_json=json)
    typer.echo(text)
    if not passed:
        raise typer.Exit(1)


@commands.command(context_settings=OVERRIDES)
def transfer(
    context: typer.Context,
    config: Config,
    axis: Annotated[
        str | None,
        typer.Option(
            help="width, depth, horizon, experts, or regime-ii and regime-iii: number of experts "
            "with width and visits in proportion, and in III width of experts; default: width, or "
            "mssp's regime"
        ),
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="as 64,128,256 (of a horizon: steps); default: small ones")
    ] = None,
    octaves: Annotated[
        float, typer.Option(help="rates around optimizer.lr to begin with, to either side")
    ] = 1.0,
    step: Annotated[float, typer.Option(help="octaves between rates")] = 0.5,
    seeds: Annotated[int, typer.Option(min=1, help="initial values and orders of data")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="steps of a run")] = 80,
    warmup: Annotated[int, typer.Option(min=0, help="steps of warm-up")] = 0,
    sequences: Annotated[int, typer.Option(min=1, help="sequences of a batch")] = 8,
    length: Annotated[int, typer.Option(min=2, help="tokens of a sequence, at most")] = 64,
    bound: Annotated[float, typer.Option(min=0.0, help="octaves that best rates may drift")] = 0.5,
    processes: Annotated[int | None, typer.Option(min=1, help="default: cores")] = None,
    trials: Annotated[
        Path | None, typer.Option(help="file that keeps each run's loss, to go on from")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="figure to write")] = Path(
        "transfer.png"
    ),
    json: Json = False,
) -> None:
    """Measure whether CONFIG's best learning rate stays as its model or its run grows.

    Sweeps rates at each size on the config's data and ends with code 1 where the best ones are
    further apart than --bound; further arguments override single keys.
    """
    from allometry.configs.loader import load
    from allometry.launch.studies.transfer import Request, run

    request = Request(
        axis=axis,
        sizes=sizes,
        octaves=octaves,
        step=step,
        seeds=seeds,
        steps=steps,
        warmup_steps=warmup,
        sequences=sequences,
        length=length,
        bound=bound,
        processes=processes,
        trials=trials,
        out=out,
    )
    text, passed = run(load(config, context.args), request, as_json=json)
    typer.echo(text)
    if not passed:
        raise typer.Exit(1)


@commands.command()
def refine(
    run: Annotated[Path, typer.Argument(help="the folder of a run that trained to its end")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON to write")] = Path("schedule.json"),
    optimizer: Annotated[
        str, typer.Option(help="adam (1-norms of gradients) or sgd (2-norms, squared)")
    ] = "adam",
    smoothing: Annotated[
        float, typer.Option(help="width of the median filter, as a share of the run")
    ] = 0.1,
) -> None:
    """Make a learning-rate schedule from a run's gradient norms (arXiv 2310.07831).

    Train with it: schedule={kind: refined, file: schedule.json}
    """
    from allometry.laws.refine import refined_schedule, write_schedule

    if optimizer not in ("adam", "sgd"):
        raise UserError(f"--optimizer={optimizer} is not known; use adam or sgd")
    content = refined_schedule(run, optimizer, smoothing)
    write_schedule(content, out)
    fractions, norm = content["fractions"], content["from"]["norm"]
    peak = 1 + fractions.index(max(fractions))
    typer.echo(f"{out}: {len(fractions)} steps from {norm}, the peak at step {peak}")
