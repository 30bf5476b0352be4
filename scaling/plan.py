"""Plan of a run, computed from its config alone; printed by ``--dry-run``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.execution import Zero
from allometry.configs.run import RunConfig
from allometry.scaling.attention import AttentionCall
from allometry.scaling.batch import BatchPlan, warmup_steps
from allometry.scaling.count import Flops, ParameterCount, count_parameters, flops_per_token
from allometry.scaling.deepspeed_memory import with_deepspeed
from allometry.scaling.layout import Layout
from allometry.scaling.loads import BalanceLoads
from allometry.scaling.memory import (
    COMPUTE_BYTES,
    MemoryEstimate,
    estimate_memory,
    most_in_flight,
)
from allometry.scaling.offload import Traffic, offloaded
from allometry.scaling.overrides import describe_overrides
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.stages import StagePlace, places_of


@dataclass(frozen=True)
class Totals:
    """Totals of a run: steps, tokens (the budget rounded up to complete steps) and model FLOPs.

    ``warmup_steps``: steps of the first warm-up.
    """

    steps: int
    tokens: int
    flops: int
    warmup_steps: int


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run, or of one of its stages, on ``world_size`` ranks. Steps are counted from 1.

    ``total_steps`` is the last step, and ``steps_before`` the number of steps of earlier stages;
    ``run`` contains the totals of all stages, and ``stage`` is None for a run without stages.

    ``flops_per_token`` assumes one document per sequence, and ``flops_assumption`` explains the
    assumption for this run's data, which the plan does not read. ``memory`` is the peak of the
    largest rank (see ``MemoryEstimate``), and ``bytes_saved`` its reduction by FP8 activations.
    ``activation_traffic``: transfers of ``training.activation_offload``; None without offload.
    """

    world_size: int
    layout: Layout
    stage: StagePlace | None
    steps_before: int
    total_steps: int
    run: Totals
    warmup_steps: int
    batch: BatchPlan
    micro_batch_sequences: int
    micro_batch_tokens: int
    parameters: ParameterCount
    flops_per_token: Flops
    flops_assumption: str
    memory: MemoryEstimate
    bytes_saved: int
    activation_traffic: Traffic | None
    parameterization: Parameterization
    balance_loads: BalanceLoads | None

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> RunPlan:
        """Return the plan of a run on ``world_size`` ranks, without torch; the last stage's plan.

        Raises UserError if the ranks cannot share the batch or do not match the mesh. For example,
        ``RunPlan.of(config, 8).memory.total``.
        """
        return cls.of_stages(config, world_size)[-1]

    @classmethod
    def of_stages(cls, config: RunConfig, world_size: int) -> tuple[RunPlan, ...]:
        """Return the plan of each stage; a run without stages has one. Raises as ``of`` does."""
        assert world_size >= 1, world_size
        plans: list[RunPlan] = []
        for place in places_of(config):
            try:
                plan = cls._of_stage(config, place, world_size)
            except UserError as error:
                if place.name is None:
                    raise
                raise UserError(f"stage {place.name}: {error}") from None
            own = plan.batch.tokens_after(plan.total_steps)
            before = plans[-1].run if plans else Totals(0, 0, 0, plan.warmup_steps)
            flops = before.flops + (own - before.tokens) * plan.flops_per_token.total
            plans.append(
                replace(plan, run=replace(before, steps=plan.total_steps, tokens=own, flops=flops))
            )
        return tuple(replace(plan, run=plans[-1].run) for plan in plans)

    @classmethod
    def _of_stage(cls, run: RunConfig, place: StagePlace, world_size: int) -> RunPlan:
        config, batch = place.config, place.batch
        layout = Layout.of(config, world_size)
        memory = memory_of(config, layout, batch)
        kept = config.precision.model_copy(update={"saved_activations": "compute"})
        unsaved = config.model_copy(update={"precision": kept})
        begun = config.run.schedule_from
        first = place.steps_before + begun
        return cls(
            world_size=world_size,
            layout=layout,
            stage=None if place.name is None else place,
            steps_before=place.steps_before,
            total_steps=place.last_step,
            run=Totals(0, 0, 0, 0),
            warmup_steps=first + warmup_steps(config.schedule, place.local.rest(begun)),
            batch=batch,
            micro_batch_sequences=config.batch.micro_batch_sequences,
            micro_batch_tokens=tokens_of_micro_batch(config),
            parameters=count_parameters(config.model),
            flops_per_token=flops_per_token(config.model, config.data.sequence_length),
            flops_assumption=_flops_assumption(config),
            memory=memory,
            bytes_saved=memory_of(unsaved, layout, batch).total - memory.total,
            activation_traffic=traffic_of(config, layout, batch),
            parameterization=Parameterization.of_run(run, place.number - 1),
            balance_loads=BalanceLoads.of(config),
        )

    @property
    def hdp(self) -> int:
        """Number of ranks that share each batch."""
        return self.layout.degrees.hdp

    @property
    def total_tokens(self) -> int:
        """Tokens of the run: the budget rounded up to complete steps."""
        return self.run.tokens

    @property
    def total_flops(self) -> int:
        """Model FLOPs of the run."""
        return self.run.flops

    def micro_batches(self, step: int) -> int:
        """Return the number of micro-batches of each rank in ``step``.

        For document data: a lower bound, since plans are made for each step.
        """
        tokens = self.batch.sequences(step) * self.batch.sequence_length
        return -(-tokens // (self.hdp * self.micro_batch_tokens))

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        return {
            "world_size": self.world_size,
            "layout": self.layout.describe(),
            "stage": None if self.stage is None else self.stage.name,
            "steps_before": self.steps_before,
            "total_steps": self.run.steps,
            "total_tokens": self.total_tokens,
            "total_flops": self.total_flops,
            "warmup_steps": self.run.warmup_steps,
            "warmup_tokens": self.batch.tokens_after(self.run.warmup_steps),
            "batch": {
                "sequence_length": self.batch.sequence_length,
                "stages": [asdict(stage) for stage in self.batch.stages],
                "micro_batch_sequences": self.micro_batch_sequences,
                "micro_batch_tokens": self.micro_batch_tokens,
                "micro_batches_per_step": self.micro_batches(self.total_steps),
            },
            "parameters": asdict(self.parameters),
            "flops_per_token": asdict(self.flops_per_token),
            "flops_assumption": self.flops_assumption,
            "memory_bytes_per_rank": self.memory.describe(),
            "bytes_saved_by_fp8": self.bytes_saved,
            "activation_offload": (
                None if self.activation_traffic is None else self.activation_traffic.describe()
            ),
            "parameterization": self.parameterization.describe(),
            "overrides": describe_overrides(
                self.parameterization.model, self.parameterization.optimizer
            ),
            "balance_loads": None if self.balance_loads is None else asdict(self.balance_loads),
        }


def tokens_of_micro_batch(config: RunConfig) -> int:
    """Return the tokens of a micro-batch; for document data, the capacity of a rank."""
    if config.data.kind == "documents":
        return config.parallel.context.capacity_tokens
    return config.batch.micro_batch_sequences * config.data.sequence_length


def memory_of(
    config: RunConfig,
    layout: Layout,
    batch: BatchPlan,
    device: str = "cuda",
    pp_rank: int | None = None,
) -> MemoryEstimate:
    """Return the memory of a rank (None: the largest) on a device, "cuda" or "cpu"."""
    tokens, length = tokens_of_micro_batch(config), config.data.sequence_length
    zero, hdp = config.parallel.zero, layout.degrees.hdp
    deepspeed = zero.engine == "deepspeed"
    estimate = estimate_memory(
        config.model,
        micro_batch_tokens=tokens,
        compute_bytes=COMPUTE_BYTES[config.training.compute_dtype],
        zero=Zero() if deepspeed else zero,
        hdp=1 if deepspeed else hdp,
        layout=layout,
        micro_batches=_micro_batches(config, layout, batch),
        checkpointing=config.training.activation_checkpointing,
        optimizer=config.optimizer,
        attention=AttentionCall(
            device,
            config.training.compute_dtype,
            packed=config.data.kind == "documents" or config.data.packing == "per_document",
            length=length,
            compiled=config.training.compile,
            head_width=config.model.head_width,
            window=config.model.window_tokens,
        ),
        attention_backend=None if config.kernels.attention == "auto" else config.kernels.attention,
        pp_rank=pp_rank,
        precision=config.precision,
        activation_offload=config.training.activation_offload,
    )
    return with_deepspeed(estimate, config, hdp) if deepspeed else estimate


def traffic_of(config: RunConfig, layout: Layout, batch: BatchPlan) -> Traffic | None:
    """Return the host transfers of the first pipeline rank; None without offload."""
    share = config.training.activation_offload
    moved = offloaded(share, [layout.stages[stage] for stage in layout.stages_of(0)])
    if not moved:
        return None
    training = config.training.model_copy(update={"activation_offload": 0.0})
    held, all_of_it = (
        memory_of(each, layout, batch, pp_rank=0).activations
        for each in (config, config.model_copy(update={"training": training}))
    )
    micro_batches = _micro_batches(config, layout, batch)
    in_flight = most_in_flight(layout, 0, micro_batches)
    return Traffic.of(
        config.model,
        moved,
        travelling=(all_of_it - held) // in_flight,
        tokens=tokens_of_micro_batch(config),
        sequence_length=config.data.sequence_length,
        tp=layout.degrees.tp,
        micro_batches=micro_batches,
        in_flight=in_flight,
        costs=config.parallel.context.costs,
    )


def _micro_batches(config: RunConfig, layout: Layout, batch: BatchPlan) -> int:
    tokens = layout.degrees.hdp * tokens_of_micro_batch(config)
    return -(-batch.full_sequences * config.data.sequence_length // tokens)


def _flops_assumption(config: RunConfig) -> str:
    """Return the plan's assumption about documents for FLOPs; a run counts its actual documents."""
    length = config.data.sequence_length
    if config.data.kind == "documents":
        return f"every document as long as a window, {length} tokens; the run counts each as it is"
    if config.data.packing == "per_document":
        return (
            f"every sequence one document of {length} tokens, an upper bound; the run counts each "
            "document as it is"
        )
    return f"every sequence attends as a whole, {length} tokens"
