"""muP, the maximal update parameterization: hyperparameters transfer across width."""

# m = width / base width; σ standard deviation

from __future__ import annotations

import math
from fractions import Fraction

from typing_extensions import override

from allometry.configs.model import CompleteP, MaximalUpdateParameterization, MuPPlusPlus
from allometry.configs.optimization import OptimizerConfig
from allometry.scaling.parameterizations.base import ForwardScales, InitKind, Multipliers, muon_rate
from allometry.scaling.roles import MATRICES, ParamSpec, Role
from allometry.scaling.update_rules import Rates, UpdateRule


class MuPMultipliers(Multipliers):
    """muP for Adam (arXiv 2203.03466, Table 8), with a constant head and scaled logits.

    ======  ===========================  ========  =============  =======  =====================
    role    init σ                       lr        weight decay   epsilon  forward
    ======  ===========================  ========  =============  =======  =====================
    input   ``embedding_std``            1         1              1/m      1
    hidden  1/√fan_in (= σ at base /√m)  1/m       m, √m or 1     1/m      1
    expert  1/√fan_in, its own           1/m       m, √m or 1     1/m      1
    router  1/√fan_in                    1/m       m, √m or 1     1/m      1
    output  1/√(fan_in at base), or 0    1         1              1/m      logits / m
    vector  ones                         1         0              1/m      1
    scores                                                                 √(base head width)/H
    ======  ===========================  ========  =============  =======  =====================

    Weight decay x m keeps lr x decay of hidden matrices constant; x √m keeps their largest singular
    values (arXiv 2510.15262); ``coupled`` does not scale it.

    Epsilon scales like the gradient: with logits divided by m and a constant σ of the head, the
    gradient of the loss in the residual stream is Θ(1/m), and so is that of every parameter (the
    head's through the division itself); Adam is width-invariant only if epsilon shrinks equally
    (verified by a test). The gains of qk_norm are shared by all heads, so their gradient shrinks
    less; a smaller epsilon does not affect them.

    The base model has ``base_width``, and all its other widths are in proportion, so each hidden
    fan-in is m times that of the base. Only head width may differ: ``base_head_dim``. Experts are
    hidden matrices: their number is constant and their widths grow in proportion. A router has a
    constant fan-out, like the head. With σ 1/√fan_in its logits are Θ(1) at the start, and with lr
    1/m each step changes them by Θ(1): for Adam this equals lr 1 with the logits divided by m.
    Columns for other rates than Adam's differ only in the learning rates (``mup_rate``).
    """

    config: MaximalUpdateParameterization | CompleteP | MuPPlusPlus
    columns = frozenset({Rates.ADAM, Rates.SGD, Rates.MUON, Rates.SPHERES})

    @property
    @override
    def forward(self) -> ForwardScales:
        """Logits are divided by m; scores by H if the head width grows."""
        scores = self.scores(self.config.base_head_dim)
        return ForwardScales(attention=scores, output=float(1 / self.m))

    @override
    def initial(self, spec: ParamSpec) -> tuple[InitKind, float]:
        match spec.role:
            case Role.INPUT:
                return "normal", self.config.embedding_std
            case Role.OUTPUT if self.config.zero_head:
                return "zeros", 0.0
            case Role.OUTPUT:
                return "normal", 1.0 / math.sqrt(spec.fan_in / self.m)
            case _:
                return "normal", 1.0 / math.sqrt(spec.fan_in)

    @override
    def width_rate(self, spec: ParamSpec, rule: UpdateRule) -> float:
        """Return 1/m for hidden matrices with Adam, 1 for other parameters."""
        return mup_rate(spec, rule, self.m, self.optimizer)

    @override
    def epsilon(self, spec: ParamSpec) -> float:
        return float(1 / self.m)


def mup_rate(
    spec: ParamSpec, rule: UpdateRule, m: Fraction, optimizer: OptimizerConfig | None
) -> float:
    """Return the factor of the learning rate of a rule for m times the base width.

    Adam, and rules with updates of Adam's size (APOLLO): 1/m for hidden matrices, routers and
    experts, else 1. Muon: ``muon_rate``. On a sphere the step is an angle and has no factor (arXiv
    2603.28743, theorem 2). SGD (arXiv 2203.03466, Table 8): m for parameters with one growing
    dimension, and the ratio of fan-out to fan-in for matrices: 1 if both grow, 1/m for a router.
    SGD-SaI's own factor, about the root of a matrix's number of elements, is divided out (derived).
    """
    match rule.rates:
        case Rates.ADAM:
            return float(1 / m) if spec.role in MATRICES else 1.0
        case Rates.MUON:
            return muon_rate(spec, m, optimizer)
        case Rates.SPHERES:
            return 1.0
        case Rates.SGD:
            both_grow = spec.role in MATRICES and spec.role is not Role.ROUTER
            sgd = {Role.ROUTER: 1 / m}.get(spec.role, Fraction(1) if both_grow else m)
            own = (m * m if both_grow else m) if rule.scales_with_root_of_size else 1
            return float(sgd) / math.sqrt(own)
