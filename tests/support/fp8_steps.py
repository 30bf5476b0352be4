"""Optimizer steps of one rule with FP8 states, for tests of states and of their kernels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from allometry.optim.fp8_states import Fp8States
from rule_groups import give, optimizer, weights

CPU = torch.device("cpu")
SHAPES = {"matrix": (40, 300), "narrow": (33, 20), "experts": (3, 20, 130)}
Rounding = Literal["nearest", "stochastic"]


def stepped(
    rule: str, fp8: Fp8States | None, steps: int = 12, device: torch.device = CPU
) -> tuple[dict[str, nn.Parameter], Optimizer]:
    parameters = weights(SHAPES | ({"gain": (40,)} if rule == "adamw" else {}))
    moved = {name: nn.Parameter(p.detach().to(device)) for name, p in parameters.items()}
    made = optimizer(rule, moved, fp8=fp8, weight_decay=0.1 if rule == "adamw" else 0.0)
    for step in range(steps):
        give(parameters, step, 0.01)
        for name, p in parameters.items():
            assert p.grad is not None
            moved[name].grad = p.grad.to(device)
        made.step()
    return moved, made
