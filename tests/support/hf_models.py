"""Tiny random models of each family, as transformers makes and saves them."""

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
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama_heads": ("llama", {"head_dim": 6, "rope_parameters": {"rope_theta": 5e5}}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "olmo2": ("olmo2", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**_QWEN_MOE, "norm_topk_prob": True}),
    "qwen3_moe_plain": ("qwen3_moe", {**_QWEN_MOE, "mlp_only_layers": []}),
}
"""Name of a case -> family, and what its configuration has besides the common sizes."""


def make(case: str, std: float = 0.3, **more: Any) -> Any:
    """Return a model of transformers whose every weight, norms included, is random."""
    import transformers

    family, own = CASES[case]
    values = {**_COMMON, **own, **more}
    if "rope_parameters" in values:
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
    return model


def save(folder: Path, case: str, **more: Any) -> Path:
    """Save such a model in ``folder``."""
    make(case, **more).save_pretrained(folder)
    return folder


def logits(folder: Path, tokens_BL: torch.Tensor) -> torch.Tensor:
    """Return the logits of the model that transformers loads from ``folder``, in fp32."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        str(folder), output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found: torch.Tensor = model.eval().float()(input_ids=tokens_BL).logits
    return found
