"""Parameter groups, from what each parameter is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.optimization import OptimizerConfig
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.roles import ParamSpec


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    specs: Mapping[str, ParamSpec],
    parameterization: Parameterization,
    config: OptimizerConfig,
) -> list[dict[str, Any]]:
    """Sort parameters into groups for a torch optimizer.

    Parameters that share a role and its resolved learning rate, weight decay and epsilon share a
    group. A group is a dict with ``params`` and ``param_names`` (in the order given),
    ``name`` (the role, numbered where one role needs several groups), ``role``, ``peak_lr``,
    ``lr`` (= ``peak_lr`` until a schedule sets it), ``weight_decay`` and ``eps``. Groups come in
    the order of their first parameters, which is the same on every rank.

    Raises:
        UserError: a parameter has no spec, or a spec no parameter.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    missing = dict(specs)
    for name, parameter in named_parameters:
        spec = missing.pop(name, None)
        if spec is None:
            raise UserError(
                f"parameter {name!r} has no role, so it has no learning rate; declare its role "
                "in the module that makes it"
            )
        resolved = parameterization.resolve(spec)
        key = (spec.role, resolved.lr, resolved.weight_decay, resolved.eps)
        if key not in groups:
            twins = sum(group["role"] == spec.role.value for group in groups.values())
            peak_lr = config.lr * resolved.lr
            groups[key] = {
                "params": [],
                "param_names": [],
                "name": spec.role.value if not twins else f"{spec.role.value}-{twins + 1}",
                "role": spec.role.value,
                "peak_lr": peak_lr,
                "lr": peak_lr,
                "weight_decay": config.weight_decay * resolved.weight_decay,
                "eps": config.eps * resolved.eps,
            }
        groups[key]["params"].append(parameter)
        groups[key]["param_names"].append(name)
    if missing:
        raise UserError(
            f"{next(iter(missing))!r} and {len(missing) - 1} more declared parameters are not in "
            "the model; declare only what the module registers"
        )
    return list(groups.values())
