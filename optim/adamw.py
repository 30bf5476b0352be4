"""AdamW for the parameters that a run's other rules leave to it (arXiv 1711.05101)."""

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
    """Mark a group for the fused kernel: ``load_state_dict`` then leaves ``step`` on the device."""
    group["fused"] = True


def init_states(items: Sequence[Item], state: State, ops: MatrixOps | None = None) -> None:
    """Make the states that torch's own AdamW makes in its first step, under the same names.

    ``exp_avg`` and ``exp_avg_sq``, as the parameter, and ``step``, on the device as the kernel
    wants it. Of moments in FP8 and of stacked runs it is on the host.
    """
    init_like_parameters(items, state, "exp_avg", "exp_avg_sq")
    init_steps([item for item in items if item.fp8 is not None or item.stacked], state)
    for item in items:
        if "step" not in state[item.parameter]:
            step = torch.zeros((), dtype=torch.float32, device=item.part.device)
            state[item.parameter]["step"] = step


def adamw(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Take a step with ``items``, in place; elementwise.

    By the fused kernel that their groups name, which knows one rate; of moments in FP8 by
    ``Fp8States.adamw``.
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
    """Take the step of torch's AdamW, unless ``bad`` (0-dim) is 1: then all keeps its bits.

    The kernel looks at ``bad`` itself, so that nothing waits for the device.
    """
    items = [item for item in items_of(groups) if item.parameter.grad is not None]
    init_states(items, state)
    for _, members in itertools.groupby(items, key=lambda item: id(item.group)):
        _torch(list(members), state, bad.float())


def _stacked(same: Sequence[Item], state: State) -> None:
    """Take the step of several runs at once, each at its rate."""
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
    """Call the kernel of apex's ``FusedAdam`` in its mode 1, decoupled decay.

    Rate and step are tensors, as ``capturable`` has them: nothing waits for the device. All
    parameters of a group have taken as many steps.
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
"""The fused kernels, by ``kernels.adamw``; each takes the items of one group."""
