"""Expert parallelism: each ep rank holds some experts, and tokens travel to them and back."""

# E experts, e = E/ep experts of a rank, R ep ranks, S rows (tokens times the experts they visit),
# Z rows that arrive here, D width

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed._functional_collectives import (
    all_to_all_single,
    all_to_all_single_autograd,
)

from allometry.models.moe import Experts
from allometry.models.transformer import Transformer
from allometry.parallel.mesh import Axis, Mesh

Compute = Callable[[Tensor, Tensor], Tensor]


class AllToAll:
    """Brings rows to the ranks that hold their experts, and what these compute back.

    Takes the place of ``Experts.exchange``. Splits are uneven and no row is dropped. A rank waits
    for the number of rows to expect (ep numbers for each of its experts) before it sends them.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    @torch.compiler.disable
    def __call__(self, x_SD: Tensor, counts_E: Tensor, compute: Compute) -> Tensor:
        """Return [S, D]: row for row what the experts make of ``x_SD``, sorted by expert."""
        ranks = self._axis.size
        sent_Re = counts_E.view(ranks, -1)
        # Functional, so that selective checkpointing can keep the result: nothing is written into.
        got_Re = all_to_all_single(sent_Re.contiguous(), None, None, self._axis.group)
        to, back = sent_Re.sum(1).tolist(), got_Re.sum(1).tolist()
        arrived_ZD = all_to_all_single_autograd(x_SD.contiguous(), back, to, self._axis.group)
        # Rows come sorted by (sender, expert); the experts want them by (expert, sender).
        order_Z = _by_expert(got_Re)
        y_ZD = compute(arrived_ZD[order_Z], got_Re.sum(0))
        inverse_Z = torch.empty_like(order_Z)
        inverse_Z[order_Z] = torch.arange(len(order_Z), device=order_Z.device)
        return all_to_all_single_autograd(y_ZD[inverse_Z], to, back, self._axis.group)


def _by_expert(counts_Re: Tensor) -> Tensor:
    """Return the order [Z] that sorts rows by expert, then by sender, each in its own order."""
    ranks, experts = counts_Re.shape
    expert_of_run = torch.arange(experts, device=counts_Re.device).repeat(ranks)
    return torch.argsort(expert_of_run.repeat_interleave(counts_Re.flatten()), stable=True)


def apply_expert(model: Transformer, mesh: Mesh) -> None:
    """Let the experts of ``model`` be reached from all ranks of ``mesh.ep``.

    Their weights must have been cut over ep already (``tensor.shard_experts``).
    """
    for module in model.modules():
        if isinstance(module, Experts):
            module.exchange = AllToAll(mesh.ep)
