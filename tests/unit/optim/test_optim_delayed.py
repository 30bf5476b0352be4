"""Updates one step late: a plain loop as reference, overlap, and saves without side effects."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allometry.configs.execution import OptimizerStates, Zero
from allometry.optim.build import init_states, take_step
from allometry.optim.delayed import LATE, DelayedOptimizer
from allometry.optim.offload.held import MASTER
from allometry.optim.offload.swap import StatesLost
from allometry.optim.optimizer import RuleOptimizer
from rule_groups import group, normal, weights

SHAPES = {"up": (48, 40), "down": (24, 48), "norm": (40,)}
RATES = (0.1, 0.5, 1.0, 0.7, 0.3, 0.0, 0.2)
CLIP = 0.5


def delayed(
    rule: str, parameters: Mapping[str, nn.Parameter], timeout_s: float = 60.0, **states: Any
) -> DelayedOptimizer:
    told = OptimizerStates.model_validate({"update": "delayed", "bucket_mib": 0.01} | states)
    sizes = {name: 8 * parameter.numel() for name, parameter in parameters.items()}
    made = group(rule, parameters, peak_lr=0.02, weight_decay=0.1)
    return DelayedOptimizer([made], Zero(optimizer_states=told), sizes, timeout_s)


def loss_of(parameters: Mapping[str, Tensor], step: int) -> Tensor:
    """Return a loss whose gradient depends on the parameters."""
    x = normal(f"x {step}", (16, 40), parameters["norm"].dtype) * parameters["norm"]
    return ((x @ parameters["up"].T).tanh() @ parameters["down"].T).square().mean()


def differentiate(parameters: Mapping[str, nn.Parameter], step: int) -> None:
    for parameter in parameters.values():
        parameter.grad = None
    loss_of(parameters, step).backward()  # type: ignore[no-untyped-call]


def plain(rule: str, kinds: type[torch.optim.Optimizer]) -> list[dict[str, Tensor]]:
    """Return the parameters after each step of a loop that delays each update by one step."""
    ahead = weights(SHAPES, torch.float64)
    groups = [group(rule, ahead, lr=0.0, weight_decay=0.1)]
    if kinds is torch.optim.AdamW:
        optimizer: Any = torch.optim.AdamW(
            ahead.values(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
        )
    else:
        optimizer = RuleOptimizer(groups)
    now = {name: each.detach().clone() for name, each in ahead.items()}
    found = []
    for step, rate in enumerate(RATES, 1):
        seen = {name: each.clone().requires_grad_() for name, each in now.items()}
        gradients = torch.autograd.grad(loss_of(seen, step), list(seen.values()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        now = {name: each.detach().clone() for name, each in ahead.items()}  # all earlier updates
        for each, gradient in zip(ahead.values(), gradients, strict=True):
            each.grad = gradient * min(1.0, CLIP / (float(norm) + 1e-6))
        optimizer.param_groups[0]["lr"] = 0.02 * rate
        optimizer.step()
        found.append(now)
    return [*found, {name: each.detach() for name, each in ahead.items()}]


@pytest.mark.parametrize(
    ("rule", "kind"), [("adamw", torch.optim.AdamW), ("lion", RuleOptimizer)], ids=["adamw", "lion"]
)
@pytest.mark.parametrize("states", [{}, {"nvme": "swap"}, {"nvme": "swap", "cpu": 0.5}])
@pytest.mark.parametrize("saves", [False, True], ids=["straight", "saved"])
def test_it_is_a_plain_loop_that_holds_each_update_back_for_a_step(
    tmp_path: Path, rule: str, kind: type[torch.optim.Optimizer], states: Any, saves: bool
) -> None:
    """In fp64, with clipping and changing rates, and with a save after each step."""
    states = states | ({"nvme": str(tmp_path)} if states else {})
    parameters = weights(SHAPES, torch.float64)
    optimizer = delayed(rule, parameters, **states)
    *wanted, last = plain(rule, kind)
    for step, rate in enumerate(RATES, 1):
        differentiate(parameters, step)
        take_step(optimizer, rate, CLIP)
        for name, parameter in parameters.items():
            assert (parameter - wanted[step - 1][name]).abs().max() <= 1e-15, (step, name)
        if saves:
            assert len([each.read() for _, _, each in optimizer.stored()]) > 3
    names = {parameter: name for name, parameter in parameters.items()}
    ahead = {names[p]: each.read() for p, key, each in optimizer.stored() if key == MASTER}  # type: ignore[index]
    assert all((ahead[name] - last[name]).abs().max() <= 1e-15 for name in SHAPES)
    assert not torch.equal(ahead["up"], parameters["up"])
    assert optimizer.held_bytes()["device"] == 0
    assert (optimizer.held_bytes()["nvme"] > 0) == bool(states)


@pytest.mark.parametrize("at", range(len(RATES)))
def test_what_is_stored_is_all_there_is(at: int, tmp_path: Path) -> None:
    """A new optimizer filled with the stored state continues bitwise, for any place of states."""
    runs = []
    for place in ("straight", "resumed"):
        parameters = weights(SHAPES)
        optimizer = delayed("adamw", parameters)
        for step, rate in enumerate(RATES, 1):
            if place == "resumed" and step == at + 1:
                old = {id(p): name for name, p in parameters.items()}
                kept = {
                    (old[id(p)], key): each.read().clone() for p, key, each in optimizer.stored()
                }
                parameters = {name: nn.Parameter(torch.zeros(SHAPES[name])) for name in SHAPES}
                optimizer = delayed("adamw", parameters, nvme=str(tmp_path))
                init_states(optimizer)
                new = {id(p): name for name, p in parameters.items()}
                there = [(new[id(p)], key, each) for p, key, each in optimizer.stored()]
                assert {(name, key) for name, key, _ in there} >= kept.keys()
                for name, key, each in there:
                    if (name, key) in kept:  # before the first step there are no states
                        each.write(kept[name, key])
            differentiate(parameters, step)
            take_step(optimizer, rate, CLIP)
        names = {id(p): name for name, p in parameters.items()}
        runs.append({(names[id(p)], key): each.read() for p, key, each in optimizer.stored()})
    assert runs[0].keys() == runs[1].keys()
    assert {key for _, key in runs[0]} == {MASTER, LATE, "exp_avg", "exp_avg_sq", "step"}
    assert all(torch.equal(runs[0][each], runs[1][each]) for each in runs[0])


def test_the_host_updates_while_the_next_step_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host so slow that each update ends after the next backward, no backward waits."""
    computed, order = threading.Semaphore(0), []
    update = RuleOptimizer.step

    def slow(self: RuleOptimizer, closure: Any = None) -> Any:
        assert computed.acquire(timeout=30.0), "the next step was not computed meanwhile"
        order.append("updated")
        return update(self, closure)

    parameters = weights(SHAPES, torch.float64)
    optimizer = delayed("adamw", parameters)
    monkeypatch.setattr(RuleOptimizer, "step", slow)
    for step, rate in enumerate(RATES, 1):
        differentiate(parameters, step)
        order.append("differentiated")
        if step > 1:
            computed.release()
        take_step(optimizer, rate, CLIP)
    computed.release()
    list(optimizer.stored())
    assert order == ["differentiated", *["differentiated", "updated"] * (len(RATES) - 1), "updated"]


def test_a_host_that_hangs_or_fails_ends_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = weights(SHAPES, torch.float64)
    optimizer, released = delayed("adamw", parameters, timeout_s=0.05), threading.Event()
    monkeypatch.setattr(RuleOptimizer, "step", lambda self, closure=None: released.wait(30.0))
    differentiate(parameters, 1)
    take_step(optimizer, 1.0, None)
    with pytest.raises(StatesLost, match=r"took longer than parallel.timeout_s=0.05"):
        take_step(optimizer, 1.0, None)
    released.set()

    def broken(self: RuleOptimizer, closure: Any = None) -> Any:
        raise StatesLost("writing failed")

    monkeypatch.setattr(RuleOptimizer, "step", broken)
    other = delayed("adamw", parameters)
    take_step(other, 1.0, None)
    for _ in range(2):
        with pytest.raises(StatesLost, match="writing failed"):
            list(other.stored())
    with pytest.raises(StatesLost, match="writing failed"):
        take_step(other, 1.0, None)


def test_a_parameter_without_a_gradient_is_an_error() -> None:
    parameters = weights(SHAPES, torch.float64)
    optimizer = delayed("adamw", parameters)
    differentiate(parameters, 1)
    parameters["up"].grad = None
    with pytest.raises(RuntimeError, match="no gradient"):
        optimizer.step()
