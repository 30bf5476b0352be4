"""Commands that fit laws to runs and tables, and say what follows from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allometry.launch.options import Json

if TYPE_CHECKING:
    from allometry.launch.laws.fit import FitRequest

commands = typer.Typer()

Sources = Annotated[
    list[str], typer.Argument(help="run folders, folders of them, or CSV files (.tsv, .gz)")
]
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        help="N=COLUMN, or arithmetic: D='`Training FLOP`/(6*N)'; backticks around a column's "
        "name that has other signs; repeat for more",
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(help="rows to take: 'loss < 3.44', \"set == 'C4'\"; repeat for more"),
]
Drop = Annotated[
    list[str] | None, typer.Option(help="leave out the rows of this group; repeat for more")
]
Group = Annotated[
    str | None,
    typer.Option(help="column that says whose a row is; default: each row of a table its own"),
]
Count = Annotated[
    str | None,
    typer.Option(help="of runs: N is non_embedding (default), total or with_head"),
]
Loss = Annotated[
    str | None,
    typer.Option(help="of runs: validation (default), train, validation/NAME or train/NAME"),
]
Last = Annotated[
    float | None, typer.Option(help="of runs: share of the steps that a train loss averages; 0.1")
]
GroupBy = Annotated[
    str | None,
    typer.Option(help="of runs: one group is a cell (but for the seed; default), model or run"),
]
Unfinished = Annotated[
    str | None, typer.Option(help="of runs: refuse (default) or skip those that did not finish")
]
Bins = Annotated[
    int | None, typer.Option(help="of runs' curves: stretches that a train loss is averaged in")
]
Curves = Annotated[
    bool | None,
    typer.Option(
        "--curves", help="of runs: rows are recorded steps, also for a law that reads no step"
    ),
]
Sweeps = Annotated[
    bool | None,
    typer.Option(
        "--sweeps",
        help="rows are the best lr and B of each sweep: of the runs of one N and D; for "
        "learning_rate_law and batch_law",
    ),
]
Warmup = Annotated[
    int | None,
    typer.Option(help="of tables of curves: steps of warm-up; default: to the first row"),
]
HoldOut = Annotated[
    str | None,
    typer.Option(
        help="groups (each by the others; default), largest (N), largest:COLUMN, a condition as "
        "'N > 1e9', or none"
    ),
]
Starts = Annotated[
    int | None, typer.Option(min=1, help="starts; default: the law's grid, or 256 spread points")
]
Objective = Annotated[str, typer.Option(help="huber or square, of residuals of logs")]
Delta = Annotated[float, typer.Option(help="where Huber's loss turns from square to linear")]
Fix = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE: a parameter that is not to be fitted")
]
Seed = Annotated[int, typer.Option(min=0, help="of spread starts and of bootstraps")]
Law = Annotated[str | None, typer.Option(help="instead of a fit: a law with --published values")]
Published = Annotated[
    str | None, typer.Option(help="whose coefficients, as `laws NAME` lists them")
]


def _request(options: dict[str, Any]) -> FitRequest:
    """The request that a command's options make: those of the data, and the others."""
    from dataclasses import fields

    from allometry.launch.laws.fit import FitRequest
    from allometry.launch.laws.sources import DataRequest

    given: dict[str, Any] = {
        name: tuple(value or ()) if name in _LISTS else value for name, value in options.items()
    }
    ours = {field.name for field in fields(DataRequest)}
    data = DataRequest(**{name: value for name, value in given.items() if name in ours})
    return FitRequest(data=data, **{k: v for k, v in given.items() if k not in ours})


_LISTS = ("sources", "mapping", "where", "drop", "fix")


@commands.command()
def fit(
    law: Annotated[str, typer.Argument(help="a law, as `allometry laws` lists them")],
    sources: Sources,
    mapping: Map = None,
    where: Where = None,
    group: Group = None,
    drop: Drop = None,
    count: Count = None,
    loss: Loss = None,
    last: Last = None,
    group_by: GroupBy = None,
    unfinished: Unfinished = None,
    bins: Bins = None,
    warmup: Warmup = None,
    curves: Curves = None,
    sweeps: Sweeps = None,
    hold_out: HoldOut = None,
    bootstraps: Annotated[
        int | None, typer.Option(min=0, help="samples for intervals; default: 200; 0: none")
    ] = None,
    starts: Starts = None,
    seed: Seed = 0,
    objective: Objective = "huber",
    delta: Delta = 1e-3,
    fix: Fix = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON to write, for predict and optimum")
    ] = None,
    json: Json = False,
) -> None:
    """Fit LAW to runs or tables: parameters with intervals, certificate, held-out error."""
    options = {name: value for name, value in locals().items() if name not in ("law", "json")}
    from allometry.launch.laws.fit import run_fit

    typer.echo(run_fit(law, _request(options), as_json=json))


@commands.command()
def compare(
    sources: Sources,
    laws: Annotated[
        list[str],
        typer.Option(help="a,b,c; a law over columns (NAME:COLUMN,COLUMN) by an option of its own"),
    ],
    mapping: Map = None,
    where: Where = None,
    group: Group = None,
    drop: Drop = None,
    count: Count = None,
    loss: Loss = None,
    last: Last = None,
    group_by: GroupBy = None,
    unfinished: Unfinished = None,
    bins: Bins = None,
    warmup: Warmup = None,
    curves: Curves = None,
    sweeps: Sweeps = None,
    hold_out: HoldOut = None,
    starts: Starts = None,
    seed: Seed = 0,
    objective: Objective = "huber",
    delta: Delta = 1e-3,
    fix: Fix = None,
    json: Json = False,
) -> None:
    """Compare laws on the same rows by how well they predict those they were not fitted to."""
    options = {name: value for name, value in locals().items() if name not in ("laws", "json")}
    from allometry.launch.laws.compare import run_compare

    typer.echo(run_compare(laws, _request(options), as_json=json))


@commands.command()
def predict(
    arguments: Annotated[
        list[str], typer.Argument(help="FIT.json and inputs: N=7e9 D=1.4e11, or N=1e9,7e9")
    ],
    law: Law = None,
    published: Published = None,
    noise: Annotated[
        bool, typer.Option("--noise", help="interval of one more run: with the scatter of runs")
    ] = False,
    downstream: Annotated[
        Path | None,
        typer.Option(help="a fit of a score by the loss, for the score at the predicted loss"),
    ] = None,
    json: Json = False,
) -> None:
    """Predict by a fit, with an interval, or by published coefficients (--law, --published)."""
    from allometry.launch.laws.predict import run_predict

    known = {"downstream": downstream, "noise": noise, "as_json": json}
    typer.echo(run_predict(arguments, law, published, **known))


@commands.command()
def optimum(
    flops: Annotated[str, typer.Option(help="budgets, as 1e21,1e22")],
    fit: Annotated[Path | None, typer.Argument(help="the file of a fit (fit --out)")] = None,
    flops_per_parameter_token: Annotated[
        float, typer.Option(help="C = this x N x D, with N as the fit counts it")
    ] = 6.0,
    others: Annotated[
        list[str] | None,
        typer.Option("--with", help="NAME=VALUE: an input of the law besides N and D"),
    ] = None,
    law: Law = None,
    published: Published = None,
    json: Json = False,
) -> None:
    """Say which N and D reach the least loss with given FLOPs, with intervals."""
    from allometry.launch.laws.optimum import run_optimum
    from allometry.launch.laws.sources import assignments

    known = assignments(others or [], "--with")
    per_token = flops_per_parameter_token
    typer.echo(run_optimum(fit, law, published, flops, per_token, known, as_json=json))


@commands.command()
def laws(
    name: Annotated[str | None, typer.Argument(help="a law; default: list them all")] = None,
    json: Json = False,
) -> None:
    """List the laws that can be fitted: equation, inputs with units, source, range."""
    from allometry.launch.laws.list import run_laws

    typer.echo(run_laws(name, as_json=json))
