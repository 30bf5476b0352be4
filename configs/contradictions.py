"""What sections of a run's description cannot mean together."""

from __future__ import annotations

from allometry.configs.model import (
    MSSP,
    HyperP,
    ModelConfig,
    MoEModel,
    ParameterizationConfig,
    StandardParameterization,
)
from allometry.configs.optimization import AdamH, MuonH, OptimizerConfig, SGDSaI


def contradiction(
    parameterization: ParameterizationConfig,
    model: ModelConfig,
    optimizer: OptimizerConfig | None = None,
) -> str | None:
    """Return the first contradiction as a sentence with what to do, None if there is none.

    Without ``optimizer`` only what a model's function depends on is judged.
    """
    kind = parameterization.kind
    if model.tied_embeddings and not isinstance(parameterization, StandardParameterization):
        return (
            f"model.tied_embeddings=true contradicts parameterization.kind={kind}, whose embedding "
            "and head scale differently; set model.tied_embeddings: false"
        )
    if isinstance(parameterization, MSSP):
        found = _mssp(parameterization, model)
        if found is not None:
            return found
    return None if optimizer is None else _of_optimizer(parameterization, optimizer)


def _mssp(parameterization: MSSP, model: ModelConfig) -> str | None:
    if not isinstance(model, MoEModel):
        return (
            f"parameterization.kind=mssp contradicts model.kind={model.kind}, as its rules are "
            "those of experts; use kind: mup or completep"
        )
    router, experts = model.router, model.experts
    if router.gate != "sigmoid" or router.normalize:
        return (
            f"model.router.gate={router.gate} with normalize={str(router.normalize).lower()} "
            "contradicts parameterization.kind=mssp, whose aggregation is a sum over plain sigmoid "
            "gates with a power of experts_per_token; set gate: sigmoid and normalize: false"
        )
    fixed = {
        "I": {
            "num_experts": parameterization.base_experts,
            "experts_per_token": parameterization.base_experts_per_token,
        },
        "II": {"width": parameterization.base_expert_width},
        "III": {},
    }[parameterization.regime]
    for key, base in fixed.items():
        value = getattr(experts, key)
        if value != base:
            name = {"width": "base_expert_width"}.get(key, f"base_{key.removeprefix('num_')}")
            return (
                f"model.experts.{key}={value} differs from parameterization.{name}={base}, which "
                f"regime {parameterization.regime} of mssp holds fixed; keep it or choose another "
                "regime"
            )
    return None


def _of_optimizer(
    parameterization: ParameterizationConfig, optimizer: OptimizerConfig
) -> str | None:
    kind = parameterization.kind
    on_spheres = isinstance(optimizer, MuonH | AdamH)
    if isinstance(parameterization, HyperP):
        if not on_spheres:
            return (
                f"optimizer.kind={optimizer.kind} contradicts parameterization.kind=hyperp, whose "
                "matrices keep their norms; use optimizer.kind: muonh or adamh"
            )
        if optimizer.weight_decay:
            return (
                f"optimizer.weight_decay={optimizer.weight_decay:g} contradicts "
                "parameterization.kind=hyperp, whose norms are fixed; set weight_decay: 0"
            )
    if isinstance(parameterization, MSSP) and optimizer.kind in ("muon", "muonh", "adamh"):
        return (
            f"optimizer.kind={optimizer.kind} contradicts parameterization.kind=mssp, whose rules "
            "are known for Adam and SGD only; use adamw, apollo, apollo_mini or sgd_sai"
        )
    if on_spheres and getattr(parameterization, "zero_head", False):
        return (
            f"parameterization.zero_head=true contradicts optimizer.kind={optimizer.kind}: a "
            "matrix of zeros on its sphere stays zero; set zero_head: false"
        )
    if isinstance(optimizer, SGDSaI) and kind in ("completep", "mupp"):
        return (
            f"optimizer.kind=sgd_sai contradicts parameterization.kind={kind}, whose depth rules "
            "are those of Adam; use kind: mup or another optimizer"
        )
    return None
