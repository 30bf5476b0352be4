"""From a parameter's role to its initialisation, learning rate, decay and epsilon."""

# m = width / base width; σ standard deviation

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from allometry.configs.errors import UserError
from allometry.configs.model import (
    MaximalUpdateParameterization,
    ModelConfig,
    MoEModel,
    ParameterizationConfig,
)
from allometry.scaling.inventory import inventory
from allometry.scaling.roles import ParamSpec, Role


@dataclass(frozen=True, slots=True)
class Resolved:
    """What one parameter gets.

    ``init_kind`` normal draws N(0, ``init_std``²); ones and zeros ignore ``init_std`` (0 then).
    ``lr``, ``weight_decay`` and ``eps`` multiply what the optimizer section says. Weight decay is
    the coupled kind: a step takes lr x decay of the weight.
    """

    init_kind: Literal["normal", "ones", "zeros"]
    init_std: float
    lr: float
    weight_decay: float
    eps: float


@dataclass(frozen=True, slots=True)
class ForwardScales:
    """What the model multiplies in its forward pass.

    ``embedding`` the embedded tokens, ``residual`` each branch before it joins the stream,
    ``attention`` the scores q·k, ``output`` the logits.
    """

    embedding: float
    residual: float
    attention: float
    output: float


class Parameterization:
    """The rules of one parameterization for one model: pure, and the same on every rank.

    ``sp``: σ = 1/√fan_in for hidden matrices, routers, experts and the head, ``embedding_std``
    for the embedding, norms one; one learning rate for all; vectors do not decay.

    ``mup`` for Adam (arXiv 2203.03466, Table 8, in the form with a constant head and a scaled
    logit). With m = width / base_width:

    ======  ===========================  ========  =============  =======  =====================
    role    init σ                       lr        weight decay   epsilon  forward
    ======  ===========================  ========  =============  =======  =====================
    input   ``embedding_std``            1         1              1/m      1
    hidden  1/√fan_in (= σ at base /√m)  1/m       m or 1         1/m      1
    expert  1/√fan_in, its own           1/m       m or 1         1/m      1
    router  1/√fan_in                    1/m       m or 1         1/m      1
    output  1/√(fan_in at base)          1         1              1/m      logits / m
    vector  ones                         1         0              1/m      1
    scores                                                                 √(base head width)/H
    ======  ===========================  ========  =============  =======  =====================

    Weight decay x m keeps lr x decay of hidden matrices constant; ``coupled`` leaves it alone.
    Epsilon follows the gradient: with logits divided by m and σ of the head constant, the
    gradient of the loss in the residual stream is Θ(1/m), and so is that of every parameter
    (the head's through the division itself); Adam is width-invariant only if epsilon shrinks
    alike (a test measures this). The gains of qk_norm are shared by all heads and their gradient
    shrinks less; a smaller epsilon does them no harm.

    The model at the base has ``base_width`` and every other width in proportion, so each hidden
    fan-in is m times that at the base. Only head width may differ: ``base_head_dim``.

    Experts are hidden matrices: their number stays and their widths grow in proportion. A router
    has a finite fan-out, as the head has. With σ 1/√fan_in its logits are Θ(1) at the start, and
    with lr 1/m each step moves them by Θ(1): for Adam the same as lr 1 with the logits divided by
    m. That it transfers is reasoned, not measured: no coordinate check of a mixture has run yet.

    At the base every multiplier is exactly 1 and ``sp`` and ``mup`` are the same model.
    """

    def __init__(self, config: ParameterizationConfig, model: ModelConfig) -> None:
        self.config = config
        self.model = model
        ratio = Fraction(1)
        if isinstance(config, MaximalUpdateParameterization):
            if model.tied_embeddings:
                raise UserError(
                    "model.tied_embeddings=true contradicts parameterization.kind=mup, whose "
                    "embedding and head scale differently; set model.tied_embeddings: false"
                )
            ratio = Fraction(model.width, config.base_width)
        # A fraction, so that what is 1 at the base is exactly 1 and nothing drifts by rounding.
        self._ratio = ratio

    @property
    def width_ratio(self) -> float:
        """m, the width relative to the base (1 for ``sp``)."""
        return float(self._ratio)

    @property
    def forward(self) -> ForwardScales:
        """The multipliers of the forward pass."""
        head_width = self.model.head_width
        attention = 1.0 / math.sqrt(head_width)
        if isinstance(self.config, MaximalUpdateParameterization):
            base = self.config.base_head_dim or head_width
            if base != head_width:
                attention = math.sqrt(base) / head_width
        return ForwardScales(
            embedding=1.0, residual=1.0, attention=attention, output=float(1 / self._ratio)
        )

    def resolve(self, spec: ParamSpec) -> Resolved:
        """Return what this parameter gets."""
        shrink = float(1 / self._ratio)
        match spec.role:
            case Role.INPUT:
                return Resolved("normal", self.config.embedding_std, 1.0, 1.0, shrink)
            case Role.HIDDEN | Role.ROUTER | Role.EXPERT_UP | Role.EXPERT_DOWN:
                std = 1.0 / math.sqrt(spec.fan_in)
                return Resolved("normal", std, shrink, self._hidden_decay(), shrink)
            case Role.OUTPUT:
                std = 1.0 / math.sqrt(spec.fan_in / self._ratio)
                return Resolved("normal", std, 1.0, 1.0, shrink)
            case Role.VECTOR:
                return Resolved("ones", 0.0, 1.0, 0.0, shrink)

    def describe(self) -> dict[str, Any]:
        """Return the rules as JSON for a run's record."""
        return {
            **self.config.model_dump(mode="json"),
            "width_ratio": self.width_ratio,
            "forward": asdict(self.forward),
            "roles": {
                role.value: asdict(self.resolve(example))
                for role, example in self._examples().items()
            },
        }

    def _hidden_decay(self) -> float:
        rule = getattr(self.config, "weight_decay_rule", "coupled")
        return float(self._ratio) if rule == "mup" else 1.0

    def _examples(self) -> dict[Role, ParamSpec]:
        """Return one parameter for each role whose multipliers all its kin share."""
        width, vocabulary = self.model.width, self.model.vocab_size
        examples = {
            Role.INPUT: ParamSpec("", Role.INPUT, (vocabulary, width), vocabulary, width),
            Role.HIDDEN: ParamSpec("", Role.HIDDEN, (width, width), width, width),
            Role.OUTPUT: ParamSpec("", Role.OUTPUT, (vocabulary, width), width, vocabulary),
            Role.VECTOR: ParamSpec("", Role.VECTOR, (width,), 1, width),
        }
        if isinstance(self.model, MoEModel):
            mixed = (Role.ROUTER, Role.EXPERT_UP, Role.EXPERT_DOWN)
            examples |= {spec.role: spec for spec in inventory(self.model) if spec.role in mixed}
        return examples
