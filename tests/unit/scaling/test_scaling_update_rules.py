"""The table of update rules agrees with each optimizer's config section and function."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
from tests.support.scaled import mixture, optimizer, parameterization

from allometry.configs.errors import UserError
from allometry.configs.optimization import OnSphere, OptimizerConfig
from allometry.optim.optimizer import rule_module
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.roles import Role
from allometry.scaling.update_rules import (
    OPTIMIZER_KINDS,
    UPDATE_RULES,
    Rates,
    fixes_frobenius_norm,
    rule_of,
    rules_of,
)

SECTIONS = {
    section.model_fields["kind"].default: section
    for section in get_args(get_args(OptimizerConfig)[0])
}
ADAM_AND_MORE = {Rates.ADAM, Rates.MUON, Rates.SPHERES}
COLUMNS = {
    "sp": set(Rates),
    "mup": set(Rates),
    "completep": ADAM_AND_MORE,
    "mupp": ADAM_AND_MORE,
    "mssp-I": {Rates.ADAM, Rates.SGD},
    "mssp-II": {Rates.ADAM, Rates.SGD},
    "mssp-III": {Rates.ADAM, Rates.SGD},
}


def test_every_kind_of_optimizer_has_a_section_and_a_rule() -> None:
    assert set(OPTIMIZER_KINDS) == set(SECTIONS)


@pytest.mark.parametrize("kind", OPTIMIZER_KINDS)
def test_sections_have_what_their_rules_read(kind: str) -> None:
    section = SECTIONS[kind]
    rules = rules_of(kind)
    keys = {key for rule in rules for key in rule.settings}
    keys |= {key for rule in rules if rule.betas for key in ("beta1", "beta2")}
    keys |= {"eps" for rule in rules if rule.second_moment}
    assert keys <= set(section.model_fields)
    assert issubclass(section, OnSphere) == rule_of(kind, Role.HIDDEN).on_sphere


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_functions_are_found_by_name(name: str) -> None:
    rule = UPDATE_RULES[name]
    module = rule_module(rule)
    assert module.__name__ == f"allometry.optim.{rule.module or name}"
    assert callable(getattr(module, rule.module or name))
    assert callable(module.init_states)
    assert not rule.second_moment or rule.betas


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("rates", Rates)
def test_rates_without_a_column_are_refused(
    name: str, rates: Rates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule has its own factor or raises an error; it never uses Adam's factor."""
    if rates is Rates.MUON and rates in COLUMNS[name]:
        return  # its factor depends on keys of Muon's section
    changed = dataclasses.replace(UPDATE_RULES["sgd_sai"], rates=rates)
    monkeypatch.setitem(UPDATE_RULES, "sgd_sai", changed)  # type: ignore[misc]
    experts = 1 if name == "mssp-I" else 4
    model = mixture(4, 1, experts, 1 if name == "mssp-II" else None)
    if rates not in COLUMNS[name]:
        with pytest.raises(UserError, match=f"sgd_sai follows {rates}; use optimizer.kind: adamw"):
            Parameterization(parameterization(name), model, optimizer("sgd_sai"))
        return
    rules = Parameterization(parameterization(name), model, optimizer("sgd_sai"))
    adam = Parameterization(parameterization(name), model, optimizer("adamw"))
    same = [rules.resolve(s).lr == adam.resolve(s).lr for s in inventory(model)]
    assert all(same) == (rates is Rates.ADAM or name == "sp")


def test_steps_of_a_fixed_frobenius_norm() -> None:
    fixed = {kind for kind in OPTIMIZER_KINDS if fixes_frobenius_norm(optimizer(kind))}
    assert fixed == {"muonh", "adamh"}
    assert not fixes_frobenius_norm(optimizer("muonh", step_norm="spectral"))
