"""HyperP: matrices with fixed norms, and one learning rate that depends on depth and data."""

# m = width / base width, L layers, B tokens of a batch, T tokens of a run; 0 marks the base

from __future__ import annotations

import math

from typing_extensions import override

from allometry.configs.model import HyperP
from allometry.scaling.parameterizations.base import ForwardScales, InitKind, Multipliers
from allometry.scaling.roles import MATRICES, ParamSpec, Role
from allometry.scaling.update_rules import Rates, UpdateRule

HEAD_STD = 0.64
"""Factor of the head's σ = HEAD_STD/√(base width): initial logits of RMS 0.64; σ = .02 at width
1024.
"""


class HyperPMultipliers(Multipliers):
    """HyperP (arXiv 2603.28743; github.com/microsoft/ArchScale), for MuonH or AdamH.

    ======  ========================  ===========  ===================
    role    start                     lr           forward
    ======  ========================  ===========  ===================
    input   N(0, ``embedding_std``²)  q            1
    matrix  U(±1/√fan_in)             q            branches x 1/√(2 L)
    output  N(0, ``head_std``²)       q            1, or logits / m
    vector  ones                      q            1
    ======  ========================  ===========  ===================

    q = √(B/B0) √(L0/L) (T/T0)^-0.32. Weight decay is 0 for all parameters, and epsilon has no
    factor. Width and number of experts have no factor: a step rotates a matrix by the angle lr,
    independent of its size. The norm of the head fixes the scale of the logits, so its σ is that of
    the base at every width; with the published .02 at small base widths the best rate varies more
    (docs/parameterization.md).
    """

    config: HyperP
    default_optimizer = "muonh"
    columns = frozenset({Rates.SPHERES, Rates.ADAM})

    @property
    @override
    def forward(self) -> ForwardScales:
        """Branches x 1/√(2 L), also at the base; scores √(base head width)/H."""
        divided = self.config.output_multiplier == "1/m"
        return ForwardScales(
            residual=1.0 / math.sqrt(2 * self.model.num_layers),
            attention=self.scores(self.config.base_head_dim),
            output=float(1 / self.m) if divided else 1.0,
        )

    @override
    def initial(self, spec: ParamSpec) -> tuple[InitKind, float]:
        if spec.role is Role.INPUT:
            return "normal", self.config.embedding_std
        if spec.role is Role.OUTPUT:
            return "normal", self.config.head_std or HEAD_STD / math.sqrt(self.config.base_width)
        return "uniform", 1.0 / math.sqrt(3 * spec.fan_in)

    @override
    def other_rate(self, spec: ParamSpec) -> float:
        config = self.config
        depth = math.sqrt(config.base_layers / self.model.num_layers)
        batch = self.growth("batch_tokens", config.base_batch_tokens)
        rate = depth * math.pow(batch, config.batch_exponent)
        if config.data_exponent_scope == "all" or spec.role in MATRICES:
            tokens = self.growth("total_tokens", config.base_tokens)
            rate *= math.pow(tokens, -config.data_exponent)
        return rate

    @override
    def other_decay(self, spec: ParamSpec) -> float:
        return 0.0

    @override
    def width_rate(self, spec: ParamSpec, rule: UpdateRule) -> float:
        return 1.0

    @override
    def epsilon(self, spec: ParamSpec) -> float:
        return 1.0
