"""MSSP: scaling of width, number of experts and visits for mixtures of sigmoid-gated experts."""

# n = width, e = expert width, M = experts, K = visits, each over its value at the base

from __future__ import annotations

import math
from fractions import Fraction
from functools import cached_property

from typing_extensions import override

from allometry.configs.model import MSSP, MoEModel
from allometry.scaling.parameterizations.base import ForwardScales, InitKind, Multipliers
from allometry.scaling.parameterizations.completep import Depth
from allometry.scaling.roles import EXPERTS, ParamSpec, Role
from allometry.scaling.update_rules import Rates, UpdateRule


class MSSPMultipliers(Multipliers):
    """MSSP (arXiv 2605.14200; github.com/vankadara-lab/mssp-moe): y = K^-α Σ gate_i E_i(x).

    α is 0 in regime I and 1 in II and III. Exponents of the authors' tables as ratios to the base,
    with N = n, M and E = e; σ at the base is 1/√fan_in except for embedding, head and routers of I:

    ======  ===========  =============  ==========  =======  ============
    regime  role         σ              lr (SGD)    (Adam)   epsilon
    ======  ===========  =============  ==========  =======  ============
    all     input        1              n           1        1/n
    all     vector       ones           n           1        1/n
    all     hidden       1/√fan_in      1           1/n      1/n
    all     output       0 (or 1/n)     1/n         1/n      1
    I       router       0              1/n         1/n      1/n
    I       up, down     1/√fan_in      1           1/n      1/n
    II      router, up   1/√fan_in      M/n         1/n      1/M
    II      down         √M /√fan_in    M n         1        1/(n M)
    III     router       1/√fan_in      1           1/n      1/M
    III     up, down     1/√fan_in, ⁼   M           1/n      1/(n M)
    ======  ===========  =============  ==========  =======  ============

    ⁼: all experts start equal. Averages over independently drawn experts shrink as M^-1/2 while
    updates do not; √M (II) and equal experts (III) correct this, and one cannot replace the other.
    The Adam columns are the authors' heuristic; the SGD columns are derived. Two additions are not
    from the authors: the SGD column is divided by SGD-SaI's own factor, and depth scaling is
    CompleteP's.
    """

    config: MSSP
    model: MoEModel
    columns = frozenset({Rates.ADAM, Rates.SGD})

    @cached_property
    def depth(self) -> Depth:
        """Multipliers that depend on depth."""
        return Depth(self.model, self.config.base_layers, self.config.depth_alpha)

    @property
    def experts(self) -> Fraction:
        """M, the number of experts relative to the base."""
        return Fraction(self.model.experts.num_experts, self.config.base_experts)

    @property
    @override
    def forward(self) -> ForwardScales:
        """The sum over experts x K^-α; the head has no factor, since its σ and lr shrink."""
        visits = self.model.experts.experts_per_token
        return ForwardScales(
            residual=self.depth.branch,
            attention=self.scores(self.config.base_head_dim),
            experts=1.0
            if self.config.regime == "I"
            else self.config.base_experts_per_token / visits,
        )

    @override
    def initial(self, spec: ParamSpec) -> tuple[InitKind, float]:
        std = 1.0 / math.sqrt(spec.fan_in)
        match spec.role:
            case Role.INPUT:
                return "normal", self.config.embedding_std
            case Role.OUTPUT if self.config.zero_head:
                return "zeros", 0.0
            case Role.OUTPUT:
                return "normal", 1.0 / math.sqrt(spec.fan_in / self.m) / float(self.m)
            case Role.ROUTER if self.config.regime == "I":
                return "zeros", 0.0
            case Role.EXPERT_DOWN if self.config.regime == "II":
                return "normal", math.sqrt(self.experts) * std
            case _:
                return "normal", std

    @override
    def alike(self, spec: ParamSpec) -> bool:
        """Return True if all experts start equal: in regime III."""
        return self.config.regime == "III" and spec.role in EXPERTS

    @override
    def width_rate(self, spec: ParamSpec, rule: UpdateRule) -> float:
        """Return the Adam column, or the SGD column divided by a rule's own factor (SGD-SaI's)."""
        if rule.rates is Rates.SGD:
            own = self._elements(spec.role) if rule.scales_with_root_of_size else 1
            return float(self._sgd(spec.role)) / math.sqrt(own)
        assert rule.rates is Rates.ADAM, rule.name
        alone = spec.role is Role.EXPERT_DOWN and self.config.regime == "II"
        return 1.0 if alone or spec.role in (Role.INPUT, Role.VECTOR) else float(1 / self.m)

    @override
    def other_rate(self, spec: ParamSpec) -> float:
        return self.depth.rate(spec)

    @override
    def epsilon(self, spec: ParamSpec) -> float:
        n, experts, regime, role = self.m, self.experts, self.config.regime, spec.role
        if role is Role.OUTPUT:
            grown = Fraction(1)
        elif regime == "I" or role in (Role.INPUT, Role.VECTOR, Role.HIDDEN):
            grown = n
        elif role is Role.ROUTER or (regime == "II" and role is Role.EXPERT_UP):
            grown = experts
        else:
            grown = n * experts
        return float(1 / grown) * self.depth.epsilon(spec)

    def _sgd(self, role: Role) -> Fraction:
        n, experts, one = self.m, self.experts, Fraction(1)
        mixture = {
            "I": (1 / n, one, one),
            "II": (experts / n, experts / n, experts * n),
            "III": (one, experts, experts),
        }[self.config.regime]
        of_experts = zip((Role.ROUTER, *EXPERTS), mixture, strict=True)
        return {Role.HIDDEN: one, Role.OUTPUT: 1 / n, **dict(of_experts)}.get(role, n)

    def _elements(self, role: Role) -> Fraction:
        """Return the elements of one matrix relative to the base; each expert is one matrix."""
        width = Fraction(self.model.experts.width, self.config.base_expert_width)
        other = dict.fromkeys(EXPERTS, width)
        return self.m * {**other, Role.HIDDEN: self.m, Role.ROUTER: self.experts}.get(role, 1)
