"""From a parameter's role to its initialisation, update rule, learning rate, decay and epsilon."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from operator import attrgetter
from typing import Any

from allometry.configs.contradictions import contradiction
from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig, ParameterizationConfig
from allometry.configs.optimization import Apollo, OptimizerConfig
from allometry.configs.run import RunConfig
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterizations.base import ForwardScales, Multipliers, Resolved, RunScale
from allometry.scaling.parameterizations.completep import CompletePMultipliers
from allometry.scaling.parameterizations.hyperp import HyperPMultipliers
from allometry.scaling.parameterizations.mssp import MSSPMultipliers
from allometry.scaling.parameterizations.mup import MuPMultipliers
from allometry.scaling.parameterizations.mupp import MuPPlusPlusMultipliers
from allometry.scaling.parameterizations.sp import StandardMultipliers
from allometry.scaling.roles import ParamSpec
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
"""By ``parameterization.kind``."""

group_key: Callable[[Resolved], tuple[Any, ...]] = attrgetter(
    "rule", "lr", "weight_decay", "eps", "sphere", "forgetting"
)
"""What ``Resolved`` of one role must share for their parameters to share an optimizer's group."""


class Parameterization:
    """The multipliers of one parameterization for one model, optimizer and run.

    Pure, and the same on every rank. The tables are in ``scaling/parameterizations``.
    ``optimizer`` None: the one that the parameterization is made for, MuonH for ``hyperp`` and
    AdamW for the others. ``scale`` None: a run as long as that of the base, with its batch. At the
    base dimensions every multiplier of learning rates, decay and epsilon is exactly 1. Raises
    UserError where the sections contradict one another or APOLLO's rank does not fit a matrix.
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
        self.config, self.model, self.optimizer, self.scale = config, model, optimizer, scale
        self._multipliers = _TABLES[config.kind](config, model, optimizer, scale)

    @classmethod
    def of_run(cls, config: RunConfig, stage: int = -1) -> Parameterization:
        """Return those of a run, with its optimizer, its full batch and its length.

        Of a run with stages: those of a stage (the last one), with the length of the whole run.
        """
        places = places_of(config)
        # As asked for: rounded up to whole steps, a run of the base's length would be longer.
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
        """The optimizer that they are for."""
        return self._multipliers.optimizer_kind

    @property
    def decay_is_independent(self) -> bool:
        """Whether ``optimizer.weight_decay`` is what a step at the peak rate takes of a weight."""
        return self._multipliers.decay_rule == "independent"

    @property
    def forward(self) -> ForwardScales:
        """The multipliers of the forward pass."""
        return self._multipliers.forward

    def resolve(self, spec: ParamSpec) -> Resolved:
        """Return what this parameter gets."""
        return self._multipliers.resolve(spec)

    def describe(self) -> dict[str, Any]:
        """Return them as JSON for a run's record.

        ``roles`` has one parameter of each role, and more ("vector-2") where some of a role get
        other multipliers.
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
