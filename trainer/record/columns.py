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
    Column(
        "step", "1", "number of the step, counted from 1, skipped steps included", lambda s: s.step
    ),
    Column(
        "stage",
        "1",
        "number of the step's stage, counted from 1, in a run with stages",
        lambda s: {} if s.stage is None else s.stage,
    ),
    Column(
        "tokens",
        "tokens",
        "tokens read so far by all ranks, including targets without loss",
        lambda s: s.tokens,
    ),
    Column(
        "flops",
        "FLOP",
        "model FLOPs so far: forward and backward passes, with causal attention within each "
        "document (with data.packing: concatenated, within each sequence), without recomputation",
        lambda s: s.total_flops,
    ),
    Column(
        "loss",
        "nats",
        "mean loss over the target tokens of the step's global batch, before its update; omitted "
        "in a skipped step, whose event has it",
        lambda s: {} if s.skipped else s.loss,
    ),
    Column(
        "lr",
        "1",
        "learning rate of this step at the base dimensions; 0 in a skipped step",
        lambda s: 0.0 if s.skipped else s.outcome.lr,
    ),
    Column("s1", "1", "sum of lr over all steps so far, warm-up included", lambda s: s.areas.s1),
    Column(
        "s2",
        "1",
        "sum of lr annealing with momentum 0.999, from the end of warm-up (arXiv 2408.11029)",
        lambda s: s.areas.s2,
    ),
    Column(
        "grad_norm",
        "1",
        "2-norm of the complete gradient before clipping; omitted in a skipped step",
        lambda s: {} if s.skipped else s.grad_norm,
    ),
    Column(
        "skipped",
        "1",
        "1 in a step without an update (training.bad_steps, training.skip_steps), else omitted",
        lambda s: 1 if s.skipped else {},
    ),
    Column(
        "tokens_per_s",
        "tokens/s",
        "tokens of this step, over all ranks, divided by time_s; omitted in a skipped step",
        lambda s: {} if s.skipped else s.step_tokens / s.seconds,
    ),
    Column(
        "mfu",
        "1",
        "model FLOP/s of this step divided by the peak FLOP/s of all ranks (run.json: peak)",
        lambda s: s.flops / s.seconds / s.peak_flops_per_s,
    ),
    Column(
        "peak_bytes",
        "bytes",
        "peak memory of the main rank so far, allocated (GPU) or resident (CPU)",
        lambda s: s.peak_bytes,
    ),
    Column(
        "time_s",
        "s",
        "device time from the previous step's end to this one's, without evaluation and saving",
        lambda s: s.seconds,
    ),
    Column(
        "loss/SOURCE",
        "nats",
        "mean loss over the target tokens of a source, as for loss",
        lambda s: {} if s.skipped else s.losses,
    ),
    Column(
        "multi_token/DEPTH",
        "nats",
        "mean loss over the targets of depth 1, 2, ... of multi-token prediction, which loss and "
        "loss/SOURCE exclude",
        lambda s: {} if s.skipped else s.outcome.losses_ahead,
    ),
    Column(
        "tokens/SOURCE",
        "tokens",
        "tokens of a source read so far",
        lambda s: {name: account.tokens for name, account in s.accounts.items()},
    ),
    Column(
        "unique_tokens/SOURCE",
        "tokens",
        "tokens of a source read for the first time, by this run or the runs that it continues",
        lambda s: {name: account.unique_tokens for name, account in s.accounts.items()},
    ),
    Column(
        "epochs/SOURCE",
        "1",
        "epochs over a source so far, by this run and the runs that it continues",
        lambda s: {name: account.epochs for name, account in s.accounts.items()},
    ),
    Column(
        "kind_tokens/KIND",
        "tokens",
        "tokens read so far of natural, rephrased and generated sources; omitted if all are "
        "natural",
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
        "validation/SOURCE of a replayed source, minus its value before the first step that this "
        "run took with data.replay",
        by="evaluate",
    ),
    Column(
        "drafts_accepted",
        "1",
        "share of held-out tokens for which depth 1 of multi-token prediction and the main head, "
        "one position later, have the same most likely token; with validation/SOURCE",
        by="evaluate",
    ),
)

_ROUTERS = tuple(
    Column(f"router/{layer}{name}", unit, meaning + of, by="balance")
    for name, unit, meaning in (
        ("max_vio", "1", "(maximum - mean) / mean of the experts' loads (arXiv 2408.15664)"),
        ("entropy", "nats", "entropy of the router's probabilities, mean over tokens"),
        ("squared_log_z", "1", "squared log of the softmax's denominator, mean over tokens"),
        ("balance", "1", "E x sum over experts of load x mean probability; 1 for uniform loads"),
        ("auxiliary_loss", "nats", "balance times its coefficient"),
        ("z_loss", "nats", "squared_log_z times its coefficient"),
        (
            "load_correlation",
            "1",
            "correlation of experts' loads with the previous step's; omitted if either is uniform",
        ),
    )
    for layer, of in (("", "; mean over layers"), ("LAYER/", ""))
)

_PLANS = tuple(
    Column(f"hdp/{name}", unit, meaning, by="record.plans")
    for name, unit, meaning in (
        ("micro_batches", "1", "micro-batches of all hdp ranks, dummies included"),
        ("waves", "1", "maximum number of micro-batches of a rank"),
        ("dummies", "1", "micro-batches without documents"),
        ("degree/DEGREE", "1", "documents that DEGREE ranks process together"),
        ("balance", "1", "planned time of the step divided by the mean busy time of the ranks"),
        ("bytes_sent", "bytes", "bytes sent in all rings, forward and backward, per tp rank"),
        (
            "offloaded",
            "1",
            "fraction of the tokens' activations that plans offload to host memory "
            "(parallel.context.offload)",
        ),
    )
)

_OFFLOAD = tuple(
    Column(f"offload/{name}", "bytes", meaning, by="record.rows")
    for name, meaning in (
        ("bytes_out", "activations that the main rank copied to host memory in this step"),
        ("bytes_in", "activations that the main rank copied back in this step"),
        ("host_bytes", "host memory allocated for activations by the main rank, used or not"),
    )
)

_MONITORS = tuple(
    Column(f"monitors/{name}", unit, meaning, by="record.monitors")
    for name, unit, meaning in (
        (
            "attention_logit_max/LAYER",
            "1",
            "maximum scaled q·k before the softmax, over at most 128 query tokens of each "
            "sequence, evenly spaced back from its last token, and all keys visible to them",
        ),
        ("attention_logit_max", "1", "maximum of these logits over all layers"),
        ("attention_logit_mean/LAYER", "1", "mean of these logits"),
        ("attention_z/LAYER", "1", "mean of (log Σ exp)² of these logits over tokens and heads"),
        (
            "branch_rms/LAYER/BRANCH",
            "1",
            "RMS of a branch's output, after the residual scale, as added to the residual stream",
        ),
        (
            "outlier_percent/LAYER/BRANCH",
            "%",
            "elements of this output more than 5 standard deviations from their token's mean",
        ),
        ("activation_max/LAYER", "1", "maximum magnitude of a block's output"),
        ("activation_max", "1", "maximum of activation_max/LAYER over all layers"),
        ("activation_max_layer", "1", "layer with activation_max, counted from 0"),
        ("output/log_z", "1", "mean log Z of the output over the tokens of the attention logits"),
        ("output/squared_log_z", "1", "mean (log Z)² of the output over these tokens"),
        ("grad_rms/ROLE", "1", "RMS of the gradients after clipping"),
        ("grad_l1", "1", "sum of the magnitudes of all gradients after clipping"),
        ("param_rms/ROLE", "1", "RMS of every n-th row of a tensor (256-511 rows) before the step"),
        (
            "update_ratio/ROLE",
            "1",
            "RMS of these rows' update over param_rms; 0 in the last row if the rate ends at 0",
        ),
        ("sphere_drift/ROLE", "1", "maximum of abs(‖W‖ / R - 1), where a rule keeps ‖W‖ at R"),
        (
            "fp8_error/ROLE",
            "1",
            "RMS of the rounding error divided by the RMS of the values, for inputs of matrix "
            "products that are read or saved in FP8",
        ),
        ("fp8_underflow_percent/ROLE", "%", "elements of these inputs that round to 0"),
        ("fp8_saturated_percent/ROLE", "%", "elements that are clipped or in a nonfinite block"),
        (
            "clip_rate",
            "1",
            "fraction of steps with clipped gradients since the last measurement of this launch",
        ),
        (
            "singular/PARAMETER",
            "1",
            "largest singular value of a matrix (for experts, the maximum over experts), every "
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
            "up to which stages differ only in their rates",
        ),
        ("low", "lower bound of its 95 % interval"),
        ("high", "upper bound of its 95 % interval"),
    )
)

_STATES = tuple(
    Column(f"monitors/state_{name}/ROLE/STATE", unit, meaning, by="record.states")
    for name, unit, meaning in (
        (
            "error",
            "1",
            "relative rounding error of this step's FP8 states (optimizer.states): root of squared "
            "errors over squared values in a group of 128, root mean square over groups",
        ),
        ("underflow_percent", "%", "values of a state that this rounding sets to zero"),
        ("saturated_percent", "%", "values stored as their group's maximum, itself included"),
    )
)

_RANKS = (
    Column("ranks/slowest", "1", "rank that waits least in the last window", by="watch.stragglers"),
    Column(
        "ranks/slowest_percent",
        "%",
        "its excess in computation time over the median of its stage's other ranks (CPU ranks "
        "only)",
        by="watch.stragglers",
    ),
)

_CARDS = tuple(
    Column(f"cards/{name}", unit, meaning, by="record.cards")
    for name, unit, meaning in (
        ("temperature_c", "°C", "maximum temperature of the GPUs"),
        ("sm_mhz", "MHz", "minimum SM clock of the GPUs"),
        ("power_w", "W", "total power of the GPUs"),
        ("ecc_corrected", "1", "corrected ECC errors of all GPUs since their drivers started"),
        ("ecc_uncorrected", "1", "uncorrected ECC errors of all GPUs since their drivers started"),
        ("throttled", "1", "number of GPUs that are slowed by heat, power or the board"),
    )
)

COLUMNS = _LOOP + _ROUTERS + _PLANS + _OFFLOAD + _MONITORS + _STATES + _RANKS + _FORECAST + _CARDS


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
