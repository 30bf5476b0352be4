"""CompleteP and Depth-muP: what is tuned at one width and depth holds at any."""

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
    """muP (arXiv 2203.03466) and, with α = ``depth_alpha`` (arXiv 2505.01618, equation 40):

    each branch x l^-α; all parameters of blocks, norms included: lr x l^(α-1), epsilon x l^-α.
    α = 1 is CompleteP, α = 1/2 Depth-muP. Embedding, final norm and head know no depth, as in the
    authors' code since its correction of January 2025 (EleutherAI/nanoGPT-mup).
    """

    config: CompleteP
    columns = MuPMultipliers.columns - {Rates.SGD}

    @cached_property
    def depth(self) -> Depth:
        """The multipliers that follow from depth."""
        return Depth(self.model, self.config.base_layers, self.config.depth_alpha)

    @property
    @override
    def forward(self) -> ForwardScales:
        """muP's, with smaller branches."""
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
    """The depth multipliers of CompleteP; ``base_layers`` None: none."""

    def __init__(self, model: ModelConfig, base_layers: int | None, alpha: float) -> None:
        self._l = float(Fraction(model.num_layers, base_layers or model.num_layers))
        self._alpha = alpha

    @property
    def branch(self) -> float:
        """What multiplies each branch: l^-α."""
        return float(self._l**-self._alpha)

    def rate(self, spec: ParamSpec) -> float:
        """Return the factor on the learning rate: l^(α-1) inside blocks."""
        return float(self._l ** (self._alpha - 1.0)) if spec.in_block else 1.0

    def epsilon(self, spec: ParamSpec) -> float:
        """Return the factor on epsilon, which follows the gradient: l^-α inside blocks."""
        return self.branch if spec.in_block else 1.0
