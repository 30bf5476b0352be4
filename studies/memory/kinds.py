"""What each storage that was alive in a step is called: the names that a prediction has."""

from __future__ import annotations

from collections.abc import Callable

from allometry.configs.model import ModelConfig
from allometry.studies.memory.live import BACKWARD, BETWEEN, FORWARD, HEAD, UPDATE, Stored


def kind_of(model: ModelConfig) -> Callable[[Stored], str]:
    def kind(stored: Stored) -> str:
        if stored.kind is not None:
            return stored.kind
        if stored.operator.startswith(("fsdp::", "c10d", "_c10d")) or stored.operator == "resize":
            return "communication"
        if stored.of_weight:
            return "weight copies"
        if stored.born == HEAD:
            return "loss"
        if stored.born == FORWARD and stored.died in (None, BACKWARD):
            return f"saved {stored.scope.split('.', 2)[-1] if stored.scope.startswith('blocks.') else stored.scope} {stored.operator}"
        return f"workspace {stored.born}"
    return kind
