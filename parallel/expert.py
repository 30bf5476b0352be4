"""Expert parallelism: ranks hold some experts, and tokens travel to them and back.

| experts                  | rows travel over | then                                           |
|--------------------------|------------------|------------------------------------------------|
| ep > 1, tp = 1           | ep               | are computed                                   |
| ep > 1, cut over tp      | ep               | are gathered over tp; sums are scattered there |
| whole, ``expert_tp: 1``  | ep x tp          | are computed                                   |

Tokens of a sequence are spread over tp (``tensor.py``), so each row is sent by one rank. Experts
cut over tp without ep move nothing but what ``tensor.py`` gathers: all tokens, once.

An exchange is begun, and whatever does not need it (the shared expert) computes until it is ended;
its backward too is begun before that of the shared expert and ended after it.
"""

# E experts, e experts of a rank, R ranks of an exchange, t tp ranks, S rows (tokens times the
# experts they visit), Z rows that arrive here, D width

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
    """Rows to send to each rank, to get from each, and that each of the tp ranks has got."""

    to: list[int]
    back: list[int]
    got: list[int]


class AllToAll:
    """Brings rows to the ranks that hold their experts, and what these compute back.

    Takes the place of ``Experts.exchange``. Splits are uneven and no row is dropped. A rank waits
    for the number of rows to expect (ep numbers for each of its experts) before it sends them.
    ``axis``: the ranks with other experts, in their order; ``cut``: those that have other parts of
    the same experts' width and other tokens, if there are any.
    """

    def __init__(self, axis: Axis, cut: Axis | None = None) -> None:
        self.axis, self.cut = axis, cut
        self.ranks = axis.size

    @torch.compiler.disable
    def __call__(self, x_SD: Tensor, counts_E: Tensor) -> Finish:
        """Send [S, D], sorted by expert; return what gives [S, D], made of them row for row."""
        sent_Re = counts_E.view(self.ranks, -1).contiguous()
        # Functional, so that selective checkpointing can keep the result: nothing is written into.
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
        """Return the sizes of what is sent, ``rows`` in all; the one time that the host waits."""
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
        # Rows come sorted by (sender, expert); the experts want them by (expert, sender).
        there, by_sender = by_expert(got_tRe.flatten(0, 1), len(x_ZD))
        y_ZD = spread_rows(compute(spread_rows(x_ZD, there), got_tRe.sum((0, 1))), by_sender)
        if self.cut is not None:
            y_ZD = _scatter_sum(y_ZD, sizes.got, self.cut)
        return _exchange(sizes.to, sizes.back, self.axis)(y_ZD)


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


def _gather(x_ZD: Tensor, got: list[int], axis: Axis) -> Tensor:
    """Return the rows of all ranks, of which each has another number; backward sums."""
    own = [len(x_ZD)] * axis.size
    return _exchange(got, own, axis)(x_ZD.repeat(axis.size, 1))


def _scatter_sum(y: Tensor, got: list[int], axis: Axis) -> Tensor:
    """Return the sum over the ranks of this one's rows; backward gathers."""
    own = [got[axis.rank]] * axis.size
    return _exchange(own, got, axis)(y).view(axis.size, -1, y.shape[1]).sum(0)


def _exchange(out: list[int], into: list[int], axis: Axis) -> InTwo:
    """Return an all-to-all of rows: ``into`` to each rank, ``out`` from each."""

    def start(out: list[int], into: list[int], x: Tensor) -> Tensor:
        begun: Tensor = torch.ops._c10d_functional.all_to_all_single(
            x, out, into, axis.group.group_name
        )
        return under_way(begun, axis)

    return InTwo(partial(start, out, into), partial(start, into, out))


def apply_expert(model: Transformer, mesh: Mesh, *, whole_experts: bool = False) -> None:
    """Let the experts of ``model`` be reached from all ranks that hold others.

    Their weights must have been cut already (``tensor.shard_experts``).
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
    """Return ep x tp as one axis; called by all ranks, whether they hold experts or not."""
    if mesh.ep.size == 1:
        return mesh.tp
    both = mesh.expert_mesh["ep", "tp"]._flatten("ep_tp")
    return Axis(both.get_local_rank(), both.size(), both.get_group())
