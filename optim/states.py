"""What all update rules share: parameters with their gradients, and the states beside them."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allometry.optim.matrix_ops import local

Group = dict[str, Any]
"""A parameter group, as ``groups.parameter_groups`` makes it."""

State = MutableMapping[Tensor, dict[str, Tensor]]
"""An optimizer's tensors by parameter and name; an unknown parameter has an empty dict."""


class Item(NamedTuple):
    """A parameter in a step; ``part`` and ``gradient`` are this rank's parts, plain tensors."""

    name: str
    parameter: Tensor
    part: Tensor
    gradient: Tensor
    group: Group


def items_of(groups: Iterable[Group]) -> list[Item]:
    """Return all parameters of groups in their order.

    All ranks that hold parts of a matrix must take part in a step, so a missing gradient is an
    error rather than a parameter to pass over.
    """
    found = []
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if parameter.grad is None:
                raise RuntimeError(f"parameter {name!r} has no gradient")
            found.append(Item(name, parameter, local(parameter), local(parameter.grad), group))
    return found


def at_rest(items: Iterable[Item]) -> bool:
    """Whether every rate is 0: such a step makes the states that are missing, and changes nothing.

    So a fresh optimizer gets the states that a checkpoint then fills.
    """
    return all(item.group["lr"] == 0.0 for item in items)


def like_parameters(items: Sequence[Item], state: State, key: str) -> list[Tensor]:
    """Return this rank's parts of the states ``key``, made of zeros and laid out as parameters."""
    for item in items:
        if key not in state[item.parameter]:
            state[item.parameter][key] = torch.zeros_like(
                item.parameter, memory_format=torch.preserve_format
            )
    return [local(state[item.parameter][key]) for item in items]


def steps_before(items: Sequence[Item], state: State) -> list[int]:
    """Return how many steps each parameter has taken: a number on the host, as a rule needs it."""
    for item in items:
        if "step" not in state[item.parameter]:
            # Not zeros(): of this one FakeTensorMode remembers the value, until it changes.
            state[item.parameter]["step"] = torch.tensor(0.0, device="cpu")
    return [int(state[item.parameter]["step"].item()) for item in items]


def count_step(items: Sequence[Item], state: State) -> None:
    """Note that these parameters have taken a step."""
    torch._foreach_add_([state[item.parameter]["step"] for item in items], 1.0)
