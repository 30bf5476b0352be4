"""Steps of one rule with states in FP8, for the tests of states and of their kernels."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.optim import Optimizer

from allometry.optim.fp8_states import Fp8States
from rule_groups import give, optimizer, weights

SHAPES = {"matrix": (40, 300), "narrow": (33, 20), "experts": (3, 20, 130)}
Rounding = Literal["nearest", "stochastic"]


def stepped(
    rule: str, fp8: Fp8States | None, steps: int = 12
) -> tuple[dict[str, nn.Parameter], Optimizer]:
    parameters = weights(SHAPES | ({"gain": (40,)} if rule == "adamw" else {}))
    made = optimizer(rule, parameters, fp8=fp8, weight_decay=0.1 if rule == "adamw" else 0.0)
    for step in range(steps):
        give(parameters, step, 0.01)
        made.step()
    return parameters, made
