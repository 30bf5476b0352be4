"""What every parameterization is made of: roles in, multipliers out."""

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
from allometry.scaling.roles import ParamSpec, Role
from allometry.scaling.update_rules import OPTIMIZER_KINDS, Rates, UpdateRule, rule_of, rules_of

InitKind = Literal["normal", "uniform", "ones", "zeros"]


@dataclass(frozen=True, slots=True)
class Resolved:
    """What one parameter gets.

    ``init_kind`` normal draws N(0, ``init_std``²), uniform U(-b, b) of that standard deviation;
    ones and zeros ignore it (0 then). ``alike``: all experts of the parameter start equal.
    ``lr``, ``weight_decay`` and ``eps`` multiply what the optimizer section says, and
    ``forgetting`` multiplies 1 - beta2 of a second moment. ``rule`` is the name of its update rule
    (``update_rules.py``). Weight decay is the coupled kind: a step takes lr x decay
    of the weight. ``sphere``: each matrix keeps its initial Frobenius norm. ``frozen``: it is not
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
    """What the model multiplies in its forward pass.

    ``embedding`` the embedded tokens, ``residual`` each branch before it joins the stream,
    ``attention`` the scores q·k, ``output`` the logits, ``experts`` the sum over routed experts.
    """

    embedding: float = 1.0
    residual: float = 1.0
    attention: float = 1.0
    output: float = 1.0
    experts: float = 1.0


@dataclass(frozen=True, slots=True)
class RunScale:
    """How much a run reads: tokens of a (full) batch, and of the whole run."""

    batch_tokens: int
    total_tokens: int


class Multipliers(ABC):
    """One parameterization for one model, optimizer and run; what differs is in the subclasses.

    ``optimizer`` None: that which the parameterization is made for; ``scale`` None: the base's run.
    ``columns``: the rates that it knows. Raises UserError for an optimizer with a rule that follows
    others: never a guess.
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
        # Fractions, so that what is 1 at the base is exactly 1 and nothing drifts by rounding.
        self.m = Fraction(model.width, base_width or model.width)

    @property
    @abstractmethod
    def forward(self) -> ForwardScales:
        """The multipliers of the forward pass."""

    @abstractmethod
    def initial(self, spec: ParamSpec) -> tuple[InitKind, float]:
        """Return how what states no ``start`` of its own begins, and its σ."""

    @abstractmethod
    def width_rate(self, spec: ParamSpec, rule: UpdateRule) -> float:
        """Return the factor on the learning rate that follows from widths and experts."""

    @abstractmethod
    def epsilon(self, spec: ParamSpec) -> float:
        """Return the factor on epsilon."""

    @property
    def decay_rule(self) -> WeightDecayRule:
        """How weight decay follows the learning rate."""
        rule: WeightDecayRule = getattr(self.config, "weight_decay_rule", "coupled")
        return rule

    def other_rate(self, spec: ParamSpec) -> float:
        """Return the factor on the learning rate from depth, batch and tokens."""
        return 1.0

    def other_decay(self, spec: ParamSpec) -> float:
        """Return the factor on weight decay from all but width."""
        return 1.0

    @property
    def forgetting(self) -> float:
        """What multiplies 1 - beta2."""
        return 1.0

    def growth(self, quantity: Literal["batch_tokens", "total_tokens"], base: int | None) -> float:
        """Return this quantity of the run's ``scale`` over ``base``; 1 where one is None."""
        return getattr(self.scale, quantity) / base if self.scale and base else 1.0

    def alike(self, spec: ParamSpec) -> bool:
        """Whether all experts of a parameter start equal."""
        return False

    def resolve(self, spec: ParamSpec) -> Resolved:
        """Return what this parameter gets."""
        rule = rule_of(self.optimizer_kind, spec.role)
        width_rate = self.width_rate(spec, rule)
        lr = width_rate * self.other_rate(spec)
        return Resolved(
            *((spec.start, 0.0) if spec.start is not None else self.initial(spec)),
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
        """Raise UserError for an optimizer with a rule for whose rates there is no column."""
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
        """Return the multiplier of q·k: √base/H, which is 1/√H where heads keep their width.

        Times what ``rope_scaling`` multiplies scores by.
        """
        width = self.model.head_width
        base = base_head_dim or width
        plain = 1.0 / math.sqrt(width) if base == width else math.sqrt(base) / width
        return plain * self.model.score_factor


def muon_rate(spec: ParamSpec, m: Fraction, optimizer: OptimizerConfig | None) -> float:
    """Return what keeps the effect of a Muon update on activations as it is at the base.

    An update should have the spectral norm √(fan_out/fan_in) (arXiv 2310.17813). Muon's has norm
    1 times its adjustment, so the factor is their quotient here over that at the base. Derived,
    for a router (fan-out finite) or any other matrix (both fans grow with width).
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
