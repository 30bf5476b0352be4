"""How much memory a rank needs: an estimate, component by component."""

# T tokens of a micro-batch, D width, N query heads, K key/value heads, H head width,
# F feed-forward width, V vocabulary, P parameters, W ranks on the hdp axis, E experts, k of them
# that a token visits

from __future__ import annotations

import math
from dataclasses import dataclass

from allometry.configs.execution import Zero
from allometry.configs.model import LatentExperts, ModelConfig, MoEModel
from allometry.scaling.inventory import inventory
from allometry.scaling.roles import Role

COMPUTE_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes of one number of each ``training.compute_dtype``."""

_FP32 = 4


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of a step, by what they hold. An estimate.

    ``parameters``: fp32 parameters, this rank's share. ``gradients``: fp32 gradients and, where
    they are reduced in buckets, one bucket. ``optimizer_states``: AdamW's two fp32 moments.
    ``compute_copies``: weights cast to the compute type, and whole ones gathered from shards.
    ``activations``: what one micro-batch keeps for its backward pass, without checkpointing.
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


def estimate_memory(
    model: ModelConfig,
    *,
    micro_batch_tokens: int,
    compute_bytes: int,
    zero: Zero,
    hdp: int,
    logits_chunk_tokens: int | None = None,
    fused_norm: bool = True,
) -> MemoryEstimate:
    """Estimate the bytes that one of ``hdp`` ranks needs at the peak of a step.

    ZeRO (arXiv 1910.02054, section 5): stage 1 divides the optimizer states by the ranks, 2 the
    gradients as well, 3 the parameters as well. ``compute_bytes`` is the size of one activation
    (``COMPUTE_BYTES``), ``logits_chunk_tokens`` how many tokens the loss treats at once; None:
    what fits half a billion logits, at most 8192 tokens, as on a GPU (less on a CPU).
    ``fused_norm``: whether norms keep no more than their input and output, as torch's CUDA kernel
    (on a CPU they also keep both widened to fp32).
    """
    if logits_chunk_tokens is None:
        logits_chunk_tokens = min(max(2**29 // model.vocab_size, 128), 8192)
    specs = inventory(model)
    parameters = sum(spec.numel for spec in specs)
    share = [1 if zero.stage < stage else hdp for stage in (1, 2, 3)]
    bucket = 0
    if zero.stage == 0 and hdp > 1:
        bucket = min(zero.bucket_mib * 2**20, _FP32 * parameters)
    return MemoryEstimate(
        parameters=_FP32 * math.ceil(parameters / share[2]),
        gradients=_FP32 * math.ceil(parameters / share[1]) + bucket,
        optimizer_states=2 * _FP32 * math.ceil(parameters / share[0]),
        compute_copies=_compute_copies(model, compute_bytes, sharded=share[2] > 1),
        activations=_activations(model, micro_batch_tokens, compute_bytes, fused_norm),
        loss=_loss(model, micro_batch_tokens, logits_chunk_tokens, compute_bytes),
    )


def _compute_copies(model: ModelConfig, compute_bytes: int, *, sharded: bool) -> int:
    """Return the bytes of weights that exist beside the fp32 parameters.

    Unsharded, a cast weight stays until its backward pass; fp32 compute needs no copy. Sharded, a
    gathered block is freed after use: the largest of block and ends exists beside a prefetched
    block.
    """
    matrices = {spec.name: spec.numel for spec in inventory(model) if spec.role is not Role.VECTOR}
    if not sharded:
        products = sum(matrices.values())
        if not model.tied_embeddings:
            products -= matrices["embedding.weight"]  # a lookup casts only the rows it reads
        return 0 if compute_bytes == _FP32 else compute_bytes * products
    blocks = [0] * model.num_layers
    for name, size in matrices.items():
        if name.startswith("blocks."):
            blocks[int(name.split(".")[1])] += size
    block = max(blocks)
    ends = sum(size for name, size in matrices.items() if not name.startswith("blocks."))
    return compute_bytes * (block + max(block, ends))


def _activations(model: ModelConfig, tokens: int, compute_bytes: int, fused_norm: bool) -> int:
    """Return the bytes kept for the backward pass of one micro-batch.

    For each block and token: both norms' input and output in the compute type (D each; unfused,
    input and quotient in fp32 or wider besides the output); q, k, v (N·H + 2·K·H); attention's
    output in its own layout and in the next product's (2·N·H), its fp32 log-sum-exp (N); with
    qk_norm q and k before it as well; gate, up, SiLU and product of the feed-forward (4·F), or
    what a mixture keeps. Then the final norm.
    """
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
    kept = norm
    for layer in range(model.num_layers):
        if isinstance(model, MoEModel) and model.has_experts(layer):
            kept += common + _mixture(model, compute_bytes)
        else:
            assert model.ffn_width is not None
            kept += common + 4 * compute_bytes * model.ffn_width
    return tokens * kept


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


def _loss(model: ModelConfig, tokens: int, chunk_tokens: int, compute_bytes: int) -> int:
    """Return the bytes that the loss holds while it does one chunk of tokens.

    Its logits, twice in fp32 or wider for the softmax; the head's gradient, added up over the
    chunks beside that of earlier micro-batches; the gradient of the loss's input.
    """
    wide = max(_FP32, compute_bytes)
    chunk = min(chunk_tokens, tokens) * model.vocab_size
    head = wide * model.vocab_size * model.width
    return chunk * (compute_bytes + 2 * wide) + head + compute_bytes * tokens * model.width
