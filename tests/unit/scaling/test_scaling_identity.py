"""The base is not scaled; every parameter has one group; contradictory settings are refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from tests.support import scaled
from tests.support.scaled import PARAMETERIZATIONS, mixture, optimizer, parameterization

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.execution import Zero
from allometry.configs.loader import load, presets
from allometry.models.build import build_model, parameter_specs
from allometry.models.init import initialize
from allometry.optim.build import build_optimizer
from allometry.optim.groups import parameter_groups
from allometry.scaling.inventory import inventory
from allometry.scaling.memory import estimate_memory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.parameterizations.base import RunScale
from allometry.scaling.roles import Role
from allometry.scaling.update_rules import OPTIMIZER_KINDS


def possible(name: str, kind: str) -> bool:
    try:
        Parameterization(parameterization(name), mixture(), optimizer(kind))
    except UserError:
        return False
    return True


PAIRS = [
    (name, kind) for name in PARAMETERIZATIONS for kind in OPTIMIZER_KINDS if possible(name, kind)
]


def at_base(name: str, kind: str, **changes: Any) -> Parameterization:
    if name in ("mupp", "hyperp"):
        changes["base_batch_tokens"] = 512
    if name == "hyperp":
        changes["base_tokens"] = 9000
    config = parameterization(name, **changes)
    return Parameterization(config, mixture(), optimizer(kind), RunScale(512, 9000))


def test_the_pairs_that_are_possible() -> None:
    pairs = {name: {kind for one, kind in PAIRS if one == name} for name in PARAMETERIZATIONS}
    everything = set(OPTIMIZER_KINDS)
    mixtures = {"adamw", "lion", "sgd_sai", "apollo", "apollo_mini"}
    assert pairs == {
        "sp": everything,
        "mup": everything,
        "completep": everything - {"sgd_sai"},
        "mupp": everything - {"sgd_sai"},
        "hyperp": {"muonh", "adamh"},
        "mssp-I": mixtures,
        "mssp-II": mixtures,
        "mssp-III": mixtures,
    }


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.parametrize("decay", ["coupled", "mup", "sqrt", "independent"])
def test_every_multiplier_is_exactly_one(name: str, kind: str, decay: str) -> None:
    changes = {} if name == "hyperp" else {"weight_decay_rule": decay}
    if (name == "sp" or name.startswith("mssp")) and decay in ("mup", "sqrt"):
        return
    rules = at_base(name, kind, **changes)
    for spec in inventory(rules.model):
        got = rules.resolve(spec)
        assert (got.lr, got.eps, got.forgetting) == (1.0, 1.0, 1.0)
        undecayed = spec.role is Role.VECTOR or got.sphere or name == "hyperp"
        undecayed |= name == "mupp" and spec.role in (Role.INPUT, Role.OUTPUT)
        assert got.weight_decay == (0.0 if undecayed else 1.0)
    forward = rules.forward
    absolute = name in ("mupp", "hyperp")
    assert forward.residual == (1 / math.sqrt(2 * scaled.LAYERS) if absolute else 1.0)
    assert forward.embedding == forward.output == forward.experts == 1.0
    assert forward.attention == 1 / math.sqrt(16)


def test_sp_mup_and_completep_are_the_same_model_at_the_base() -> None:
    weights = []
    for name in ("sp", "mup", "completep"):
        rules = at_base(name, "adamw")
        model = build_model(rules.model, rules, "fp32")
        initialize(model, rules, seed=3)
        weights.append(model.state_dict())
    standard, *others = weights
    for other in others:
        assert other.keys() == standard.keys()
        for key, tensor in other.items():
            assert torch.equal(tensor.nan_to_num(), standard[key].nan_to_num()), key


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_every_parameter_has_one_group_and_its_rule(name: str, kind: str) -> None:
    config = optimizer(kind, lr=0.125)
    rules = Parameterization(parameterization(name), mixture(), config)
    with torch.device("meta"):
        model = build_model(rules.model, rules, "fp32")
    specs = parameter_specs(model)
    groups = parameter_groups(model.named_parameters(), specs, rules, config)
    named = dict(model.named_parameters())
    found = [pair for g in groups for pair in zip(g["param_names"], g["params"], strict=True)]
    assert sorted(one for one, _ in found) == sorted(named)
    assert all(named[one] is parameter for one, parameter in found)
    assert len({group["name"] for group in groups}) == len(groups)
    matrices = {"hidden", "expert_up", "expert_down"}
    by_rule = {
        "muon": {"muon": matrices | {"router"}},
        "muonh": {"muonh": matrices | {"router"}, "adamh": {"output"}},
        "adamh": {"adamh": matrices | {"router", "output"}},
        "lion": {"lion": {role.value for role in Role}},
        "sgd_sai": {"sgd_sai": {role.value for role in Role}},
        "apollo": {"apollo": matrices},
        "apollo_mini": {"apollo_mini": matrices},
    }.get(kind, {})
    for group in groups:
        expected = next((r for r, roles in by_rule.items() if group["role"] in roles), "adamw")
        assert group["rule"] == expected
        assert group["sphere"] == (expected in ("muonh", "adamh"))
        assert [spec.name for spec in group["specs"]] == group["param_names"]
        assert ("betas" in group) == (expected not in ("muon", "muonh", "sgd_sai"))
        assert ("momentum" in group) == (expected in ("muon", "muonh", "sgd_sai"))
        assert group["lr"] == group["peak_lr"] == 0.125


def test_what_adamw_updates_may_have_a_rate_of_its_own() -> None:
    config = optimizer("muonh", lr=0.02, adamw_lr=0.003)
    rules = Parameterization(parameterization("hyperp"), mixture(), config)
    with torch.device("meta"):
        model = build_model(rules.model, rules, "fp32")
    for group in parameter_groups(model.named_parameters(), parameter_specs(model), rules, config):
        assert group["peak_lr"] == (0.003 if group["role"] in ("input", "vector") else 0.02)


def test_independent_decay_takes_the_same_share_at_any_rate_and_width() -> None:
    for lr in (0.01, 0.5):
        config = optimizer(lr=lr, weight_decay=0.002)
        rules = Parameterization(
            parameterization("completep", weight_decay_rule="independent", depth_alpha=0.5),
            mixture(4, 4),
            config,
        )
        with torch.device("meta"):
            model = build_model(rules.model, rules, "fp32")
        specs = parameter_specs(model)
        for group in parameter_groups(model.named_parameters(), specs, rules, config):
            expected = 0.0 if group["role"] == "vector" else 0.002
            assert group["peak_lr"] * group["weight_decay"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["muon", "apollo"])
def test_independent_decay_is_over_the_rate_of_the_group(kind: str) -> None:
    """For AdamW's parameters, AdamW's own rate if it has one."""
    config = optimizer(kind, lr=0.02, adamw_lr=0.006, weight_decay=0.003)
    for name in ("sp", "mup"):
        rules = Parameterization(
            parameterization(name, weight_decay_rule="independent"), mixture(4), config
        )
        with torch.device("meta"):
            model = build_model(rules.model, rules, "fp32")
        specs = parameter_specs(model)
        seen = set()
        for group in parameter_groups(model.named_parameters(), specs, rules, config):
            expected = 0.0 if group["role"] == "vector" else 0.003
            assert group["peak_lr"] * group["weight_decay"] == pytest.approx(expected, rel=1e-12)
            seen.add((group["rule"], group["peak_lr"]))
        assert ("adamw", 0.006) in seen
        assert any(rule == kind and lr != 0.006 for rule, lr in seen)


def test_groups_carry_the_second_moment_of_a_larger_batch() -> None:
    config = optimizer(beta2=0.95)
    rules = Parameterization(
        parameterization("mupp", base_batch_tokens=100, batch_rule="sde"),
        mixture(),
        config,
        RunScale(400, 1),
    )
    with torch.device("meta"):
        model = build_model(rules.model, rules, "fp32")
    for group in parameter_groups(model.named_parameters(), parameter_specs(model), rules, config):
        assert group["betas"] == pytest.approx((0.9, 0.8), rel=1e-12)


def test_groups_and_rules_must_be_of_one_optimizer() -> None:
    rules = Parameterization(parameterization("mup"), mixture())
    with pytest.raises(AssertionError, match="another optimizer"):
        parameter_groups([], {}, rules, optimizer("muon"))


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_record_is_json_with_every_group(name: str) -> None:
    config = optimizer("muonh" if name == "hyperp" else "adamw")
    rules = Parameterization(parameterization(name), mixture(), config, RunScale(512, 9000))
    described = json.loads(json.dumps(rules.describe()))
    assert described["scale"] == {"batch_tokens": 512, "total_tokens": 9000}
    for spec in inventory(rules.model):
        wanted = asdict(rules.resolve(spec))
        same = [
            row
            for key, row in described["roles"].items()
            if key.split("-")[0] == spec.role.value and row["lr"] == wanted["lr"]
        ]
        assert any(row["eps"] == wanted["eps"] and row["rule"] == wanted["rule"] for row in same)


def test_the_record_tells_norms_of_blocks_from_the_last_one() -> None:
    rules = Parameterization(parameterization("completep", depth_alpha=0.5), mixture(2, 4))
    roles = rules.describe()["roles"]
    assert roles["vector"]["lr"] == 0.5
    assert roles["vector-2"]["lr"] == 1.0


TIED = {"tied_embeddings": True}


@pytest.mark.parametrize(
    ("name", "kind", "model", "changes", "sentence"),
    [
        ("mup", "adamw", TIED, {}, "tied_embeddings=true contradicts parameterization.kind=mup"),
        ("completep", "adamw", TIED, {}, "tied_embeddings=true"),
        ("mupp", "adamw", TIED, {}, "tied_embeddings=true"),
        ("hyperp", "muonh", TIED, {}, "tied_embeddings=true"),
        ("mssp-I", "adamw", TIED, {}, "tied_embeddings=true"),
        ("hyperp", "adamw", {}, {}, "optimizer.kind=adamw contradicts .*muonh or adamh"),
        ("hyperp", "muon", {}, {}, "optimizer.kind=muon contradicts"),
        ("mup", "muonh", {}, {"zero_head": True}, "a matrix of zeros on its sphere"),
        ("mup", "adamh", {}, {"zero_head": True}, "zero_head=true contradicts"),
        ("mssp-II", "adamw", {"router": {"gate": "sqrt"}}, {}, "router.gate=sqrt .*mssp"),
        (
            "mssp-II",
            "adamw",
            {"router": {"gate": "sigmoid", "normalize": True}},
            {},
            "normalize=true contradicts",
        ),
        ("mssp-I", "adamw", {}, {"base_experts": 8}, "num_experts=4 differs from .*base_experts=8"),
        ("mssp-I", "adamw", {}, {"base_experts_per_token": 1}, "experts_per_token=2 differs"),
        ("mssp-II", "adamw", {}, {"base_expert_width": 12}, "width=24 differs .*regime II"),
        ("mssp-III", "muonh", {}, {}, "known for Adam and SGD only"),
        (
            "completep",
            "sgd_sai",
            {},
            {},
            "known for Adam and Muon and spheres only, while sgd_sai follows SGD",
        ),
    ],
)
def test_contradictions_are_one_sentence(
    name: str, kind: str, model: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        Parameterization(parameterization(name, **changes), mixture(**model), optimizer(kind))
    assert "\n" not in str(error.value)
    assert "; " in str(error.value)  # and the fix


def test_mixtures_rules_need_a_mixture_and_spheres_no_decay() -> None:
    dense = load("preset:dense_25m").model
    with pytest.raises(UserError, match=r"kind=mssp contradicts model\.kind=dense"):
        Parameterization(parameterization("mssp-I"), dense)
    with pytest.raises(UserError, match=r"weight_decay=0.1 contradicts .*hyperp"):
        Parameterization(
            parameterization("hyperp"), mixture(), optimizer("muonh", weight_decay=0.1)
        )


def test_a_file_is_refused_with_its_place() -> None:
    changes = ["parameterization.kind=hyperp", "parameterization.base_layers=4"]
    with pytest.raises(ConfigError, match=r"optimizer.kind=adamw contradicts"):
        load("preset:demo", changes)
    config = load("preset:demo", [*changes, "optimizer.kind=muonh"])
    assert Parameterization.of_run(config).optimizer_kind == "muonh"


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_resolve(name: str) -> None:
    config = load(f"preset:{name}")
    rules = Parameterization.of_run(config)
    assert rules.optimizer_kind == config.optimizer.kind
    assert rules.scale is not None
    wanted = config.training.total_tokens
    if wanted is not None:
        assert rules.scale.total_tokens == wanted
    assert rules.describe()["roles"]


@pytest.mark.parametrize("kind", OPTIMIZER_KINDS)
def test_states_are_as_large_as_the_estimate_says(kind: str) -> None:
    config = optimizer(kind)
    rules = Parameterization(parameterization("sp"), mixture(2), config)
    model = build_model(rules.model, rules, "fp32")
    initialize(model, rules, seed=0)
    specs = parameter_specs(model)
    updates = build_optimizer(model.named_parameters(), specs, rules, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    updates.step()
    memory = estimate_memory(
        rules.model,
        micro_batch_tokens=8,
        compute_bytes=4,
        zero=Zero(stage=0),
        hdp=1,
        optimizer=config,
    )
    kept = sum(
        value.nbytes
        for state in updates.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    assert memory.optimizer_states == pytest.approx(kept, rel=0.02)
