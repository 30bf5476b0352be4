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
"""Fraction, or bytes per rank as ``"1.5 GiB"``."""


def bytes_of(amount: Amount, total: int) -> int:
    """Return the bytes that ``amount`` allows of ``total``, rounded down."""
    if isinstance(amount, str):
        return int(float(amount.removesuffix(" GiB")) * 2**30)
    return int(amount * total)


class OptimizerStates(Section):
    """Placement of a rank's optimizer states between steps: device, then host, then NVMe."""

    device: Amount = Field(
        0.0, description='fraction of states kept next to the parameters, or "N GiB"; 0: none'
    )
    cpu: Amount | None = Field(
        None,
        description='states to keep in host memory: a fraction, or "N GiB" per rank, if ``nvme`` '
        "takes the rest; null: the states that ``device`` leaves, or none with ``nvme``",
    )
    nvme: PathText | None = Field(
        None,
        min_length=1,
        description="folder on a local disk for the remaining states, where each rank keeps an "
        "unlinked file until its process ends; null: no states on disk",
    )
    master_weights: bool = Field(
        False,
        description="offload the fp32 parameters with their states; of parameters that are "
        "gathered in the compute type, the device keeps a copy in that type (bf16, stages 1-3)",
    )
    gradients: bool = Field(
        False,
        description="move gradients of offloaded states to host memory as soon as they are reduced "
        "(stages 1-3)",
    )
    update: Literal["exact", "delayed"] = Field(
        "exact",
        description="delayed: the host updates while the device computes the next step, whose "
        "gradients lack this update; the trajectory differs from exact (only elementwise update "
        "rules)",
    )
    bucket_mib: float = Field(
        64.0,
        gt=0.0,
        description="MiB of states that are transferred at once; three buckets are allocated",
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
    """ZeRO sharding over the ``hdp`` axis (arXiv 1910.02054)."""

    engine: Literal["fsdp2", "deepspeed"] = Field(
        "fsdp2",
        description="implementation: torch's FSDP2, or DeepSpeed, which can also offload "
        "parameters to NVMe (AdamW only; no tp, pp or ep)",
    )
    stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="what is sharded. 0: nothing, gradients are reduced in flat buckets; 1: "
        "optimizer states; 2: also gradients; 3: also parameters. Raise it to save memory",
    )
    bucket_mib: Count = Field(
        256, gt=0, description="MiB of gradients reduced together (stage 0 and engine deepspeed)"
    )
    replicas: Count = Field(
        1,
        gt=0,
        description="stages 1-3: number of replicas for hybrid sharding; each replica is sharded "
        "over hdp/replicas ranks, and gradients are summed over the replicas",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="stages 1-3: memory for sharded parameters, gradients and optimizer states "
        "between uses; nvme (deepspeed, stage 3): the folder optimizer_states.nvme",
    )
    regather: Literal["auto", "micro_batch", "step"] = Field(
        "auto",
        description="stage 3: when a block's parameters are gathered. micro_batch: in each forward "
        "and backward pass, and freed in between; step: once for all micro-batches of a step; "
        "auto: step with pipeline parallelism, else micro_batch",
    )

    optimizer_states: OptimizerStates | None = Field(
        None,
        description="placement of optimizer states between steps; null: next to the parameters",
    )
    deepspeed_extra: dict[str, Any] = Field(
        default_factory=dict,
        description="further keys of DeepSpeed's own configuration, which change speed and memory",
    )

    @model_validator(mode="before")
    @classmethod
    def _earlier_name(cls, given: Any) -> Any:
        """Accept ``kind: fsdp2``, the earlier spelling in existing run folders."""
        if isinstance(given, dict) and given.get("kind") == "fsdp2" and "engine" not in given:
            return {"engine": "fsdp2"} | {k: v for k, v in given.items() if k != "kind"}
        return given

    def frees(self, pp: int) -> bool:
        """Return True if gathered parameters are freed within a step; ``pp``: pipeline ranks."""
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
    """Pipeline stages and the order of their micro-batches (pp > 1)."""

    schedule: Schedule = Field(
        "1f1b", description="pipeline schedule: the order of forward and backward passes"
    )
    stages_per_rank: Count | None = Field(
        None, gt=0, description="number of stages on each rank; null: 1 for gpipe and 1f1b, else 2"
    )
    split: Literal["flops", "measured"] | tuple[Count, ...] = Field(
        "flops",
        description="layers of each stage, embedding and head included: balanced by counted FLOPs "
        "(flops), balanced by times of unsharded layers in eager mode at the first launch "
        "(measured), or a list with the number of layers of each stage",
    )


class ContextCosts(Section):
    """Machine constants for planning hybrid data/context parallelism."""

    tflops: float = Field(
        400.0, gt=0.0, description="rate of matrix products of a rank, in TFLOP/s"
    )
    attention_efficiency: float = Field(
        1.0, gt=0.0, description="rate of attention divided by the rate of other matrix products"
    )
    bandwidth_gb_per_s: float = Field(
        50.0, gt=0.0, description="bandwidth between neighbours of a ring, in GB/s per direction"
    )
    host_bandwidth_gb_per_s: float = Field(
        25.0, gt=0.0, description="bandwidth between a rank and host memory, in GB/s per direction"
    )
    micro_batch_ms: float = Field(
        0.0, ge=0.0, description="fixed cost of a micro-batch in each layer, in ms"
    )


class ContextConfig(Section):
    """Hybrid data/context parallelism (arXiv 2502.21231): documents on the hdp ranks.

    This section applies if ``data.kind`` is ``documents``.
    """

    capacity_tokens: Count = Field(
        8192,
        gt=0,
        description="maximum tokens of a rank in one micro-batch; lower it to save memory",
    )
    policy: Literal["static", "naive", "balanced", "pipeline_balanced"] = Field(
        "balanced",
        description="assignment of documents to ranks. static: ``degree`` ranks for each document; "
        "naive: as few ranks as each document needs; balanced: also equal compute time on all "
        "ranks; pipeline_balanced: each pipeline gets documents of similar length, and more "
        "micro-batches the shorter they are",
    )
    degree: Count = Field(1, gt=0, description="policy static: ranks of each document")
    min_chunk_tokens: Count = Field(
        128,
        gt=0,
        description="minimum tokens of a chunk; a ring of n ranks cuts a document into 2n chunks",
    )
    offload: Literal["none", "selective"] = Field(
        "none",
        description="selective: activations of some layers are offloaded to host memory for long "
        "documents, where this takes no extra time, so that these documents need fewer ranks",
    )
    costs: ContextCosts = Field(
        default_factory=ContextCosts, description="machine constants for planning"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.policy != "static" and self.degree != 1:
            raise ValueError(
                f"degree={self.degree} belongs to policy: static; policy={self.policy} chooses "
                "degrees itself"
            )
        return self


class ParallelConfig(Section):
    """Degrees of the device mesh; the number of ranks is pp x hdp x tp."""

    hdp: Annotated[Count, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="hybrid data/context parallel degree; auto: all ranks that pp and tp leave",
    )
    tp: Count = Field(1, gt=0, description="tensor and sequence parallel degree")
    tp_overlap: Literal["off", "chunked", "symmetric"] = Field(
        "off",
        description="overlap of tensor-parallel communication with matrix products. chunked: in "
        "chunks of tokens (without compile); symmetric: torch's async TP on symmetric memory "
        "(CUDA, compiled)",
    )
    pp: Count = Field(1, gt=0, description="pipeline parallel degree")
    ep: Count = Field(1, gt=0, description="expert parallel degree, a divisor of hdp")
    expert_tp: Literal[1] | None = Field(
        None,
        description="null: tp shards the width of each expert; 1: complete experts are distributed "
        "over ep x tp ranks, and their tokens are not gathered over tp",
    )
    pipeline: Pipeline = Field(default_factory=Pipeline, description="pipeline stages (pp > 1)")
    context: ContextConfig = Field(
        default_factory=ContextConfig,
        description="assignment of documents to hdp ranks (data.kind documents)",
    )
    zero: Zero = Field(default_factory=Zero, description="ZeRO sharding over hdp")
    timeout_s: Count = Field(
        600, gt=0, description="seconds after which a step with a hanging rank ends the run"
    )
    watch: Watch = Field(
        default_factory=Watch,
        description="time limits outside of steps, and detection of stragglers",
    )
    auto: AutoLayout | None = Field(
        None,
        description="choose the layout when a run begins; ``parallel: auto`` does so with the "
        "defaults of this section; null: keep the configured layout",
    )

    @model_validator(mode="before")
    @classmethod
    def _word(cls, given: Any) -> Any:
        return {"auto": {}} if given == "auto" else given


class EvaluationConfig(Section):
    """Evaluation of the loss on each source's held-out tokens."""

    every_steps: Count | None = Field(
        None, gt=0, description="steps between evaluations; null: evaluate only at the end"
    )
    sequences_per_source: Count = Field(
        64,
        gt=0,
        description="sequences evaluated per source, evenly spaced over its validation split",
    )


class WandB(Section):
    """Logging to Weights & Biases; requires the package wandb."""

    project: str = Field(min_length=1, description="W&B project")
    entity: str | None = Field(None, description="W&B team or user; null: the account's default")
    mode: Literal["online", "offline"] | None = Field(
        None, description="W&B mode; null: $WANDB_MODE if set, else online"
    )


class MonitorConfig(Section):
    """Stability monitors: ``monitors/`` in metrics.jsonl, and alarms in events.jsonl."""

    every_steps: Count | None = Field(
        100,
        gt=0,
        description="steps between measurements of activations, attention, gradients and updates, "
        "each with one forward pass over ``sequences``; null: never",
    )
    sequences: Count = Field(
        4, gt=0, description="sequences of the step's batch to measure, over all ranks together"
    )
    singular_values_every_steps: Count | None = Field(
        1000, gt=0, description="steps between measurements of singular values; null: never"
    )


class ForecastConfig(Section):
    """Forecasts of the final loss from the training curve: ``forecast/`` in metrics.jsonl."""

    every_steps: Count | None = Field(
        1000, gt=0, description="steps between forecasts, about 50 ms each; null: never"
    )


class RecordConfig(Section):
    """Records, logs and monitors that are written during training."""

    every_steps: Count = Field(1, gt=0, description="steps between rows of metrics.jsonl")
    display_every_steps: Count = Field(10, gt=0, description="steps between printed lines")
    tensorboard: bool = Field(
        True,
        description="write TensorBoard files: the row of each printed line (display_every_steps) "
        "and rows with a held-out loss or a forecast",
    )
    wandb: WandB | None = Field(None, description="log to Weights & Biases as well; null: do not")
    monitors: MonitorConfig = Field(default_factory=MonitorConfig, description="stability monitors")
    forecast: ForecastConfig = Field(
        default_factory=ForecastConfig, description="forecasts of the final loss"
    )
    prediction: PredictionConfig = Field(
        default_factory=PredictionConfig,
        description="comparison of predicted and measured step times",
    )
    checks: ChecksConfig = Field(
        default_factory=ChecksConfig, description="checks for silent corruption"
    )
    cards: CardsConfig = Field(default_factory=CardsConfig, description="NVML readings of the GPUs")
