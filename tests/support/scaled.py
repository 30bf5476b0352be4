"""Model with a parameter of every role, at multiples of a base, for tests of scaling."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from allometry.configs.model import MoEModel, ParameterizationConfig
from allometry.configs.optimization import OptimizerConfig

WIDTH, LAYERS, EXPERTS, VISITS, EXPERT_WIDTH = 32, 2, 4, 2, 24
BASE = {"base_width": WIDTH, "base_head_dim": 16}
MIXTURE_BASE = {
    "base_experts": EXPERTS,
    "base_experts_per_token": VISITS,
    "base_expert_width": EXPERT_WIDTH,
}

PARAMETERIZATIONS: dict[str, dict[str, Any]] = {
    "sp": {"kind": "sp"},
    "mup": {"kind": "mup", **BASE},
    "completep": {"kind": "completep", **BASE, "base_layers": LAYERS},
    "mupp": {"kind": "mupp", **BASE, "base_layers": LAYERS},
    "hyperp": {"kind": "hyperp", **BASE, "base_layers": LAYERS},
    **{
        f"mssp-{regime}": {"kind": "mssp", "regime": regime, **BASE, **MIXTURE_BASE}
        for regime in ("I", "II", "III")
    },
}


def parameterization(name: str, **changes: Any) -> ParameterizationConfig:
    adapter: TypeAdapter[ParameterizationConfig] = TypeAdapter(ParameterizationConfig)
    return adapter.validate_python({**PARAMETERIZATIONS[name], **changes})


def optimizer(kind: str = "adamw", **changes: Any) -> OptimizerConfig:
    adapter: TypeAdapter[OptimizerConfig] = TypeAdapter(OptimizerConfig)
    return adapter.validate_python({"kind": kind, "lr": 0.01, **changes})


def mixture(
    m: int = 1, depth: int = 1, experts: int = 1, expert_width: int | None = None, **changes: Any
) -> MoEModel:
    """Return the base with its width, depth and number of experts and top-k multiplied.

    Experts widen with the model unless ``expert_width`` is given.
    """
    return MoEModel.model_validate(
        {
            "vocab_size": 40,
            "width": WIDTH * m,
            "num_layers": LAYERS * depth,
            "num_heads": 2 * m,
            "head_dim": 16,
            "qk_norm": True,
            "first_dense_layers": 1,
            "ffn_width": 48 * m,
            "experts": {
                "kind": "swiglu",
                "num_experts": EXPERTS * experts,
                "experts_per_token": VISITS * experts,
                "width": EXPERT_WIDTH * (m if expert_width is None else expert_width),
            },
            "router": {"gate": "sigmoid"},
            **changes,
        }
    )
