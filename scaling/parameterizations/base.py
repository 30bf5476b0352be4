"""Base of all parameterizations: multipliers by role."""

# m = width / base width, l = layers / base layers; σ standard deviation

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig, ParameterizationConfig, WeightDecayRule
from allometry.configs.optimization import Muon, OptimizerConfig
from allometry.scaling.roles import Normal, ParamSpec, Role, Start
from allometry.scaling.update_rules import OPTIMIZER_KINDS, Rates, UpdateRule, rule_of, rules_of

InitKind = Literal["normal", "uniform", "ones", "zeros"]


@dataclass(frozen=True, slots=True)
class Resolved:
    """Initialization and multipliers of one parameter.

    ``init_kind`` normal draws N(0, ``init_std``²), uniform U(-b, b) with this standard deviation;
    ones and zeros ignore ``init_std`` (then 0). ``alike``: all experts of the parameter start
    equal. ``lr``, ``weight_decay`` and ``eps`` multiply the values of the optimizer section, and
    ``forgetting`` multiplies 1 - beta2 of a second moment. ``rule`` is the name of the update rule
    (``update_rules.py``). Weight decay is coupled: a step subtracts lr x decay of the weight.
    ``sphere``: each matrix keeps its initial Frobenius norm. ``frozen``: the parameter is not
    trained.
    """

    init_kind: InitKind
    init_std: float
    lr: float
    weight_decay: float
    eps: float
    rule: str = "adamw"
    sphere: bool = False
    alike: bool = False
    forgetting: float = 1.0
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class ForwardScales:
    """Multipliers of the forward pass.

    ``embedding`` multiplies the embedded tokens, ``residual`` each branch before it is added to the
    residual stream, ``attention`` the scores q·k, ``output`` the logits, ``experts`` the sum over
    routed experts.
    """

    embedding: float = 1.0
    residual: float = 1.0
    attention: float = 1.0
    output: float = 1.0
    experts: float = 1.0


@dataclass(frozen=True, slots=True)
class RunScale:
    """Tokens of a (full) batch, and of the complete run."""

    batch_tokens: int
    total_tokens: int


class Multipliers(ABC):
    """Base class of a parameterization for one model, optimizer and run.

    ``optimizer`` None: the default of the parameterization; ``scale`` None: the base's run.
    ``columns``: supported types of learning rates. Raises UserError for an optimizer with a rule of
    another type; rates are never guessed.
    """

    default_optimizer = "adamw"
    columns: ClassVar[frozenset[Rates]]

    def __init__(
        self,
        config: ParameterizationConfig,
        model: ModelConfig,
        optimizer: OptimizerConfig | None,
        scale: RunScale | None,
    ) -> None:
        self.config, self.model, self.optimizer, self.scale = config, model, optimizer, scale
        self.optimizer_kind = optimizer.kind if optimizer else self.default_optimizer
        self.check()
        base_width: int | None = getattr(config, "base_width", None)
        # Fractions: multipliers at the base are exactly 1, without rounding errors.
        self.m = Fraction(model.width, base_width or model.width)

    @property
    @abstractmethod
    def forward(self) -> ForwardScales:
        """Multipliers of the forward pass."""

    @abstractmethod
    def initial(self, spec: ParamSpec) -> tuple[InitKind, float]:
        """Return the initialization and σ of a parameter without a ``start`` of its own."""

    @abstractmethod
    def width_rate(self, spec: ParamSpec, rule: UpdateRule) -> float:
        """Return the factor of the learning rate from width and number of experts."""

    @abstractmethod
    def epsilon(self, spec: ParamSpec) -> float:
        """Return the factor of epsilon."""

    @property
    def decay_rule(self) -> WeightDecayRule:
        """Dependence of weight decay on the learning rate."""
        rule: WeightDecayRule = getattr(self.config, "weight_decay_rule", "coupled")
        return rule

    def other_rate(self, spec: ParamSpec) -> float:
        """Return the factor of the learning rate from depth, batch and tokens."""
        return 1.0

    def other_decay(self, spec: ParamSpec) -> float:
        """Return the factor of weight decay from all but width."""
        return 1.0

    @property
    def forgetting(self) -> float:
        """Factor of 1 - beta2."""
        return 1.0

    def growth(self, quantity: Literal["batch_tokens", "total_tokens"], base: int | None) -> float:
        """Return the run's ``scale`` in this quantity over ``base``; 1 if either is None."""
        return getattr(self.scale, quantity) / base if self.scale and base else 1.0

    def alike(self, spec: ParamSpec) -> bool:
        """Return True if all experts of a parameter start equal."""
        return False

    def resolve(self, spec: ParamSpec) -> Resolved:
        """Return the initialization and multipliers of a parameter."""
        rule = rule_of(self.optimizer_kind, spec.role)
        width_rate = self.width_rate(spec, rule)
        lr = width_rate * self.other_rate(spec)
        return Resolved(
            *(_started(spec.start) if spec.start is not None else self.initial(spec)),
            lr=lr,
            weight_decay=self._decay(spec, rule, width_rate, lr),
            eps=self.epsilon(spec),
            rule=rule.name,
            sphere=rule.on_sphere,
            alike=self.alike(spec),
            forgetting=self.forgetting,
        )

    def _decay(self, spec: ParamSpec, rule: UpdateRule, width_rate: float, lr: float) -> float:
        if spec.role is Role.VECTOR or rule.on_sphere:
            return 0.0
        match self.decay_rule:
            case "coupled":
                factor = 1.0
            case "mup":
                factor = 1.0 / width_rate
            case "sqrt":
                factor = math.sqrt(1.0 / width_rate)
            case "independent":  # parameter_groups divides by the learning rate of the config
                factor = 1.0 / lr
        return factor * self.other_decay(spec)

    def check(self) -> None:
        """Raise UserError if the optimizer has a rule with an unsupported type of learning rate."""
        for rule in rules_of(self.optimizer_kind):
            if rule.rates in self.columns:
                continue
            known = " and ".join(rates for rates in Rates if rates in self.columns)
            fits = [k for k in OPTIMIZER_KINDS if {r.rates for r in rules_of(k)} <= self.columns]
            raise UserError(
                f"optimizer.kind={self.optimizer_kind} contradicts parameterization.kind="
                f"{self.config.kind}, whose learning rates are known for {known} only, while "
                f"{rule.name} follows {rule.rates}; use optimizer.kind: {', '.join(fits)}"
            )

    def scores(self, base_head_dim: int | None) -> float:
        """Return the multiplier of q·k: √base/H, which is 1/√H for a constant head width.

        The result includes the factor of scores of ``rope_scaling``.
        """
        width = self.model.head_width
        base = base_head_dim or width
        plain = 1.0 / math.sqrt(width) if base == width else math.sqrt(base) / width
        return plain * self.model.score_factor


def _started(start: Start) -> tuple[InitKind, float]:
    """Return the initialization and σ of a start that a module states."""
    return ("normal", start.std) if isinstance(start, Normal) else (start, 0.0)


def muon_rate(spec: ParamSpec, m: Fraction, optimizer: OptimizerConfig | None) -> float:
    """Return the factor that keeps the effect of a Muon update on activations equal to the base.

    An update should have the spectral norm √(fan_out/fan_in) (arXiv 2310.17813). Muon's update has
    norm 1 times its adjustment, so the factor is the quotient of both at this size over that at the
    base. Derived, for a router (constant fan-out) and for other matrices (both fans grow with
    width).
    """
    assert isinstance(optimizer, Muon), optimizer
    base_in = spec.fan_in / m
    base_out = Fraction(spec.fan_out) if spec.role is Role.ROUTER else spec.fan_out / m

    def squared(out: Fraction, into: Fraction) -> Fraction:
        match optimizer.adjust:
            case "none":
                adjusted = Fraction(1)
            case "original":
                adjusted = max(Fraction(1), out / into)
            case "match_rms_adamw":
                adjusted = max(out, into)
        return out / into / adjusted

    here = squared(Fraction(spec.fan_out), Fraction(spec.fan_in))
    return math.sqrt(here / squared(base_out, base_in))
