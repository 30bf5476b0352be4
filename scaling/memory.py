"""How much memory a rank needs: an estimate, component by component."""

# T tokens of a micro-batch, D width, N query heads, K key/value heads, H head width,
# F feed-forward width, V vocabulary, P parameters, W ranks on the hdp axis, E experts, k of them
# that a token visits

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from allometry.configs.execution import Zero
from allometry.configs.model import LatentExperts, ModelConfig, MoEModel
from allometry.configs.optimization import OptimizerConfig
from allometry.scaling.inventory import inventory
from allometry.scaling.layout import Layout
from allometry.scaling.roles import ParamSpec, Role
from allometry.scaling.update_rules import state_numbers

COMPUTE_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes of one number of each ``training.compute_dtype``."""

_FP32 = 4


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of a step, by what they hold. An estimate.

    ``parameters``: fp32 parameters, this rank's share. ``gradients``: fp32 gradients and, where
    they are reduced in buckets, one bucket. ``optimizer_states``: what the update rules keep, for
    AdamW two fp32 moments; none of parameters and states where they are offloaded.
    ``compute_copies``: weights cast to the compute type, and whole ones gathered from shards.
    ``activations``: what the micro-batches in flight (one without a pipeline) keep for backward.
    ``loss``: the piece of the logits that exists at once and the head's gradient beside it.

    Not in it: the allocator's fragmentation, communication buffers of the back end, the CUDA
    context, compiled code. Kernels differ in what they keep: expect tens of per cent of error in
    the activations, little in the rest.
    """

    parameters: int
    gradients: int
    optimizer_states: int
    compute_copies: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """The sum of all components, in bytes."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer_states
            + self.compute_copies
            + self.activations
            + self.loss
        )


@dataclass(frozen=True, slots=True)
class _Rank:
    """What one rank holds of a model: some layers, the ends or not, cut over tp and ep."""

    model: ModelConfig
    layers: frozenset[int]
    first: bool
    last: bool
    tp: int
    ep: int

    def parameters(self) -> dict[str, int]:
        """Return the elements of this rank's part of each parameter, before ZeRO."""
        found = {}
        for spec in inventory(self.model):
            layer = _layer(spec.name)
            here = layer in self.layers if layer is not None else self._holds_end(spec.name)
            if here:
                found[spec.name] = math.ceil(spec.numel / self.cut(spec))
        return found

    def cut(self, spec: ParamSpec) -> int:
        """Return into how many parts tensor and expert parallelism cut a parameter."""
        if spec.role in (Role.EXPERT_UP, Role.EXPERT_DOWN):
            return self.tp * self.ep
        apart = (Role.VECTOR, Role.ROUTER)
        return 1 if spec.role in apart or ".latent_" in spec.name else self.tp

    def _holds_end(self, name: str) -> bool:
        # A tied head away from its embedding is a copy of it.
        if name == "embedding.weight":
            return self.first or (self.last and self.model.tied_embeddings)
        return self.last


def _layer(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


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
) -> MemoryEstimate:
    """Estimate the bytes that the fullest of the ranks needs at the peak of a step.

    ZeRO divides by hdp, by a copy's ranks where there are replicas, as ``parallel/zero.py`` says:
    stage 1 parameters (gathered for the step) and optimizer states, 2 the gradients as well, 3
    what is gathered. ``layout`` None: one pipeline stage, nothing cut. ``compute_bytes`` is the
    size of one activation (``COMPUTE_BYTES``), ``logits_chunk_tokens`` how many tokens the loss
    treats at once; None: what fits half a billion logits, at most 8192 tokens, as on a GPU (less
    on a CPU).
    ``fused_norm``: whether norms keep no more than their input and output, as torch's CUDA kernel
    (on a CPU they also keep both widened to fp32). ``optimizer`` None: AdamW.
    """
    if logits_chunk_tokens is None:
        columns = math.ceil(model.vocab_size / (layout.degrees.tp if layout is not None else 1))
        logits_chunk_tokens = min(max(2**29 // columns, 128), 8192)
    pp, tp, ep = (
        (layout.pp, layout.degrees.tp, layout.degrees.ep) if layout is not None else (1, 1, 1)
    )
    estimates = []
    for rank in range(pp):
        stages = layout.stages_of(rank) if layout is not None else (0,)
        layers = layout.stages if layout is not None else (range(model.num_layers),)
        part = _Rank(
            model,
            frozenset(layer for stage in stages for layer in layers[stage]),
            first=0 in stages,
            last=len(layers) - 1 in stages,
            tp=tp,
            ep=ep,
        )
        held = _held(part, zero, hdp, compute_bytes, optimizer, pipeline=pp > 1)
        kept = _activations(part, micro_batch_tokens, compute_bytes, fused_norm, checkpointing)
        in_flight = _in_flight(layout, rank, micro_batches) if layout is not None else 1
        loss = 0
        if part.last:
            loss = _loss(model, micro_batch_tokens, logits_chunk_tokens, compute_bytes, tp)
        estimates.append(MemoryEstimate(**held, activations=in_flight * kept, loss=loss))
    return max(estimates, key=lambda estimate: estimate.total)


def _held(
    part: _Rank,
    zero: Zero,
    hdp: int,
    compute_bytes: int,
    optimizer: OptimizerConfig | None,
    *,
    pipeline: bool,
) -> dict[str, int]:
    """Return the bytes of parameters, gradients, states and copies of weights (see zero.py)."""
    elements = part.parameters()
    whole = sum(elements.values())
    ranks = hdp // zero.replicas

    def shared(numbers: dict[str, int]) -> int:
        experts = sum(size for name, size in numbers.items() if ".experts." in name)
        rest = sum(numbers.values()) - experts
        return math.ceil(rest / ranks) + math.ceil(experts / (ranks // part.ep))

    per_element = {s.name: state_numbers(s, optimizer) for s in inventory(part.model)}
    kept = {name: math.ceil(size * per_element[name]) for name, size in elements.items()}
    share = shared(elements)
    sharded = share if zero.stage >= 1 else whole
    states = shared(kept) if zero.stage >= 1 else sum(kept.values())
    # In a pipeline gradients are whole until the stage's last backward.
    gradients = share if zero.stage >= 2 and not pipeline else whole
    bucket = 0
    if zero.stage == 0 and hdp > 1:
        bucket = min(zero.bucket_mib * 2**20, _FP32 * whole)
    on_device = 0 if zero.offload == "cpu" else 1
    if zero.stage >= 2 and not pipeline:
        gradients *= on_device
    return {
        "parameters": on_device * _FP32 * sharded,
        "gradients": _FP32 * gradients + bucket,
        "optimizer_states": on_device * _FP32 * states,
        "compute_copies": _compute_copies(part.model, elements, compute_bytes, zero.stage),
    }


def _compute_copies(
    model: ModelConfig, elements: dict[str, int], compute_bytes: int, stage: int
) -> int:
    """Return the bytes of weights that exist beside the fp32 parameters.

    Unsharded, a cast weight stays until its backward pass; fp32 compute needs no copy. Sharded,
    what is gathered stays for the step; at stage 3 a gathered block is freed after use: the
    largest of block and ends exists beside a prefetched block. The embedding is gathered in fp32.
    """
    matrices = {name: size for name, size in elements.items() if not name.endswith("norm.weight")}
    embedding = matrices.get("embedding.weight", 0)
    total = sum(matrices.values())
    if stage == 0:
        if not model.tied_embeddings:
            total -= embedding  # a lookup casts only the rows it reads
        return 0 if compute_bytes == _FP32 else compute_bytes * total
    if stage < 3:
        return compute_bytes * (total - embedding) + _FP32 * embedding
    blocks: dict[int, int] = {}
    for name, size in matrices.items():
        layer = _layer(name)
        if layer is not None:
            blocks[layer] = blocks.get(layer, 0) + size
    block = max(blocks.values())
    ends = total - sum(blocks.values())
    return compute_bytes * (block + max(block, ends))


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
    part: _Rank,
    tokens: int,
    compute_bytes: int,
    fused_norm: bool,
    checkpointing: Literal["none", "selective", "full"],
) -> int:
    """Return the bytes kept for the backward pass of one micro-batch.

    For each block and token: both norms' input and output in the compute type (D each; unfused,
    input and quotient in fp32 or wider besides the output); q, k, v (N·H + 2·K·H); attention's
    output in its own layout and in the next product's (2·N·H), its fp32 log-sum-exp (N); with
    qk_norm q and k before it as well; gate, up, SiLU and product of the feed-forward (4·F), or
    what a mixture keeps. Then the final norm. Tensor parallelism divides all but the two gathered
    inputs (2·D). Checkpointing keeps a block's input (D) and one block whole; selective keeps
    products and attention besides.
    """
    model = part.model
    queries = model.num_heads * model.head_width
    keys = model.kv_heads * model.head_width
    wide = max(_FP32, compute_bytes)
    norm_input = compute_bytes if fused_norm else 2 * wide
    norm = model.width * (norm_input + compute_bytes)
    common = 2 * norm + compute_bytes * (3 * queries + 2 * keys) + _FP32 * model.num_heads
    if model.qk_norm:
        common += norm_input * (queries + keys)
    if model.dropout:
        common += 2 * model.width  # a mask of one byte for each branch
    products = compute_bytes * (2 * queries + 2 * keys + 3 * model.width) + _FP32 * model.num_heads
    kept: list[int] = []
    least: list[int] = []
    for layer in sorted(part.layers):
        if isinstance(model, MoEModel) and model.has_experts(layer):
            mixture = _mixture(model, compute_bytes)
            kept.append(common + mixture)
            least.append(products + mixture * 3 // 4)
        else:
            assert model.ffn_width is not None
            kept.append(common + 4 * compute_bytes * model.ffn_width)
            least.append(products + 2 * compute_bytes * model.ffn_width)
    gathered = 0 if part.tp == 1 else 2 * compute_bytes * model.width * (part.tp - 1)
    if checkpointing != "none":
        one = max(kept) + gathered
        inputs = compute_bytes * model.width * len(kept)
        total = one + (inputs if checkpointing == "full" else sum(least))
    else:
        total = sum(kept) + gathered * len(kept)
    if part.last:
        total += norm
    return tokens * total // part.tp


def _mixture(model: MoEModel, compute_bytes: int) -> int:
    """Return the bytes that a mixture keeps for one token; loads are taken to be even.

    The router's input in fp32 or wider where activations are not (D), its logits and scores (2·E);
    three numbers of a visit in int64 and its weight; for each visit the expert's input and output
    (2·D, or latent widths) and 4·F; the sum before the latent projection up; shared experts (4·F
    each).
    """
    mixture = model.experts
    wide = max(_FP32, compute_bytes)
    latent = mixture.latent_width if isinstance(mixture, LatentExperts) else None
    visit = 2 * (latent or model.width) + 4 * mixture.width
    kept = compute_bytes * mixture.experts_per_token * visit
    kept += mixture.experts_per_token * (3 * 8 + wide)
    kept += 2 * wide * mixture.num_experts + compute_bytes * (latent or 0)
    kept += 4 * compute_bytes * mixture.num_shared_experts * mixture.width
    return kept + (wide * model.width if wide != compute_bytes else 0)


def _loss(model: ModelConfig, tokens: int, chunk_tokens: int, compute_bytes: int, tp: int) -> int:
    """Return the bytes that the loss holds while it does one chunk of tokens.

    Its logits, twice in fp32 or wider for the softmax; the head's gradient, added up over the
    chunks beside that of earlier micro-batches; the gradient of the loss's input. Each of tp ranks
    has its part of the vocabulary.
    """
    wide = max(_FP32, compute_bytes)
    vocabulary = math.ceil(model.vocab_size / tp)
    chunk = min(chunk_tokens, tokens) * vocabulary
    head = wide * vocabulary * model.width
    return chunk * (compute_bytes + 2 * wide) + head + compute_bytes * tokens * model.width
