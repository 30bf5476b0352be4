"""AdamW for the parameters that a run's other rules leave to it (arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from allometry.optim.matrix_ops import MatrixOps
from allometry.optim.states import Group, State, at_rest, items_of, like_parameters


def prepare_group(group: Group) -> None:
    """Mark a group for the fused kernel: ``load_state_dict`` then leaves ``step`` on the device."""
    group["fused"] = True


def adamw(groups: Sequence[Group], state: State, ops: MatrixOps) -> None:
    """Take a step with all parameters of ``groups`` by torch's fused kernel, in place.

    Elementwise, so ``ops`` is not asked. The states and their names are torch's: ``exp_avg`` and
    ``exp_avg_sq``, as the parameter, and ``step``, on the device as the kernel wants it.
    """
    del ops
    for group in groups:
        items = items_of([group])
        means, squares = (like_parameters(items, state, key) for key in ("exp_avg", "exp_avg_sq"))
        steps = [_step(state[item.parameter], item.part) for item in items]
        if at_rest(items):
            continue
        beta1, beta2 = group["betas"]
        torch_adamw(
            [item.part for item in items],
            [item.gradient for item in items],
            means,
            squares,
            [],
            steps,
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _step(states: dict[str, Tensor], part: Tensor) -> Tensor:
    if "step" not in states:
        states["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
    return states["step"]
