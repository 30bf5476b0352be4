"""Contradictions between sections of a run's configuration."""

from __future__ import annotations

from allometry.configs.model import (
    MSSP,
    HyperP,
    ModelConfig,
    MoEModel,
    ParameterizationConfig,
    StandardParameterization,
)
from allometry.configs.optimization import OnSphere, OptimizerConfig


def contradiction(
    parameterization: ParameterizationConfig,
    model: ModelConfig,
    optimizer: OptimizerConfig | None = None,
) -> str | None:
    """Return the first contradiction as a sentence that says what to do, or None.

    Without ``optimizer`` only keys that determine the model's function are checked.
    ``scaling/parameterizations`` refuses optimizers for which a parameterization has no learning
    rates.
    """
    kind = parameterization.kind
    if model.tied_embeddings and not isinstance(parameterization, StandardParameterization):
        return (
            f"model.tied_embeddings=true contradicts parameterization.kind={kind}, whose embedding "
            "and head scale differently; set model.tied_embeddings: false"
        )
    problem = _mssp(parameterization, model) if isinstance(parameterization, MSSP) else None
    if problem is not None or optimizer is None:
        return problem
    on_spheres = isinstance(optimizer, OnSphere)
    if isinstance(parameterization, HyperP):
        if not on_spheres:
            kinds = " or ".join(s.model_fields["kind"].default for s in OnSphere.__subclasses__())
            return (
                f"optimizer.kind={optimizer.kind} contradicts parameterization.kind=hyperp, whose "
                f"matrices keep their norms; use optimizer.kind: {kinds}"
            )
        if optimizer.weight_decay:
            return (
                f"optimizer.weight_decay={optimizer.weight_decay:g} contradicts "
                "parameterization.kind=hyperp, whose norms are fixed; set weight_decay: 0"
            )
    # mssp also initializes the head to zero, but has no learning rates for optimizers on spheres.
    zero_head = getattr(parameterization, "zero_head", False)
    if on_spheres and zero_head and not isinstance(parameterization, MSSP):
        return (
            f"parameterization.zero_head=true contradicts optimizer.kind={optimizer.kind}: a "
            "matrix of zeros on its sphere stays zero; set zero_head: false"
        )
    return None


def _mssp(parameterization: MSSP, model: ModelConfig) -> str | None:
    if not isinstance(model, MoEModel):
        return (
            f"parameterization.kind=mssp contradicts model.kind={model.kind}, as its rules are "
            "those of experts; use kind: mup or completep"
        )
    router = model.router
    if router.gate != "sigmoid" or router.normalize:
        return (
            f"model.router.gate={router.gate} with normalize={str(router.normalize).lower()} "
            "contradicts parameterization.kind=mssp, whose aggregation is a sum over plain sigmoid "
            "gates with a power of experts_per_token; set gate: sigmoid and normalize: false"
        )
    for regime, key, name in (
        ("I", "num_experts", "base_experts"),
        ("I", "experts_per_token", "base_experts_per_token"),
        ("II", "width", "base_expert_width"),
    ):
        value, base = getattr(model.experts, key), getattr(parameterization, name)
        if regime == parameterization.regime and value != base:
            return (
                f"model.experts.{key}={value} differs from parameterization.{name}={base}, which "
                f"regime {regime} of mssp holds fixed; keep it or choose another "
                "regime"
            )
    return None
