"""APOLLO and APOLLO-Mini, against their package."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allometry.configs.errors import UserError
from allometry.optim.apollo import Moments, projection, scaled_gradient
from rule_groups import SHAPES, give, normal, optimizer, weights

STEPS, REFRESH = 20, 6
KINDS = ["apollo", "apollo_mini"]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import apollo_torch.apollo without its siblings' dependencies (bitsandbytes)."""
    pytest.importorskip("transformers", reason="apollo-torch imports transformers")
    spec = importlib.util.find_spec("apollo_torch")
    if spec is None:
        pytest.skip("the package apollo-torch is not installed")
    parent = types.ModuleType("apollo_torch")
    parent.__path__ = list(spec.submodule_search_locations or ())
    monkeypatch.setitem(sys.modules, "apollo_torch", parent)
    yield importlib.import_module("apollo_torch.apollo")
    for name in [name for name in sys.modules if name.startswith("apollo_torch.")]:
        del sys.modules[name]


def use_our_projections(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package's projectors draw our numbers; it numbers parameters from 1."""
    projector = sys.modules[package.GradientProjector.__module__].GradientProjector
    names = list(SHAPES)
    original = projector.__init__

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.name, self.epoch = names[kwargs["seed"] - 1], 0

    def drawn(self: Any, weights: Tensor, rank: int, type: str, seed: int) -> Tensor:
        found = projection(self.name, 0, self.epoch, (rank, min(weights.shape)), 0, weights)
        self.epoch += 1
        return found.T if type == "left" else found

    monkeypatch.setattr(projector, "__init__", start)
    monkeypatch.setattr(projector, "get_orthogonal_matrix", drawn)


def settings(rule: str) -> dict[str, Any]:
    mini = rule == "apollo_mini"
    return {
        "lr": 0.01,
        "weight_decay": 0.1,
        "eps": 1e-6,
        "betas": (0.9, 0.999),
        "rank": None if mini else 1,
        "scale": 3.0 if mini else 1.0,
        "refresh_steps": REFRESH,
    }


@pytest.mark.parametrize("rule", KINDS)
def test_twenty_steps_equal_the_package(
    package: Any, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    use_our_projections(package, monkeypatch)
    mini = rule == "apollo_mini"
    said = settings(rule)
    rank = 1 if mini else 3
    shapes = {name: shape for name, shape in SHAPES.items() if mini or min(shape) >= rank}
    shapes = {name: shapes.get(name, (rank, 20)) for name in SHAPES}
    start, ours, theirs, other = (weights(shapes) for _ in range(4))
    mine = optimizer(rule, ours, **{**said, "rank": rank})
    control = optimizer(rule, other, **{**said, "rank": rank, "seed": 1})
    reference = package.AdamW(
        [
            {
                "params": list(theirs.values()),
                "rank": rank,
                "proj": "random",
                "scale_type": "tensor" if mini else "channel",
                "scale": said["scale"],
                "update_proj_gap": REFRESH,
                "proj_type": "std",
            }
        ],
        lr=said["lr"],
        betas=said["betas"],
        eps=said["eps"],
        weight_decay=said["weight_decay"],
        scale_front=mini,
    )
    for step in range(STEPS):
        for parameters in (ours, theirs, other):
            give(parameters, step, scale=1e-2 * (1 + step % 3))  # growth is limited
        for each in (mine, reference, control):
            each.step()
    for name in shapes:
        moved = (theirs[name] - start[name]).detach().abs().max()
        assert float(moved) > 1e-2, "it moves"
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
        assert float((other[name] - theirs[name]).detach().abs().max()) > 1e-4, name


@pytest.mark.parametrize("rule", KINDS)
def test_the_norm_grows_by_no_more_than_the_limit(rule: str) -> None:
    moments = Moments.zeros((6, 10), 2, torch.zeros(()))
    drawn = projection("w", 0, 0, (2, 6), 0, torch.zeros(()))
    said = {"rule": rule, "betas": (0.9, 0.95), "eps": 1e-6, "scale": 1.0, "norm_growth": 1.01}
    sizes = []
    for step in range(4):
        gradient = normal(f"{step}", (6, 10)) * 10.0**step
        found = scaled_gradient(gradient, drawn, moments, said, first=step == 0)
        sizes.append(float(found.norm()))
        assert float(moments.norm) == pytest.approx(sizes[-1], rel=1e-6)
    growth = [after / before for before, after in pairwise(sizes)]
    assert max(growth) == pytest.approx(1.01, rel=1e-5)
    moments.mean.mul_(1e-2)
    small = scaled_gradient(normal("s", (6, 10)) * 1e-3, drawn, moments, said, first=False)
    assert float(small.norm()) < sizes[-1] * 0.9, "shrinking is not limited"


@pytest.mark.parametrize("rule", KINDS)
def test_growth_is_limited_against_the_last_norm_that_was_not_zero(rule: str) -> None:
    """An expert that was without tokens for a step or two has a limited step afterwards."""
    rank = 1 if rule == "apollo_mini" else 2
    moments = Moments.zeros((6, 10), rank, torch.zeros(()))
    drawn = projection("w", 0, 0, (rank, 6), 0, torch.zeros(()))
    said = {"rule": rule, "betas": (0.9, 0.95), "eps": 1e-2, "scale": 1.0, "norm_growth": 1.01}
    first = scaled_gradient(normal("a", (6, 10)) * 1e-3, drawn, moments, said, first=True)
    for _ in range(2):
        nothing = scaled_gradient(torch.zeros(6, 10), drawn, moments, said, first=False)
        assert float(nothing.norm()) == 0.0
    free = Moments(moments.mean.clone(), moments.square.clone(), torch.zeros(()))
    again = scaled_gradient(normal("b", (6, 10)) * 1e3, drawn, moments, said, first=False)
    assert float(again.norm()) == pytest.approx(1.01 * float(first.norm()), rel=1e-5)
    unlimited = scaled_gradient(normal("b", (6, 10)) * 1e3, drawn, free, said, first=False)
    assert float(unlimited.norm()) > 1.1 * float(first.norm()), "the limit is felt"


def test_projections_depend_on_everything_they_should() -> None:
    like = torch.zeros((), dtype=torch.float64)
    usual = ("a", 0, 0, (100, 200), 0)
    drawn = projection(*usual, like)
    assert torch.equal(drawn, projection(*usual, like))
    assert float(drawn.std()) == pytest.approx(1 / math.sqrt(100), rel=2e-2)
    for place, value in ((0, "b"), (1, 1), (2, 1), (4, 1)):
        changed = list(usual)
        changed[place] = value
        assert not torch.equal(drawn, projection(*changed, like)), place


def test_defaults_are_a_quarter_of_the_smaller_side() -> None:
    parameters = weights({"tall": (30, 12), "wide": (8, 30), "row": (1, 20)})
    give(parameters, 0)
    made = optimizer("apollo", parameters)
    made.step()
    shapes = {name: made.state[p]["mean.0"].shape for name, p in parameters.items()}
    assert shapes == {"tall": (30, 3), "wide": (2, 30), "row": (1, 20)}
    one, two = ({"w": nn.Parameter(normal("w", (8, 30)))} for _ in range(2))
    for parameters, scale in ((one, None), (two, 2.0)):
        give(parameters, 0)
        optimizer("apollo_mini", parameters, scale=scale).step()
    assert torch.equal(one["w"], two["w"])


def test_a_rank_above_the_smaller_side_is_an_error() -> None:
    with pytest.raises(UserError, match=r"optimizer.rank=5 is above the smaller side of wide, 4"):
        optimizer("apollo", weights({"tall": (9, 5), "wide": (4, 9)}), rank=5)


@pytest.mark.parametrize("rule", KINDS)
def test_each_expert_of_a_stack_is_a_matrix_of_its_own(rule: str) -> None:
    stack = weights({"experts": (3, 12, 8)})
    mine = optimizer(rule, stack)
    alone = weights({"experts": (3, 12, 8)})
    other = optimizer(rule, alone)
    for step in range(3):
        give(stack, step)
        give(alone, step)
        alone["experts"].grad[1] *= 1e3
        mine.step()
        other.step()
    assert torch.equal(stack["experts"][0], alone["experts"][0])
    assert torch.equal(stack["experts"][2], alone["experts"][2])
    means = [mine.state[stack["experts"]][f"mean.{e}"] for e in range(3)]
    assert not torch.equal(means[0], means[1])


@pytest.mark.parametrize("rule", KINDS)
def test_what_has_no_gradient_at_first_is_not_frozen(rule: str) -> None:
    """The package would let its update grow from a norm of zero by 1% per step."""
    parameters = weights({"hidden": (4, 9), "experts": (2, 4, 9)})
    mine = optimizer(rule, parameters)
    give(parameters, 0)
    parameters["hidden"].grad.zero_()
    parameters["experts"].grad[1] = 0.0
    mine.step()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    give(parameters, 1)
    mine.step()
    for part, old in (
        (parameters["hidden"], before["hidden"]),
        (parameters["experts"][1], before["experts"][1]),
    ):
        assert float((part - old).detach().norm()) > 1e-3
