"""Small mixture of experts for the training runs of many tests."""

from __future__ import annotations

from typing import Any


def experts_model(width: int = 32, num_layers: int = 2) -> dict[str, Any]:
    """Return the model section: eight experts, a shared one, and a router with a z-loss."""
    return {
        "kind": "moe",
        "vocab_size": 64,
        "width": width,
        "num_layers": num_layers,
        "num_heads": 4,
        "num_kv_heads": 2,
        "experts": {
            "kind": "swiglu",
            "num_experts": 8,
            "experts_per_token": 2,
            "width": width // 2,
            "num_shared_experts": 1,
        },
        "router": {"gate": "sqrt", "z_loss": 1e-3},
    }
