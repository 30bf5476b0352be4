"""Whether the projections of APOLLO fit the matrices of a model."""

from __future__ import annotations

from allometry.configs.model import ModelConfig
from allometry.configs.optimization import Apollo, OptimizerConfig
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterizations.base import rule_of
from allometry.scaling.roles import Rule


def rank_problem(rank: int, name: str, smaller: int) -> str | None:
    """Return why a matrix with this smaller side cannot have this rank; None if it can."""
    if rank <= smaller:
        return None
    return (
        f"optimizer.rank={rank} is above the smaller side of {name}, {smaller}; choose a smaller "
        "one, or null for a quarter of each"
    )


def rank_of_model_problem(model: ModelConfig, optimizer: OptimizerConfig | None) -> str | None:
    """Return why the optimizer's rank does not fit a matrix of the model; None if all fit."""
    if not isinstance(optimizer, Apollo) or optimizer.rank is None:
        return None
    for spec in inventory(model):
        if rule_of(optimizer.kind, spec.role) is Rule.APOLLO:
            found = rank_problem(optimizer.rank, spec.name, min(spec.shape[-2:]))
            if found is not None:
                return found
    return None
