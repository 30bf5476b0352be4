"""muP++: muP with branches scaled by depth and one learning rate factor for all parameters."""

# m = width / base width, l = layers / base layers, b = batch / base batch

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property

from typing_extensions import override

from allometry.configs.errors import UserError
from allometry.configs.model import MuPPlusPlus
from allometry.scaling.parameterizations.base import ForwardScales
from allometry.scaling.parameterizations.mup import MuPMultipliers
from allometry.scaling.roles import ParamSpec, Role
from allometry.scaling.update_rules import Rates, rules_of


class MuPPlusPlusMultipliers(MuPMultipliers):
    """muP with the following differences, as in ArchScale (github.com/microsoft/ArchScale).

    Branches x 1/√(2 L), also at the base; every learning rate x 1/√l and x √b (``batch_rule``);
    constant epsilon; no weight decay of embedding and head.
    """

    columns = MuPMultipliers.columns - {Rates.SGD}

    config: MuPPlusPlus

    @cached_property
    def _b(self) -> float:
        return self.growth("batch_tokens", self.config.base_batch_tokens)

    @override
    def check(self) -> None:
        """Raise UserError also for a ``batch_rule`` that the optimizer does not support."""
        super().check()
        kind, rule = self.optimizer_kind, self.config.batch_rule
        if rule != "sqrt" and not any(r.second_moment for r in rules_of(kind)):
            raise UserError(
                f"parameterization.batch_rule={rule} says how a second moment "
                f"forgets, and optimizer.kind={kind} has none; use batch_rule: sqrt"
            )
        beta2: float | None = getattr(self.optimizer, "beta2", None)
        if beta2 is not None and (1.0 - beta2) * self.forgetting >= 1.0 != self.forgetting:
            raise UserError(
                f"parameterization.batch_rule={rule} multiplies 1 - optimizer.beta2="
                f"{1.0 - beta2:g} by {self.forgetting:g}, which leaves no second moment; choose a "
                "smaller batch, a larger beta2 or batch_rule: sqrt"
            )

    @property
    @override
    def forward(self) -> ForwardScales:
        """Multipliers of muP, with branches x 1/√(2 L)."""
        return replace(super().forward, residual=1.0 / math.sqrt(2 * self.model.num_layers))

    @override
    def other_rate(self, spec: ParamSpec) -> float:
        """Return √b/√l; 1/√l with ``batch_rule: sdew``."""
        batch = 1.0 if self.config.batch_rule == "sdew" else math.sqrt(self._b)
        return batch / math.sqrt(self.model.num_layers / self.config.base_layers)

    @override
    def other_decay(self, spec: ParamSpec) -> float:
        """Return 0 for embedding and head; else √b with ``batch_rule: sdew`` and 1 otherwise."""
        if spec.role in (Role.INPUT, Role.OUTPUT):
            return 0.0
        return math.sqrt(self._b) if self.config.batch_rule == "sdew" else 1.0

    @override
    def epsilon(self, spec: ParamSpec) -> float:
        """Return 1, or 1/√b for the rules in which gradient noise sets the scale."""
        return 1.0 if self.config.batch_rule == "sqrt" else 1.0 / math.sqrt(self._b)

    @property
    @override
    def forgetting(self) -> float:
        return {"sqrt": 1.0, "sde": self._b, "sdew": math.sqrt(self._b)}[self.config.batch_rule]
