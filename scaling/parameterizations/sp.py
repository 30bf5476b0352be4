"""Standard parameterization: only initial values depend on size."""

from __future__ import annotations

import math

from typing_extensions import override

from allometry.configs.model import StandardParameterization
from allometry.scaling.parameterizations.base import ForwardScales, InitKind, Multipliers
from allometry.scaling.roles import ParamSpec, Role
from allometry.scaling.update_rules import Rates, UpdateRule


class StandardMultipliers(Multipliers):
    """σ = 1/√fan_in for hidden matrices, routers, experts and the head; one learning rate.

    The best learning rate decreases with width, by an unknown factor.
    """

    config: StandardParameterization
    columns = frozenset(Rates)

    @property
    @override
    def forward(self) -> ForwardScales:
        """Scores are divided by √H; all other multipliers are 1."""
        return ForwardScales(attention=self.scores(None))

    @override
    def initial(self, spec: ParamSpec) -> tuple[InitKind, float]:
        if spec.role is Role.INPUT:
            return "normal", self.config.embedding_std
        return "normal", 1.0 / math.sqrt(spec.fan_in)

    @override
    def width_rate(self, spec: ParamSpec, rule: UpdateRule) -> float:
        return 1.0

    @override
    def epsilon(self, spec: ParamSpec) -> float:
        return 1.0
