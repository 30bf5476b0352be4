"""Peak memory of a rank during a step, by kind of data."""

# T tokens of a micro-batch, D width, N query heads, K key/value heads, H head width,
# F feed-forward width, V vocabulary, P parameters, E experts, k of them that a token visits

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allometry.configs.execution import Zero, bytes_of
from allometry.configs.model import ModelConfig
from allometry.configs.optimization import OptimizerConfig
from allometry.configs.precision import PrecisionConfig
from allometry.scaling.attention import AttentionCall, choose_backend, named
from allometry.scaling.inventory import block_specs, inventory
from allometry.scaling.layout import Layout
from allometry.scaling.moment import Moment
from allometry.scaling.moments import Step
from allometry.scaling.offload import offloaded
from allometry.scaling.overrides import frozen_names
from allometry.scaling.roles import ParamSpec, Role, layer_of
from allometry.scaling.saved import COMPUTE, Checkpointing, Kernels
from allometry.scaling.shards import PREFETCHED, RankParts, has_experts, zero_dim
from allometry.scaling.update_rules import rule_of, state_bytes

COMPUTE_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes per element of each ``training.compute_dtype``."""

EXACT = ("parameters", "gradients", "optimizer_states")
"""Fields of ``MemoryEstimate`` that are exact: bytes of the sharded model."""

_FP32 = 4

FUSED_ATTENTION = AttentionCall("cuda", "bf16", packed=False, length=1, compiled=False)
"""A fused kernel, which saves the log-sum-exp of each query for any length."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one rank, between steps and at the moments of a step that may be the peak.

    Exact values of the sharded model: ``parameters`` in fp32, this rank's shards, including the
    copy of a tied head on another stage; their ``gradients`` after the last backward;
    ``optimizer_states`` (approximate for APOLLO, whose states are stored by matrix owners, and with
    a partial ``zero.optimizer_states``). Offloaded values are not on the device and count as 0.

    Estimates: ``saved``: activations saved for backward by the micro-batches in flight (one without
    a pipeline), by operation (``scaling/saved.py``). ``compute_copies``: weights cast to the
    compute type and unsharded weights. ``reduction``: gradients in addition to the rank's own
    before their reduction: one bucket at ZeRO stage 0; else the gradients and buffer of one unit,
    and unsharded fp32 gradients if micro-batches are accumulated before the reduction. ``moments``:
    bytes of all live tensors at each moment, by kind (``scaling/moments.py``).

    Not included: allocator fragmentation, buffers of the communication back end, the CUDA context,
    compiled code, workspaces allocated by kernels.
    """

    parameters: int
    gradients: int
    optimizer_states: int
    reduction: int
    compute_copies: int
    saved: Mapping[str, int]
    moments: tuple[Moment, ...]

    @classmethod
    def of(cls, step: Step) -> MemoryEstimate:
        """Return the estimate of a step."""
        held, moments = (step.held, step.gradients, step.states), step.moments()
        return cls(*held, step.reduction, step.copies, step.saved(), moments)

    @property
    def activations(self) -> int:
        """Bytes saved for backward by the micro-batches in flight."""
        return sum(self.saved.values())

    @property
    def peak(self) -> Moment:
        """Moment with the most live bytes."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.peak.total

    def describe(self) -> dict[str, Any]:
        """Return the estimate as JSON."""
        held = {name: getattr(self, name) for name in EXACT}
        peak = self.peak
        return {**held, "total": peak.total, "moment": peak.name, "peak": dict(peak.kinds)}


def estimate_memory(
    model: ModelConfig,
    *,
    micro_batch_tokens: int,
    compute_bytes: int,
    zero: Zero,
    hdp: int,
    layout: Layout | None = None,
    micro_batches: int = 1,
    checkpointing: Checkpointing = "none",
    logits_chunk_tokens: int | None = None,
    optimizer: OptimizerConfig | None = None,
    attention: AttentionCall = FUSED_ATTENTION,
    attention_backend: str | None = None,
    pp_rank: int | None = None,
    precision: PrecisionConfig = COMPUTE,
    activation_offload: float = 0.0,
) -> MemoryEstimate:
    """Return a rank's peak memory during a step: for the largest rank of each axis, or ``pp_rank``.

    ZeRO shards as in ``parallel/zero.py`` and ``shards.py``. ``layout`` None: one unsharded stage.
    ``compute_bytes``: per activation element. ``logits_chunk_tokens``: tokens per chunk of the loss
    (None: ``models/loss.py``). ``optimizer`` None: AdamW. ``attention``: defines the device (on a
    CPU norms and gradient buckets keep more); ``attention_backend`` None: the first supported.
    """
    stages, pp = (layout.stages, layout.pp) if layout else ((range(model.num_layers),), 1)
    add_up = pp > 1 or (zero.stage == 1 and micro_batches > 1)  # gradients are unsharded to the end
    sequences = max(1, micro_batch_tokens // attention.length)
    kernels = _kernels(model, compute_bytes, attention, attention_backend, precision, sequences)
    frozen = frozen_names(model, optimizer)

    def step_of(rank: int) -> Step:
        part = RankParts.of(model, layout, rank, hdp // zero.replicas if zero.stage else 1, frozen)
        held, gradients, states = _kept(part, optimizer, zero, compute_bytes)
        return Step(
            part=part,
            kernels=kernels,
            checkpointing=checkpointing,
            zero=zero,
            hdp=hdp,
            pipelined=pp > 1,
            optimizer=optimizer,
            on_cpu=attention.device == "cpu",
            compiled=attention.compiled,
            tokens=micro_batch_tokens,
            chunk=logits_chunk_tokens,
            micro_batches=micro_batches,
            in_flight=most_in_flight(layout, rank, micro_batches) if layout else 1,
            away=offloaded(activation_offload, stages),
            dormant=_dormant(model, stages[0], frozen),
            held=held,
            gradients=gradients,
            states=states,
            reduction=_reduction(part, zero, hdp, gradients, compute_bytes, add_up),
            copies=_compute_copies(part, kernels, zero, pp),
            gathered=gathered_bytes(part, kernels),
        )

    ranks = [pp_rank] if pp_rank is not None else _different(model, layout, precision, frozen)
    return max((MemoryEstimate.of(step_of(rank)) for rank in ranks), key=lambda one: one.total)


def _kernels(
    model: ModelConfig,
    compute_bytes: int,
    attention: AttentionCall,
    attention_backend: str | None,
    precision: PrecisionConfig,
    sequences: int,
) -> Kernels:
    # On CUDA all layers share one back end, on a CPU each call has its own
    # (``trainer/kernels.py``).
    of_all = attention if attention.device == "cuda" else attention._replace(window=None)
    scores, windowed = (
        (named(attention_backend) if attention_backend else choose_backend(call)).kept(
            call, model.num_heads, compute_bytes, sequences
        )
        for call in (of_all, attention)
    )
    # A call of length 1 stands for any length: all tokens are one sequence.
    share = model.prefix_tokens / (sequences if attention.length == 1 else attention.length)
    return Kernels(compute_bytes, attention.device == "cuda", scores, precision, windowed, share)


def _dormant(model: ModelConfig, stage: range, frozen: frozenset[str]) -> frozenset[int]:
    """Return the layers of the first stage without a backward: earlier parameters are frozen."""
    ends = inventory(model, (), last=False)
    found: set[int] = set()
    for layer in stage if frozen.issuperset(spec.name for spec in ends) else ():
        if not frozen.issuperset(s.name for s in block_specs(model, layer, f"blocks.{layer}")):
            break
        found.add(layer)
    return frozenset(found)


def _different(
    model: ModelConfig, layout: Layout | None, precision: PrecisionConfig, frozen: frozenset[str]
) -> list[int]:
    """Return pipeline ranks, without ranks that are equal to an earlier one.

    No rank has more micro-batches in flight than an earlier rank, so the earlier one is kept.
    """
    if layout is None:
        return [0]
    found: dict[Any, int] = {}
    for rank in range(layout.pp):
        stages = layout.stages_of(rank)
        part = RankParts.of(model, layout, rank, 1, frozen)
        ends = 0 in stages, len(layout.stages) - 1 in stages
        layers = (
            tuple(
                (has_experts(model, n), n in precision.compute_layers, part.frozen_in(n))
                for n in layout.stages[s]
            )
            for s in stages
        )
        found.setdefault((ends, tuple(layers)), rank)
    return list(found.values())


def _kept(
    part: RankParts, optimizer: OptimizerConfig | None, zero: Zero, compute_bytes: int
) -> tuple[int, int, int]:
    """Return bytes of this rank's parameters, gradients and optimizer states on the device.

    Offloaded states are on the device in three buckets, each of ``bucket_mib`` or of the largest
    parameter that is not split. With ``master_weights`` parameters that are gathered in the compute
    type are offloaded with them, except for the resident share, and leave copies in the compute
    type. Of offloaded gradients one bucket is on the device; gradients summed over tp stay there
    and are too small to count.
    """
    if zero.offload != "none":
        return 0, 0, 0
    counted = part.counted
    parameters = {spec.name: n * _FP32 * part.held(spec) for spec, n in counted}
    held = sum(parameters.values())
    specs = [(spec, n) for spec, n in counted if spec.name not in part.frozen]
    gradients = sum(parameters[spec.name] for spec, _ in specs)
    trained = [(spec, n) for spec, n in specs if part.trains(spec)]
    sizes = {s.name: n * state_bytes(s, part.shard(s), optimizer) for s, n in trained}
    states, tiers = sum(sizes.values()), zero.optimizer_states
    if tiers is None or not sizes:
        return held, gradients, states
    if tiers.update == "delayed":
        return held, gradients, 0
    masters = {s.name for s, _ in trained if s.role not in (Role.INPUT, Role.ROUTER)}
    masters = masters if tiers.master_weights and compute_bytes < _FP32 else set()
    sizes |= {name: sizes[name] + parameters[name] for name in masters}
    total = sum(sizes.values())
    away = 1.0 - min(1.0, bytes_of(tiers.device, total) / total)
    factor = away * compute_bytes / _FP32
    parameters |= {
        s.name: n * int(factor * (parameters[s.name] // n)) for s, n in trained if s.name in masters
    }
    kind = optimizer.kind if optimizer else "adamw"
    fp8 = getattr(getattr(optimizer, "states", None), "kind", None) == "fp8"
    whole = [sizes[s.name] // n for s, n in trained if fp8 or not rule_of(kind, s.role).elementwise]
    bucket = max(int(tiers.bucket_mib * 2**20), *whole, 0)
    states = min(total, bytes_of(tiers.device, total) + 3 * bucket)
    if tiers.gradients:
        copied = part.model.tied_embeddings or part.model.num_depths > 0
        copied = copied and not (part.first and part.last)
        summed = sum(_FP32 * part.held(s) for s, _ in specs if copied and s.role is Role.INPUT)
        gradients = min(gradients, summed + int((1.0 - away) * (gradients - summed)) + bucket)
    return sum(parameters.values()), gradients, states


def _reduction(
    part: RankParts, zero: Zero, hdp: int, held: int, compute_bytes: int, add_up: bool
) -> int:
    """Return bytes of gradients before their reduction, in addition to ``held``."""
    whole = _FP32 * sum(part.trained.values())
    if zero.stage == 0:
        return min(zero.bucket_mib * 2**20, whole) if hdp > 1 else 0
    unit = max(part.units.values(), default=0)
    return whole - held + _FP32 * unit if add_up else (compute_bytes + _FP32) * unit


def _compute_copies(part: RankParts, kernels: Kernels, zero: Zero, pp: int) -> int:
    """Return bytes of weights in addition to the fp32 parameters.

    Without ZeRO a cast weight is kept until its backward pass; fp32 compute needs no copy. With
    ZeRO gathered parameters are kept during the step (``gathered_bytes``). If blocks are freed
    after use, a block and the prefetched blocks coexist with norm and head, or the embedding with
    these. Experts that ZeRO shards in a dimension other than the first are concatenated into a
    copy.
    """
    compute_bytes = kernels.compute
    if zero.stage == 0:
        sizes = {spec.name: size for spec, size in part.sizes.items() if _is_cast(spec)}
        if not part.model.tied_embeddings:
            sizes.pop("embedding.weight", 0)  # a lookup casts only the rows that it reads
        sizes.pop("mtp.embedding.weight", 0)
        return 0 if compute_bytes == _FP32 else compute_bytes * sum(sizes.values())
    gathered, joined = gathered_bytes(part, kernels), _joined_bytes(part, compute_bytes)
    if not zero.frees(pp):
        return sum(gathered.values()) + joined
    ends = gathered.pop(None, 0)
    block = max(gathered.values())
    ahead = min(PREFETCHED, len(gathered) - 1)
    table = sum(
        max(_FP32, compute_bytes) * size
        for spec, size in part.sizes.items()
        if spec.role is Role.INPUT and not part.model.tied_embeddings
    )
    return ends - table + max(table, block) + ahead * block + joined


def gathered_bytes(part: RankParts, kernels: Kernels) -> dict[int | None, int]:
    """Return bytes of each block's gathered parameters by layer; None: parameters outside blocks.

    Exact: blocks and head are gathered in the compute type, the embedding (with its copies) and
    routers in fp32, or wider if parameters are; with FP8 those selected by ``precision.gather``.
    """
    total: dict[int | None, int] = {}
    for spec, size in part.sizes.items():
        layer = layer_of(spec.name)
        each = kernels.wide if spec.role in (Role.INPUT, Role.ROUTER) else kernels.compute
        if kernels.precision.gather == "fp8" and spec.role is Role.HIDDEN and layer is not None:
            each = 1 if kernels.recipe(spec.role, layer) else each
        total[layer] = total.get(layer, 0) + each * size
    return total


def _joined_bytes(part: RankParts, compute_bytes: int) -> int:
    """Return bytes of a block's experts that are concatenated after the all-gather."""
    joined: Counter[int | None] = Counter()
    for spec, _ in part.counted:
        if zero_dim(part.part(spec), part.ranks_of(spec)):
            joined[layer_of(spec.name)] += compute_bytes * part.sizes[spec]
    return max(joined.values(), default=0)


def _is_cast(spec: ParamSpec) -> bool:
    """Return True if a product, which needs the compute type, uses the parameter."""
    return spec.role is not Role.VECTOR


def most_in_flight(layout: Layout, rank: int, micro_batches: int) -> int:
    """Return the maximum number of micro-batches in flight on a pipeline rank.

    1F1B: the number of stages from this rank on (arXiv 2104.04473); GPipe and breadth-first: all
    micro-batches. Other schedules are assumed equal to the first rank of 1F1B (arXiv 2401.10241 for
    the zero-bubble V), interleaved ones (p-1)/(p v) more (arXiv 2205.05198). For example, rank 0 of
    1F1B with pp = 4 has at most 4.
    """
    if layout.pp == 1:
        return 1
    match layout.schedule:
        case "gpipe" | "looped_bfs":
            return micro_batches
        case "1f1b":
            return min(micro_batches, layout.pp - rank)
        case "interleaved_1f1b" | "interleaved_zero_bubble":
            each = len(layout.stages) // layout.pp
            return min(micro_batches, layout.pp + math.ceil((layout.pp - 1) / each))
        case _:
            return min(micro_batches, layout.pp)
