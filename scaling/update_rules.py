"""Properties of all update rules; the single table for groups, states, rates and records.

A new optimizer touches three source files: ``configs/optimization.py`` (its section), this file
(its row) and ``optim/NAME.py`` (its function, found by ``optim/optimizer.py`` by name).
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
"""(smaller dimension of a matrix, optimizer) -> fp32 numbers stored per element of a parameter."""


class Rates(StrEnum):
    """Scaling type of a rule's learning rate with model size: a column of a parameterization.

    ``Adam``: every element changes by about the rate, for any gradient size. ``SGD``: an update is
    proportional to the gradient. ``Muon``: an update is an orthogonal matrix times a factor of its
    shape. ``spheres``: an update is an angle, which needs no factor.
    """

    ADAM = "Adam"
    SGD = "SGD"
    MUON = "Muon"
    SPHERES = "spheres"


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """One row of the table.

    ``updates``: roles updated by the rule in each kind of optimizer; AdamW updates the others.
    ``settings``: keys of the optimizer section stored in a parameter group, in addition to rate,
    decay and epsilon; ``betas``: the group stores (beta1, beta2). ``state_size``: numbers stored
    for each element; ``numbers_per_parameter`` (step counts) and ``numbers_per_matrix`` (radii of
    spheres, signal-to-noise ratios): numbers stored once for each. ``second_moment``: updates are
    divided by the root of averaged squared gradients plus epsilon, and a larger batch may shorten
    the average. ``scales_with_root_of_size``: the rule multiplies the rate by about the root of a
    matrix's number of elements. ``elementwise``: an element's update depends only on its own
    numbers, so parts of a parameter may be updated separately. ``module``: file in ``optim/``;
    None: ``name``.
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
        """True if each matrix keeps its initial Frobenius norm."""
        return self.rates is Rates.SPHERES


def projection_rank(rank: int | None, smaller: int) -> int:
    """Return APOLLO's rank (arXiv 2412.05270) for this smaller dimension; None: a quarter of it."""
    return rank or max(1, smaller // 4)


def check_ranks(rank: int | None, smaller_sides: Iterable[tuple[str, int]]) -> None:
    """Raise UserError if ``optimizer.rank`` exceeds a smaller dimension of (name, dimension)."""
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
"""All values of ``optimizer.kind``."""


def rule_of(kind: str, role: Role) -> UpdateRule:
    """Return the rule by which this kind of optimizer updates parameters of ``role``.

    For example, ``rule_of("muon", Role.INPUT).name`` is "adamw", since Muon updates only matrices.
    """
    assert kind in OPTIMIZER_KINDS, kind
    rules = (rule for rule in UPDATE_RULES.values() if role in rule.updates.get(kind, ()))
    return next(rules, UPDATE_RULES["adamw"])


def rules_of(kind: str) -> tuple[UpdateRule, ...]:
    """Return all rules used by this kind of optimizer."""
    return tuple({rule_of(kind, role).name: rule_of(kind, role) for role in Role}.values())


def state_bytes(spec: ParamSpec, part: Sequence[int], optimizer: OptimizerConfig | None) -> int:
    """Return bytes of optimizer states for a part of a parameter, given the part's shape.

    ``optimizer`` None: AdamW. Frozen parameters have no states. For example, AdamW stores 80,004
    bytes for 100 x 100 elements.
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
    """Return bytes of one FP8 state of a matrix or a stack of them.

    One byte per element, and for each group of a row a four-byte scale and a one-byte exponent
    (``optim/dre.py``). For example, (2, 300) takes 630 bytes.
    """
    *leading, columns = part
    return math.prod(leading) * (columns + (_FP32 + 1) * math.ceil(columns / FP8_GROUP))


def check_delayed(config: RunConfig) -> None:
    """Raise UserError if ``optimizer_states.update`` delays an update that a host cannot run."""
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
    """Raise UserError for delayed updates if ``what`` compares with exact updates."""
    if zero.optimizer_states is not None and zero.optimizer_states.update != "exact":
        raise UserError(
            f"parallel.zero.optimizer_states.update={zero.optimizer_states.update}: {what} is of "
            "exact updates; use update: exact"
        )


def fixes_frobenius_norm(optimizer: OptimizerConfig) -> bool:
    """Return True if steps of some matrices have a Frobenius norm independent of their rank."""
    spectral = getattr(optimizer, "step_norm", "frobenius") == "spectral"
    return not spectral and any(rule.on_sphere for rule in rules_of(optimizer.kind))
