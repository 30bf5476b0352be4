"""AdamW for parameters without another rule of the run (arXiv 1711.05101)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from allometry.optim.adam import adam_direction
from allometry.optim.matrix_ops import MatrixOps
from allometry.optim.states import (
    Group,
    Item,
    State,
    count_step,
    descend_,
    init_like_parameters,
    init_steps,
    items_of,
    local_states,
)


def prepare_group(group: Group) -> None:
    """Mark a group as fused, so that ``load_state_dict`` leaves ``step`` on the device."""
    group["fused"] = True


def init_states(items: Sequence[Item], state: State, ops: MatrixOps | None = None) -> None:
    """Create the states that torch's AdamW creates in its first step, with the same names.

    ``exp_avg`` and ``exp_avg_sq`` like the parameter, and ``step`` on the device, as the fused
    kernel requires. For FP8 moments and stacked runs, ``step`` is on the host.
    """
    init_like_parameters(items, state, "exp_avg", "exp_avg_sq")
    init_steps([item for item in items if item.fp8 is not None or item.stacked], state)
    for item in items:
        if "step" not in state[item.parameter]:
            step = torch.zeros((), dtype=torch.float32, device=item.part.device)
            state[item.parameter]["step"] = step


def adamw(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Update ``items`` in place; elementwise.

    Uses the fused kernel named by each group, which supports one learning rate for the group; FP8
    moments use ``Fp8States.adamw``.
    """
    compressed = [item for item in items if item.fp8 is not None]
    count_step(compressed, state)
    for item in compressed:
        assert item.fp8 is not None
        held = state[item.parameter]
        item.fp8.adamw(item.name, item.parameter, item.gradient, held, item.group)
    plain = [item for item in items if item.fp8 is None]
    for _, members in itertools.groupby(plain, key=lambda item: id(item.group)):
        same = list(members)
        if same[0].stacked:
            _stacked(same, state)
            continue
        KERNELS[same[0].group.get("kernel", "torch")](same, state)


def adamw_unless(bad: Tensor, groups: Iterable[Group], state: State) -> None:
    """Run the step of torch's AdamW unless ``bad`` (0-dim) is 1; then all tensors keep their bits.

    The kernel reads ``bad`` on the device, so the host does not wait.
    """
    items = [item for item in items_of(groups) if item.parameter.grad is not None]
    init_states(items, state)
    for _, members in itertools.groupby(items, key=lambda item: id(item.group)):
        _torch(list(members), state, bad.float())


def _stacked(same: Sequence[Item], state: State) -> None:
    """Update parameters of several runs at once, each with the learning rate of its run."""
    for item, step in zip(same, count_step(same, state), strict=True):
        mean, square = (state[item.parameter][key] for key in ("exp_avg", "exp_avg_sq"))
        betas, eps = item.group["betas"], item.group["eps"]
        descend_(item, adam_direction(item.gradient, mean, square, step, betas, eps))


def _torch(same: Sequence[Item], state: State, found_inf: Tensor | None = None) -> None:
    group = same[0].group
    beta1, beta2 = group["betas"]
    torch_adamw(
        [item.part for item in same],
        [item.gradient for item in same],
        local_states(same, state, "exp_avg"),
        local_states(same, state, "exp_avg_sq"),
        [],
        [state[item.parameter]["step"] for item in same],
        foreach=False,
        fused=True,
        found_inf=found_inf,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _apex(same: Sequence[Item], state: State) -> None:
    """Call the kernel of apex's ``FusedAdam`` in its mode 1, decoupled weight decay.

    Learning rate and step are tensors, as with ``capturable``, so the host does not wait for the
    device. All parameters of a group have taken the same number of steps.
    """
    from amp_C import multi_tensor_adam_capturable
    from apex.multi_tensor_apply import multi_tensor_applier

    group, device = same[0].group, same[0].part.device
    steps = [state[item.parameter]["step"] for item in same]
    torch._foreach_add_(steps, 1.0)
    here = [item for item in same if item.part.numel()]  # a shard may be empty
    lists = [
        [item.gradient for item in here],
        [item.part for item in here],
        local_states(here, state, "exp_avg"),
        local_states(here, state, "exp_avg_sq"),
    ]
    if not here:
        return
    skip = torch.zeros(1, dtype=torch.int32, device=device)
    rate = torch.full((), group["lr"], dtype=torch.float32, device=device)
    step, unscaled = steps[0].to(torch.int32).view(1), torch.ones(1, device=device)
    beta1, beta2 = group["betas"]
    multi_tensor_applier(
        *(multi_tensor_adam_capturable, skip, lists, rate, beta1, beta2, group["eps"], step),
        *(_DECOUPLED, _CORRECT_BIAS, group["weight_decay"], unscaled),
    )


_DECOUPLED = _CORRECT_BIAS = 1
KERNELS: dict[str, Callable[[Sequence[Item], State], None]] = {"torch": _torch, "apex": _apex}
"""Fused kernels by value of ``kernels.adamw``; each kernel updates the items of one group."""
