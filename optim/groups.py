"""Parameter groups by role and update rule of each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.optimization import OptimizerConfig
from allometry.scaling.parameterization import Parameterization, group_key
from allometry.scaling.parameterizations.base import Resolved
from allometry.scaling.roles import ParamSpec
from allometry.scaling.update_rules import UPDATE_RULES


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    specs: Mapping[str, ParamSpec],
    parameterization: Parameterization,
    config: OptimizerConfig,
) -> list[dict[str, Any]]:
    """Sort trainable parameters into groups for a torch optimizer.

    Parameters with the same role, update rule and resolved multipliers share a group. A group is a
    dict with ``params``, ``param_names`` and ``specs`` (in the given order), ``name`` (the role,
    numbered if a role has several groups), ``role``, ``rule``, ``sphere``, ``peak_lr``, ``lr`` (=
    ``peak_lr`` until a schedule sets it), ``weight_decay``, ``eps`` (if the optimizer has one) and
    the settings of its rule (``betas``, ``momentum``, ...). For example, the second group of the
    role ``hidden`` is called ``hidden-2``. Groups are in the order of their first parameters, which
    is the same on every rank. If all parameters are frozen, as may happen in a pipeline stage,
    there is one group without parameters.

    Raises:
        UserError: a parameter has no spec, or a spec no parameter.
    """
    assert parameterization.optimizer_kind == config.kind, (
        "the parameterization was resolved for another optimizer",
        parameterization.optimizer_kind,
        config.kind,
    )
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    empty: dict[str, Any] = {}
    missing = dict(specs)
    for name, parameter in named_parameters:
        spec = missing.pop(name, None)
        if spec is None:
            raise UserError(
                f"parameter {name!r} has no role, so it has no learning rate; declare its role "
                "in the module that makes it"
            )
        resolved = parameterization.resolve(spec)
        key = (spec.role, *group_key(resolved))
        if key not in groups:
            twins = sum(group["role"] == spec.role.value for group in groups.values())
            made = {
                "params": [],
                "param_names": [],
                "specs": [],
                "name": spec.role.value if not twins else f"{spec.role.value}-{twins + 1}",
                "role": spec.role.value,
                **_settings(resolved, parameterization, config),
            }
            if resolved.frozen:
                empty = empty or made
                continue
            groups[key] = made
        groups[key]["params"].append(parameter)
        groups[key]["param_names"].append(name)
        groups[key]["specs"].append(spec)
    if missing:
        raise UserError(
            f"{next(iter(missing))!r} and {len(missing) - 1} more declared parameters are not in "
            "the model; declare only what the module registers"
        )
    return list(groups.values()) or [empty]


def _settings(
    resolved: Resolved, parameterization: Parameterization, config: OptimizerConfig
) -> dict[str, Any]:
    """Return the entries of a group other than its parameters."""
    rule = UPDATE_RULES[resolved.rule]
    base_lr = config.lr
    if rule.name == "adamw":
        base_lr = getattr(config, "adamw_lr", None) or base_lr
    weight_decay = config.weight_decay * resolved.weight_decay
    if parameterization.decay_is_independent:
        weight_decay /= base_lr
    settings: dict[str, Any] = {
        "rule": rule.name,
        "sphere": resolved.sphere,
        "peak_lr": base_lr * resolved.lr,
        "lr": base_lr * resolved.lr,
        "weight_decay": weight_decay,
        **{key: getattr(config, key) for key in rule.settings},
    }
    if hasattr(config, "eps"):
        settings["eps"] = config.eps * resolved.eps
    if rule.betas:
        beta1, beta2 = (getattr(config, key) for key in ("beta1", "beta2"))
        forgets = resolved.forgetting if rule.second_moment else 1.0
        settings["betas"] = (beta1, beta2 if forgets == 1.0 else 1.0 - (1.0 - beta2) * forgets)
    return settings
