"""``optimizer.overrides``: selected parameters, their settings, and refusals."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from allometry.configs.errors import UserError
from allometry.configs.model import DenseModel, MoEModel
from allometry.configs.overrides import OverrideRole, ParameterOverride
from allometry.configs.run import RunConfig
from allometry.scaling.inventory import inventory
from allometry.scaling.layout import Layout
from allometry.scaling.memory import estimate_memory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.parameterizations.base import Resolved
from allometry.scaling.roles import Role
from allometry.scaling.saved import NORMS, SWIGLU
from allometry.scaling.update_rules import state_bytes

DENSE: dict[str, Any] = {
    "kind": "dense",
    "vocab_size": 64,
    "width": 32,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 4,
    "ffn_width": 64,
}
MOE: dict[str, Any] = {
    **DENSE,
    "kind": "moe",
    "first_dense_layers": 1,
    "experts": {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 16},
    "router": {"gate": "softmax", "balance": {"kind": "bias"}},
}


def run(*entries: dict[str, Any], model: dict[str, Any] = DENSE, **sections: Any) -> RunConfig:
    optimizer = {"lr": 1e-2, **sections.pop("optimizer", {}), "overrides": entries}
    return RunConfig.model_validate(
        {
            "run": {"folder": "none"},
            "model": model,
            "data": {"sequence_length": 16, "sources": [{"name": "one", "train": "none"}]},
            "batch": {"sequences": 4, "micro_batch_sequences": 1},
            "training": {"total_steps": 4},
            "optimizer": optimizer,
            "schedule": {"kind": "constant"},
            **sections,
        }
    )


def resolved(*entries: dict[str, Any], **sections: Any) -> dict[str, Resolved]:
    config = run(*entries, **sections)
    rules = Parameterization.of_run(config)
    return {spec.name: rules.resolve(spec) for spec in inventory(config.model)}


def frozen(*entries: dict[str, Any], **sections: Any) -> set[str]:
    return {name for name, one in resolved(*entries, **sections).items() if one.frozen}


def test_roles_are_those_of_the_inventory() -> None:
    assert get_args(OverrideRole) == tuple(role.value for role in Role)


def test_criteria_are_joined_by_and() -> None:
    both = {"roles": "hidden", "layers": [0, "2-3"], "names": "*.attention.*", "freeze": True}
    kinds = ("wq", "wk", "wv", "wo")
    assert frozen(both) == {
        f"blocks.{layer}.attention.{kind}.weight" for layer in (0, 2, 3) for kind in kinds
    }


def test_one_value_is_a_list_of_it() -> None:
    listed = {"roles": ["vector"], "layers": ["1"], "names": ["*ffn_norm*"], "freeze": True}
    single = {"roles": "vector", "layers": 1, "names": "*ffn_norm*", "freeze": True}
    assert frozen(listed) == frozen(single) == {"blocks.1.ffn_norm.weight"}


def test_the_last_entry_that_names_a_parameter_decides_all_of_it() -> None:
    made = resolved(
        {"freeze": True},
        {"layers": "2-3", "lr_multiplier": 0.5, "weight_decay_multiplier": 0.0},
        {"layers": 3, "lr_multiplier": 0.25},
    )
    plain = resolved()
    matrix = "attention.wq.weight"
    assert {n for n, one in made.items() if one.frozen} == {
        n for n in made if not n.startswith(("blocks.2.", "blocks.3."))
    }
    for layer, rate, decay in ((2, 0.5, 0.0), (3, 0.25, 1.0)):
        one, before = made[f"blocks.{layer}.{matrix}"], plain[f"blocks.{layer}.{matrix}"]
        assert (one.lr, one.weight_decay) == (before.lr * rate, before.weight_decay * decay)


def test_multipliers_join_those_of_the_parameterization() -> None:
    mup = {"parameterization": {"kind": "mup", "base_width": 8}}
    plain = resolved(**mup)
    made = resolved({"roles": "hidden", "lr_multiplier": 0.5}, **mup)
    for name, one in made.items():
        hidden = name.startswith("blocks.") and "norm" not in name
        assert one.lr == plain[name].lr * (0.5 if hidden else 1.0)
        assert one.weight_decay == plain[name].weight_decay


def test_independent_decay_does_not_follow_the_multiplier() -> None:
    mup = {"kind": "mup", "base_width": 8, "weight_decay_rule": "independent"}
    plain = resolved(parameterization=mup)
    made = resolved({"lr_multiplier": 0.5}, parameterization=mup)
    for name, one in made.items():
        before = plain[name]
        assert one.lr == 0.5 * before.lr
        assert one.lr * one.weight_decay == pytest.approx(before.lr * before.weight_decay)


def test_a_tied_head_away_from_its_embedding_is_frozen_with_it() -> None:
    model = {**DENSE, "tied_embeddings": True}
    rules = Parameterization.of_run(run({"roles": "input", "freeze": True}, model=model))
    copy = next(s for s in inventory(rules.model, (), first=False) if s.role is Role.OUTPUT)
    assert rules.resolve(copy).frozen


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "role": (
        [{"roles": ["hidden", "router"], "freeze": True}],
        r"overrides\.0\.roles: .* no parameter of role router; it has input, hidden",
    ),
    "layer": (
        [{"layers": ["0-1", "3-4"], "freeze": True}],
        r"overrides\.0\.layers='3-4' goes past .* 4 layers, which are 0-3",
    ),
    "pattern": (
        [{"freeze": True}, {"names": ["*.wq.weight", "*.q_proj.*"], "lr_multiplier": 2}],
        r"overrides\.1\.names='\*\.q_proj\.\*' matches no parameter.* blocks\.0\.attention\.wq",
    ),
    "together": (
        [{"roles": "input", "layers": 0, "freeze": True}],
        r"overrides\.0 names no parameter: no one meets roles and layers together",
    ),
    "shadowed": (
        [{"layers": 0, "lr_multiplier": 0.5}, {"freeze": True, "layers": "0-1"}],
        r"overrides\.0 decides nothing",
    ),
    "equal entries": (
        [{"layers": 0, "lr_multiplier": 0.5}, {"layers": 0, "lr_multiplier": 0.5}],
        r"overrides\.0 decides nothing",
    ),
    "everything": ([{"freeze": True}], "freezes every parameter"),
    "no decay": (
        [{"roles": "vector", "weight_decay_multiplier": 0.5}],
        r"overrides\.0\.weight_decay_multiplier multiplies nothing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_decides_nothing_is_refused(case: str) -> None:
    entries, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        Parameterization.of_run(run(*entries))
    assert str(caught.value).count(". ") == 0, "one sentence"


def test_a_tied_head_has_no_role_of_its_own() -> None:
    config = run({"roles": "output", "freeze": True}, model={**DENSE, "tied_embeddings": True})
    with pytest.raises(UserError, match="its head is the embedding, role input"):
        Parameterization.of_run(config)


def test_decay_of_matrices_on_spheres_cannot_be_multiplied() -> None:
    entry = {"roles": "hidden", "weight_decay_multiplier": 0.5}
    config = run(entry, optimizer={"kind": "muonh", "weight_decay": 0.1})
    with pytest.raises(UserError, match="matrices on spheres never do"):
        Parameterization.of_run(config)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "says nothing of its parameters"),
        ({"layers": 0}, "says nothing of its parameters"),
        ({"freeze": True, "lr_multiplier": 0.5}, "contradict one another"),
        ({"freeze": True, "weight_decay_multiplier": 0.5}, "contradict one another"),
        ({"lr_multiplier": 0}, "greater than 0"),
        ({"lr_multiplier": float("nan")}, "finite number"),
        ({"roles": "attention", "freeze": True}, "'input', 'hidden'"),
        ({"roles": [], "freeze": True}, "at least 1 item"),
        ({"layers": "first", "freeze": True}, "neither a layer"),
        ({"layers": "3-1", "freeze": True}, "neither a layer"),
        ({"layers": -1, "freeze": True}, "neither a layer"),
        ({"layer": 0, "freeze": True}, "layer"),
    ],
)
def test_an_entry_must_make_sense(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ParameterOverride.model_validate(entry)


def test_deepspeed_refuses_to_freeze_and_takes_multipliers() -> None:
    engine = {"parallel": {"hdp": 1, "zero": {"stage": 2, "engine": "deepspeed"}}}
    Layout.of(run({"layers": 0, "lr_multiplier": 0.5}, **engine), 1)
    with pytest.raises(UserError, match=r"overrides\.0\.freeze=true with .*engine=deepspeed"):
        Layout.of(run({"layers": 0, "freeze": True}, **engine), 1)


def test_frozen_parameters_have_neither_states_nor_gradients() -> None:
    config = run({"freeze": True}, {"roles": "input", "freeze": False})
    plain = run()

    def memory(of: RunConfig) -> Any:
        zero = of.parallel.zero
        sizes = {"micro_batch_tokens": 64, "compute_bytes": 2, "zero": zero, "hdp": 1}
        return estimate_memory(of.model, optimizer=of.optimizer, **sizes)

    ours, all_of_it = memory(config), memory(plain)
    embedding = 4 * 64 * 32
    assert ours.parameters == all_of_it.parameters
    assert ours.gradients == embedding
    assert ours.optimizer_states == 2 * embedding + 4
    for spec in inventory(config.model):
        assert (state_bytes(spec, spec.shape, config.optimizer) == 0) == (spec.role != Role.INPUT)


def test_layers_before_the_first_that_is_trained_keep_no_activation() -> None:
    def saved(*entries: dict[str, Any]) -> dict[str, int]:
        of = run(*entries)
        sizes = {"micro_batch_tokens": 64, "compute_bytes": 2, "zero": of.parallel.zero, "hdp": 1}
        return dict(estimate_memory(of.model, optimizer=of.optimizer, **sizes).saved)

    whole, ends = saved(), {"roles": "input", "freeze": True}
    half = saved(ends, {"layers": "0-1", "freeze": True})
    assert half[SWIGLU] == whole[SWIGLU] // 2
    # A trained embedding requires gradients of all activations, but products save no input.
    between = saved({"layers": "0-3", "roles": "hidden", "freeze": True})
    assert between[SWIGLU] == whole[SWIGLU] // 2, "silu(gate), without its product with up"
    assert 0 < between[NORMS] < whole[NORMS]


def test_models_of_experts_and_dense_ones_are_told_apart() -> None:
    assert isinstance(run(model=MOE).model, MoEModel)
    assert isinstance(run().model, DenseModel)
    assert frozen({"names": "*.experts.*", "freeze": True}, model=MOE) == {
        f"blocks.{layer}.ffn.experts.{name}"
        for layer in (1, 2, 3)
        for name in ("gate", "up", "down")
    }
