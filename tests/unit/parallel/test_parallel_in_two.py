"""A communication in two halves: where it begins and ends, and what autograd knows of it."""

from __future__ import annotations

import torch
from torch import Tensor

from allometry.parallel.in_two import InTwo


def test_tensors_in_flight_have_no_history() -> None:
    """What threads of the backend read, autograd may not write into."""
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
