"""Parameters with gradients and states, as used by all update rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allometry.optim.fp8_states import Fp8States
from allometry.parallel.mesh import local

Group = dict[str, Any]
"""A parameter group of ``groups.parameter_groups``."""

State = MutableMapping[Tensor, dict[str, Tensor]]
"""Optimizer states by parameter and name; an unknown parameter has an empty dict."""


class Item(NamedTuple):
    """A parameter in an optimizer step."""

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

    @property
    def stacked(self) -> bool:
        """True for a stacked parameter of several runs, each with a rate (``optim/stacked.py``)."""
        return isinstance(self.group["lr"], Tensor)

    def setting(self, key: str) -> float | Tensor:
        """Return a number of the group; values by run become fp64 [M, 1, 1], to match ``part``."""
        value: float | Tensor = self.group[key]
        if not isinstance(value, Tensor):
            return value
        return value.repeat_interleave(len(self.part) // len(value)).view(-1, 1, 1)

    @property
    def fp8(self) -> Fp8States | None:
        """FP8 storage of this parameter's states; None for plain states."""
        fp8: Fp8States | None = self.group.get("fp8")
        return fp8 if fp8 is not None and fp8.holds(self.parameter) else None


def items_of(groups: Iterable[Group]) -> list[Item]:
    """Return all parameters of groups in order."""
    return [
        Item(name, parameter, group)
        for group in groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]


def init_like_parameters(items: Sequence[Item], state: State, *keys: str) -> None:
    """Create missing states ``keys`` as zeros, sharded like the parameters."""
    for item in items:
        if item.fp8 is not None:
            item.fp8.init(item.parameter, state[item.parameter], *keys)
            continue
        for key in keys:
            if key not in state[item.parameter]:
                state[item.parameter][key] = torch.zeros_like(
                    item.parameter, memory_format=torch.preserve_format
                )


def init_steps(items: Sequence[Item], state: State) -> None:
    """Create missing step counts on the host."""
    for item in items:
        if "step" not in state[item.parameter]:
            # Not zeros(): FakeTensorMode stores the value of this constant until it changes.
            state[item.parameter]["step"] = torch.tensor(0.0, device="cpu")


def local_states(items: Sequence[Item], state: State, key: str) -> list[Tensor]:
    """Return this rank's parts of the states ``key``."""
    return [local(state[item.parameter][key]) for item in items]


@contextmanager
def updated(item: Item, state: State, *keys: str) -> Iterator[list[Tensor]]:
    """Yield this rank's parts of the states ``keys``, to be changed in place.

    FP8 states are yielded as fp32 copies and rounded afterwards. For stochastic rounding ``step``
    must already count this step.
    """
    fp8, held = item.fp8, state[item.parameter]
    if fp8 is None:
        yield [local(held[key]) for key in keys]
        return
    values = [fp8.read(item.parameter, held, key) for key in keys]
    yield values
    for key, value in zip(keys, values, strict=True):
        fp8.write(item.name, item.parameter, held, key, value)


def descend_(item: Item, update: Tensor, scale: float = 1.0) -> None:
    """Update a parameter in place: W ← (1−ηλ)W − η·``scale``·``update``, with its group's rates."""
    part, rate = item.part, item.setting("lr")
    keep, move = 1.0 - rate * item.setting("weight_decay"), -rate * scale
    part.mul_(keep.to(part.dtype) if isinstance(keep, Tensor) else keep)
    if isinstance(move, Tensor):
        part.addcmul_(update.to(part.dtype), move.to(part.dtype))
    else:
        part.add_(update, alpha=move)


def rounded_at_random(items: Sequence[Item]) -> list[Item]:
    """Return the items with stochastic rounding of states, which need a step count."""
    return [item for item in items if item.fp8 is not None and item.fp8.stochastic]


def count_step(items: Sequence[Item], state: State) -> list[int]:
    """Increment the step counts of ``items``; return the new counts, from 1."""
    counts = [state[item.parameter]["step"] for item in items]
    taken = [int(count.item()) + 1 for count in counts]
    if counts:
        torch._foreach_add_(counts, 1.0)
    return taken
