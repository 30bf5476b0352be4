"""Live bytes at one moment of a step, by kind, and the workspace of update rules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from allometry.configs.optimization import Fp8StatesConfig, OptimizerConfig
from allometry.scaling.roles import MATRICES, ParamSpec
from allometry.scaling.saved import GATE_UP, SWIGLU
from allometry.scaling.shards import RankParts
from allometry.scaling.update_rules import rule_of

_FP32 = 4
_ROUNDED_ROWS = 80 << 16
"""Measured bytes for rounding 2**16 elements of a state (``optim/dre.py``)."""

PARAMETERS, GRADIENTS, STATES = "parameters", "gradients", "optimizer states"
COPIES, LOSS, WORKSPACE = "weight copies", "loss", "workspace"


@dataclass(frozen=True, slots=True)
class Moment:
    """Live bytes at one moment of a step, by kind; ``saved: NAME`` is saved for backward."""

    name: str
    kinds: Mapping[str, int]

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return sum(self.kinds.values())


def with_saved(kinds: Counter[str], saved: Mapping[str, int]) -> dict[str, int]:
    """Return live bytes together with the bytes saved for backward."""
    return positive(kinds | Counter({f"saved: {name}": size for name, size in saved.items()}))


def later(saved: Mapping[str, int]) -> Counter[str]:
    """Return the bytes that a block saves after gate and up have been rounded."""
    return Counter({name: saved.get(name, 0) for name in (GATE_UP, SWIGLU)})


def positive(kinds: Mapping[str, int]) -> dict[str, int]:
    """Return the kinds with more than 0 bytes."""
    return {name: size for name, size in kinds.items() if size > 0}


def rule_workspace(
    part: RankParts, trained: Iterable[ParamSpec], optimizer: OptimizerConfig | None, on_cpu: bool
) -> int:
    """Return workspace bytes of matrix update rules: directions and results.

    Included are fp32 tensors of one parameter: momentum decoded from FP8, the Nesterov direction,
    and rotations.
    """
    kind = optimizer.kind if optimizer is not None else "adamw"
    in_fp8 = isinstance(getattr(optimizer, "states", None), Fp8StatesConfig)
    total = largest = 0
    for spec in trained:
        if spec.role in MATRICES and rule_of(kind, spec.role).name in ("muon", "muonh"):
            total += part.held(spec)
            largest = max(largest, part.held(spec), math.prod(spec.shape[-2:]))
    least = 2 * total + 2 * _FP32 * largest + _ROUNDED_ROWS if in_fp8 and on_cpu else 0
    return max(2 * 2 * total + (5 if in_fp8 else 3) * _FP32 * largest, least)
