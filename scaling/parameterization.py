"""Initialization, update rule, learning rate, decay and epsilon of a parameter, from its role."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from operator import attrgetter
from typing import Any

from allometry.configs.contradictions import contradiction
from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig, ParameterizationConfig
from allometry.configs.optimization import Apollo, OptimizerConfig
from allometry.configs.run import RunConfig
from allometry.scaling.inventory import inventory
from allometry.scaling.overrides import check_overrides, deciding
from allometry.scaling.parameterizations.base import ForwardScales, Multipliers, Resolved, RunScale
from allometry.scaling.parameterizations.completep import CompletePMultipliers
from allometry.scaling.parameterizations.hyperp import HyperPMultipliers
from allometry.scaling.parameterizations.mssp import MSSPMultipliers
from allometry.scaling.parameterizations.mup import MuPMultipliers
from allometry.scaling.parameterizations.mupp import MuPPlusPlusMultipliers
from allometry.scaling.parameterizations.sp import StandardMultipliers
from allometry.scaling.roles import ParamSpec, Role
from allometry.scaling.stages import places_of
from allometry.scaling.update_rules import check_ranks, rule_of

_TABLES: Mapping[str, type[Multipliers]] = {
    "sp": StandardMultipliers,
    "mup": MuPMultipliers,
    "completep": CompletePMultipliers,
    "mupp": MuPPlusPlusMultipliers,
    "hyperp": HyperPMultipliers,
    "mssp": MSSPMultipliers,
}
"""Implementations by ``parameterization.kind``."""

group_key: Callable[[Resolved], tuple[Any, ...]] = attrgetter(
    "rule", "lr", "weight_decay", "eps", "sphere", "forgetting", "frozen"
)
"""Fields of ``Resolved`` that parameters of one role must share to be in one parameter group."""


class Parameterization:
    """Multipliers of a parameterization for one model, optimizer and run.

    The result is pure and the same on every rank. The tables are in ``scaling/parameterizations``.
    ``optimizer`` None: the default of the parameterization, MuonH for ``hyperp`` and AdamW for the
    others. ``scale`` None: a run with the base's length and batch. At the base dimensions every
    multiplier of learning rates, decay and epsilon is exactly 1, except for
    ``optimizer.overrides``. For example, ``Parameterization.of_run(config).resolve(spec).lr``.
    Raises UserError if sections contradict each other, APOLLO's rank does not fit a matrix, or an
    override has no effect (``check_overrides``).
    """

    def __init__(
        self,
        config: ParameterizationConfig,
        model: ModelConfig,
        optimizer: OptimizerConfig | None = None,
        scale: RunScale | None = None,
    ) -> None:
        problem = contradiction(config, model, optimizer)
        if problem is not None:
            raise UserError(problem)
        if isinstance(optimizer, Apollo):
            matrices = (
                s for s in inventory(model) if rule_of(optimizer.kind, s.role).name == "apollo"
            )
            check_ranks(optimizer.rank, ((s.name, min(s.shape[-2:])) for s in matrices))
        check_overrides(model, optimizer)
        self.config, self.model, self.optimizer, self.scale = config, model, optimizer, scale
        self._multipliers = _TABLES[config.kind](config, model, optimizer, scale)
        self._check_decays()

    @classmethod
    def of_run(cls, config: RunConfig, stage: int = -1) -> Parameterization:
        """Return the parameterization of a run, with its optimizer, full batch and length.

        For a run with stages: of ``stage`` (default: the last one), with the length of all stages.
        """
        places = places_of(config)
        # As configured: rounded up to complete steps, a run of the base's length would be longer.
        tokens = sum(place.asked_tokens for place in places)
        one, plan = places[stage].config, places[stage].local
        scale = RunScale(plan.full_sequences * plan.sequence_length, tokens)
        return cls(one.parameterization, one.model, one.optimizer, scale)

    @property
    def width_ratio(self) -> float:
        """m, the width relative to the base (1 for ``sp``)."""
        return float(self._multipliers.m)

    @property
    def optimizer_kind(self) -> str:
        """Kind of the optimizer."""
        return self._multipliers.optimizer_kind

    @property
    def decay_is_independent(self) -> bool:
        """True if ``optimizer.weight_decay`` is the decay of a weight per step at the peak rate."""
        return self._multipliers.decay_rule == "independent"

    @property
    def forward(self) -> ForwardScales:
        """Multipliers of the forward pass."""
        return self._multipliers.forward

    def resolve(self, spec: ParamSpec) -> Resolved:
        """Return the values of a parameter, from its role and ``optimizer.overrides``."""
        resolved = self._multipliers.resolve(spec)
        if self.optimizer is None or not self.optimizer.overrides:
            return resolved
        entry = deciding(self.optimizer, self._owner(spec))
        if entry is None:
            return resolved
        if entry.freeze:
            return replace(resolved, frozen=True)
        rate = 1.0 if entry.lr_multiplier is None else entry.lr_multiplier
        decay = 1.0 if entry.weight_decay_multiplier is None else entry.weight_decay_multiplier
        if self.decay_is_independent:  # the decay per step does not depend on the rate
            decay /= rate
        return replace(resolved, lr=resolved.lr * rate, weight_decay=resolved.weight_decay * decay)

    def _check_decays(self) -> None:
        """Reject an override that multiplies only zero decays."""
        optimizer = self.optimizer
        for number, entry in enumerate(optimizer.overrides if optimizer is not None else ()):
            assert optimizer is not None
            if entry.weight_decay_multiplier is None:
                continue
            decided = (s for s in inventory(self.model) if deciding(optimizer, s) is entry)
            decays = (self._multipliers.resolve(spec).weight_decay for spec in decided)
            if not any(optimizer.weight_decay * decay for decay in decays):
                raise UserError(
                    f"optimizer.overrides.{number}.weight_decay_multiplier multiplies nothing: "
                    f"with optimizer.weight_decay={optimizer.weight_decay:g} none of these "
                    "parameters has a decay (vectors and matrices on spheres never do); leave it "
                    "out"
                )

    def _owner(self, spec: ParamSpec) -> ParamSpec:
        """Return the original of a copy, otherwise ``spec``.

        A tied head and the table of multi-token prediction are copies of the embedding.
        """
        copied = self.model.tied_embeddings and spec.role is Role.OUTPUT
        copied = copied or (spec.ahead and spec.role is Role.INPUT)
        return inventory(self.model)[0] if copied else spec

    def describe(self) -> dict[str, Any]:
        """Return the multipliers as JSON for a run's record.

        ``roles`` has one parameter of each role, and further ones ("vector-2") if parameters of a
        role have different multipliers.
        """
        seen: set[tuple[Any, ...]] = set()
        examples: dict[str, dict[str, Any]] = {}
        for spec in inventory(self.model):
            resolved = self.resolve(spec)
            key = (spec.role, *group_key(resolved))
            if key not in seen:
                seen.add(key)
                twins = sum(role is spec.role for role, *_ in seen)
                name = spec.role.value if twins == 1 else f"{spec.role.value}-{twins}"
                examples[name] = asdict(resolved)
        return {
            **self.config.model_dump(mode="json"),
            "width_ratio": self.width_ratio,
            "scale": asdict(self.scale) if self.scale else None,
            "forward": asdict(self.forward),
            "roles": examples,
        }
