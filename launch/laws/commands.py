"""Commands that fit laws to runs and tables, and compute predictions and choices from the laws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allometry.launch.command import REQUIRED, Command, argument, option

LAW = "instead of a fit: a law with --published values"
PUBLISHED = "whose coefficients, as `laws NAME` lists them"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """SOURCES and the options for reading them; None is an option that was not given."""

    sources: tuple[str, ...] = argument(
        "run folders, folders of them, or tables (.csv, .tsv, .jsonl; .gz)", paths=True
    )
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
    smooth: int | None = option(
        "rows are means of this many successive checkpoints of each group, in order of D, after "
        "the first tenth; for laws of scores",
        min=1,
    )
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
    """Options of the fit, and of the held-out rows."""

    hold_out: str | None = option(
        "groups (each by the others; default), largest (N), largest:COLUMN, a condition "
        "as of --where, or none"
    )
    starts: int | None = option("starts; default: the law's grid, or 256 spread points", min=1)
    seed: int = option("of spread starts and of bootstraps", 0, min=0)
    objective: str = option("huber or square, of residuals of logs", "huber")
    delta: float = option("where Huber's loss turns from square to linear", 1e-3)
    fix: tuple[str, ...] = option(
        "NAME=VALUE: a parameter that is not to be fitted; or the file of a fit, whose values are "
        "kept; repeat for more",
        (),
    )


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
    """Compare laws on the same rows by their errors on held-out rows."""

    rows: Rows
    laws: tuple[str, ...] = option(
        "a,b,c; a law over columns (NAME:COLUMN,COLUMN) by an option of its own", REQUIRED
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
    noise: bool = option("interval of one more run: with the scatter of runs", False)
    downstream: Path | None = option(
        "a fit of a score by the loss, for the score at the predicted loss"
    )


@dataclass(frozen=True, kw_only=True)
class Optimum(Command):
    """Compute the N and D of the least loss for given FLOPs, with intervals."""

    flops: str = option("budgets, as 1e21,1e22", REQUIRED)
    fit: Path | None = argument("the file of a fit (fit --out)", None)
    flops_per_parameter_token: float = option("C = this x N x D, with N as the fit counts it", 6.0)
    inputs: tuple[str, ...] = option(
        "NAME=VALUE: an input of the law besides N and D", (), "--with"
    )
    law: str | None = option(LAW)
    published: str | None = option(PUBLISHED)


@dataclass(frozen=True, kw_only=True)
class IsoFlop(Command):
    """Fit a parabola of loss over ln N at each compute budget: best N and D, and their exponents.

    FLOPs are the column C of runs, or of a table where --map C=COLUMN names it, else 6 N D.
    """

    rows: Rows
    within: float | None = option(
        "leave out rows whose loss is more than this many percent above their budget's best; "
        "default: none"
    )
    tolerance: float = option("rows of one budget have FLOPs within this many percent", 10.0)
    flops_per_parameter_token: float = option("without a column C: C = this x N x D", 6.0)
    bootstraps: int = option("samples for intervals; 0: none", 1000, min=0)
    seed: int = option("of the bootstrap", 0, min=0)


@dataclass(frozen=True, kw_only=True)
class Sweeps(Command):
    """Fit the best lr and B of each sweep (the runs of one N and D), and the laws through them.

    Intervals include the noise of the runs in each sweep. The loss of runs near the laws, compared
    with the best runs, measures the quality of the laws.
    """

    rows: Rows
    at: tuple[str, ...] = option("N=VALUE,D=VALUE: best lr and B there; repeat for more", ())
    cubic: bool = option("a cubic through each sweep: it leans less and takes 30 runs", False)
    within: float = option("runs that count, up to this many percent above a sweep's best", 1.5)
    initial_loss: float | None = option(
        "loss before training, for the sensitivity to lr (arXiv 2309.14322): the mean over rates "
        "of min(loss, initial) less the best"
    )
    bootstraps: int = option("samples for intervals", 1000, min=2)
    seed: int = option("of the bootstrap", 0, min=0)


@dataclass(frozen=True, kw_only=True)
class MixReplay(Command):
    """Choose the ratio of replay by laws of small runs: D-CPT, CMR, repetition (`mix RUNS...`).

    RUNS continue one model of each size with new and old data (data.replay) at several ratios; or
    tables with N, D, r (the new domain's share), domain, general and start (held-out losses).
    """

    sources: tuple[str, ...] = argument(
        "run folders, folders of them, or tables (.csv, .tsv, .jsonl; .gz)", paths=True
    )
    domain: tuple[str, ...] = option(
        "a new source; default: all that data.replay does not name; repeat for more", ()
    )
    rise: float = option("percent that the general loss may be above its start", 3.0)
    inputs: tuple[str, ...] = option(
        "N=VALUE, D=VALUE: the run to choose for; default: the largest that was run", (), "--with"
    )
    bound: float = option("rise of the general loss at the critical ratio, nats per token", 0.05)
    start: float | None = option("general loss before, where runs or tables do not say it")
    ends: bool = option("rows are the ends of runs alone; default: all held-out losses", False)
    skip: float = option("share of a run's tokens before its first row", 0.1)
    count: str | None = option("of runs: N is non_embedding (default), total or with_head")
    unfinished: str | None = option("of runs: refuse (default) or skip those that did not finish")
    mapping: tuple[str, ...] = option(
        "of tables: N=COLUMN or arithmetic, 'r=1-replay'; repeat for more", (), "--map"
    )
    where: tuple[str, ...] = option("of tables: rows to take; repeat for more", ())
    unique: float | None = option(
        "tokens of the new domain that there are; default: those of the runs' store"
    )
    repetition: Path | None = option(
        "a fit of data_constrained, whose R_D is taken; default: the published one (C4)"
    )
    bootstraps: int = option("samples for intervals; 0: none", 100, min=0)
    seed: int = option("of starts and samples", 0, min=0)
    out: Path | None = option("picture of the frontier: .png, .svg or .pdf", None, "-o")


@dataclass(frozen=True, kw_only=True)
class MixBest(Command):
    """Compute the shares of the domains with the least (weighted) loss, with intervals."""

    fits: tuple[str, ...] = argument(
        "fits of laws of shares: FILE, or NAME=FILE, one for each loss", paths=True
    )
    weights: tuple[str, ...] = option(
        "NAME=NUMBER: of a fit's loss in the sum; default: 1 of each", (), "--weight"
    )
    least: tuple[str, ...] = option(
        "DOMAIN=SHARE: at least this; default: the least that was run; repeat for more", ()
    )
    most: tuple[str, ...] = option(
        "DOMAIN=SHARE: at most this; default: the largest that was run; repeat for more", ()
    )
    inputs: tuple[str, ...] = option("NAME=VALUE: what the laws read besides shares", (), "--with")
    starts: int = option("searches, whose agreement is told", 16, min=1)
    seed: int = option("of the starts", 0, min=0)


@dataclass(frozen=True, kw_only=True)
class MixRatio(Command):
    """Compute the largest share of a domain within a bound on the general loss (D-CPT).

    Both fits are of a law that reads r, the share of the corpus whose loss it predicts: d_cpt.
    """

    general: Path = option("the fit of the general loss, by the general share", REQUIRED)
    domain: Path = option("the fit of the domain's loss, by the domain's share", REQUIRED)
    start: float = option("general loss before the training", REQUIRED)
    rise: float = option("percent that the general loss may be above it", 3.0)
    inputs: tuple[str, ...] = option("NAME=VALUE: what the laws read besides r", (), "--with")


@dataclass(frozen=True, kw_only=True)
class MixCritical(Command):
    """Compute the critical mixture ratio of a domain by tokens (CMR), from runs of several shares.

    Rows have D, r (the domain's share) and dloss (rise of the general loss): of runs by --curves
    --map r=r/DOMAIN --map 'dloss=loss - 2.86'.
    """

    rows: Rows
    tokens: str = option("horizons, as 1e10,2e10", REQUIRED)
    bound: float = option("rise of the general loss that is allowed", 0.05)
    bootstraps: int = option("samples for intervals; 0: none", 50, min=0)
    seed: int = option("of starts and samples", 0, min=0)


@dataclass(frozen=True, kw_only=True)
class MixPools(Command):
    """Choose pools of data and the number of repetitions of each, by a fit of quality_pools."""

    fit: Path = argument("a fit of quality_pools:COLUMN,COLUMN")
    sizes: tuple[str, ...] = option(
        "POOL=TOKENS or POOL=PATH of its token files, with commas; one for each pool", REQUIRED
    )
    tokens: str = option("budgets of training tokens, as 4e10,4e11", REQUIRED)
    yaml: Path | None = option("file for data.sources of the one budget; sizes are then PATHs")


@dataclass(frozen=True, kw_only=True)
class MixFilterRate(Command):
    """Choose the share of a corpus to keep, by fits of one loss to runs on several shares of it."""

    fits: tuple[str, ...] = argument(
        "fits of the loss by N and D: FILE, or NAME=FILE, one for each share kept", paths=True
    )
    flops: str = option("budgets, as 1e21,1e22", REQUIRED)
    flops_per_parameter_token: float = option("C = this x N x D", 6.0)
    seed: int = option("of the pairs of bootstrap samples", 0, min=0)


@dataclass(frozen=True, kw_only=True)
class Laws(Command):
    """List the laws that can be fitted: equation, inputs with units, source, range."""

    name: str | None = argument("a law; default: list them all", None)
