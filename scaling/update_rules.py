"""What each update rule is: the one table that groups, states, rates and records read.

A new optimizer touches three source files: ``configs/optimization.py`` (its section), this one (its
row) and ``optim/NAME.py`` (its function, which ``optim/optimizer.py`` finds by its name).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

from allometry.configs.errors import UserError
from allometry.configs.execution import Zero
from allometry.configs.optimization import Apollo, Fp8StatesConfig, OptimizerConfig
from allometry.configs.run import RunConfig
from allometry.scaling.overrides import is_frozen
from allometry.scaling.roles import MATRICES, ParamSpec, Role

StateSize = Callable[[int, OptimizerConfig | None], Fraction]
"""(smaller side of a matrix, optimizer) -> fp32 numbers kept for each element of a parameter."""


class Rates(StrEnum):
    """Whose learning rates a rule follows as a model grows: the column of a parameterization.

    ``Adam``: every element moves by about the rate, whatever the size of the gradient. ``SGD``: an
    update is in proportion to the gradient. ``Muon``: it is an orthogonal matrix times a factor of
    its shape. ``spheres``: it is an angle, which needs no factor.
    """

    ADAM = "Adam"
    SGD = "SGD"
    MUON = "Muon"
    SPHERES = "spheres"


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """One row of the table.

    ``updates``: the roles that it updates in each kind of optimizer; AdamW updates the others.
    ``settings``: the keys of the optimizer section that a parameter group carries, besides rate,
    decay and epsilon; ``betas``: whether it carries (beta1, beta2). ``state_size``: what is kept
    beside a parameter for each of its elements, ``numbers_per_parameter`` (counts of steps) and
    ``numbers_per_matrix`` (radii of spheres, signal-to-noise ratios): what is kept once for each.
    ``second_moment``: whether updates are divided by the root of averaged squared gradients plus
    epsilon, whose average a larger batch may shorten. ``scales_with_root_of_size``: the rule itself
    multiplies the rate by about the root of a matrix's elements. ``elementwise``: whether an
    element's update depends on its own numbers alone, so that parts of a parameter may be updated
    one after the other. ``module``: the file of
    ``optim/``, None: ``name``.
    """

    name: str
    updates: Mapping[str, frozenset[Role]]
    rates: Rates
    state_size: StateSize
    numbers_per_parameter: int = 0
    numbers_per_matrix: int = 0
    settings: tuple[str, ...] = ()
    betas: bool = False
    second_moment: bool = False
    scales_with_root_of_size: bool = False
    elementwise: bool = False
    module: str | None = None

    @property
    def on_sphere(self) -> bool:
        """Whether each matrix keeps its initial Frobenius norm."""
        return self.rates is Rates.SPHERES


def projection_rank(rank: int | None, smaller: int) -> int:
    """Return APOLLO's rank (arXiv 2412.05270) for a matrix of this side; None: a quarter of it."""
    return rank or max(1, smaller // 4)


def check_ranks(rank: int | None, smaller_sides: Iterable[tuple[str, int]]) -> None:
    """Raise UserError for an ``optimizer.rank`` above a smaller side of these (name, side)."""
    for name, smaller in smaller_sides:
        if rank is not None and rank > smaller:
            raise UserError(
                f"optimizer.rank={rank} is above the smaller side of {name}, {smaller}; choose a "
                "smaller one, or null for a quarter of each"
            )


def _moments(count: int) -> StateSize:
    return lambda smaller, optimizer: Fraction(count)


def _projected(smaller: int, optimizer: OptimizerConfig | None) -> Fraction:
    rank = optimizer.rank if isinstance(optimizer, Apollo) else None
    return Fraction(2 * projection_rank(rank, smaller), smaller)


_FP32 = 4

FP8_GROUP = 128
"""Elements of a row that share a scale in an FP8 state."""

_ALL = frozenset(Role)
_OUTPUT = frozenset({Role.OUTPUT})

_MOMENTUM = ("momentum", "nesterov")
_LOW_RANK = ("scale", "refresh_steps", "norm_growth")

_ROWS = (
    UpdateRule(
        "adamw",
        {"adamw": _ALL},
        Rates.ADAM,
        _moments(2),
        numbers_per_parameter=1,
        betas=True,
        second_moment=True,
        elementwise=True,
    ),
    UpdateRule("lion", {"lion": _ALL}, Rates.ADAM, _moments(1), betas=True, elementwise=True),
    UpdateRule(
        "muon", {"muon": MATRICES}, Rates.MUON, _moments(1), settings=(*_MOMENTUM, "adjust")
    ),
    UpdateRule(
        "muonh",
        {"muonh": MATRICES},
        Rates.SPHERES,
        _moments(1),
        numbers_per_matrix=1,
        settings=(*_MOMENTUM, "step_norm"),
    ),
    UpdateRule(
        "adamh",
        {"muonh": _OUTPUT, "adamh": MATRICES | _OUTPUT},
        Rates.SPHERES,
        _moments(2),
        numbers_per_parameter=1,
        numbers_per_matrix=1,
        betas=True,
        second_moment=True,
    ),
    UpdateRule(
        "sgd_sai",
        {"sgd_sai": _ALL},
        Rates.SGD,
        _moments(1),
        numbers_per_parameter=1,
        numbers_per_matrix=1,
        settings=("momentum",),
        scales_with_root_of_size=True,
    ),
    UpdateRule(
        "apollo",
        {"apollo": MATRICES - {Role.ROUTER}},
        Rates.ADAM,
        _projected,
        settings=("rank", *_LOW_RANK),
        betas=True,
        second_moment=True,
    ),
    UpdateRule(
        "apollo_mini",
        {"apollo_mini": MATRICES - {Role.ROUTER}},
        Rates.ADAM,
        lambda smaller, optimizer: Fraction(2, smaller),
        settings=_LOW_RANK,
        betas=True,
        second_moment=True,
        module="apollo",
    ),
)

UPDATE_RULES: Mapping[str, UpdateRule] = {rule.name: rule for rule in _ROWS}
"""All rules by name, in the order in which an optimizer calls them."""

OPTIMIZER_KINDS = tuple(dict.fromkeys(kind for rule in _ROWS for kind in rule.updates))
"""Every ``optimizer.kind``."""


def rule_of(kind: str, role: Role) -> UpdateRule:
    """Return the rule by which this kind of optimizer updates parameters of this role."""
    assert kind in OPTIMIZER_KINDS, kind
    rules = (rule for rule in UPDATE_RULES.values() if role in rule.updates.get(kind, ()))
    return next(rules, UPDATE_RULES["adamw"])


def rules_of(kind: str) -> tuple[UpdateRule, ...]:
    """Return all rules that this kind of optimizer uses."""
    return tuple({rule_of(kind, role).name: rule_of(kind, role) for role in Role}.values())


def state_bytes(spec: ParamSpec, part: Sequence[int], optimizer: OptimizerConfig | None) -> int:
    """Return the bytes that an optimizer keeps for a part, of this shape, of a parameter.

    ``optimizer`` None: AdamW. Of what ``optimizer.overrides`` freezes it keeps nothing.
    """
    if is_frozen(optimizer, spec):
        return 0
    rule = rule_of(optimizer.kind if optimizer else "adamw", spec.role)
    matrices = spec.shape[0] if len(spec.shape) == 3 else 1
    once = rule.numbers_per_parameter + rule.numbers_per_matrix * matrices
    each = rule.state_size(min(spec.fan_in, spec.fan_out), optimizer)
    states = getattr(optimizer, "states", None)
    if isinstance(states, Fp8StatesConfig) and len(part) > 1:
        counted = states.rounding == "stochastic" and not rule.numbers_per_parameter
        return math.ceil(fp8_bytes(part) * each) + _FP32 * (once + counted)
    return _FP32 * (math.ceil(math.prod(part) * each) + once)


def fp8_bytes(part: Sequence[int]) -> int:
    """Return the bytes of one FP8 state of a matrix or a stack of them: a byte of each element,
    and of each group in a row a scale of four bytes and an exponent of one (``optim/dre.py``)."""
    *leading, columns = part
    return math.prod(leading) * (columns + (_FP32 + 1) * math.ceil(columns / FP8_GROUP))


def check_delayed(config: RunConfig) -> None:
    """Raise UserError where ``optimizer_states.update`` delays what its host cannot update."""
    states, optimizer = config.parallel.zero.optimizer_states, config.optimizer
    if states is None or states.update == "exact":
        return
    asked, exact = "parallel.zero.optimizer_states.update=delayed", "; use update: exact"
    for rule in rules_of(optimizer.kind):
        if not rule.elementwise:
            raise UserError(
                f"{asked} with optimizer.kind={optimizer.kind}: {rule.name} wants whole matrices, "
                f"which are put together on the device{exact}, or adamw or lion"
            )
    if isinstance(getattr(optimizer, "states", None), Fp8StatesConfig):
        raise UserError(f"{asked} with optimizer.states.kind=fp8 has not been tried{exact}")
    if config.kernels.adamw == "apex":
        raise UserError(f"{asked} with kernels.adamw=apex, which has no kernel for a host{exact}")


def check_exact(zero: Zero, what: str) -> None:
    """Raise UserError for late updates where ``what`` compares with a loop that has none."""
    if zero.optimizer_states is not None and zero.optimizer_states.update != "exact":
        raise UserError(
            f"parallel.zero.optimizer_states.update={zero.optimizer_states.update}: {what} is of "
            "exact updates; use update: exact"
        )


def fixes_frobenius_norm(optimizer: OptimizerConfig) -> bool:
    """Whether steps of some matrices have a Frobenius norm that does not depend on their rank."""
    spectral = getattr(optimizer, "step_norm", "frobenius") == "spectral"
    return not spectral and any(rule.on_sphere for rule in rules_of(optimizer.kind))
