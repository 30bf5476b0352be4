"""DeepSeek-V3 (arXiv 2412.19437): keys of ``config.json``, names and row order of its tensors."""

# E experts, N heads, c width of the key/value latent, n, r components of a query without and with
# rotation

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

from allometry.configs.model import ModelConfig, MoEModel
from allometry.scaling.roles import ParamSpec

NORM_EPS = 1e-6
"""Epsilon of the norms of latents, a constant in its code; ``rms_norm_eps`` sets the others."""

FIXED: Mapping[str, tuple[Any, ...]] = {
    "rope_interleave": (True,),
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
    "moe_layer_freq": (1, None),
}
"""Keys with their only supported values."""

_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_NEEDED = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
_ROUTER = ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
_DEPTHS = ("num_nextn_predict_layers", "num_mtp_layers")
OWN_KEYS = frozenset(
    [
        *(*_LATENT, *_NEEDED, *_ROUTER, *_DEPTHS, *FIXED, "q_lora_rank", "first_k_dense_replace"),
        *("qk_head_dim", "ep_size", "aux_loss_alpha", "seq_aux"),  # derived, or for training only
    ]
)
"""Keys allowed in its files."""

NAMES: Mapping[str, str] = {
    "attention.latent_q": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.wq": "self_attn.q_b_proj",
    "attention.latent_kv": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.wkv": "self_attn.kv_b_proj",
    "ffn.shared.gate": "mlp.shared_experts.gate_proj",
    "ffn.shared.up": "mlp.shared_experts.up_proj",
    "ffn.shared.down": "mlp.shared_experts.down_proj",
}
"""Modules of a block with other names than in other families, or without a counterpart there."""

_DEPTH: Mapping[str, str] = {
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "projection": "eh_proj",
    "final_norm": "shared_head.norm",
}
"""Modules of a depth of multi-token prediction, in the layer after the model's own layers.

As in our models, readers such as vLLM (``deepseek_mtp.py``) multiply ``eh_proj`` by
[enorm(embedding); hnorm(hidden)], where hidden is the output of the model's final norm.
"""

ROUTER_BIAS = "mlp.gate.e_score_correction_bias"
"""Hugging Face name of a router's ``bias``."""


def described(
    values: Mapping[str, Any], need: Callable[[Mapping[str, Any], str], Any]
) -> dict[str, Any]:
    """Return the keys of our ``MoEModel`` for latent attention, experts and router.

    ``need(values, key)`` returns a required value and raises if the value is missing.
    """
    dense = int(values.get("first_k_dense_replace") or 0)
    groups = int(need(values, "n_group"))
    return {
        "head_dim": None,
        "latent_attention": {
            **{key: need(values, key) for key in _LATENT},
            "q_lora_rank": values.get("q_lora_rank"),
            "norm_eps": NORM_EPS,
        },
        "experts": {
            "kind": "swiglu",
            "num_experts": need(values, "n_routed_experts"),
            "experts_per_token": need(values, "num_experts_per_tok"),
            "width": need(values, "moe_intermediate_size"),
            "num_shared_experts": need(values, "n_shared_experts"),
        },
        "first_dense_layers": dense,
        "ffn_width": need(values, "intermediate_size") if dense else None,
        "router": {
            "gate": "sigmoid",
            "normalize": bool(values.get("norm_topk_prob", True)),
            "scale": float(need(values, "routed_scaling_factor")),
            "num_groups": groups,
            "groups_per_token": need(values, "topk_group"),
            "balance": {"kind": "bias"},
        },
    }


def written(model: MoEModel) -> dict[str, Any]:
    """Return the ``config.json`` keys of ``described``, from our model: the inverse."""
    latent, experts, router = model.latent_attention, model.experts, model.router
    assert latent is not None
    sizes = latent.model_dump(mode="json")
    return {
        **{key: sizes[key] for key in (*_LATENT, "q_lora_rank")},
        "n_routed_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.width,
        "n_shared_experts": experts.num_shared_experts,
        "first_k_dense_replace": model.first_dense_layers,
        # Read only by dense layers.
        "intermediate_size": model.ffn_width or experts.width,
        "n_group": router.num_groups,
        "topk_group": router.groups_per_token or router.num_groups,
        "norm_topk_prob": router.normalize,
        "routed_scaling_factor": router.scale,
        **{key: allowed[0] for key, allowed in FIXED.items()},
        "num_nextn_predict_layers": model.num_depths,
    }


def lacks(model: ModelConfig) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, reason) for each choice of ours that DeepSeek-V3 does not support."""
    latent = model.latent_attention
    if latent is not None and latent.norm_eps != NORM_EPS:
        yield "latent_attention.norm_eps", latent.norm_eps, f"it has {NORM_EPS:g}"
    if not isinstance(model, MoEModel):
        return
    experts, router = model.experts, model.router
    if not experts.num_shared_experts:
        yield "experts.num_shared_experts", 0, "it has at least one"
    if router.gate != "sigmoid":
        yield "router.gate", router.gate, "its gate is a sigmoid"
    if experts.num_experts // router.num_groups < 2:
        yield "router.num_groups", router.num_groups, "its groups have two experts or more"


def rows_of(model: ModelConfig, name: str) -> tuple[int, ...] | None:
    """Return, for each row of our parameter ``name``, its row in the HF tensor; None: same order.

    HF rotates the pairs (2i, 2i + 1), our models the pairs (i, i + r/2). For example, r = 4 without
    unrotated rows gives (0, 2, 1, 3).
    """
    latent = model.latent_attention
    if latent is None:
        return None
    if name.endswith(".attention.wq.weight"):
        return _interleaved(latent.qk_nope_head_dim, latent.qk_rope_head_dim, model.num_heads)
    if name.endswith(".attention.latent_kv.weight"):
        return _interleaved(latent.kv_lora_rank, latent.qk_rope_head_dim, 1)
    return None


def name_of_depth(model: ModelConfig, name: str) -> str | None:
    """Return the tensor of a parameter ``mtp.K...``; None for other parameters.

    For example, ``mtp.0.projection.weight`` of 61 layers is ``model.layers.61.eh_proj.weight``.
    """
    match = re.fullmatch(r"mtp\.(\d+)\.(\w+)\.weight", name)
    if match is None:
        return None
    return f"model.layers.{model.num_layers + int(match[1])}.{_DEPTH[match[2]]}.weight"


def copies_of(model: ModelConfig, spec: ParamSpec) -> tuple[str, ...]:
    """Return the copies of the embedding and the head in the layers of multi-token prediction."""
    own = {"embedding.weight": ["embed_tokens"], "head.weight": ["shared_head.head"]}
    if model.tied_embeddings:
        own["embedding.weight"].append("shared_head.head")
    layers = range(model.num_layers, model.num_blocks)
    modules = own.get(spec.name, [])
    return tuple(f"model.layers.{layer}.{name}.weight" for layer in layers for name in modules)


@lru_cache(maxsize=8)
def _interleaved(plain: int, rotated: int, number: int) -> tuple[int, ...]:
    """Return the rows of ``number`` groups: ``plain`` rows in order, then ``rotated`` even, odd."""
    pairs = [*range(0, rotated, 2), *range(1, rotated, 2)]
    each = [*range(plain), *(plain + row for row in pairs)]
    return tuple(start * len(each) + row for start in range(number) for row in each)


def beyond(values: Mapping[str, Any], names: Collection[str]) -> tuple[str, ...]:
    """Return the names of tensors of multi-token prediction layers, after the model's layers."""
    layers = int(values.get("num_hidden_layers") or 0)
    depths = max(int(values.get(key) or 0) for key in _DEPTHS)
    own = re.compile(r"^model\.layers\.(\d+)\.")
    found = ((name, own.match(name)) for name in names)
    ahead = range(layers, layers + depths)
    return tuple(sorted(name for name, match in found if match and int(match[1]) in ahead))
