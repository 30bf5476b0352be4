"""Expert parallelism: each rank owns some experts, and an all-to-all moves tokens to the experts.

| experts                      | all-to-all over | on the receiving rank                          |
|------------------------------|-----------------|------------------------------------------------|
| ep > 1, tp = 1               | ep              | rows are computed                              |
| ep > 1, sharded over tp      | ep              | all-gather over tp, compute, reduce-scatter    |
| unsharded, ``expert_tp: 1``  | ep x tp         | rows are computed                              |

The tokens of a sequence are sharded over tp (``tensor.py``), so each row is sent by one rank.
Experts that are sharded over tp without ep need no all-to-all: ``tensor.py`` gathers all tokens
once.

An all-to-all is started, then the shared expert, which does not depend on the result, is computed,
and then the all-to-all is awaited. The backward all-to-all likewise starts before the backward pass
of the shared expert and is awaited after it.
"""

# E experts, e experts of a rank, R ranks of an exchange, t tp ranks, S rows (tokens times the
# experts they visit), Z received rows, D width

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single

from allometry.models.moe import Compute, Experts, Finish
from allometry.models.transformer import Transformer
from allometry.models.visits import Sorting, spread_rows
from allometry.parallel.in_two import InTwo, under_way
from allometry.parallel.mesh import Axis, Mesh


class Sizes(NamedTuple):
    """Numbers of rows: sent to each rank, received from each rank, received by each tp rank."""

    to: list[int]
    back: list[int]
    got: list[int]


class AllToAll:
    """All-to-all that dispatches rows to the ranks of their experts, and returns the results.

    Replacement of ``Experts.exchange``. Splits are uneven and no row is dropped. Before rows are
    sent, a rank waits for the numbers of rows to receive: one number from each ep rank for each
    local expert. ``axis``: the ranks that own different experts, in order. ``cut``: the ranks that
    own other shards of the same experts and have other tokens; None if experts are not sharded over
    tp.
    """

    def __init__(self, axis: Axis, cut: Axis | None = None) -> None:
        self.axis, self.cut = axis, cut
        self.ranks = axis.size

    @torch.compiler.disable
    def __call__(self, x_SD: Tensor, counts_E: Tensor) -> Finish:
        """Send rows [S, D], sorted by expert; return a function that computes and returns rows."""
        sent_Re = counts_E.view(self.ranks, -1).contiguous()
        # A functional collective does not write in place, so selective checkpointing can save its
        # result.
        got_Re = all_to_all_single(sent_Re, None, None, self.axis.group)
        got_tRe = got_Re[None]
        if self.cut is not None:
            functional = torch.ops._c10d_functional
            gathered = functional.all_gather_into_tensor(
                got_Re.contiguous(), self.cut.size, self.cut.group.group_name
            )
            got_tRe = functional.wait_tensor(gathered).view(-1, *got_Re.shape)
        sizes = self.sizes(sent_Re, got_tRe, len(x_SD))
        exchange = _exchange(sizes.back, sizes.to, self.axis)
        return partial(self._finish, exchange, exchange.send(x_SD), got_tRe, sizes)

    def sizes(self, sent_Re: Tensor, got_tRe: Tensor, rows: int) -> Sizes:
        """Return the split sizes of ``rows`` rows; this is the only host synchronization."""
        got_tR = got_tRe.sum(2)
        own = 0 if self.cut is None else self.cut.rank
        numbers = torch.cat([sent_Re.sum(1), got_tR[own], got_tR.sum(1)]).tolist()
        R = self.ranks
        return Sizes(numbers[:R], numbers[R : 2 * R], numbers[2 * R :])

    @torch.compiler.disable
    def _finish(
        self, exchange: InTwo, edge: Tensor, got_tRe: Tensor, sizes: Sizes, compute: Compute
    ) -> Tensor:
        x_ZD = exchange.arrive(edge)
        if self.cut is not None:
            x_ZD = _gather(x_ZD, sizes.got, self.cut)
        # Rows arrive sorted by (sender, expert); the experts need them sorted by (expert, sender).
        there, by_sender = by_expert(got_tRe.flatten(0, 1), len(x_ZD))
        y_ZD = spread_rows(compute(spread_rows(x_ZD, there), got_tRe.sum((0, 1))), by_sender)
        if self.cut is not None:
            y_ZD = _scatter_sum(y_ZD, sizes.got, self.cut)
        return _exchange(sizes.to, sizes.back, self.axis)(y_ZD)


def by_expert(counts_Re: Tensor, rows: int) -> tuple[Sorting, Sorting]:
    """Return the permutation of ``rows`` from (sender, expert) to (expert, sender), and back.

    ``counts_Re``: rows of each sender for each expert. Both permutations are computed from counts,
    so the host does not wait for the device. For example, ``counts_Re = [[1, 1], [2, 0]]`` sorts
    the rows 0, 1, 2, 3 as 0, 2, 3, 1.
    """
    counts_eR = counts_Re.t()
    before_Re = counts_Re.flatten().cumsum(0).view(counts_Re.shape) - counts_Re
    after_eR = counts_eR.flatten().cumsum(0).view(counts_eR.shape) - counts_eR
    move_Re = after_eR.t() - before_Re  # shift of each run of rows
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


def _gather(x_ZD: Tensor, got: list[int], axis: Axis) -> Tensor:
    """All-gather rows, whose number differs between ranks; the backward pass sums."""
    own = [len(x_ZD)] * axis.size
    return _exchange(got, own, axis)(x_ZD.repeat(axis.size, 1))


def _scatter_sum(y: Tensor, got: list[int], axis: Axis) -> Tensor:
    """Reduce-scatter rows: this rank's rows summed over ranks; the backward pass gathers."""
    own = [got[axis.rank]] * axis.size
    return _exchange(own, got, axis)(y).view(axis.size, -1, y.shape[1]).sum(0)


def _exchange(out: list[int], into: list[int], axis: Axis) -> InTwo:
    """Return an all-to-all of rows: ``into`` sent to each rank, ``out`` received from each."""

    def start(out: list[int], into: list[int], x: Tensor) -> Tensor:
        begun: Tensor = torch.ops._c10d_functional.all_to_all_single(
            x, out, into, axis.group.group_name
        )
        return under_way(begun, axis)

    return InTwo(partial(start, out, into), partial(start, into, out))


def apply_expert(model: Transformer, mesh: Mesh, *, whole_experts: bool = False) -> None:
    """Install the all-to-all in all experts of ``model``.

    The expert weights must already be sharded (``tensor.shard_experts``).
    """
    axis, cut = mesh.ep, None if mesh.tp.size == 1 else mesh.tp
    if whole_experts:
        axis, cut = _ep_and_tp(mesh), None
    if axis.size == 1:
        return
    for module in model.modules():
        if isinstance(module, Experts):
            module.exchange = AllToAll(axis, cut)


def _ep_and_tp(mesh: Mesh) -> Axis:
    """Return ep x tp as one axis; all ranks call this function, including ranks without experts."""
    if mesh.ep.size == 1:
        return mesh.tp
    both = mesh.expert_mesh["ep", "tp"]._flatten("ep_tp")
    return Axis(both.get_local_rank(), both.size(), both.get_group())
