"""Declare the columns of metrics.jsonl: name, unit, meaning, and computation.

A new column is declared here and measured in one other file: the value of a tensor of
``StepOutcome`` is computed by ``made``; a column added by a callback is declared with ``made``
None. run.json's ``conventions`` and the tables in docs/file_formats.md and docs/monitors.md are
generated from these declarations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from allometry.trainer.record.column import Column

if TYPE_CHECKING:
    from allometry.data.reading import Account
    from allometry.data.sources import Sources
    from allometry.laws.areas import LearningRateAreas
    from allometry.scaling.batch import BatchPlan
    from allometry.scaling.hdp.plan import Plan
    from allometry.trainer.record.writer import Row
    from allometry.trainer.step import StepOutcome


@dataclass
class FinishedStep:
    """A step whose numbers have been read; rows are made from it.

    ``outcome`` is in host memory; ``plan`` assigns documents to ranks (None: sequences).
    ``losses``: mean loss of each source with targets; ``flops``: of the step. ``areas``,
    ``total_flops`` and ``peak_bytes`` cover all steps so far; ``peak_flops_per_s`` is the sum over
    all ranks. ``skipped``: the step made no update. ``recorded``: this rank writes a row of the
    step, as far as known.
    """

    outcome: StepOutcome
    plan: Plan | None
    loss: float
    grad_norm: float
    losses: Mapping[str, float]
    seconds: float
    flops: int
    areas: LearningRateAreas
    total_flops: int
    peak_flops_per_s: float
    peak_bytes: int
    stream: Sources
    batch: BatchPlan
    stage: int | None
    recorded: bool
    skipped: bool = False

    @property
    def step(self) -> int:
        """Number of the step, counted from 1."""
        return self.outcome.step

    @cached_property
    def accounts(self) -> dict[str, Account]:
        """Account of the tokens read so far, by source."""
        return self.stream.accounts(self.batch.sequences_before(self.step + 1))

    @cached_property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return sum(account.tokens for account in self.accounts.values())

    @cached_property
    def step_tokens(self) -> int:
        """Number of tokens in this step."""
        before = self.stream.tokens(self.batch.sequences_before(self.step))
        return self.tokens - before


_LOOP = (
    Column("step", "1", "updates so far, counted from 1", lambda s: s.step),
    Column(
        "stage",
        "1",
        "of a run with stages: the number of the step's own, counted from 1",
        lambda s: {} if s.stage is None else s.stage,
    ),
    Column(
        "tokens",
        "tokens",
        "read so far, by all ranks, targets that do not count included",
        lambda s: s.tokens,
    ),
    Column(
        "flops",
        "FLOP",
        "model FLOPs so far: forward and backward, causal attention of each document to itself "
        "alone (with data.packing: concatenated, of each sequence), no recomputation",
        lambda s: s.total_flops,
    ),
    Column(
        "loss",
        "nats",
        "mean over target tokens of the step's global batch, before its update; a skipped step's "
        "is in its event",
        lambda s: {} if s.skipped else s.loss,
    ),
    Column(
        "lr",
        "1",
        "learning rate that this step used, at the base dimensions; 0 if it was skipped",
        lambda s: 0.0 if s.skipped else s.outcome.lr,
    ),
    Column("s1", "1", "sum of lr over steps, warm-up included", lambda s: s.areas.s1),
    Column(
        "s2",
        "1",
        "sum of lr annealing with momentum 0.999, from the end of warm-up (arXiv 2408.11029)",
        lambda s: s.areas.s2,
    ),
    Column(
        "grad_norm",
        "1",
        "2-norm of the whole gradient before clipping; missing like the loss",
        lambda s: {} if s.skipped else s.grad_norm,
    ),
    Column(
        "skipped",
        "1",
        "1 in the row of a step that made no update (training.bad_steps, training.skip_steps), "
        "missing in others",
        lambda s: 1 if s.skipped else {},
    ),
    Column(
        "tokens_per_s",
        "tokens/s",
        "of all ranks in this step",
        lambda s: {} if s.skipped else s.step_tokens / s.seconds,
    ),
    Column(
        "mfu",
        "1",
        "model FLOPs of this step per second, over the peak of all ranks (run.json: peak)",
        lambda s: s.flops / s.seconds / s.peak_flops_per_s,
    ),
    Column(
        "peak_bytes",
        "bytes",
        "most memory of the main rank so far, allocated (GPU) or resident (CPU)",
        lambda s: s.peak_bytes,
    ),
    Column(
        "time_s",
        "s",
        "from the end of the step before to the end of this one, on the device; evaluation and "
        "saving do not count",
        lambda s: s.seconds,
    ),
    Column(
        "loss/SOURCE",
        "nats",
        "the same of a source's targets",
        lambda s: {} if s.skipped else s.losses,
    ),
    Column(
        "tokens/SOURCE",
        "tokens",
        "read so far of a source",
        lambda s: {name: account.tokens for name, account in s.accounts.items()},
    ),
    Column(
        "unique_tokens/SOURCE",
        "tokens",
        "of these, read for the first time: by this run and those that it goes on after",
        lambda s: {name: account.unique_tokens for name, account in s.accounts.items()},
    ),
    Column(
        "epochs/SOURCE",
        "1",
        "how often a source has been read, by this run and those that it goes on after",
        lambda s: {name: account.epochs for name, account in s.accounts.items()},
    ),
    Column(
        "kind_tokens/KIND",
        "tokens",
        "read so far of natural, rephrased and generated sources, where not all are natural",
        lambda s: s.stream.by_kind({name: one.tokens for name, one in s.accounts.items()}),
    ),
    Column(
        "validation/SOURCE",
        "nats",
        "mean loss of held-out tokens after this step, every evaluation.every_steps and at the end",
        by="evaluate",
    ),
    Column(
        "forgetting/SOURCE",
        "nats",
        "of a replayed source: validation/SOURCE less what it was before the first step that "
        "this run took with data.replay",
        by="evaluate",
    ),
)

_ROUTERS = tuple(
    Column(f"router/{layer}{name}", unit, meaning + of, by="balance")
    for name, unit, meaning in (
        ("max_vio", "1", "(largest - mean) / mean of the experts' loads (arXiv 2408.15664)"),
        ("entropy", "nats", "of the router's probabilities, mean over tokens"),
        ("squared_log_z", "1", "squared log of the softmax's sum, mean over tokens"),
        ("balance", "1", "E x sum of load times mean probability of this step; 1 where even"),
        ("auxiliary_loss", "nats", "balance times its coefficient"),
        ("z_loss", "nats", "squared_log_z times its coefficient"),
        (
            "load_correlation",
            "1",
            "of experts' loads with those of the step before; missing where one of them is even",
        ),
    )
    for layer, of in (("", "; mean over layers"), ("LAYER/", ""))
)

_PLANS = tuple(
    Column(f"hdp/{name}", unit, meaning, by="record.plans")
    for name, unit, meaning in (
        ("micro_batches", "1", "of all hdp ranks, dummies among them"),
        ("waves", "1", "micro-batches of the rank with most"),
        ("dummies", "1", "micro-batches that count nothing"),
        ("degree/DEGREE", "1", "documents that so many ranks shared"),
        ("balance", "1", "planned time of the step over the mean of what ranks are busy"),
        ("bytes_sent", "bytes", "by rings, forward and backward"),
        (
            "offloaded",
            "1",
            "share of the tokens' activations that plans keep in the host's memory "
            "(parallel.context.offload)",
        ),
    )
)

_OFFLOAD = tuple(
    Column(f"offload/{name}", "bytes", meaning, by="record.rows")
    for name, meaning in (
        ("bytes_out", "of activations that the main rank sent to the host's memory in this step"),
        ("bytes_in", "of activations that it fetched back"),
        ("host_bytes", "of the host's memory that it holds for them, used or not"),
    )
)

_MONITORS = tuple(
    Column(f"monitors/{name}", unit, meaning, by="record.monitors")
    for name, unit, meaning in (
        (
            "attention_logit_max/LAYER",
            "1",
            "largest q·k times its scale, as the softmax sees it, from at most 128 tokens of each "
            "sequence, evenly spaced back from its last one, over all keys that these see",
        ),
        ("attention_logit_max", "1", "the same of all layers"),
        ("attention_logit_mean/LAYER", "1", "mean of the same"),
        ("attention_z/LAYER", "1", "mean of (log Σ exp)² of these logits over tokens and heads"),
        (
            "branch_rms/LAYER/BRANCH",
            "1",
            "what is added to the residual stream, after the residual scale",
        ),
        (
            "outlier_percent/LAYER/BRANCH",
            "%",
            "of these: elements further than 5 standard deviations of their token from its mean",
        ),
        ("activation_max/LAYER", "1", "largest magnitude of a block's output"),
        ("activation_max", "1", "the same of all layers"),
        ("activation_max_layer", "1", "the layer that has it"),
        ("output/log_z", "1", "mean of log Z of the output over the same tokens as the logits"),
        ("output/squared_log_z", "1", "mean of its square"),
        ("grad_rms/ROLE", "1", "of gradients after clipping"),
        ("grad_l1", "1", "the sum of all their magnitudes"),
        (
            "param_rms/ROLE",
            "1",
            "of every n-th row of each tensor, 256 rows to 511, before the step",
        ),
        (
            "update_ratio/ROLE",
            "1",
            "rms of these rows' change over param_rms: 0 in the last row where the rate ends at 0",
        ),
        ("sphere_drift/ROLE", "1", "largest of abs(‖W‖ / R - 1), where a rule keeps ‖W‖ at R"),
        (
            "fp8_error/ROLE",
            "1",
            "of inputs of products that are read or kept in FP8: rms of the rounding over theirs",
        ),
        ("fp8_underflow_percent/ROLE", "%", "of these: elements that became 0"),
        ("fp8_saturated_percent/ROLE", "%", "of these: elements clipped or in a block not finite"),
        (
            "clip_rate",
            "1",
            "share of the steps since the last look, in this launch, whose gradient was clipped",
        ),
        (
            "singular/PARAMETER",
            "1",
            "largest singular value of a matrix (of the experts of one: the largest), every "
            "record.monitors.singular_values_every_steps steps (1000)",
        ),
    )
)

_FORECAST = tuple(
    Column(f"forecast/{name}", "nats", meaning, by="record.forecast")
    for name, meaning in (
        (
            "loss",
            "expected training loss of the run's last step (docs/forecast.md), or of the last step "
            "up to which stages differ in their rates alone",
        ),
        ("low", "lower end of its 95 % interval"),
        ("high", "upper end of its 95 % interval"),
    )
)

_STATES = tuple(
    Column(f"monitors/state_{name}/ROLE/STATE", unit, meaning, by="record.states")
    for name, unit, meaning in (
        (
            "error",
            "1",
            "of this step's rounding to FP8: root of squared errors over squared values of a group "
            "of 128, root mean square over groups (optimizer.states)",
        ),
        ("underflow_percent", "%", "of a state's values: those that became zero by it"),
        (
            "saturated_percent",
            "%",
            "of a state's values: those kept as their group's largest, itself among them",
        ),
    )
)

_RANKS = (
    Column("ranks/slowest", "1", "rank that waited least for others lately", by="watch.stragglers"),
    Column(
        "ranks/slowest_percent",
        "%",
        "so much longer it computed than the median of the others of its stage (CPU alone)",
        by="watch.stragglers",
    ),
)

_CARDS = tuple(
    Column(f"cards/{name}", unit, meaning, by="record.cards")
    for name, unit, meaning in (
        ("temperature_c", "°C", "of the hottest GPU"),
        ("sm_mhz", "MHz", "clock of the slowest GPU"),
        ("power_w", "W", "of all GPUs together"),
        ("ecc_corrected", "1", "ECC errors of all GPUs since their drivers started, corrected"),
        ("ecc_uncorrected", "1", "and those that could not be corrected"),
        ("throttled", "1", "GPUs that are slowed by heat, power or the board"),
    )
)

COLUMNS = (
    *_LOOP,
    *_ROUTERS,
    *_PLANS,
    *_OFFLOAD,
    *_MONITORS,
    *_STATES,
    *_RANKS,
    *_FORECAST,
    *_CARDS,
)


def row_of(finished: FinishedStep) -> Row:
    """Return the columns computed by ``made`` from a step's numbers."""
    row: Row = {}
    for column in COLUMNS:
        if column.made is not None:
            value = column.made(finished)
            if isinstance(value, Mapping):
                prefix = column.name.rpartition("/")[0]
                row.update({f"{prefix}/{key}": each for key, each in value.items()})
            else:
                row[column.name] = value
    return row


def conventions() -> dict[str, str]:
    """Return the meaning and unit of each column, for run.json."""
    return {c.name: c.meaning + (f" [{c.unit}]" if c.unit != "1" else "") for c in COLUMNS}


def table(columns: Iterable[Column], prefix: str = "") -> str:
    """Return columns as a table in Markdown, their names without ``prefix``."""
    lines = [f"| `{c.name.removeprefix(prefix)}` | {c.unit} | {c.meaning} |" for c in columns]
    return "\n".join(["| key | unit | what |", "|---|---|---|", *lines]) + "\n"
