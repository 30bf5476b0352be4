"""What every parameterization is made of: roles in, multipliers out."""

# m = width / base width, l = layers / base layers; σ standard deviation

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from allometry.configs.model import ModelConfig, WeightDecayRule
from allometry.configs.optimization import Muon, OptimizerConfig
from allometry.scaling.roles import ParamSpec, Role, Rule

InitKind = Literal["normal", "uniform", "ones", "zeros"]

MATRICES = frozenset({Role.HIDDEN, Role.ROUTER, Role.EXPERT_UP, Role.EXPERT_DOWN})
"""The roles between embedding and head whose weights are multiplied with activations."""

SPHERES = frozenset({Rule.MUONH, Rule.ADAMH})

_RULES: dict[str, tuple[tuple[frozenset[Role], Rule], ...]] = {
    "adamw": (),
    "muon": ((MATRICES, Rule.MUON),),
    "muonh": ((MATRICES, Rule.MUONH), (frozenset({Role.OUTPUT}), Rule.ADAMH)),
    "adamh": ((MATRICES | {Role.OUTPUT}, Rule.ADAMH),),
    "sgd_sai": ((frozenset(Role), Rule.SGD_SAI),),
    "apollo": ((MATRICES - {Role.ROUTER}, Rule.APOLLO),),
    "apollo_mini": ((MATRICES - {Role.ROUTER}, Rule.APOLLO_MINI),),
}
"""Which roles each kind of optimizer updates by which rule; all others get AdamW."""


def rule_of(optimizer: str, role: Role) -> Rule:
    """Return the update rule that parameters of this role get from this kind of optimizer."""
    return next((rule for roles, rule in _RULES[optimizer] if role in roles), Rule.ADAMW)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What one parameter gets.

    ``init_kind`` normal draws N(0, ``init_std``²), uniform U(-b, b) of that standard deviation;
    ones and zeros ignore it (0 then). ``alike``: all experts of the parameter start equal.
    ``lr``, ``weight_decay`` and ``eps`` multiply what the optimizer section says, and
    ``forgetting`` multiplies 1 - beta2. Weight decay is the coupled kind: a step takes lr x decay
    of the weight. ``sphere``: each matrix keeps its initial Frobenius norm.
    """

    init_kind: InitKind
    init_std: float
    lr: float
    weight_decay: float
    eps: float
    rule: Rule = Rule.ADAMW
    sphere: bool = False
    alike: bool = False
    forgetting: float = 1.0


@dataclass(frozen=True, slots=True)
class ForwardScales:
    """What the model multiplies in its forward pass.

    ``embedding`` the embedded tokens, ``residual`` each branch before it joins the stream,
    ``attention`` the scores q·k, ``output`` the logits, ``experts`` the sum over routed experts.
    """

    embedding: float
    residual: float
    attention: float
    output: float
    experts: float = 1.0


@dataclass(frozen=True, slots=True)
class RunScale:
    """How much a run reads: tokens of a (full) batch, and of the whole run."""

    batch_tokens: int
    total_tokens: int


class Multipliers(ABC):
    """One parameterization for one model, optimizer and run; what differs is in the subclasses.

    ``optimizer`` None: that which the parameterization is made for.
    """

    default_optimizer = "adamw"

    def __init__(
        self, model: ModelConfig, optimizer: OptimizerConfig | None, base_width: int | None
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        # Fractions, so that what is 1 at the base is exactly 1 and nothing drifts by rounding.
        self.m = Fraction(model.width, base_width or model.width)

    @property
    @abstractmethod
    def forward(self) -> ForwardScales:
        """The multipliers of the forward pass."""

    @abstractmethod
    def initial(self, spec: ParamSpec) -> tuple[InitKind, float]:
        """Return how a matrix or an embedding starts, and its σ."""

    @abstractmethod
    def width_rate(self, spec: ParamSpec, rule: Rule) -> float:
        """Return the factor on the learning rate that follows from widths and experts."""

    @abstractmethod
    def epsilon(self, spec: ParamSpec) -> float:
        """Return the factor on epsilon."""

    @property
    @abstractmethod
    def decay_rule(self) -> WeightDecayRule:
        """How weight decay follows the learning rate."""

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

    def alike(self, spec: ParamSpec) -> bool:
        """Whether all experts of a parameter start equal."""
        return False

    def resolve(self, spec: ParamSpec) -> Resolved:
        """Return what this parameter gets."""
        kind = self.optimizer.kind if self.optimizer else self.default_optimizer
        rule = rule_of(kind, spec.role)
        width_rate = self.width_rate(spec, rule)
        lr = width_rate * self.other_rate(spec)
        start: tuple[InitKind, float] = ("ones", 0.0)
        if spec.role is not Role.VECTOR:
            start = self.initial(spec)
        return Resolved(
            init_kind=start[0],
            init_std=start[1],
            lr=lr,
            weight_decay=self._decay(spec, rule, width_rate, lr),
            eps=self.epsilon(spec),
            rule=rule,
            sphere=rule in SPHERES,
            alike=self.alike(spec),
            forgetting=self.forgetting,
        )

    def _decay(self, spec: ParamSpec, rule: Rule, width_rate: float, lr: float) -> float:
        if spec.role is Role.VECTOR or rule in SPHERES:
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

    def scores(self, base_head_dim: int | None) -> float:
        """Return the multiplier of q·k: √base/H, which is 1/√H where heads keep their width."""
        width = self.model.head_width
        base = base_head_dim or width
        return 1.0 / math.sqrt(width) if base == width else math.sqrt(base) / width


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
