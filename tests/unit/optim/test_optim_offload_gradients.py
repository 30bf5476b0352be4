"""Gradients on the host: summed, measured and clipped bitwise as on the device."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from allometry.configs.execution import OptimizerStates, Zero
from allometry.optim.clip import clip_by_global_norm
from allometry.optim.matrix_ops import LocalMatrixOps
from allometry.optim.offload.gradients import HostGradients
from allometry.optim.offload.pieces import Piece
from allometry.optim.optimizer import RuleOptimizer
from allometry.optim.states import Item
from allometry.optim.tiered import TieredOptimizer, gradient_of
from rule_groups import group, normal, weights

SHAPES = {"a": (96, 64), "b": (301, 40), "norm": (33,), "stack": (3, 50, 20)}
CPU = torch.device("cpu")


def backward(parameters: Mapping[str, nn.Parameter], step: int, micro_batches: int) -> None:
    for index in range(micro_batches):
        loss = torch.zeros(())
        for name, parameter in parameters.items():
            drawn = normal(f"g {name} {step} {index}", tuple(parameter.shape))
            loss = loss + (parameter * drawn).sum()
        loss.backward()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_sums_norms_and_clipping_are_those_of_the_device(micro_batches: int) -> None:
    one, other = weights(SHAPES), weights(SHAPES)
    leaving = [p for name, p in other.items() if name != "norm"]
    away = HostGradients(leaving, CPU)
    assert away.nbytes == sum(p.nbytes for p in leaving)
    for step in (1, 2):
        away.clear()
        for p in (*one.values(), *other.values()):
            p.grad = None
        backward(one, step, micro_batches)
        backward(other, step, micro_batches)
        assert all(p.grad is None for p in leaving), "they have left"
        assert other["norm"].grad is not None
        limit = 0.5 if step == 1 else None
        wanted = clip_by_global_norm(one.values(), limit)
        norm = clip_by_global_norm(other.values(), limit, away=away)
        assert torch.equal(norm, wanted)
        assert float(norm) > 0.5
        for name, p in other.items():
            whole = one[name].grad
            assert whole is not None
            if p in away:
                assert torch.equal(away.fetch(p), whole)
                assert torch.equal(away.fetch(p), whole), "asked twice, clipped once"
                piece = Piece(Item(name, p, {}), slice(0, 5), last=False)
                assert torch.equal(away.fetch(p, piece), whole.reshape(-1, whole.shape[-1])[:5])


def test_a_norm_that_is_not_finite_scales_nothing() -> None:
    parameters = weights({"a": (8, 8), "b": (8, 8)})
    away = HostGradients(parameters.values(), CPU)
    (parameters["a"].sum() * float("inf") + parameters["b"].sum()).backward()
    assert not clip_by_global_norm(parameters.values(), 1.0, away=away).isfinite()
    assert torch.equal(away.fetch(parameters["b"]), torch.ones(8, 8))


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_updates_with_gradients_that_left(rule: str) -> None:
    shapes = {name: s for name, s in SHAPES.items() if rule == "adamw" or name != "norm"}
    one, other = weights(shapes), weights(shapes)
    plain = RuleOptimizer([group(rule, one)])
    zero = Zero(optimizer_states=OptimizerStates(bucket_mib=0.03, gradients=True), stage=1)
    sizes = {name: 8 * parameter.numel() for name, parameter in other.items()}
    groups = [group(rule, other)]
    moving = TieredOptimizer(groups, LocalMatrixOps(), zero, sizes, leaving=other.values())
    held: list[Tensor | None] = []
    for step in range(1, 5):
        for parameters, optimizer in ((one, plain), (other, moving)):
            optimizer.zero_grad(set_to_none=True)
            backward(parameters, step, 2)
            away = getattr(optimizer, "gradients", None)
            clip_by_global_norm(parameters.values(), 0.5, away=away)
            optimizer.step()
        held = [other[name].grad for name in shapes if name != "norm"]
        for name in shapes:
            wanted, got = gradient_of(plain, one[name]), gradient_of(moving, other[name])
            assert wanted is not None
            assert got is not None
            assert torch.equal(wanted, got), "monitors see them after the step"
    assert not any(each is not None for each in held), "none is on the device after the step"
    assert all(torch.equal(one[name], other[name]) for name in one)
    moving.zero_grad()
    assert gradient_of(moving, other["a"]) is None
    with pytest.raises(RuntimeError, match="has no gradient"):
        moving.step()
