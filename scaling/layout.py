"""Layout of a run: pipeline stages, and checks of the parallel degrees against the model.

The module is pure and without torch; trainer, dry run and planner call the same function.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.execution import Pipeline
from allometry.configs.model import ModelConfig, MoEModel
from allometry.configs.run import RunConfig
from allometry.scaling.batch import BatchPlan, check_batch
from allometry.scaling.context import check_context
from allometry.scaling.count import layer_flops
from allometry.scaling.deepspeed import check_deepspeed
from allometry.scaling.degrees import Degrees, check_divides, either, resolve_degrees
from allometry.scaling.offload import check_offload
from allometry.scaling.overrides import check_overrides
from allometry.scaling.precision import check_precision
from allometry.scaling.update_rules import check_delayed

V_SCHEDULES = ("zbv_zero_bubble", "dualpipe_v")
"""Schedules with V-shaped stages: the first and the last stage are on the same rank."""
ONE_STAGE_SCHEDULES = ("gpipe", "1f1b")
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipe_v")
"""Schedules that delay weight gradients after activation gradients."""
INTERLEAVED_ROUNDS = ("interleaved_1f1b", "interleaved_zero_bubble")


@dataclass(frozen=True, slots=True)
class Layout:
    """Parallel degrees valid for a model, and its pipeline stages.

    ``stages[s]`` are the layers of stage s in model order; the first stage also has the embedding,
    the last one the final norm and the head. Without a pipeline there is one stage.
    """

    degrees: Degrees
    schedule: str
    stages: tuple[range, ...]

    @classmethod
    def of(cls, config: RunConfig, world_size: int, costs: Sequence[float] | None = None) -> Layout:
        """Return the layout of this run on ``world_size`` ranks.

        ``costs``: measured times of embedding, each layer and head, for a split by measurement;
        None: use FLOPs. Raises UserError if the ranks do not match the degrees, the model or the
        batch; the message names the key, its value and valid values. For example,
        ``Layout.of(config, 8).stages_of(0)``.
        """
        degrees = resolve_degrees(config.parallel, world_size)
        _check_tensor(config, degrees)
        check_deepspeed(config, degrees)
        check_delayed(config)
        check_precision(config, degrees)
        check_overrides(config.model, config.optimizer)
        _check_expert(config.model, degrees)
        if config.data.kind == "sequences":
            check_batch(config.batch, degrees.hdp)
        check_context(config, degrees)
        for name, degree in (("pp", degrees.pp), ("tp", degrees.tp)):
            if config.model.dropout and degree > 1:
                raise UserError(
                    f"model.dropout={config.model.dropout} with parallel.{name}={degree}: its "
                    f"masks would depend on the layout; set model.dropout: 0 or parallel.{name}: 1"
                )
        pipeline = config.parallel.pipeline
        split = pipeline.split
        if degrees.pp == 1:
            if not isinstance(split, str) and split != (config.model.num_layers,):
                raise UserError(
                    f"parallel.pipeline.split={list(split)} needs stages, but parallel.pp=1; set "
                    "parallel.pp or use split: flops"
                )
            check_offload(config, config.model.num_layers)
            return cls(degrees, pipeline.schedule, (range(config.model.num_layers),))
        _check_halves(config)
        count = _stage_count(pipeline, degrees.pp, config.model.num_layers)
        if config.data.kind == "sequences":
            _check_micro_batches(config, degrees)
        if costs is None:
            costs = layer_flops(config.model, config.data.sequence_length)
        stages = _stages(pipeline, count, config.model, costs)
        check_offload(config, min(map(len, stages)))
        return cls(degrees, pipeline.schedule, stages)

    @property
    def pp(self) -> int:
        """Number of pipeline ranks."""
        return self.degrees.pp

    def describe(self) -> dict[str, Any]:
        """Return the layout as JSON; ``stages`` lists [first layer, last layer + 1]."""
        described: dict[str, Any] = asdict(self.degrees)
        if self.pp > 1:
            described["schedule"] = self.schedule
            described["stages"] = [[stage.start, stage.stop] for stage in self.stages]
        return described

    def rank_of(self, stage: int) -> int:
        """Return the pipeline rank of ``stage``."""
        assert 0 <= stage < len(self.stages), stage
        if self.schedule in V_SCHEDULES:
            return min(stage, len(self.stages) - 1 - stage)
        return stage % self.pp

    def stages_of(self, pp_rank: int) -> tuple[int, ...]:
        """Return the stages of pipeline rank ``pp_rank`` in model order."""
        return tuple(s for s in range(len(self.stages)) if self.rank_of(s) == pp_rank)


def split_layers(costs: Sequence[float], stages: int) -> tuple[range, ...]:
    """Split layers into ``stages`` contiguous non-empty parts that minimize the largest cost.

    ``costs`` are the costs of embedding, each layer and head; embedding and head belong to the
    first and the last part. Ties are resolved by balance (sum of squares), then by longer early
    parts. The time is O(stages x layers^2). For example, costs (1, 2, 2, 2, 2, 1) in 2 stages give
    layers 0-1 and 2-3.
    """
    first, *layers, last = costs
    assert 1 <= stages <= len(layers), (stages, len(layers))
    before = list(itertools.accumulate(layers, initial=0.0))

    def price(stage: int, start: int, stop: int) -> float:
        ends = (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
        return before[stop] - before[start] + ends

    # tables[s][n]: (largest cost, squares, start of stage s) for the first n layers.
    tables: list[dict[int, tuple[float, float, int]]] = []
    for stage in range(stages):
        below = tables[-1] if stage else {0: (0.0, 0.0, 0)}
        table = {}
        for stop in range(stage + 1, len(layers) - (stages - 1 - stage) + 1):
            table[stop] = min(
                (max(price(stage, n, stop), worst), price(stage, n, stop) ** 2 + squares, -n)
                for n, (worst, squares, _) in below.items()
                if n < stop
            )
        tables.append(table)
    parts: list[range] = []
    stop = len(layers)
    for table in reversed(tables):
        start = -table[stop][2]
        parts.append(range(start, stop))
        stop = start
    return tuple(reversed(parts))


def _check_tensor(config: RunConfig, degrees: Degrees) -> None:
    model, tp = config.model, degrees.tp
    cut = {"model.num_heads": model.num_heads, "model.num_kv_heads": model.kv_heads}
    if config.data.kind == "sequences":
        cut["data.sequence_length"] = config.data.sequence_length
    if model.ffn_width is not None:
        cut["model.ffn_width"] = model.ffn_width
    if isinstance(model, MoEModel) and not degrees.whole_experts:
        cut["model.experts.width"] = model.experts.width
    rows = -(-model.vocab_size // tp)
    if rows * (tp - 1) >= model.vocab_size:
        raise UserError(
            f"parallel.tp={tp} leaves a rank without a row of model.vocab_size="
            f"{model.vocab_size}; use a smaller parallel.tp or a larger vocabulary"
        )
    overlap, compiled = config.parallel.tp_overlap, config.training.compile
    if overlap != "off" and compiled != (overlap == "symmetric"):
        raise UserError(
            f"parallel.tp_overlap={overlap} needs training.compile: {str(not compiled).lower()}; "
            f"set that, or parallel.tp_overlap: {'symmetric' if compiled else 'chunked'} or off"
        )
    common = math.gcd(*cut.values())
    for name, size in cut.items():
        check_divides("parallel.tp", tp, name, size, common)


def _check_expert(model: ModelConfig, degrees: Degrees) -> None:
    if not isinstance(model, MoEModel):
        for key, value, none in (
            ("ep", degrees.ep, 1),
            ("expert_tp", 1 if degrees.whole_experts else None, None),
        ):
            if value != none:
                raise UserError(
                    f"parallel.{key}={value} needs experts, but model.kind={model.kind} has none; "
                    f"use parallel.{key}={none or 'null'} or model.kind=moe"
                )
        return
    key = "parallel.ep"
    if degrees.whole_experts:
        key = f"parallel.ep={degrees.ep} x parallel.tp={degrees.tp} (parallel.expert_tp=1)"
    experts = model.experts.num_experts
    check_divides(key, degrees.expert_ranks, "model.experts.num_experts", experts)


def _check_halves(config: RunConfig) -> None:
    """Reject options that do not support a backward in two halves, for schedules that split it."""
    schedule, training = config.parallel.pipeline.schedule, config.training
    if schedule not in SPLIT_BACKWARD:
        return
    refused = f"parallel.pipeline.schedule={schedule} splits backward in two, which"
    if config.parallel.zero.regather == "micro_batch":
        raise UserError(
            f"{refused} needs a stage's parameters throughout; set parallel.zero.regather: step or "
            "schedule: interleaved_1f1b"
        )
    if training.compile:
        raise UserError(
            f"{refused} compiled blocks cannot; set training.compile: false or schedule: "
            "interleaved_1f1b"
        )
    if training.activation_checkpointing == "selective":
        raise UserError(
            f"{refused} selective checkpointing cannot; set training.activation_checkpointing: "
            "full or none, or schedule: interleaved_1f1b"
        )


def _stage_count(pipeline: Pipeline, pp: int, num_layers: int) -> int:
    schedule, asked = pipeline.schedule, pipeline.stages_per_rank
    single = schedule in ONE_STAGE_SCHEDULES
    each = asked or (1 if single else 2)
    fixed = 1 if single else 2 if schedule in V_SCHEDULES else None
    if fixed is not None and each != fixed:
        raise UserError(
            f"parallel.pipeline.stages_per_rank={each}: schedule {schedule} runs {fixed} on each "
            f"rank; use {fixed} or null"
        )
    if pp * each > num_layers:
        most = num_layers // each
        fewer = "fewer stages on each rank or a schedule that has one (1f1b, gpipe)"
        fits = f"parallel.pp at most {most}" if most else fewer
        if most and each > 1:
            fits = f"{fits}, or {fewer}"
        raise UserError(
            f"parallel.pp={pp} with {each} stage{'s' * (each > 1)} on each rank "
            f"(parallel.pipeline.schedule={schedule}) needs {pp * each} layers, but "
            f"model.num_layers={num_layers}; use {fits}"
        )
    return pp * each


def _check_micro_batches(config: RunConfig, degrees: Degrees) -> None:
    """Check that the schedule supports every batch size of the run, including the ramp."""
    schedule, pp = config.parallel.pipeline.schedule, degrees.pp
    fits, rule = _rule(schedule, pp)
    unit = degrees.hdp * config.batch.micro_batch_sequences
    plan = BatchPlan(config.batch, config.data.sequence_length)
    for stage in plan.stages:
        number = stage.sequences // unit
        if fits(number):
            continue
        near = sorted(range(1, number + 4 * pp), key=lambda n: (abs(n - number), n))
        good = sorted([n for n in near if fits(n)][:2])
        ramp = stage is not plan.stages[-1]
        key = "batch.ramp.start_sequences and increments of" if ramp else "batch.sequences="
        smaller = "smaller micro-batches, " * (config.batch.micro_batch_sequences > 1)
        raise UserError(
            f"parallel.pipeline.schedule={schedule} on pp={pp} needs {rule}, but a batch of "
            f"{stage.sequences} sequences{' (in its ramp)' * ramp} is {number} on each rank "
            f"(hdp={degrees.hdp}, batch.micro_batch_sequences="
            f"{config.batch.micro_batch_sequences}); use {key}{' ' * ramp}"
            f"{either([n * unit for n in good])}, {smaller}fewer hdp ranks or another schedule"
        )


def least_micro_batches(schedule: str, pp: int) -> int:
    """Return the smallest supported number of micro-batches of a schedule, in rounds of ``pp``.

    For example, 1f1b on 4 ranks needs 4.
    """
    fits, _ = _rule(schedule, pp)
    return next(number for number in (1, pp, 2 * pp) if fits(number))


def _rule(schedule: str, pp: int) -> tuple[Callable[[int], bool], str]:
    """Return the schedule's condition on the number of micro-batches, and its description."""
    if schedule == "1f1b":
        return lambda n: n >= pp, f"at least {pp} micro-batches"
    if schedule == "dualpipe_v":
        return lambda n: n >= 2 * pp, f"at least {2 * pp} micro-batches"
    if schedule in INTERLEAVED_ROUNDS:
        return (
            lambda n: n % max(1, n // pp) == 0,
            f"micro-batches in equal rounds of at least {pp}, or fewer than {pp}",
        )
    return lambda n: n >= 1, "a micro-batch"


_split = functools.lru_cache(maxsize=256)(split_layers)  # a search repeats calls


def _stages(
    pipeline: Pipeline, count: int, model: ModelConfig, costs: Sequence[float]
) -> tuple[range, ...]:
    if isinstance(pipeline.split, str):
        return _split(tuple(costs), count)
    numbers = pipeline.split
    if len(numbers) != count or sum(numbers) != model.num_layers or 0 in numbers:
        raise UserError(
            f"parallel.pipeline.split={list(numbers)} must be {count} positive numbers, one for "
            f"each stage, whose sum is model.num_layers={model.num_layers}; or use flops"
        )
    bounds = itertools.accumulate(numbers, initial=0)
    return tuple(itertools.starmap(range, itertools.pairwise(bounds)))
