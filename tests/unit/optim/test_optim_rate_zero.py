"""A step at rate 0 updates an optimizer's states, and no parameter, for all optimizers."""

# M momentum, m and v Adam's moments of the gradients g

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.optim import Optimizer

from allometry.configs.model import StandardParameterization
from allometry.configs.optimization import OptimizerConfig, WSDSSchedule
from allometry.optim.apollo import projection
from allometry.optim.build import build_optimizer, set_lr
from allometry.optim.schedule import Schedule
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.update_rules import OPTIMIZER_KINDS
from mixtures import described
from rule_groups import give, weights

MODEL = described(first_dense_layers=1)
SPECS = {spec.name: spec for spec in inventory(MODEL)}
SCHEDULE = Schedule(WSDSSchedule(decay="linear", decay_fraction=0.5, decay_ends_steps=(3,)), 6, 0)
MIDDLE, LAST = 3, 6


def made(kind: str) -> tuple[dict[str, nn.Parameter], Optimizer]:
    parameters = weights({name: spec.shape for name, spec in SPECS.items()}, torch.float64)
    config: Any = TypeAdapter(OptimizerConfig).validate_python({"kind": kind, "lr": 0.01})
    rules = Parameterization(StandardParameterization(), MODEL, config)
    return parameters, build_optimizer(parameters.items(), SPECS, rules, config)


def averages(gradients: Sequence[Tensor], betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    mean, square = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for g in gradients:
        mean = betas[0] * mean + (1 - betas[0]) * g
        square = betas[1] * square + (1 - betas[1]) * g * g
    return mean, square


def written_out(group: dict[str, Any], name: str, gradients: list[Tensor]) -> dict[str, Tensor]:
    """Return the states of a parameter after steps with these gradients, at any rates."""
    match group["rule"]:
        case "adamw" | "adamh":
            mean, square = averages(gradients, group["betas"])
            return {"exp_avg": mean, "exp_avg_sq": square}
        case "lion":
            mean, _ = averages(gradients, (group["betas"][1], 0.0))
            return {"exp_avg": mean}
        case "muon":
            mean, _ = averages(gradients, (group["momentum"], 0.0))
            return {"momentum_buffer": mean}
        case "muonh":
            momentum = torch.zeros_like(gradients[0])
            for g in gradients:
                momentum = group["momentum"] * momentum + g
            return {"momentum_buffer": momentum}
        case "sgd_sai":
            momentum = gradients[0]
            for g in gradients[1:]:
                momentum = group["momentum"] * momentum + (1 - group["momentum"]) * g
            return {"momentum_buffer": momentum}
        case "apollo" | "apollo_mini":
            return _of_apollo(group, name, gradients)
    raise AssertionError(group["rule"])


def _of_apollo(group: dict[str, Any], name: str, gradients: list[Tensor]) -> dict[str, Tensor]:
    states = {}
    rows, columns = gradients[0].shape[-2:]
    smaller = min(rows, columns)
    rank = 1 if group["rule"] == "apollo_mini" else max(1, smaller // 4)
    for e in range(gradients[0].shape[0] if gradients[0].dim() == 3 else 1):
        p = projection(name, e, 0, (rank, smaller), 0, gradients[0])
        of_expert = [g[e] if g.dim() == 3 else g for g in gradients]
        projected = [g @ p.T if rows >= columns else p @ g for g in of_expert]
        states[f"mean.{e}"], states[f"square.{e}"] = averages(projected, group["betas"])
    return states


@pytest.mark.parametrize("kind", OPTIMIZER_KINDS)
def test_states_are_those_of_all_steps_and_parameters_stay(kind: str) -> None:
    """Over a schedule of two decays to 0: every batch enters the momentum."""
    assert [SCHEDULE.fraction(step) == 0.0 for step in range(1, 7)] == [
        step in (MIDDLE, LAST) for step in range(1, 7)
    ]
    parameters, optimizer = made(kind)
    gradients: dict[str, list[Tensor]] = {name: [] for name in SPECS}
    for step in range(1, LAST + 1):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        give(parameters, step)
        for name, p in parameters.items():
            assert p.grad is not None
            gradients[name].append(p.grad.clone())
        set_lr(optimizer, SCHEDULE.fraction(step))
        optimizer.step()
        for name, p in parameters.items():
            assert torch.equal(p, before[name]) == (step in (MIDDLE, LAST)), (step, name)
        for group in optimizer.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                held = optimizer.state[p]
                assert "step" not in held or int(held["step"]) == step
                wanted = written_out(group, name, gradients[name])
                for key, value in wanted.items():
                    torch.testing.assert_close(held[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", OPTIMIZER_KINDS)
def test_negative_control_a_missing_batch_shows(kind: str) -> None:
    parameters, optimizer = made(kind)
    gradients: dict[str, list[Tensor]] = {name: [] for name in SPECS}
    for step in range(1, 4):
        give(parameters, step)
        optimizer.step()
        for name, p in parameters.items():
            if step != 2:
                assert p.grad is not None
                gradients[name].append(p.grad.clone())
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            for key, value in written_out(group, name, gradients[name]).items():
                assert not torch.allclose(optimizer.state[p][key], value, rtol=1e-3), (name, key)
