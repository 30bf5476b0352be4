"""How much memory a rank needs at the peak of a step, component by component."""

# T tokens of a micro-batch, D width, N query heads, K key/value heads, H head width,
# F feed-forward width, V vocabulary, P parameters, E experts, k of them that a token visits

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, fields
from typing import Literal

from allometry.configs.execution import Zero, bytes_of
from allometry.configs.model import LatentExperts, ModelConfig, MoEModel
from allometry.configs.optimization import OptimizerConfig
from allometry.scaling.attention import AttentionCall, choose_backend, named
from allometry.scaling.layout import Layout
from allometry.scaling.precision import SAVED_BYTES
from allometry.scaling.roles import ParamSpec, Role
from allometry.scaling.shards import PREFETCHED, RankParts, layer_of, zero_dim
from allometry.scaling.update_rules import rule_of, state_bytes

COMPUTE_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes of one number of each ``training.compute_dtype``."""

EXACT = ("parameters", "gradients", "optimizer_states")
"""What of a ``MemoryEstimate`` is exact: the bytes of the sharded model."""

_FP32 = 4

FUSED_ATTENTION = AttentionCall("cuda", "bf16", packed=False, length=1, compiled=False)
"""What a fused kernel does, which keeps the log-sum-exp of each query whatever the length."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of a step, by what they hold.

    Exact, those of the sharded model: ``parameters`` in fp32, this rank's share, with the copy
    that a tied head away from its embedding is; their ``gradients`` after the last backward;
    ``optimizer_states`` (near for APOLLO, whose states lie with the owners of matrices, and where
    ``zero.optimizer_states`` lets only a part of them be there). Where
    they are offloaded they are not on the device and 0 here.

    Estimates: ``reduction``, gradients beyond these until they are reduced: one bucket at ZeRO
    stage 0; else those of one unit and its buffer, and whole ones in fp32 where micro-batches add
    up before they are reduced. ``compute_copies``: weights cast to the compute type, and whole
    ones gathered from shards. ``activations``: what the micro-batches in flight (one without a
    pipeline) keep for backward. ``loss``: the piece of the logits that exists at once, and the
    gradients of the head and of its input, which each micro-batch in flight keeps.

    Not in it: the allocator's fragmentation, communication buffers of the back end, the CUDA
    context, compiled code, routers' buffers. Kernels differ in what they keep: expect tens of per
    cent of error in the activations, little in the rest.
    """

    parameters: int
    gradients: int
    optimizer_states: int
    reduction: int
    compute_copies: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """The sum of all components, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(
    model: ModelConfig,
    *,
    micro_batch_tokens: int,
    compute_bytes: int,
    zero: Zero,
    hdp: int,
    layout: Layout | None = None,
    micro_batches: int = 1,
    checkpointing: Literal["none", "selective", "full"] = "none",
    logits_chunk_tokens: int | None = None,
    fused_norm: bool = True,
    optimizer: OptimizerConfig | None = None,
    attention: AttentionCall = FUSED_ATTENTION,
    attention_backend: str | None = None,
    pp_rank: int | None = None,
    saved_activations: Literal["compute", "fp8"] = "compute",
) -> MemoryEstimate:
    """Return the bytes that a rank needs at the peak of a step, the fullest of each axis.

    ZeRO shards over hdp, over a copy's ranks where there are replicas, as ``parallel/zero.py`` and
    ``shards.py`` say. ``layout`` None: one pipeline stage, nothing cut. ``compute_bytes`` is the
    size of one activation (``COMPUTE_BYTES``), ``logits_chunk_tokens`` how many tokens the loss
    treats at once; None: what fits half a billion logits, at most 8192 tokens, as on a GPU (less
    on a CPU).
    ``fused_norm``: whether norms keep no more than their input and output, as torch's CUDA kernel
    (on a CPU they also keep both widened to fp32). ``optimizer`` None: AdamW. ``attention``: what
    is asked of attention, whose back ends differ in what they keep, and ``attention_backend`` the
    name of one; None: the first that suits. ``pp_rank`` None: the fullest rank of the pipeline.
    ``saved_activations``: as ``precision.saved_activations``.
    """
    columns = math.ceil(model.vocab_size / (layout.degrees.tp if layout is not None else 1))
    if logits_chunk_tokens is None:
        logits_chunk_tokens = min(max(2**29 // columns, 128), 8192)
    chunk = min(logits_chunk_tokens, micro_batch_tokens)
    pp = layout.pp if layout is not None else 1
    # In a pipeline gradients are whole until the stage's last backward.
    add_up = pp > 1 or (zero.stage == 1 and micro_batches > 1)
    estimates = []
    backend = choose_backend(attention) if attention_backend is None else named(attention_backend)
    scores = backend.kept_bytes(model.num_heads, attention.length, compute_bytes)
    for rank in range(pp) if pp_rank is None else (pp_rank,):
        part = RankParts.of(model, layout, rank, hdp // zero.replicas if zero.stage else 1)
        given = micro_batch_tokens, compute_bytes, fused_norm, checkpointing, scores
        kept = _activations(part, *given, fp8=saved_activations == "fp8")
        in_flight = _in_flight(layout, rank, micro_batches) if layout is not None else 1
        parameters, gradients, states = _kept(part, optimizer, zero, compute_bytes)
        estimates.append(
            MemoryEstimate(
                parameters=parameters,
                gradients=gradients,
                optimizer_states=states,
                reduction=_reduction(part, zero, hdp, gradients, compute_bytes, add_up),
                compute_copies=_compute_copies(part, compute_bytes, zero, pp),
                activations=in_flight * kept,
                loss=_loss(part, micro_batch_tokens, chunk, compute_bytes, in_flight),
            )
        )
    return max(estimates, key=lambda estimate: estimate.total)


def _kept(
    part: RankParts, optimizer: OptimizerConfig | None, zero: Zero, compute_bytes: int
) -> tuple[int, int, int]:
    """Return the bytes of this rank's parameters, gradients and optimizer states on the device.

    States that travel are there in three buckets, each as large as ``bucket_mib`` or the largest
    parameter that is not cut; with ``master_weights`` parameters that are gathered in the compute
    type travel with them, but for what stays by its share, and leave copies in that type. Of
    gradients that leave a bucket is there; those that tp sums stay and are too few to count.
    """
    if zero.offload == "cpu":
        return 0, 0, 0
    specs = part.specs()
    parameters = {spec.name: _FP32 * part.held(spec) for spec in specs}
    gradients = sum(parameters.values())
    trained = [spec for spec in specs if part.trains(spec)]
    sizes = {s.name: state_bytes(s, part.shard(s), optimizer) for s in trained}
    states, tiers = sum(sizes.values()), zero.optimizer_states
    if tiers is None or not sizes:
        return gradients, gradients, states
    masters = {s.name for s in trained if s.role not in (Role.INPUT, Role.ROUTER)}
    masters = masters if tiers.master_weights and compute_bytes < _FP32 else set()
    sizes |= {name: sizes[name] + parameters[name] for name in masters}
    total = sum(sizes.values())
    away = 1.0 - min(1.0, bytes_of(tiers.device, total) / total)
    factor = away * compute_bytes / _FP32
    parameters |= {name: int(factor * parameters[name]) for name in masters}
    kind = optimizer.kind if optimizer else "adamw"
    fp8 = getattr(getattr(optimizer, "states", None), "kind", None) == "fp8"
    whole = [sizes[s.name] for s in trained if fp8 or not rule_of(kind, s.role).elementwise]
    bucket = max(int(tiers.bucket_mib * 2**20), *whole, 0)
    states = min(total, bytes_of(tiers.device, total) + 3 * bucket)
    if tiers.gradients:
        tied = part.model.tied_embeddings and not (part.first and part.last)
        summed = sum(_FP32 * part.held(s) for s in specs if tied and s.role is Role.INPUT)
        gradients = min(gradients, summed + int((1.0 - away) * (gradients - summed)) + bucket)
    return sum(parameters.values()), gradients, states


def _reduction(
    part: RankParts, zero: Zero, hdp: int, held: int, compute_bytes: int, add_up: bool
) -> int:
    """Return the bytes of gradients, beyond the ``held`` ones, until they are reduced."""
    whole = _FP32 * sum(math.prod(part.part(spec)) for spec in part.specs())
    if zero.stage == 0:
        return min(zero.bucket_mib * 2**20, whole) if hdp > 1 else 0
    unit = max(part.units().values())
    return whole - held + _FP32 * unit if add_up else (compute_bytes + _FP32) * unit


def _compute_copies(part: RankParts, compute_bytes: int, zero: Zero, pp: int) -> int:
    """Return the bytes of weights that exist beside the fp32 parameters.

    Unsharded, a cast weight stays until its backward pass; fp32 compute needs no copy. Sharded,
    what is gathered stays for the step (``gathered_bytes``); where a block is freed after use, it
    and those that are gathered ahead of it exist beside norm and head, or the embedding and these.
    Experts that ZeRO shards in another dimension than the first are put together in a copy.
    """
    if zero.stage == 0:
        sizes = {spec.name: math.prod(part.part(spec)) for spec in part.specs() if _is_cast(spec)}
        if not part.model.tied_embeddings:
            sizes.pop("embedding.weight", 0)  # a lookup casts only the rows it reads
        return 0 if compute_bytes == _FP32 else compute_bytes * sum(sizes.values())
    gathered, joined = gathered_bytes(part, compute_bytes), _joined_bytes(part, compute_bytes)
    if not zero.frees(pp):
        return sum(gathered.values()) + joined
    ends = gathered.pop(None, 0)
    block = max(gathered.values())
    ahead = min(PREFETCHED, len(gathered) - 1)
    table = sum(
        max(_FP32, compute_bytes) * math.prod(part.part(spec))
        for spec in part.specs()
        if spec.role is Role.INPUT and not part.model.tied_embeddings
    )
    return ends - table + max(table, block) + ahead * block + joined


def gathered_bytes(part: RankParts, compute_bytes: int) -> dict[int | None, int]:
    """Return the bytes of each block's gathered parameters, by layer; None: of the ends.

    Exact: blocks and head are gathered in the compute type, the embedding (with its copies) and
    routers in fp32, or wider where parameters are.
    """
    wide = max(_FP32, compute_bytes)
    total: dict[int | None, int] = {}
    for spec in part.specs():
        size = wide if spec.role in (Role.INPUT, Role.ROUTER) else compute_bytes
        layer = layer_of(spec.name)
        total[layer] = total.get(layer, 0) + size * math.prod(part.part(spec))
    return total


def _joined_bytes(part: RankParts, compute_bytes: int) -> int:
    """Return the bytes of the block's experts that are put together after they are gathered."""
    joined: Counter[int | None] = Counter()
    for spec in part.specs():
        if zero_dim(part.part(spec), part.ranks_of(spec)):
            joined[layer_of(spec.name)] += compute_bytes * math.prod(part.part(spec))
    return max(joined.values(), default=0)


def _is_cast(spec: ParamSpec) -> bool:
    """Whether a product, which wants its weight in the compute type, uses the parameter."""
    return not spec.name.endswith("norm.weight")


def _in_flight(layout: Layout, rank: int, micro_batches: int) -> int:
    """Return how many micro-batches' activations a pipeline rank keeps at once, at most.

    1F1B: as many as there are stages from here on (arXiv 2104.04473); GPipe and breadth-first:
    all. The others are taken to keep as much as the first rank of 1F1B (arXiv 2401.10241 for the
    zero-bubble V), interleaving (p-1)/(p v) more (arXiv 2205.05198).
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


def _activations(
    part: RankParts,
    tokens: int,
    compute_bytes: int,
    fused_norm: bool,
    checkpointing: Literal["none", "selective", "full"],
    scores: int,
    fp8: bool,
) -> int:
    """Return the bytes kept for the backward pass of one micro-batch.

    For each block and token: both norms' input and output in the compute type (D each; unfused,
    input and quotient in fp32 or wider besides the output); q, k, v (N·H + 2·K·H); attention's
    output in its own layout and in the next product's (2·N·H), ``scores`` bytes of what its back
    end keeps besides; with qk_norm q and k before it as well; gate, up, SiLU and product of the
    feed-forward (4·F), or what a mixture keeps. Then the final norm. Tensor parallelism divides
    all but the two gathered inputs (2·D). Checkpointing keeps a block's input (D) and one block
    whole; selective keeps products and attention besides. ``fp8``: inputs of norms and products
    (D, N·H, D, F) and of SwiGLU (2·F) in FP8, attention as before.
    """
    model = part.model
    queries = model.num_heads * model.head_width
    keys = model.kv_heads * model.head_width
    wide = max(_FP32, compute_bytes)
    norm_input = compute_bytes if fused_norm else 2 * wide
    norm = model.width * (norm_input + compute_bytes)
    common = 2 * norm + compute_bytes * (3 * queries + 2 * keys) + scores
    if model.qk_norm:
        common += norm_input * (queries + keys)
    if model.dropout:
        common += 2 * model.width  # a mask of one byte for each branch
    if fp8:
        small = 2 * model.width + queries + model.width
        small += (queries + keys if model.qk_norm else 0) + model.width
        common = compute_bytes * 2 * (queries + keys) + scores + 2 * _FP32
        common += math.ceil(SAVED_BYTES * small) + (2 * model.width if model.dropout else 0)
        norm = math.ceil(SAVED_BYTES * model.width) + compute_bytes * model.width
    products = compute_bytes * (2 * queries + 2 * keys + 3 * model.width) + scores
    kept: list[int] = []
    least: list[int] = []
    for layer in sorted(part.layers):
        if isinstance(model, MoEModel) and model.has_experts(layer):
            mixture = _mixture(model, compute_bytes, fp8)
            kept.append(common + mixture)
            least.append(products + mixture * 3 // 4)
        else:
            assert model.ffn_width is not None
            each = 3 * SAVED_BYTES if fp8 else 4 * compute_bytes
            kept.append(common + math.ceil(each * model.ffn_width))
            least.append(products + 2 * compute_bytes * model.ffn_width)
    gathered = 0 if part.tp == 1 else 2 * compute_bytes * model.width * (part.tp - 1)
    total = norm if part.last else 0
    if checkpointing == "none":
        total += sum(kept) + gathered * len(kept)
    else:
        inputs = compute_bytes * model.width * len(kept)
        total += max(kept) + gathered + (inputs if checkpointing == "full" else sum(least))
    return tokens * total // part.tp


def _mixture(model: MoEModel, compute_bytes: int, fp8: bool) -> int:
    """Return the bytes that a mixture keeps for one token; loads are taken to be even.

    The router's input in fp32 or wider where activations are not (D), its logits and scores (2·E);
    three numbers of a visit in int64 and its weight; for each visit the expert's input and output
    (2·D, or latent widths) and 4·F; the sum before the latent projection up; shared experts (4·F
    each). ``fp8``: all of it but an expert's output, with 3·F for 4·F; inputs that several modules
    read are kept by each.
    """
    mixture = model.experts
    wide = max(_FP32, compute_bytes)
    latent = mixture.latent_width if isinstance(mixture, LatentExperts) else None
    if fp8:
        small = mixture.experts_per_token * ((latent or model.width) + 3 * mixture.width)
        small += model.width * bool(latent) + (latent or 0)
        shared = mixture.num_shared_experts
        small += 3 * shared * mixture.width + model.width * bool(shared)
        whole = compute_bytes * (latent or model.width) + 3 * 8 + wide
        kept = mixture.experts_per_token * whole + 2 * wide * mixture.num_experts
        return kept + math.ceil(SAVED_BYTES * small)
    visit = 2 * (latent or model.width) + 4 * mixture.width
    kept = compute_bytes * mixture.experts_per_token * visit
    kept += mixture.experts_per_token * (3 * 8 + wide)
    kept += 2 * wide * mixture.num_experts + compute_bytes * (latent or 0)
    kept += 4 * compute_bytes * mixture.num_shared_experts * mixture.width
    return kept + (wide * model.width if wide != compute_bytes else 0)


def _loss(part: RankParts, tokens: int, chunk: int, compute_bytes: int, in_flight: int) -> int:
    """Return the bytes that the loss holds while it does one chunk of tokens.

    Its logits, twice in fp32 or wider for the softmax; the head's gradient, added up in that type
    over the chunks and over the micro-batches in flight; the gradients of their inputs. Each of tp
    ranks has its part of the vocabulary.
    """
    if not part.last:
        return 0
    wide = max(_FP32, compute_bytes)
    vocabulary = math.ceil(part.model.vocab_size / part.tp)
    head = vocabulary * part.model.width
    inputs = in_flight * compute_bytes * tokens * part.model.width
    logits = chunk * vocabulary * (compute_bytes + 2 * wide)
    return logits + wide * head + inputs
