"""Tied embeddings in a pipeline: the last stage's head is a copy of the embedding.

The embedding owns the weight. Before a step computes, the embedding's value is sent to the head,
the mirror; after the gradients of the step are reduced, the mirror's gradient is sent back and
added. A frozen embedding has no gradient. The mirror is not trained, clipped or saved. Both are
sharded alike over hdp and tp, so the shard of one rank corresponds to the shard of the rank at the
same position of the other stage.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from allometry.models.transformer import Transformer
from allometry.parallel.mesh import Axis, local

MIRROR = "head.weight"


class TiedHead:
    """Synchronization of the mirror with the embedding; no effect on other ranks or untied models.

    ``parts`` are this rank's stages by number; ``first`` and ``last`` are the pipeline ranks of the
    embedding and of the head, which are equal in V-shaped schedules.
    """

    def __init__(
        self, parts: Mapping[int, Transformer], first: int, last: int, axis: Axis, *, tied: bool
    ) -> None:
        held = parts.values() if tied else ()
        self._owner = next((part.embedding for part in held if part.embedding is not None), None)
        self._mirror = next((part.head for part in held if part.head is not None), None)
        self._first, self._last, self._axis = first, last, axis
        assert self._mirror is None or self._mirror.weight is not None, "the head is not parted"

    @property
    def mirrors(self) -> frozenset[str]:
        """Names of this rank's parameters that are copies."""
        return frozenset() if self._mirror is None else frozenset({MIRROR})

    @torch.no_grad()
    def send_value(self) -> None:
        """Copy the owner's value to the mirror; if parameters are sharded, both are shards."""
        if self._owner is not None and self._mirror is not None:
            local(_weight(self._mirror)).copy_(local(_weight(self._owner)))
        elif self._owner is not None:
            self._axis.send(local(_weight(self._owner)), self._last).wait()
        elif self._mirror is not None:
            self._axis.receive(local(_weight(self._mirror)), self._first)

    @torch.no_grad()
    def return_gradient(self) -> None:
        """Add the mirror's reduced gradient to the owner's, then drop it; skip frozen weights."""
        ends = [module for module in (self._owner, self._mirror) if module is not None]
        if not all(_weight(module).requires_grad for module in ends):
            return
        if self._mirror is not None:
            mirror = _weight(self._mirror)
            gradient = _gradient(mirror)
            mirror.grad = None
            if self._owner is None:
                self._axis.send(gradient, self._first).wait()
                return
        elif self._owner is not None:
            gradient = torch.empty_like(_gradient(_weight(self._owner)))
            self._axis.receive(gradient, self._last)
        else:
            return
        _gradient(_weight(self._owner)).add_(gradient)


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "both ends of a tied model have a gradient after a step"
    gradient = parameter.grad
    if isinstance(gradient, DTensor):
        assert isinstance(parameter, DTensor)
        assert gradient.placements == parameter.placements, (gradient.placements, "not reduced")
    return local(gradient)
