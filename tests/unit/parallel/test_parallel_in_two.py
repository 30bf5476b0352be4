"""A communication in two halves: where it begins and ends, and its autograd history."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.parallel.checkpointing import apply_checkpointing
from allometry.parallel.in_two import InTwo, Start


def test_tensors_in_flight_have_no_history() -> None:
    """Autograd must not write to tensors that the backend's threads read."""
    moving: list[Tensor] = []

    def start(factor: float, x: Tensor) -> Tensor:
        moving.append(x * factor)
        assert both.moving is None, "one at a time"
        return moving[-1]

    both = InTwo(lambda x: start(2.0, x), lambda grad: start(3.0, grad))
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    edge = both.send(x)
    assert edge.requires_grad, "the graph goes through it"
    assert both.moving is not None, "both tensors are kept until they are waited for"
    assert not moving[0].requires_grad
    assert moving[0].grad_fn is None
    y = both.arrive(edge)
    assert both.moving is None
    torch.testing.assert_close(y, 2.0 * x)
    y.sum().backward()
    assert not moving[1].requires_grad
    torch.testing.assert_close(x.grad, torch.full((2, 3), 3.0))


class Counted(InTwo):
    """Count starts and waits."""

    begun = ended = 0

    def begin(self, start: Start, x: Tensor) -> Tensor:
        Counted.begun += 1
        return super().begin(start, x)

    def end(self) -> Tensor:
        Counted.ended += 1
        return super().end()


class Chunks(torch.nn.Module):
    """A block whose last messages start before, and are awaited after, its last product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        begun = []
        for part in x.chunk(2):
            both = Counted(torch.clone, torch.clone)
            begun.append((both, both.send(part @ self.weight)))
        return torch.cat([both.arrive(edge) for both, edge in begun])


@pytest.mark.parametrize(("to_the_end", "left"), [(True, 0), (False, 1)])
def test_what_a_block_sends_again_arrives(to_the_end: bool, left: int) -> None:
    Counted.begun = Counted.ended = 0
    model: Any = torch.nn.Module()
    model.blocks = torch.nn.ModuleDict({"0": Chunks()})
    apply_checkpointing(model, "full", dropout=False, to_the_end=to_the_end)
    model.blocks["0"](torch.ones(4, 3, requires_grad=True)).sum().backward()
    assert Counted.begun - Counted.ended == left
    assert Counted.begun > 4, "some were begun again"
