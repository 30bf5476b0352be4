"""One optimizer for runs of one shape with different learning rates, by the rules of single runs.

A parameter of R runs is [M, rows, columns] (``models/stacked.py``); a rule treats it as M logical
matrices, like experts. The learning rates of its group are tensors [R].
"""

# R runs, M = R*E logical matrices of a parameter with E experts (else E = 1), run after run

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.optimization import Fp8StatesConfig, OptimizerConfig
from allometry.optim.clip import clip_factor
from allometry.optim.optimizer import RuleOptimizer
from allometry.optim.sphere import check_sphere
from allometry.optim.states import Group
from allometry.scaling.update_rules import UPDATE_RULES

KINDS = ("adamw", "muon", "muonh", "adamh")
"""Optimizers that support stacked runs."""


def check_stacked(config: OptimizerConfig) -> None:
    """Raise UserError if the optimizer does not support stacked runs."""
    if config.kind not in KINDS:
        raise UserError(
            f"optimizer.kind={config.kind} has no stacked form; use --engine processes, or one of "
            f"{', '.join(KINDS)}"
        )
    if isinstance(getattr(config, "states", None), Fp8StatesConfig):
        raise UserError(
            "optimizer.states.kind=fp8 has no stacked form; use --engine processes, or "
            "optimizer.states.kind=fp32"
        )


def stacked_optimizer(
    parameters: Mapping[str, Tensor], groups_of_runs: Sequence[Sequence[Group]]
) -> RuleOptimizer:
    """Return the optimizer of stacked ``parameters``, given by name.

    ``groups_of_runs``: the groups of ``groups.parameter_groups`` for each run, in the order of
    runs; only learning rates and weight decay may differ. ``set_lr`` sets the rates of all runs.
    Raises UserError: see ``RuleOptimizer``.
    """
    merged = []
    for of_runs in zip(*groups_of_runs, strict=True):
        names = of_runs[0]["param_names"]
        stacks = [parameters[name] for name in names]
        if UPDATE_RULES[of_runs[0]["rule"]].on_sphere:
            for of_run in of_runs:
                check_sphere(of_run)
        group: dict[str, Any] = {"params": stacks, "specs": of_runs[0]["specs"]}
        for key in of_runs[0].keys() - group.keys():
            values = [of_run[key] for of_run in of_runs]
            if key in ("peak_lr", "lr") or (key == "weight_decay" and len(set(values)) > 1):
                group[key] = torch.tensor(values, dtype=torch.float64, device=stacks[0].device)
            else:
                assert all(value == values[0] for value in values), (key, values)
                group[key] = values[0]
        merged.append(group)
    return RuleOptimizer(merged)


@torch.no_grad()
def clip_runs(gradients: Sequence[Tensor], max_norm: float | None, alive_R: Tensor) -> None:
    """Clip gradients [M, ...] of each run by global norm (None: no clipping), 0 for dead runs.

    ``alive_R``: bool. For one run the result equals ``clip_by_global_norm``.
    """
    runs = len(alive_R)
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = [torch.linalg.vector_norm(g.view(runs, -1), dim=1, dtype=wide) for g in gradients]
    factor_R = None
    if max_norm is not None:
        norm_R = torch.stack(norms).double().square().sum(0).sqrt()
        factor_R = clip_factor(norm_R, max_norm).to(gradients[0].dtype)
    for gradient in gradients:
        flat_RN = gradient.view(runs, -1)
        if factor_R is not None:
            flat_RN.mul_(factor_R[:, None])
        flat_RN.masked_fill_(~alive_R[:, None], 0.0)
