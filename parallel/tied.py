"""Copies of the embedding in a pipeline's last stage: a tied head, and multi-token prediction's.

The embedding owns the weight. Before a step computes, the embedding's value is sent to the copies,
the mirrors; after the gradients of the step are reduced, the mirrors' gradients are sent back and
added. A frozen embedding has no gradient. Mirrors are not trained, clipped or saved. All are
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

HEAD, TABLE = "head.weight", "mtp.embedding.weight"


class Mirrors:
    """Synchronization of mirrors with the embedding; no effect on ranks and models without mirrors.

    ``parts`` are this rank's stages by number; ``first`` and ``last`` are the pipeline ranks of the
    embedding and of the head, which are equal in V-shaped schedules. ``tied``: the head is a
    mirror; ``depths``: the last stage has the table of multi-token prediction, also a mirror.
    """

    def __init__(
        self,
        parts: Mapping[int, Transformer],
        first: int,
        last: int,
        axis: Axis,
        *,
        tied: bool,
        depths: bool,
    ) -> None:
        held = parts.values() if tied or depths else ()
        self._owner = next((part.embedding for part in held if part.embedding is not None), None)
        end = next((part for part in held if part.head is not None), None)
        self._mirrors: dict[str, nn.Module] = {}
        if end is not None and tied:
            assert end.head is not None
            assert end.head.weight is not None, "the head is not parted"
            self._mirrors[HEAD] = end.head
        if end is not None and depths:
            assert end.mtp is not None
            self._mirrors[TABLE] = end.mtp["embedding"]
        self._number = int(tied) + int(depths)  # on the rank that has them
        self._first, self._last, self._axis = first, last, axis

    @property
    def names(self) -> frozenset[str]:
        """Names of this rank's parameters that are mirrors."""
        return frozenset(self._mirrors)

    @torch.no_grad()
    def send_value(self) -> None:
        """Copy the owner's value to the mirrors; if parameters are sharded, all are shards."""
        if self._owner is not None and not self._mirrors and self._number:
            self._axis.send(local(_weight(self._owner)), self._last).wait()
            return
        values: Tensor | None = None
        for mirror in self._mirrors.values():
            into = local(_weight(mirror))
            if values is not None:
                into.copy_(values)
            elif self._owner is not None:
                into.copy_(local(_weight(self._owner)))
            else:
                self._axis.receive(into, self._first)
            values = into

    @torch.no_grad()
    def return_gradient(self) -> None:
        """Add the mirrors' reduced gradients to the owner's and drop them; skip frozen weights."""
        ends = [module for module in (self._owner, *self._mirrors.values()) if module is not None]
        if not all(_weight(module).requires_grad for module in ends):
            return
        total: Tensor | None = None
        for mirror in map(_weight, self._mirrors.values()):
            gradient = _gradient(mirror)
            mirror.grad = None
            total = gradient if total is None else total + gradient
        if self._owner is None:
            if total is not None:
                self._axis.send(total, self._first).wait()
            return
        owner = _gradient(_weight(self._owner))
        if total is None and self._number:
            total = torch.empty_like(owner)
            self._axis.receive(total, self._last)
        if total is not None:
            owner.add_(total)


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
