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

from allometry.models.grouped import Sorting, spread_rows
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
        # The one time that the host waits.
        to, back = torch.stack([sent_Re.sum(1), got_Re.sum(1)]).tolist()
        arrived_ZD = all_to_all_single_autograd(x_SD.contiguous(), back, to, self._axis.group)
        # Rows come sorted by (sender, expert); the experts want them by (expert, sender).
        there, by_sender = by_expert(got_Re, sum(back))
        y_ZD = compute(spread_rows(arrived_ZD, there), got_Re.sum(0))
        return all_to_all_single_autograd(spread_rows(y_ZD, by_sender), to, back, self._axis.group)


def by_expert(counts_Re: Tensor, rows: int) -> tuple[Sorting, Sorting]:
    """Return the order that sorts ``rows`` by expert, then by sender, each in its own; and back.

    ``counts_Re``: rows of each sender for each expert, as they lie: by sender, then by expert.
    Found by counting; nothing waits for the device.
    """
    counts_eR = counts_Re.t()
    before_Re = counts_Re.flatten().cumsum(0).view(counts_Re.shape) - counts_Re
    after_eR = counts_eR.flatten().cumsum(0).view(counts_eR.shape) - counts_eR
    move_Re = after_eR.t() - before_Re  # how far the rows of a run go
    places_Z = torch.arange(rows, device=counts_Re.device)

    def moved(by: Tensor, counts: Tensor) -> Tensor:
        each = by.flatten().repeat_interleave(counts.flatten(), output_size=rows)
        return places_Z + each

    to_Z, from_Z = moved(move_Re, counts_Re), moved(-move_Re.t(), counts_eR)
    by_expert, by_sender = counts_Re.sum(0), counts_Re.sum(1)
    return (
        Sorting(from_Z, to_Z[:, None], by_expert),
        Sorting(to_Z, from_Z[:, None], by_sender),
    )


def apply_expert(model: Transformer, mesh: Mesh) -> None:
    """Let the experts of ``model`` be reached from all ranks of ``mesh.ep``.

    Their weights must have been cut over ep already (``tensor.shard_experts``).
    """
    for module in model.modules():
        if isinstance(module, Experts):
            module.exchange = AllToAll(mesh.ep)
