"""Match entries of ``optimizer.overrides`` with parameters, and reject entries without effect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig
from allometry.configs.optimization import OptimizerConfig
from allometry.configs.overrides import ParameterOverride
from allometry.scaling.inventory import inventory
from allometry.scaling.roles import ParamSpec, Role, layer_of


def matches(entry: ParameterOverride, spec: ParamSpec) -> bool:
    """Return True if the parameter satisfies all criteria of the entry."""
    if entry.roles is not None and spec.role not in entry.roles:
        return False
    layer = layer_of(spec.name)
    if entry.layers is not None and not any(layer in found for found in entry.layer_ranges()):
        return False
    return entry.names is None or any(fnmatchcase(spec.name, name) for name in entry.names)


def deciding(optimizer: OptimizerConfig | None, spec: ParamSpec) -> ParameterOverride | None:
    """Return the entry that applies to a parameter, the last matching one; None without a match."""
    entries = optimizer.overrides if optimizer is not None else ()
    return next((entry for entry in reversed(entries) if matches(entry, spec)), None)


def is_frozen(optimizer: OptimizerConfig | None, spec: ParamSpec) -> bool:
    """Return True if a parameter is not trained."""
    entry = deciding(optimizer, spec)
    return entry is not None and bool(entry.freeze)


def frozen_names(model: ModelConfig, optimizer: OptimizerConfig | None) -> frozenset[str]:
    """Return the names of a model's parameters that are not trained."""
    if optimizer is None or not any(entry.freeze for entry in optimizer.overrides):
        return frozenset()
    return frozenset(spec.name for spec in inventory(model) if is_frozen(optimizer, spec))


def describe_overrides(
    model: ModelConfig, optimizer: OptimizerConfig | None
) -> list[dict[str, Any]]:
    """Return as JSON the number of parameters and elements to which each entry applies."""
    entries = optimizer.overrides if optimizer is not None else ()
    found = [{"parameters": 0, "numbers": 0, **e.model_dump(exclude_none=True)} for e in entries]
    for spec in inventory(model) if entries else ():
        entry = deciding(optimizer, spec)
        for one, described in zip(entries, found, strict=True):
            if one is entry:
                described["parameters"] += 1
                described["numbers"] += spec.numel
    return found


def check_overrides(model: ModelConfig, optimizer: OptimizerConfig | None) -> None:
    """Reject entries without effect, and freezing of all parameters.

    Raises:
        UserError: a role, layer or pattern matches no parameter of the model, an entry matches none
            or only parameters of later entries, or all parameters are frozen.
    """
    if optimizer is None or not optimizer.overrides:
        return
    specs = inventory(model)
    for number, entry in enumerate(optimizer.overrides):
        _check_criteria(f"optimizer.overrides.{number}", entry, specs, model)
    decided = [deciding(optimizer, spec) for spec in specs]
    for number, entry in enumerate(optimizer.overrides):
        # By identity: equal entries are distinct.
        if not any(one is entry for one in decided):
            raise UserError(
                f"optimizer.overrides.{number} decides nothing: the last entry that names a "
                "parameter decides it, and later entries name all of its parameters; remove it, or "
                "move it behind them"
            )
    if all(one is not None and one.freeze for one in decided):
        raise UserError(
            "optimizer.overrides freezes every parameter, so that nothing is trained; let the last "
            "entries leave some of them out, or name them with freeze: false"
        )


def _check_criteria(
    key: str, entry: ParameterOverride, specs: Sequence[ParamSpec], model: ModelConfig
) -> None:
    there = [role.value for role in Role if any(spec.role is role for spec in specs)]
    for role in entry.roles or ():
        if role not in there:
            tied = role == "output" and model.tied_embeddings
            why = ": its head is the embedding, role input" if tied else ""
            raise UserError(
                f"{key}.roles: the model has no parameter of role {role}{why}; it has "
                f"{', '.join(there)}"
            )
    for item, layers in zip(entry.layers or (), entry.layer_ranges(), strict=True):
        if layers[-1] >= model.num_layers:
            raise UserError(
                f"{key}.layers={item!r} goes past the last of the model's {model.num_layers} "
                f"layers, which are 0-{model.num_layers - 1}"
            )
    for name in entry.names or ():
        if not any(fnmatchcase(spec.name, name) for spec in specs):
            raise UserError(
                f"{key}.names={name!r} matches no parameter of the model; those of layer 0 and of "
                f"the ends are {', '.join(_known(specs))}"
            )
    named = [spec for spec in specs if matches(entry, spec)]
    if not named:
        given = [name for name in ("roles", "layers", "names") if getattr(entry, name) is not None]
        raise UserError(
            f"{key} names no parameter: no one meets {' and '.join(given)} together; take a "
            "criterion away, or make an entry of each"
        )


def _known(specs: Iterable[ParamSpec]) -> list[str]:
    return [spec.name for spec in specs if layer_of(spec.name) in (None, 0)]
