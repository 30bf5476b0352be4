"""What all update rules share: parameters with their gradients, and the states beside them."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allometry.parallel.mesh import local

Group = dict[str, Any]
"""A parameter group, as ``groups.parameter_groups`` makes it."""

State = MutableMapping[Tensor, dict[str, Tensor]]
"""An optimizer's tensors by parameter and name; an unknown parameter has an empty dict."""


class Item(NamedTuple):
    """A parameter in a step."""

    name: str
    parameter: Tensor
    group: Group

    @property
    def part(self) -> Tensor:
        """This rank's part, a plain tensor."""
        return local(self.parameter)

    @property
    def gradient(self) -> Tensor:
        """This rank's part of the gradient."""
        assert self.parameter.grad is not None, self.name
        return local(self.parameter.grad)


def items_of(groups: Iterable[Group]) -> list[Item]:
    """Return all parameters of groups in their order."""
    return [
        Item(name, parameter, group)
        for group in groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]


def init_like_parameters(items: Sequence[Item], state: State, *keys: str) -> None:
    """Make the states ``keys`` that are missing, of zeros and laid out as the parameters."""
    for item in items:
        for key in keys:
            if key not in state[item.parameter]:
                state[item.parameter][key] = torch.zeros_like(
                    item.parameter, memory_format=torch.preserve_format
                )


def init_steps(items: Sequence[Item], state: State) -> None:
    """Make the counts of steps that are missing, on the host, where rules need them."""
    for item in items:
        if "step" not in state[item.parameter]:
            # Not zeros(): of this one FakeTensorMode remembers the value, until it changes.
            state[item.parameter]["step"] = torch.tensor(0.0, device="cpu")


def local_states(items: Sequence[Item], state: State, key: str) -> list[Tensor]:
    """Return this rank's parts of the states ``key``."""
    return [local(state[item.parameter][key]) for item in items]


def count_step(items: Sequence[Item], state: State) -> list[int]:
    """Count a step of these parameters; return how many each has now taken, from 1."""
    counts = [state[item.parameter]["step"] for item in items]
    taken = [int(count.item()) + 1 for count in counts]
    torch._foreach_add_(counts, 1.0)
    return taken
