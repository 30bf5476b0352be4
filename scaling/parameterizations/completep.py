"""CompleteP and Depth-muP: hyperparameters transfer across width and depth."""

# m = width / base width, l = layers / base layers

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cached_property

from typing_extensions import override

from allometry.configs.model import CompleteP, ModelConfig
from allometry.scaling.parameterizations.base import ForwardScales
from allometry.scaling.parameterizations.mup import MuPMultipliers
from allometry.scaling.roles import ParamSpec
from allometry.scaling.update_rules import Rates


class CompletePMultipliers(MuPMultipliers):
    """muP (arXiv 2203.03466) with depth scaling, α = ``depth_alpha`` (arXiv 2505.01618, eq. 40).

    Each branch is multiplied by l^-α; for all parameters of blocks, including norms, lr is
    multiplied by l^(α-1) and epsilon by l^-α. α = 1 is CompleteP, α = 1/2 Depth-muP. Embedding,
    final norm and head do not depend on depth, as in the authors' code since its correction of
    January 2025 (EleutherAI/nanoGPT-mup).
    """

    config: CompleteP
    columns = MuPMultipliers.columns - {Rates.SGD}

    @cached_property
    def depth(self) -> Depth:
        """Multipliers that depend on depth."""
        return Depth(self.model, self.config.base_layers, self.config.depth_alpha)

    @property
    @override
    def forward(self) -> ForwardScales:
        """Multipliers of muP, with scaled branches."""
        return replace(super().forward, residual=self.depth.branch)

    @override
    def other_rate(self, spec: ParamSpec) -> float:
        """Return l^(α-1) inside blocks."""
        return self.depth.rate(spec)

    @override
    def epsilon(self, spec: ParamSpec) -> float:
        """Return 1/m, inside blocks x l^-α."""
        return super().epsilon(spec) * self.depth.epsilon(spec)


class Depth:
    """Depth multipliers of CompleteP; ``base_layers`` None: all are 1."""

    def __init__(self, model: ModelConfig, base_layers: int | None, alpha: float) -> None:
        self._l = float(Fraction(model.num_layers, base_layers or model.num_layers))
        self._alpha = alpha

    @property
    def branch(self) -> float:
        """Factor of each branch: l^-α."""
        return float(self._l**-self._alpha)

    def rate(self, spec: ParamSpec) -> float:
        """Return the factor of the learning rate: l^(α-1) inside blocks."""
        return float(self._l ** (self._alpha - 1.0)) if spec.in_block else 1.0

    def epsilon(self, spec: ParamSpec) -> float:
        """Return the factor of epsilon, which scales like the gradient: l^-α inside blocks."""
        return self.branch if spec.in_block else 1.0
