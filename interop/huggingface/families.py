"""Model families of transformers that can be imported and exported, and their features."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from allometry.configs.decoder import Activation, NormOver, NormPlaces
from allometry.configs.model import ModelConfig, MoEModel
from allometry.interop.huggingface import deepseek
from allometry.scaling.inventory import inventory, stream_names

Family = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "olmo2",
    "olmo3",
    "gemma3_text",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
]
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True, slots=True)
class Traits:
    """Features of a family's model class, in the terms of our ``model`` section.

    ``scaled_embedding``: embedded tokens are multiplied by sqrt(width). ``gain_offset``: norms
    multiply by this plus the stored weight, e.g. 1.0 for Gemma. ``heads_divide``: the number of
    heads must divide the width. ``dense_first``: the first blocks may be dense. ``any_gate``: gates
    of the chosen experts need not be normalised by their sum. ``latent``: latent attention, router
    and shared experts of DeepSeek-V3 (``deepseek.py``), and YaRN may scale the attention scores.

    ``windows``: "all": all layers have a window if one is set; "by_layer": the listed layers;
    "switched": the listed layers if a switch is on. ``own_rope``: layers with a window have their
    own unscaled rotary positions, of base ``windowed_theta`` (None: always the base of the other
    layers). Defaults of the class: ``global_every``, ``rope_theta`` (None: required in files),
    ``head_dim``, ``tied``.
    """

    architecture: str
    experts: bool = False
    qkv_bias: bool = False
    qk_norm: NormOver | None = None
    norms: NormPlaces = "before"
    activation: Activation = "silu"
    scaled_embedding: bool = False
    gain_offset: float = 0.0
    heads_divide: bool = False
    dense_first: bool = False
    any_gate: bool = False
    latent: bool = False
    windows: Literal["all", "by_layer", "switched"] | None = None
    own_rope: bool = False
    windowed_theta: float | None = None
    global_every: int | None = None
    rope_theta: float | None = None
    head_dim: int | None = None
    tied: bool = False


TRAITS: Mapping[Family, Traits] = {
    # The files of the first Llama have no rope_theta.
    "llama": Traits("LlamaForCausalLM", heads_divide=True, rope_theta=10_000.0),
    "mistral": Traits("MistralForCausalLM", windows="all"),
    "qwen2": Traits("Qwen2ForCausalLM", qkv_bias=True, windows="switched"),
    "qwen3": Traits("Qwen3ForCausalLM", qk_norm="head", windows="switched", head_dim=128),
    "olmo2": Traits("Olmo2ForCausalLM", qk_norm="width", norms="after"),
    "olmo3": Traits(
        "Olmo3ForCausalLM",
        qk_norm="width",
        norms="after",
        windows="by_layer",
        own_rope=True,
        global_every=4,
    ),
    "gemma3_text": Traits(
        "Gemma3ForCausalLM",
        qk_norm="head",
        norms="both",
        activation="gelu_tanh",
        scaled_embedding=True,
        gain_offset=1.0,
        heads_divide=True,
        windows="by_layer",
        own_rope=True,
        windowed_theta=10_000.0,
        global_every=6,
        rope_theta=1_000_000.0,
        head_dim=256,
        tied=True,
    ),
    "mixtral": Traits("MixtralForCausalLM", experts=True, windows="all"),
    "qwen3_moe": Traits(
        "Qwen3MoeForCausalLM", experts=True, qk_norm="head", dense_first=True, any_gate=True
    ),
    "deepseek_v3": Traits(
        "DeepseekV3ForCausalLM",
        experts=True,
        dense_first=True,
        any_gate=True,
        latent=True,
        rope_theta=10_000.0,
    ),
}
"""Features by family, in order of preference: an export uses the first family that fits."""


def lacks(model: ModelConfig, family: Family) -> list[tuple[str, Any, str]]:
    """Return (key, value, reason) for each choice of ``model`` that ``family`` does not support."""
    has = TRAITS[family]
    own = deepseek.lacks(model) if has.latent else _of_router(model, has)
    return [*_of_blocks(model, has), *_of_experts(model, has), *own]


def _of_blocks(model: ModelConfig, has: Traits) -> Iterator[tuple[str, Any, str]]:
    if isinstance(model, MoEModel) != has.experts:
        yield "kind", model.kind, "it has experts" if has.experts else "it has no experts"
    if (model.latent_attention is not None) != has.latent:
        value = None if has.latent else "{...}"
        yield "latent_attention", value, "it has one" if has.latent else "it has none"
    if model.streams is not None:
        first = next(s.name for s in inventory(model) if s.name in stream_names(model))
        value = f"{{count: {model.streams.count}, ...}}"
        yield "streams", value, f"it has no place for {first} and aggregator.mix.weight"
    if model.qkv_bias != has.qkv_bias:
        yield "qkv_bias", model.qkv_bias, "it has biases" if has.qkv_bias else "it has no biases"
    if model.qk_norm != (has.qk_norm is not None):
        yield "qk_norm", model.qk_norm, "it has one" if has.qk_norm else "it has none"
    elif has.qk_norm is not None and model.qk_norm_over != has.qk_norm:
        yield "qk_norm_over", model.qk_norm_over, f"its norm is over {has.qk_norm}"
    for key in ("norms", "activation"):
        value, theirs = getattr(model, key), getattr(has, key)
        if value != theirs:
            yield key, value, f"it has {theirs}"
    scale = embedding_scale(model.width) if has.scaled_embedding else 1.0
    if not math.isclose(model.embedding_scale, scale, rel_tol=1e-7):
        yield "embedding_scale", model.embedding_scale, f"it multiplies by {scale:.8g}"
    if has.heads_divide and model.width % model.num_heads:
        yield "num_heads", model.num_heads, f"it must divide width={model.width}"


def _of_experts(model: ModelConfig, has: Traits) -> Iterator[tuple[str, Any, str]]:
    if not isinstance(model, MoEModel) or not has.experts:
        return
    experts = model.experts
    if experts.kind != "swiglu":
        yield "experts.kind", experts.kind, "its experts read the residual stream"
    if model.first_dense_layers and not has.dense_first:
        yield "first_dense_layers", model.first_dense_layers, "it has none"


def _of_router(model: ModelConfig, has: Traits) -> Iterator[tuple[str, Any, str]]:
    if not isinstance(model, MoEModel) or not has.experts:
        return
    experts, router = model.experts, model.router
    if experts.num_shared_experts:
        yield "experts.num_shared_experts", experts.num_shared_experts, "it has none"
    gate = gate_of(model)
    if gate[0] != "softmax":
        yield "router.gate", router.gate, "its gate is a softmax"
    elif not has.any_gate and not gate[1]:
        yield "router.normalize", "false", "it divides by the sum"
    if router.scale != 1.0:
        yield "router.scale", router.scale, "it has no such factor"
    if router.groups_per_token not in (None, router.num_groups):
        yield "router.groups_per_token", router.groups_per_token, "it has no groups"
    if router.balance.kind == "bias":
        yield "router.balance.kind", "bias", "its router has no bias"


def embedding_scale(width: int) -> float:
    """Return Gemma's multiplier of embedded tokens, sqrt(width)."""
    return math.sqrt(width)


def gate_of(model: MoEModel) -> tuple[str, bool]:
    """Return (gate, normalize) in a canonical form, equal for equal functions.

    A softmax over all experts, normalised over the chosen experts, equals the softmax over the
    chosen experts: "softmax_after_topk" becomes ("softmax", True).
    """
    gate, normalize = model.router.gate, model.router.normalize
    return ("softmax", True) if gate == "softmax_after_topk" else (gate, normalize)
