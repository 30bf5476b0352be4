from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.model import (
    DenseModel,
    MaximalUpdateParameterization,
    StandardParameterization,
)
from allometry.configs.optimization import AdamW, Apollo, ApolloMini
from allometry.optim.build import build_optimizer
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.roles import ParamSpec, Role

BASE_WIDTH = 96


def model_at(multiple: int, head_dim: int | None = None) -> DenseModel:
    return DenseModel(
        vocab_size=64,
        width=BASE_WIDTH * multiple,
        num_layers=2,
        num_heads=6 * multiple if head_dim is None else 6,
        num_kv_heads=3 * multiple if head_dim is None else 3,
        head_dim=head_dim,
        ffn_width=256 * multiple,
        qk_norm=True,
    )


def mup(**changes: object) -> MaximalUpdateParameterization:
    return MaximalUpdateParameterization.model_validate({"base_width": BASE_WIDTH, **changes})


@pytest.mark.parametrize("rule", ["mup", "coupled"])
def test_at_the_base_every_multiplier_is_exactly_one_and_mup_is_sp(rule: str) -> None:
    model = model_at(1)
    standard = Parameterization(StandardParameterization(), model)
    scaled = Parameterization(mup(weight_decay_rule=rule, base_head_dim=16), model)
    for spec in inventory(model):
        resolved = scaled.resolve(spec)
        assert resolved == standard.resolve(spec)
        assert resolved.lr == 1.0
        assert resolved.eps == 1.0
        assert resolved.weight_decay == (0.0 if spec.role is Role.VECTOR else 1.0)
    assert scaled.forward == standard.forward
    assert scaled.forward.embedding == scaled.forward.residual == scaled.forward.output == 1.0
    assert scaled.forward.attention == 1.0 / math.sqrt(16)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_mup_table(m: int) -> None:
    model = model_at(m)
    rules = Parameterization(mup(embedding_std=0.5), model)
    base = {spec.name: spec for spec in inventory(model_at(1))}
    for spec in inventory(model):
        resolved = rules.resolve(spec)
        at_base = base[spec.name]
        expected = {
            # role: (init σ, lr, weight decay)
            Role.INPUT: (0.5, 1.0, 1.0),
            Role.HIDDEN: (at_base.fan_in**-0.5 / math.sqrt(m), 1.0 / m, float(m)),
            Role.OUTPUT: (at_base.fan_in**-0.5, 1.0, 1.0),
            Role.VECTOR: (0.0, 1.0, 0.0),
        }[spec.role]
        got = (resolved.init_std, resolved.lr, resolved.weight_decay)
        assert got == pytest.approx(expected, rel=1e-12)
        assert resolved.eps == pytest.approx(1.0 / m, rel=1e-12)
        assert resolved.lr * resolved.weight_decay == pytest.approx(
            0.0 if spec.role is Role.VECTOR else 1.0
        )
        assert resolved.init_kind == ("ones" if spec.role is Role.VECTOR else "normal")
    assert rules.forward.output == pytest.approx(1.0 / m, rel=1e-12)
    assert rules.forward.attention == pytest.approx(1.0 / math.sqrt(16), rel=1e-12)


def test_coupled_decay_keeps_the_multiplier() -> None:
    rules = Parameterization(mup(weight_decay_rule="coupled"), model_at(4))
    hidden = next(spec for spec in inventory(model_at(4)) if spec.role is Role.HIDDEN)
    assert rules.resolve(hidden).weight_decay == 1.0


def test_scores_are_divided_by_the_head_width_when_it_grows() -> None:
    for multiple in (1, 2, 4):
        model = model_at(multiple, head_dim=16 * multiple)
        rules = Parameterization(mup(base_head_dim=16), model)
        expected = 0.25 / multiple  # 1/√16 at the base, then 1/H
        assert rules.forward.attention == pytest.approx(expected, rel=1e-12)


def test_a_base_wider_than_the_model_is_fine() -> None:
    rules = Parameterization(mup(base_width=4 * BASE_WIDTH), model_at(1))
    assert rules.width_ratio == 0.25
    assert rules.forward.output == 4.0


def test_sp_values() -> None:
    model = model_at(2)
    rules = Parameterization(StandardParameterization(embedding_std=0.03), model)
    for spec in inventory(model):
        resolved = rules.resolve(spec)
        if spec.role in (Role.HIDDEN, Role.OUTPUT):
            assert resolved.init_std == pytest.approx(spec.fan_in**-0.5)
        elif spec.role is Role.INPUT:
            assert resolved.init_std == 0.03
    assert rules.forward.output == 1.0


def test_tied_mup_is_refused() -> None:
    with pytest.raises(UserError, match="tied_embeddings=true"):
        Parameterization(mup(), model_at(1).model_copy(update={"tied_embeddings": True}))


def test_description_is_json_and_complete() -> None:
    rules = Parameterization(mup(), model_at(2))
    described = json.loads(json.dumps(rules.describe()))
    assert described["kind"] == "mup"
    assert described["width_ratio"] == 2.0
    assert described["forward"]["output"] == 0.5
    for spec in inventory(model_at(2)):
        multipliers = asdict(rules.resolve(spec))
        shown = described["roles"][spec.role.value]
        for key in ("lr", "weight_decay", "eps", "init_kind"):
            assert shown[key] == multipliers[key]


@pytest.mark.parametrize("m", [1, 2, 4])
def test_learning_rates_and_decay_equal_the_mup_package(m: int) -> None:
    """The paper's public implementation is the reference for lr and lr x decay."""
    mup_package = pytest.importorskip("mup")
    specs = [spec for spec in inventory(model_at(m)) if spec.role is not Role.OUTPUT]
    shapes = {spec.name: spec.shape for spec in inventory(model_at(1))}
    wider = {spec.name: spec.shape for spec in inventory(model_at(2))}
    parameters = {}
    for spec in specs:
        parameter = torch.nn.Parameter(torch.zeros(spec.shape))
        parameter.infshape = mup_package.infshape.InfShape(
            [
                mup_package.infshape.InfDim(base if base != wide else None, size)
                for base, wide, size in zip(
                    shapes[spec.name], wider[spec.name], spec.shape, strict=True
                )
            ]
        )
        parameters[spec.name] = parameter
    optimizer = mup_package.MuAdamW(parameters.values(), lr=0.01, weight_decay=0.1)
    oracle = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    rules = Parameterization(mup(), model_at(m))
    for spec in specs:
        lr, weight_decay = oracle[id(parameters[spec.name])]
        resolved = rules.resolve(spec)
        assert resolved.lr * 0.01 == pytest.approx(lr, rel=1e-12)
        if spec.role is not Role.VECTOR:  # the package decays vectors; we do not
            assert resolved.weight_decay * 0.1 == pytest.approx(weight_decay, rel=1e-12)


def test_ten_steps_are_those_of_the_mup_package() -> None:
    """An MLP of width 64 over a base of 16 in fp64: the package's layers and MuAdamW, and ours."""
    mup_package = pytest.importorskip("mup")
    torch.manual_seed(0)

    def theirs(width: int) -> torch.nn.Sequential:
        return torch.nn.Sequential(
            torch.nn.Linear(6, width, bias=False),
            torch.nn.Linear(width, width, bias=False),
            mup_package.MuReadout(width, 5, bias=False),
        ).double()

    oracle = theirs(64)
    mup_package.set_base_shapes(oracle, theirs(16), delta=theirs(32))
    start = oracle[1].weight.detach().clone()
    weights = [torch.nn.Parameter(layer.weight.detach().clone()) for layer in oracle]
    specs = {
        "input": ParamSpec("input", Role.INPUT, (64, 6), fan_in=6, fan_out=64),
        "hidden": ParamSpec("hidden", Role.HIDDEN, (64, 64), fan_in=64, fan_out=64),
        "output": ParamSpec("output", Role.OUTPUT, (5, 64), fan_in=64, fan_out=5),
    }
    # The package does not scale epsilon; such a small value has no effect in either.
    config = AdamW(lr=0.01, weight_decay=0.1, eps=1e-30)
    model = DenseModel(vocab_size=5, width=64, num_layers=1, num_heads=4, ffn_width=64)
    rules = Parameterization(MaximalUpdateParameterization(base_width=16), model, config)
    ours = build_optimizer(zip(specs, weights, strict=True), specs, rules, config)
    package = mup_package.MuAdamW(
        oracle.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-30
    )
    x, y = torch.randn(32, 6).double(), torch.randn(32, 5).double()
    for _ in range(10):
        package.zero_grad()
        h = torch.relu(oracle[1](torch.relu(oracle[0](x))))
        (oracle[2](h) - y).square().mean().backward()
        package.step()
        ours.zero_grad()
        h = torch.relu(torch.relu(x @ weights[0].T) @ weights[1].T)
        (h @ weights[2].T * rules.forward.output - y).square().mean().backward()
        ours.step()
    for mine, layer in zip(weights, oracle, strict=True):
        torch.testing.assert_close(mine.detach(), layer.weight.detach(), rtol=1e-6, atol=1e-9)
    assert (oracle[1].weight - start).abs().max() > 1e-3


def test_a_rank_above_a_side_of_a_matrix_needs_no_weights_to_be_refused() -> None:
    """The optimizer's own sentence, from the shapes alone."""
    model, sp = model_at(1), StandardParameterization()
    said = (
        r"optimizer.rank=97 is above the smaller side of blocks.0.attention.wq.weight, 96; choose"
    )
    # Keys have 3 heads of 16: their matrix is the first whose smaller side is below 96.
    keys = (
        r"optimizer.rank=49 is above the smaller side of blocks.0.attention.wk.weight, 48; choose"
    )
    Parameterization(sp, model, Apollo(lr=0.01, rank=48))
    Parameterization(sp, model, Apollo(lr=0.01))
    Parameterization(sp, model, ApolloMini(lr=0.01))
    for rank, words in ((97, said), (49, keys)):
        with pytest.raises(UserError, match=words):
            Parameterization(sp, model, Apollo(lr=0.01, rank=rank))
