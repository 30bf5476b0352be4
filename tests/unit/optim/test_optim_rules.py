"""Properties of every optimizer: its states, and resuming."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from allometry.configs.model import StandardParameterization
from allometry.configs.optimization import OptimizerConfig
from allometry.optim.build import build_optimizer, init_states, set_lr
from allometry.optim.optimizer import RuleOptimizer
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.roles import Role
from allometry.scaling.update_rules import OPTIMIZER_KINDS, rule_of
from mixtures import described
from rule_groups import give, weights

MODEL = described(first_dense_layers=1)
SPECS = {spec.name: spec for spec in inventory(MODEL)}
KINDS = OPTIMIZER_KINDS
MIXED = tuple(kind for kind in KINDS if kind != "adamw")


def config(kind: str) -> Any:
    said: dict[str, Any] = {"kind": kind, "lr": 0.01}
    if kind.startswith("apollo"):
        said["refresh_steps"] = 4
    if not rule_of(kind, Role.HIDDEN).on_sphere:
        said["weight_decay"] = 0.1
    return TypeAdapter(OptimizerConfig).validate_python(said)


def made(kind: str, seed: int = 0) -> tuple[dict[str, nn.Parameter], Optimizer]:
    parameters = weights({name: spec.shape for name, spec in SPECS.items()})
    said = config(kind)
    rules = Parameterization(StandardParameterization(), MODEL, said)
    return parameters, build_optimizer(parameters.items(), SPECS, rules, said, seed=seed)


def take(parameters: dict[str, nn.Parameter], optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        give(parameters, step, scale=0.01)
        set_lr(optimizer, 1.0 - 0.05 * step)
        optimizer.step()


def tensors(parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """Return all states by their checkpoint names."""
    names = {p: name for name, p in parameters.items()}
    return {
        f"{names[p]}.{key}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def equal(one: dict[str, nn.Parameter], other: dict[str, nn.Parameter]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in SPECS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_optimizer_goes_on_bit_by_bit(kind: str) -> None:
    """Through tensors by name, copied in place into a new optimizer, as in a run."""
    straight, first = made(kind)
    take(straight, first, range(8))
    halted, second = made(kind)
    take(halted, second, range(3))
    kept = {name: value.clone() for name, value in tensors(halted, second).items()}
    resumed, third = made(kind)
    init_states(third)
    for name, p in resumed.items():
        p.data.copy_(halted[name].detach())
    filled = tensors(resumed, third)
    assert filled.keys() == kept.keys()
    for name, value in filled.items():
        assert value.shape == kept[name].shape
        assert value.dtype == kept[name].dtype
        value.copy_(kept[name])
    take(resumed, third, range(3, 8))
    assert equal(straight, resumed)


@pytest.mark.parametrize("kind", MIXED)
def test_negative_control_without_its_states_it_goes_on_differently(kind: str) -> None:
    straight, first = made(kind)
    take(straight, first, range(8))
    halted, second = made(kind)
    take(halted, second, range(3))
    resumed, third = made(kind)
    for name, p in resumed.items():
        p.data.copy_(halted[name].detach())
    take(resumed, third, range(3, 8))
    assert not any(torch.equal(straight[name], resumed[name]) for name in SPECS)


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_own_state_dict_resumes_as_well(kind: str) -> None:
    straight, first = made(kind)
    take(straight, first, range(6))
    halted, second = made(kind)
    take(halted, second, range(3))
    resumed, third = made(kind)
    third.load_state_dict(second.state_dict())
    for name, p in resumed.items():
        p.data.copy_(halted[name].detach())
    take(resumed, third, range(3, 6))
    assert equal(straight, resumed)


@pytest.mark.parametrize("kind", KINDS)
def test_making_states_leaves_an_optimizer_as_before_its_first_step(kind: str) -> None:
    straight, first = made(kind)
    begun, second = made(kind)
    before = {name: p.detach().clone() for name, p in begun.items()}
    init_states(second)
    assert all(torch.equal(begun[name], before[name]) for name in SPECS)
    assert all(p.grad is None for p in begun.values())
    assert second.state.keys() == set(begun.values())
    take(straight, first, range(3))
    take(begun, second, range(3))
    assert equal(straight, begun)
    made_in_steps, made_before = (tensors(straight, first), tensors(begun, second))
    assert made_in_steps.keys() == made_before.keys()
    for name, value in made_before.items():
        assert torch.equal(value, made_in_steps[name])
        assert (value.dtype, value.device) == (made_in_steps[name].dtype, value.device)


@pytest.mark.parametrize("kind", MIXED)
def test_every_parameter_moves(kind: str) -> None:
    parameters, optimizer = made(kind)
    assert isinstance(optimizer, RuleOptimizer)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    take(parameters, optimizer, range(2))
    assert not any(torch.equal(parameters[name], before[name]) for name in SPECS)
    assert all(bool(p.isfinite().all()) for p in parameters.values())


def state_bytes(kind: str, role: Role) -> float:
    """Return bytes per element of a role's parameters, without single numbers."""
    parameters, optimizer = made(kind)
    init_states(optimizer)
    mine = [name for name, spec in SPECS.items() if spec.role is role]
    held = sum(
        value.nbytes
        for name in mine
        for key, value in optimizer.state[parameters[name]].items()
        if key not in ("step", "radius", "gsnr") and not key.startswith("norm.")
    )
    return held / sum(parameters[name].numel() for name in mine)


@pytest.mark.parametrize(
    ("kind", "hidden", "output"),
    [
        ("adamw", 8, 8),
        ("lion", 4, 4),
        ("muon", 4, 8),
        ("muonh", 4, 8),
        ("adamh", 8, 8),
        ("sgd_sai", 4, 4),
        ("apollo_mini", None, 8),
    ],
)
def test_bytes_of_states(kind: str, hidden: float | None, output: float) -> None:
    assert state_bytes(kind, Role.OUTPUT) == output
    if hidden is not None:
        assert state_bytes(kind, Role.HIDDEN) == hidden
        assert state_bytes(kind, Role.EXPERT_UP) == hidden
    else:  # two moments of one row or column: 8 bytes / the smaller side
        assert state_bytes(kind, Role.EXPERT_UP) == pytest.approx(8 / 16)


def test_bytes_of_apollo() -> None:
    """Two moments of a quarter of the smaller side: 8 bytes / 4."""
    assert state_bytes("apollo", Role.EXPERT_UP) == 2
    assert state_bytes("apollo", Role.EXPERT_DOWN) == 2


@pytest.mark.parametrize("kind", ["muon", "muonh", "apollo"])
def test_adamw_beside_other_rules_is_torchs(kind: str) -> None:
    parameters, optimizer = made(kind)
    reference, adamw = made("adamw")
    for group in adamw.param_groups:
        group["eps"] = config(kind).eps
        group["weight_decay"] = config(kind).weight_decay if group["role"] == "input" else 0.0
    take(parameters, optimizer, range(4))
    take(reference, adamw, range(4))
    for name, spec in SPECS.items():
        if spec.role in (Role.INPUT, Role.VECTOR):
            assert torch.equal(parameters[name], reference[name]), name
            assert optimizer.state[parameters[name]].keys() == adamw.state[reference[name]].keys()
        elif spec.role is Role.HIDDEN:
            assert not torch.equal(parameters[name], reference[name]), name


def test_apollo_draws_by_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        parameters, optimizer = made("apollo", seed)
        take(parameters, optimizer, range(2))
        found.append(parameters)
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_closures_run_once_and_a_missing_gradient_is_an_error() -> None:
    parameters, optimizer = made("muon")
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        give(parameters, 0)
        return 3.5

    assert optimizer.step(closure) == 3.5
    assert calls == [True]
    name = next(name for name, spec in SPECS.items() if spec.role is Role.HIDDEN)
    parameters[name].grad = None
    with pytest.raises(RuntimeError, match=f"parameter '{name}' has no gradient"):
        optimizer.step()


@pytest.mark.parametrize("kind", MIXED)
def test_a_step_without_numbers(kind: str) -> None:
    """Rehearsals of large layouts take such steps, on tensors with shapes only."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = {name: nn.Parameter(torch.empty(spec.shape)) for name, spec in SPECS.items()}
        said = config(kind)
        rules = Parameterization(StandardParameterization(), MODEL, said)
        optimizer = build_optimizer(parameters.items(), SPECS, rules, said)
        for p in parameters.values():
            p.grad = torch.empty_like(p)
        optimizer.step()
        assert optimizer.state.keys() == set(parameters.values())
