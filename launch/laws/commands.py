"""Commands that fit laws to runs and tables, and compute predictions and choices from the laws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allometry.launch.command import REQUIRED, Command, argument, option

LAW = "name of a law to use, instead of a fit, with --published coefficients"
PUBLISHED = "name of published coefficients of --law, as `laws NAME` lists them"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """SOURCES and the options for reading them; None is an option that was not given."""

    sources: tuple[str, ...] = argument(
        "run folders, folders of runs, or tables (.csv, .tsv, .jsonl; also .gz)", paths=True
    )
    mapping: tuple[str, ...] = option(
        "N=COLUMN, or arithmetic: D='`Training FLOP`/(6*N)', log, exp, sqrt; backticks quote "
        "column names with other characters; repeat for more",
        (),
        "--map",
    )
    where: tuple[str, ...] = option(
        "condition of rows to use: 'loss < 3.44', \"set in ('C4', 'Pile') or N > 1e9\"; repeat for "
        "more",
        (),
    )
    group: str | None = option(
        "column with the group of a row; default: rows of a table that agree in all inputs"
    )
    drop: tuple[str, ...] = option("group whose rows to omit; repeat for more", ())
    count: str | None = option(
        "runs: parameters counted as N: non_embedding (default), total or with_head"
    )
    loss: str | None = option("runs: validation (default), train, validation/NAME or train/NAME")
    last: float | None = option(
        "runs: fraction of the last steps over which a train loss is averaged; default: 0.1"
    )
    group_by: str | None = option("runs: group by cell (all but the seed; default), model or run")
    unfinished: str | None = option("runs: refuse (default) or skip unfinished runs")
    bins: int | None = option(
        "curves of runs: number of intervals in which a train loss is averaged"
    )
    warmup: int | None = option(
        "tables of curves: number of warm-up steps; default: up to the first row"
    )
    smooth: int | None = option(
        "average this many successive checkpoints of each group, in order of D, after the first "
        "tenth; for laws of scores",
        min=1,
    )
    curves: bool = option(
        "runs: one row per recorded step, also for a law without step as input", False
    )
    sweeps: bool = option(
        "one row per sweep (the runs of one N and D): its best lr and B; for learning_rate_law and "
        "batch_law",
        False,
    )


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Options of the fit, and of the held-out rows."""

    hold_out: str | None = option(
        "held-out rows: groups (each by a fit of the others; default), largest (N), "
        "largest:COLUMN, a condition as for --where, or none"
    )
    starts: int | None = option(
        "number of starts; default: the law's grid, or 256 spread points", min=1
    )
    seed: int = option("seed of spread starts and bootstraps", 0, min=0)
    objective: str = option("huber or square, of residuals of logs", "huber")
    delta: float = option("residual at which Huber's loss turns from square to linear", 1e-3)
    fix: tuple[str, ...] = option(
        "NAME=VALUE: parameter with a fixed value; or the file of a fit whose values are fixed; "
        "repeat for more",
        (),
    )


@dataclass(frozen=True, kw_only=True)
class Fit(Command):
    """Fit LAW to runs or tables: parameters with intervals, certificate, held-out error."""

    law: str = argument("name of a law, as `allometry laws` lists them")
    rows: Rows
    bootstraps: int | None = option(
        "number of bootstrap samples for intervals; default: 200; 0: none", min=0
    )
    fitting: Fitting
    out: Path | None = option("JSON file to write, for predict and optimum", None, "-o")


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Compare laws on the same rows by their errors on held-out rows."""

    rows: Rows
    laws: tuple[str, ...] = option(
        "names a,b,c; repeat the option for a law over columns (NAME:COLUMN,COLUMN)", REQUIRED
    )
    fitting: Fitting


@dataclass(frozen=True, kw_only=True)
class Predict(Command):
    """Predict by a fit, with an interval, or by published coefficients (--law, --published)."""

    arguments: tuple[str, ...] = argument(
        "FIT.json and inputs: N=7e9 D=1.4e11, or N=1e9,7e9", paths=True
    )
    law: str | None = option(LAW)
    published: str | None = option(PUBLISHED)
    level: float = option("probability of the interval", 0.95)
    noise: bool = option("interval of a further run, including the scatter of runs", False)
    downstream: Path | None = option(
        "file of a fit of a score by the loss, to predict the score as well"
    )


@dataclass(frozen=True, kw_only=True)
class Optimum(Command):
    """Compute the N and D of the least loss for given FLOPs, with intervals."""

    flops: str = option("compute budgets, such as 1e21,1e22", REQUIRED)
    fit: Path | None = argument("file of a fit (fit --out)", None)
    flops_per_parameter_token: float = option(
        "factor of C = factor x N x D, with N as the fit counts it", 6.0
    )
    inputs: tuple[str, ...] = option("NAME=VALUE: input of the law besides N and D", (), "--with")
    law: str | None = option(LAW)
    published: str | None = option(PUBLISHED)


@dataclass(frozen=True, kw_only=True)
class IsoFlop(Command):
    """Fit a parabola of loss over ln N at each compute budget: best N and D, and their exponents.

    FLOPs are the column C of runs, or of a table where --map C=COLUMN names it, else 6 N D.
    """

    rows: Rows
    within: float | None = option(
        "omit rows whose loss is more than this percentage above their budget's best; default: none"
    )
    tolerance: float = option("percentage within which the FLOPs of rows count as one budget", 10.0)
    flops_per_parameter_token: float = option(
        "without a column C: factor of C = factor x N x D", 6.0
    )
    bootstraps: int = option("number of bootstrap samples for intervals; 0: none", 1000, min=0)
    seed: int = option("seed of the bootstrap", 0, min=0)


@dataclass(frozen=True, kw_only=True)
class Sweeps(Command):
    """Fit the best lr and B of each sweep (the runs of one N and D), and the laws through them.

    Intervals include the noise of the runs in each sweep. The loss of runs near the laws, compared
    with the best runs, measures the quality of the laws.
    """

    rows: Rows
    at: tuple[str, ...] = option(
        "N=VALUE,D=VALUE: point at which to compute best lr and B; repeat for more", ()
    )
    cubic: bool = option("fit a cubic through each sweep: less bias, but 30 runs are needed", False)
    within: float = option("maximum percentage above a sweep's best loss for runs in the fit", 1.5)
    initial_loss: float | None = option(
        "loss before training, for the sensitivity to lr (arXiv 2309.14322): the mean over rates "
        "of min(loss, initial) minus the best"
    )
    bootstraps: int = option("number of bootstrap samples for intervals", 1000, min=2)
    seed: int = option("seed of the bootstrap", 0, min=0)


@dataclass(frozen=True, kw_only=True)
class MixReplay(Command):
    """Choose the ratio of replay by laws of small runs: D-CPT, CMR, repetition (`mix RUNS...`).

    RUNS continue one model of each size with new and old data (data.replay) at several ratios; or
    tables with N, D, r (the new domain's share), domain, general and start (held-out losses).
    """

    sources: tuple[str, ...] = argument(
        "run folders, folders of runs, or tables (.csv, .tsv, .jsonl; also .gz)", paths=True
    )
    domain: tuple[str, ...] = option(
        "name of a new source; default: all sources outside data.replay; repeat for more", ()
    )
    rise: float = option("maximum rise of the general loss over its start, in percent", 3.0)
    inputs: tuple[str, ...] = option(
        "N=VALUE, D=VALUE: run for which to choose; default: the largest run", (), "--with"
    )
    bound: float = option("rise of the general loss at the critical ratio, in nats per token", 0.05)
    start: float | None = option(
        "general loss before training, if runs or tables do not contain it"
    )
    ends: bool = option("use only final losses of runs; default: all held-out losses", False)
    skip: float = option("fraction of a run's tokens before its first row", 0.1)
    count: str | None = option(
        "runs: parameters counted as N: non_embedding (default), total or with_head"
    )
    unfinished: str | None = option("runs: refuse (default) or skip unfinished runs")
    mapping: tuple[str, ...] = option(
        "tables: N=COLUMN or arithmetic, 'r=1-replay'; repeat for more", (), "--map"
    )
    where: tuple[str, ...] = option("tables: condition of rows to use; repeat for more", ())
    unique: float | None = option(
        "number of available tokens of the new domain; default: those in the runs' store"
    )
    repetition: Path | None = option(
        "file of a fit of data_constrained for R_D; default: the published value (C4)"
    )
    bootstraps: int = option("number of bootstrap samples for intervals; 0: none", 100, min=0)
    seed: int = option("seed of starts and bootstrap samples", 0, min=0)
    out: Path | None = option("figure of the frontier to write: .png, .svg or .pdf", None, "-o")


@dataclass(frozen=True, kw_only=True)
class MixBest(Command):
    """Compute the shares of the domains with the least (weighted) loss, with intervals."""

    fits: tuple[str, ...] = argument(
        "fits of laws of shares: FILE, or NAME=FILE, one per loss", paths=True
    )
    weights: tuple[str, ...] = option(
        "NAME=NUMBER: weight of a fit's loss in the sum; default: 1 for each", (), "--weight"
    )
    least: tuple[str, ...] = option(
        "DOMAIN=SHARE: lower bound; default: the smallest share of the runs; repeat for more", ()
    )
    most: tuple[str, ...] = option(
        "DOMAIN=SHARE: upper bound; default: the largest share of the runs; repeat for more", ()
    )
    inputs: tuple[str, ...] = option("NAME=VALUE: input of the laws besides shares", (), "--with")
    starts: int = option("number of searches, whose agreement is reported", 16, min=1)
    seed: int = option("seed of the starts", 0, min=0)


@dataclass(frozen=True, kw_only=True)
class MixRatio(Command):
    """Compute the largest share of a domain within a bound on the general loss (D-CPT).

    Both fits are of a law that reads r, the share of the corpus whose loss it predicts: d_cpt.
    """

    general: Path = option("file of the fit of the general loss, by the general share", REQUIRED)
    domain: Path = option("file of the fit of the domain's loss, by the domain's share", REQUIRED)
    start: float = option("general loss before training", REQUIRED)
    rise: float = option("maximum rise of the general loss over --start, in percent", 3.0)
    inputs: tuple[str, ...] = option("NAME=VALUE: input of the laws besides r", (), "--with")


@dataclass(frozen=True, kw_only=True)
class MixCritical(Command):
    """Compute the critical mixture ratio of a domain by tokens (CMR), from runs of several shares.

    Rows have D, r (the domain's share) and dloss (rise of the general loss): of runs by --curves
    --map r=r/DOMAIN --map 'dloss=loss - 2.86'.
    """

    rows: Rows
    tokens: str = option("horizons in tokens, such as 1e10,2e10", REQUIRED)
    bound: float = option("maximum rise of the general loss, in nats per token", 0.05)
    bootstraps: int = option("number of bootstrap samples for intervals; 0: none", 50, min=0)
    seed: int = option("seed of starts and bootstrap samples", 0, min=0)


@dataclass(frozen=True, kw_only=True)
class MixPools(Command):
    """Choose pools of data and the number of repetitions of each, by a fit of quality_pools."""

    fit: Path = argument("file of a fit of quality_pools:COLUMN,COLUMN")
    sizes: tuple[str, ...] = option(
        "POOL=TOKENS or POOL=PATH of its token files, comma-separated, for every pool", REQUIRED
    )
    tokens: str = option("budgets of training tokens, such as 4e10,4e11", REQUIRED)
    yaml: Path | None = option(
        "file to write data.sources to, for a single budget and sizes given as PATH"
    )


@dataclass(frozen=True, kw_only=True)
class MixFilterRate(Command):
    """Choose the share of a corpus to keep, by fits of one loss to runs on several shares of it."""

    fits: tuple[str, ...] = argument(
        "fits of the loss by N and D: FILE, or NAME=FILE, one per share kept", paths=True
    )
    flops: str = option("compute budgets, such as 1e21,1e22", REQUIRED)
    flops_per_parameter_token: float = option("factor of C = factor x N x D", 6.0)
    seed: int = option("seed of the pairs of bootstrap samples", 0, min=0)


@dataclass(frozen=True, kw_only=True)
class Laws(Command):
    """List the laws that can be fitted: equation, inputs with units, source, range."""

    name: str | None = argument("name of a law; default: list all laws", None)
