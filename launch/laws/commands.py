"""Commands that fit laws to runs and tables, and say what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allometry.launch.command import REQUIRED, Command, argument, option

LAW = "instead of a fit: a law with --published values"
PUBLISHED = "whose coefficients, as `laws NAME` lists them"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """SOURCES and the options that say how to read them; None is an option that was not given."""

    sources: tuple[str, ...] = argument("run folders, folders of them, or CSV files (.tsv, .gz)")
    mapping: tuple[str, ...] = option(
        "N=COLUMN, or arithmetic: D='`Training FLOP`/(6*N)', log, exp, sqrt; backticks around "
        "a column's name that has other signs; repeat for more",
        (),
        "--map",
    )
    where: tuple[str, ...] = option(
        "rows to take: 'loss < 3.44', \"set in ('C4', 'Pile') or N > 1e9\"; repeat for more", ()
    )
    group: str | None = option(
        "column that says whose a row is; default: rows of a table that agree in all inputs"
    )
    drop: tuple[str, ...] = option("leave out the rows of this group; repeat for more", ())
    count: str | None = option("of runs: N is non_embedding (default), total or with_head")
    loss: str | None = option("of runs: validation (default), train, validation/NAME or train/NAME")
    last: float | None = option("of runs: share of the steps that a train loss averages; 0.1")
    group_by: str | None = option(
        "of runs: one group is a cell (but for the seed; default), model or run"
    )
    unfinished: str | None = option("of runs: refuse (default) or skip those that did not finish")
    bins: int | None = option("of runs' curves: stretches that a train loss is averaged in")
    warmup: int | None = option("of tables of curves: steps of warm-up; default: to the first row")
    curves: bool = option(
        "of runs: rows are recorded steps, also for a law that reads no step", False
    )
    sweeps: bool = option(
        "rows are the best lr and B of each sweep: of the runs of one N and D; for "
        "learning_rate_law and batch_law",
        False,
    )


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How laws are fitted, and what is held out."""

    hold_out: str | None = option(
        "groups (each by the others; default), largest (N), largest:COLUMN, a condition "
        "as of --where, or none"
    )
    starts: int | None = option("starts; default: the law's grid, or 256 spread points", min=1)
    seed: int = option("of spread starts and of bootstraps", 0, min=0)
    objective: str = option("huber or square, of residuals of logs", "huber")
    delta: float = option("where Huber's loss turns from square to linear", 1e-3)
    fix: tuple[str, ...] = option("NAME=VALUE: a parameter that is not to be fitted", ())


@dataclass(frozen=True, kw_only=True)
class Fit(Command):
    """Fit LAW to runs or tables: parameters with intervals, certificate, held-out error."""

    law: str = argument("a law, as `allometry laws` lists them")
    rows: Rows
    bootstraps: int | None = option("samples for intervals; default: 200; 0: none", min=0)
    fitting: Fitting
    out: Path | None = option("JSON to write, for predict and optimum", None, "-o")


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Compare laws on the same rows by how well they predict those they were not fitted to."""

    rows: Rows
    laws: tuple[str, ...] = option(
        "a,b,c; a law over columns (NAME:COLUMN,COLUMN) by an option of its own", REQUIRED
    )
    fitting: Fitting


@dataclass(frozen=True, kw_only=True)
class Predict(Command):
    """Predict by a fit, with an interval, or by published coefficients (--law, --published)."""

    arguments: tuple[str, ...] = argument("FIT.json and inputs: N=7e9 D=1.4e11, or N=1e9,7e9")
    law: str | None = option(LAW)
    published: str | None = option(PUBLISHED)
    level: float = option("probability of the interval", 0.95)
    noise: bool = option("interval of one more run: with the scatter of runs", False)
    downstream: Path | None = option(
        "a fit of a score by the loss, for the score at the predicted loss"
    )


@dataclass(frozen=True, kw_only=True)
class Optimum(Command):
    """Say which N and D reach the least loss with given FLOPs, with intervals."""

    flops: str = option("budgets, as 1e21,1e22", REQUIRED)
    fit: Path | None = argument("the file of a fit (fit --out)", None)
    flops_per_parameter_token: float = option("C = this x N x D, with N as the fit counts it", 6.0)
    inputs: tuple[str, ...] = option(
        "NAME=VALUE: an input of the law besides N and D", (), "--with"
    )
    law: str | None = option(LAW)
    published: str | None = option(PUBLISHED)


@dataclass(frozen=True, kw_only=True)
class Laws(Command):
    """List the laws that can be fitted: equation, inputs with units, source, range."""

    name: str | None = argument("a law; default: list them all", None)
