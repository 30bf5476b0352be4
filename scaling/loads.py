"""Expert loads used by the auxiliary balance loss, and the reason for the choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from allometry.configs.model import AuxiliaryBalance, MoEModel
from allometry.configs.run import RunConfig

Loads = Literal["step_before", "this_batch"]

FEW_SEQUENCES = 64
"""Sequences per step below which the loads of a step predict the next step poorly."""


@dataclass(frozen=True, slots=True)
class BalanceLoads:
    """Chosen loads, with the reason for the record."""

    loads: Loads
    reason: str

    @classmethod
    def of(cls, config: RunConfig) -> BalanceLoads | None:
        """Resolve ``model.router.balance.loads`` for this run; None if the run has no such loss."""
        if not isinstance(config.model, MoEModel):
            return None
        balance = config.model.router.balance
        if not isinstance(balance, AuxiliaryBalance):
            return None
        if balance.loads != "auto":
            return cls(balance.loads, "as model.router.balance.loads says")
        if config.data.kind == "documents":
            return cls("this_batch", "auto: whole documents differ from step to step")
        ramp = config.batch.ramp
        fewest = config.batch.sequences if ramp is None else ramp.start_sequences
        if fewest < FEW_SEQUENCES:
            reason = f"auto: a step has {fewest} sequences, fewer than {FEW_SEQUENCES}"
            return cls("this_batch", reason)
        return cls("step_before", f"auto: a step has {fewest} sequences, {FEW_SEQUENCES} or more")
