"""Tiny random models of each family, created and saved by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_QWEN_MOE = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [0],
}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "num_mtp_layers": 0,
}
_DEEPSEEK_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "mscale": 0.8,
    "mscale_all_dim": 1.1,
}
_MANY_LAYERS = {"num_hidden_layers": 7}
_OLMO3_ROPE = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.2,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
}
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama_heads": ("llama", {"head_dim": 6, "rope_parameters": {"rope_theta": 5e5}}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama_linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("mistral", {"sliding_window": 7, "head_dim": 6}),
    "mistral_whole": ("mistral", {"sliding_window": None, "head_dim": 6, "num_attention_heads": 6}),
    "qwen2_yarn": (
        "qwen2",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "olmo3": ("olmo3", {**_MANY_LAYERS, "sliding_window": 7, "rope_parameters": _OLMO3_ROPE}),
    "gemma3_text": (
        "gemma3_text",
        {**_MANY_LAYERS, "sliding_window": 5, "head_dim": 6, "query_pre_attn_scalar": 6},
    ),
    "qwen3_windows": (
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3_yarn": (
        "qwen3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 8.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.2,
                "truncate": False,
            },
        },
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "olmo2": ("olmo2", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**_QWEN_MOE, "norm_topk_prob": True}),
    "deepseek_v3": ("deepseek_v3", {**_DEEPSEEK, "rope_parameters": _DEEPSEEK_ROPE}),
    "deepseek_v3_full_queries": ("deepseek_v3", {**_DEEPSEEK, "q_lora_rank": None}),
    "qwen3_moe_plain": ("qwen3_moe", {**_QWEN_MOE, "mlp_only_layers": []}),
}
"""Family of each case, and its config values beyond the common sizes."""


def make(case: str, std: float = 0.3, **more: Any) -> Any:
    """Return a transformers model with random weights, norms included; e.g. make("qwen2")."""
    import transformers

    family, own = CASES[case]
    values = {**_COMMON, **own, **more}
    if "full_attention" not in values.get("rope_parameters", {"full_attention": None}):
        values["rope_parameters"] = {"rope_type": "default", **values["rope_parameters"]}
    config = transformers.AutoConfig.for_model(family, **values)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = name.endswith("norm.weight")
            parameter.copy_(1 + std * noise if is_gain else std * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def save(folder: Path, case: str, **more: Any) -> Path:
    """Save the model of ``make`` in ``folder`` and return the folder."""
    make(case, **more).save_pretrained(folder)
    return folder


def logits(folder: Path, tokens_BL: torch.Tensor) -> torch.Tensor:
    """Return the fp32 logits of the model that transformers loads from ``folder``."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        str(folder), output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found: torch.Tensor = model.eval().float()(input_ids=tokens_BL).logits
    return found
