"""The ``parallel``, ``evaluation`` and ``record`` sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from allometry.configs.auto import AutoLayout, PredictionConfig
from allometry.configs.base import Count, PathText, Section
from allometry.configs.checks import CardsConfig, ChecksConfig
from allometry.configs.watch import Watch

Amount = (
    Annotated[float, Field(ge=0.0, le=1.0)]
    | Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)? GiB$")]
)
"""A share, or bytes on a rank as ``"1.5 GiB"``."""


def bytes_of(amount: Amount, total: int) -> int:
    """Return the bytes that ``amount`` allows of ``total``, rounded down."""
    if isinstance(amount, str):
        return int(float(amount.removesuffix(" GiB")) * 2**30)
    return int(amount * total)


class OptimizerStates(Section):
    """Where a rank's optimizer states live between steps: each place is filled before the next."""

    device: Amount = Field(
        0.0, description='share of the states beside the parameters, or "N GiB"; none by default'
    )
    cpu: Amount | None = Field(
        None,
        description='share in the host\'s memory, or "N GiB"; only with ``nvme``, which takes the '
        "rest; null: all that ``device`` leaves, none with ``nvme``",
    )
    nvme: PathText | None = Field(
        None,
        min_length=1,
        description="folder on a local disk for the rest: each rank keeps a file without a name "
        "there, which goes when its process does",
    )
    master_weights: bool = Field(
        False,
        description="the fp32 parameters live with their states; the device keeps a copy in the "
        "compute type of what is gathered in that type (bf16, stages 1-3)",
    )
    gradients: bool = Field(
        False,
        description="gradients of what travels leave the device as they are reduced, for the "
        "host's memory (stages 1-3)",
    )
    update: Literal["exact", "delayed"] = Field(
        "exact",
        description="delayed: the host updates while the device computes the next step, which so "
        "lacks this one's update; another trajectory (rules that update element by element)",
    )
    bucket_mib: float = Field(
        64.0, gt=0.0, description="MiB of states that move at once; three buckets are held"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.device == 1.0:
            raise ValueError("device=1.0 moves no state; leave optimizer_states out")
        if self.cpu is not None and self.nvme is None:
            raise ValueError(
                f"cpu={self.cpu} limits the host's memory, but nothing takes the rest; name a "
                "folder in nvme, or leave cpu out"
            )
        for key in ("device", "master_weights", "gradients"):
            if self.update == "delayed" and getattr(self, key):
                raise ValueError(
                    f"{key}={str(getattr(self, key)).lower()} with update=delayed, which keeps all "
                    "states, gradients and a copy of the fp32 parameters on the host and the "
                    f"parameters on the device; leave {key} out"
                )
        return self


class Zero(Section):
    """ZeRO on the ``hdp`` axis (arXiv 1910.02054)."""

    engine: Literal["fsdp2", "deepspeed"] = Field(
        "fsdp2",
        description="who shards: torch's FSDP2, or DeepSpeed, which can keep parameters on NVMe "
        "too (no tp, pp or ep; AdamW)",
    )
    stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="what is sharded: 0 nothing (gradients reduced in flat buckets), 1 optimizer "
        "states, 2 and gradients, 3 and parameters",
    )
    bucket_mib: Count = Field(
        256, gt=0, description="stage 0 and deepspeed: gradients that are reduced together, in MiB"
    )
    replicas: Count = Field(
        1,
        gt=0,
        description="stages 1-3: whole copies that hdp is divided into; each is sharded over "
        "hdp/replicas ranks and gradients are summed over the copies (hybrid sharding)",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="stages 1-3: where sharded parameters, gradients and optimizer states live "
        "between uses; nvme (deepspeed, stage 3): in the folder optimizer_states.nvme",
    )
    regather: Literal["auto", "micro_batch", "step"] = Field(
        "auto",
        description="stage 3: how often a block's parameters are gathered; micro_batch: for each "
        "forward and backward, freed in between; step: once, kept for all micro-batches of a step; "
        "auto: step in a pipeline, else micro_batch",
    )

    optimizer_states: OptimizerStates | None = Field(
        None, description="where optimizer states live between steps; null: beside the parameters"
    )
    deepspeed_extra: dict[str, Any] = Field(
        default_factory=dict,
        description="more keys of DeepSpeed's own configuration, which change speed and memory",
    )

    @model_validator(mode="before")
    @classmethod
    def _earlier_name(cls, given: Any) -> Any:
        """Read ``kind: fsdp2``, as older run folders have it."""
        if isinstance(given, dict) and given.get("kind") == "fsdp2" and "engine" not in given:
            return {"engine": "fsdp2"} | {k: v for k, v in given.items() if k != "kind"}
        return given

    def frees(self, pp: int) -> bool:
        """Return whether gathered parameters are freed within a step, with so many ``pp`` ranks."""
        each = self.regather == "micro_batch" or (self.regather == "auto" and pp == 1)
        return self.stage == 3 and each

    @model_validator(mode="after")
    def _check(self) -> Self:
        states = self.optimizer_states
        if self.deepspeed_extra and self.engine != "deepspeed":
            raise ValueError(
                f"deepspeed_extra has no effect with engine={self.engine}; set engine: deepspeed "
                "or leave it out"
            )
        if self.offload == "nvme" and self.engine != "deepspeed":
            raise ValueError(
                f"offload=nvme keeps parameters on NVMe, which engine={self.engine} cannot; use "
                "engine: deepspeed with stage: 3, or offload: cpu with optimizer_states.nvme"
            )
        if self.offload == "nvme" and (states is None or not states.nvme):
            raise ValueError("offload=nvme needs a folder; name it in optimizer_states.nvme")
        if self.offload == "cpu" and states is not None and (states.device or not states.nvme):
            raise ValueError(
                "offload=cpu keeps parameters and optimizer states in the host's memory, which "
                "optimizer_states can only relieve; set its nvme and leave its device at 0"
            )
        for key in ("master_weights", "gradients"):
            if self.stage == 0 and getattr(states, key, False):
                raise ValueError(
                    f"optimizer_states.{key}=true needs parameters that FSDP2 gathers and reduces; "
                    "set stage to 1, 2 or 3 (on one rank as well)"
                )
        if self.offload == "cpu" and states is not None and states.gradients:
            raise ValueError(
                "optimizer_states.gradients=true is what offload=cpu does with all gradients; "
                "leave it out"
            )
        if self.stage != 3 and self.regather == "micro_batch":
            raise ValueError(
                f"regather=micro_batch needs parameters that are sharded, but stage={self.stage} "
                "gathers them once a step; set stage to 3 or regather to auto"
            )
        for name, usual in (("replicas", 1), ("offload", "none"), ("engine", "fsdp2")):
            if self.stage == 0 and getattr(self, name) != usual:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs sharding; set stage to 1, 2 or 3"
                )
        return self


Schedule = Literal[
    "gpipe",
    "1f1b",
    "interleaved_1f1b",
    "looped_bfs",
    "interleaved_zero_bubble",
    "zbv_zero_bubble",
    "dualpipe_v",
]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


class Pipeline(Section):
    """How a model is cut into stages and in which order their micro-batches run (pp > 1)."""

    schedule: Schedule = Field("1f1b", description="order of forward and backward passes")
    stages_per_rank: Count | None = Field(
        None,
        gt=0,
        description="stages on each rank; null: 2 for the schedules that interleave, else 1",
    )
    split: Literal["flops", "measured"] | tuple[Count, ...] = Field(
        "flops",
        description="layers of the stages: evened out by counted FLOPs or by times measured at "
        "the first launch (whole layers, eager), embedding and head included; or their numbers, "
        "one for each stage",
    )


class ContextCosts(Section):
    """What the planner of hybrid data/context parallelism assumes of the machine."""

    tflops: float = Field(400.0, gt=0.0, description="what a rank reaches in products, TFLOP/s")
    attention_efficiency: float = Field(
        1.0, gt=0.0, description="rate of attention over that of other products"
    )
    bandwidth_gb_per_s: float = Field(
        50.0, gt=0.0, description="between neighbours of a ring, each way"
    )
    host_bandwidth_gb_per_s: float = Field(
        25.0, gt=0.0, description="between a rank and the host's memory, each way"
    )
    micro_batch_ms: float = Field(
        0.0, ge=0.0, description="what a micro-batch costs besides its tokens, in each layer"
    )


class ContextConfig(Section):
    """Hybrid data/context parallelism (arXiv 2502.21231): how documents lie on the hdp ranks.

    It takes part where ``data.kind`` is ``documents``.
    """

    capacity_tokens: Count = Field(
        8192, gt=0, description="most tokens that a rank holds in one micro-batch"
    )
    policy: Literal["static", "naive", "balanced", "pipeline_balanced"] = Field(
        "balanced",
        description="static: every document on ``degree`` ranks; naive: as few ranks as a document "
        "needs; balanced: and all ranks busy for as long; pipeline_balanced: each pipeline has "
        "documents of like lengths, and the more micro-batches the shorter they are",
    )
    degree: Count = Field(1, gt=0, description="static: ranks of each document")
    min_chunk_tokens: Count = Field(
        128, gt=0, description="a ring of n cuts a document into 2n chunks of at least these tokens"
    )
    offload: Literal["none", "selective"] = Field(
        "none",
        description="selective: long documents keep activations of some layers in the host's "
        "memory where that costs no time, and need fewer ranks",
    )
    costs: ContextCosts = Field(default_factory=ContextCosts, description="what planning assumes")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.policy != "static" and self.degree != 1:
            raise ValueError(
                f"degree={self.degree} belongs to policy: static; policy={self.policy} chooses "
                "degrees itself"
            )
        return self


class ParallelConfig(Section):
    """Degrees of the mesh's axes; pp x hdp x tp is the number of ranks."""

    hdp: Annotated[Count, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="hybrid data/context ranks; auto: all ranks that pp and tp leave"
    )
    tp: Count = Field(1, gt=0, description="tensor and sequence parallel ranks")
    tp_overlap: Literal["off", "chunked", "symmetric"] = Field(
        "off",
        description="tensor parallelism's messages behind its products; chunked: tokens in chunks "
        "(without compile); symmetric: torch's async TP through symmetric memory (CUDA, compiled)",
    )
    pp: Count = Field(1, gt=0, description="pipeline ranks")
    ep: Count = Field(1, gt=0, description="expert parallel ranks, a factor of hdp")
    expert_tp: Literal[1] | None = Field(
        None,
        description="null: tp cuts the width of each expert; 1: it spreads whole experts as ep "
        "does, over ep x tp ranks together, and no tokens are gathered for them",
    )
    pipeline: Pipeline = Field(default_factory=Pipeline, description="stages, where pp > 1")
    context: ContextConfig = Field(
        default_factory=ContextConfig, description="how whole documents lie on hdp ranks"
    )
    zero: Zero = Field(default_factory=Zero, description="what is sharded over hdp")
    timeout_s: Count = Field(
        600, gt=0, description="seconds after which a step in which a rank hangs ends the run"
    )
    watch: Watch = Field(default_factory=Watch, description="how long other things may take")
    auto: AutoLayout | None = Field(
        None, description="choose the layout when a run begins; ``parallel: auto``: by its defaults"
    )

    @model_validator(mode="before")
    @classmethod
    def _word(cls, given: Any) -> Any:
        return {"auto": {}} if given == "auto" else given


class EvaluationConfig(Section):
    """Loss on each source's held-out tokens."""

    every_steps: Count | None = Field(
        None, gt=0, description="steps between evaluations; null: only at the end"
    )
    sequences_per_source: Count = Field(
        64,
        gt=0,
        description="sequences read from each source's validation split, evenly spread over it",
    )


class WandB(Section):
    """Weights & Biases, when its package is installed."""

    project: str = Field(min_length=1, description="W&B project")
    entity: str | None = Field(None, description="W&B team or user; null: the default one")
    mode: Literal["online", "offline"] | None = Field(
        None, description="W&B mode; null: what $WANDB_MODE says, else online"
    )


class MonitorConfig(Section):
    """Stability monitors: ``monitors/`` in metrics.jsonl, and alarms in events.jsonl."""

    every_steps: Count | None = Field(
        100,
        gt=0,
        description="steps between looks at activations, attention, gradients and updates: each "
        "is a forward pass over ``sequences``; null: never",
    )
    sequences: Count = Field(
        4, gt=0, description="sequences of the step's batch to look at, over all ranks together"
    )
    singular_values_every_steps: Count | None = Field(
        1000, gt=0, description="steps between looks at singular values; null: never"
    )


class ForecastConfig(Section):
    """Forecasts of the final loss from the curve so far: ``forecast/`` in metrics.jsonl."""

    every_steps: Count | None = Field(
        1000, gt=0, description="steps between forecasts, each some 50 ms; null: never"
    )


class RecordConfig(Section):
    """What is written while training."""

    every_steps: Count = Field(1, gt=0, description="steps between rows of metrics.jsonl")
    display_every_steps: Count = Field(10, gt=0, description="steps between printed lines")
    tensorboard: bool = Field(
        True,
        description="write rows for TensorBoard, those of each printed line (display_every_steps) "
        "and those with a held-out loss or a forecast",
    )
    wandb: WandB | None = Field(None, description="also log to Weights & Biases")
    monitors: MonitorConfig = Field(
        default_factory=MonitorConfig, description="what is watched besides the loss"
    )
    forecast: ForecastConfig = Field(
        default_factory=ForecastConfig, description="what the run will end at"
    )
    prediction: PredictionConfig = Field(
        default_factory=PredictionConfig, description="what the planner says of its steps"
    )
    checks: ChecksConfig = Field(
        default_factory=ChecksConfig, description="whether machines compute and remember rightly"
    )
    cards: CardsConfig = Field(
        default_factory=CardsConfig, description="what is read of the GPUs themselves"
    )
