"""Apply functions of unsharded matrices to sharded parameters: the owner computes each matrix once.

Pieces of many matrices are sent to their owners in an uneven all-to-all, and pieces of the results
are sent back to all ranks that store them, including replicas, in another: a rank of W sends about
2 N/W of N elements, or N if parameters are replicated on every rank. Matrices are split in a few
buckets (see owners.py): while one bucket is computed, the next one's pieces arrive and the previous
one's results are sent. The work of a rank is 1/W of the total, as far as complete matrices allow. A
function receives the same matrix in every layout, so its result is bit-identical in every layout.
"""

# W ranks of a stage, M logical matrices of a parameter, m of them on this rank (see matrix_ops.py)

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from allometry.optim.matrix_ops import Cost, Matrix, MatrixFunction, MatrixOps, aligned
from allometry.optim.owners import Bucket, Messages, Piece, Plan, plan_exchange
from allometry.optim.shards import Placed, Placements
from allometry.parallel.mesh import Mesh


class ShardedMatrixOps(MatrixOps):
    """MatrixOps over the ranks of a pipeline stage (hdp x tp), for any sharding of the parameters.

    Sums, exchanges and functions run on the device of ``mesh``, even if parameters are offloaded to
    the host. No process group is created.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._stage, self._device = mesh.stage, mesh.device
        self._placements = Placements(mesh)
        # The key contains ids of parameters, so the value keeps the parameters alive.
        self._plans: dict[tuple[object, ...], tuple[tuple[Tensor, ...], Plan]] = {}

    @override
    def sums(self, parameters: Sequence[Tensor], partials: Sequence[Tensor]) -> list[Tensor]:
        # Parameters that are replicated on every rank are not communicated.
        placed = [self._placements.of(parameter) for parameter in parameters]
        results = list(partials)
        cut = [i for i, where in enumerate(placed) if not where.whole_everywhere]
        if cut:
            total = torch.cat([self._padded(placed[i], partials[i]) for i in cut])
            dist.all_reduce(total, group=self._stage.group)
            sums = torch.split(total.to(partials[cut[0]].device), [placed[i].size[0] for i in cut])
            for i, each in zip(cut, sums, strict=True):
                results[i] = each
        return results

    @override
    def factors(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        factors = []
        for parameter, value in zip(parameters, values, strict=True):
            box = self._placements.of(parameter).boxes[self._stage.rank]
            value = value.to(parameter.dtype)
            stacked = parameter.dim() == 3
            factors.append(value[slice(*box.matrices)].view(-1, 1, 1) if stacked else value[0])
        return factors

    @override
    def owned(self, parameters: Sequence[Tensor], cost: Cost) -> list[Matrix]:
        return list(self._plan(parameters, cost).owned)

    @override
    def map(
        self,
        parameters: Sequence[Tensor],
        parts: Sequence[Tensor],
        function: MatrixFunction,
        cost: Cost,
    ) -> list[Tensor]:
        if not parts:
            return []
        dtype = parts[0].dtype
        assert all(part.dtype == dtype for part in parts), "one type travels"
        placed = [self._placements.of(parameter) for parameter in parameters]
        starts = [where.boxes[self._stage.rank].matrices[0] for where in placed]

        def part_of(tensors: Sequence[Tensor], piece: Piece) -> Tensor:
            i, e = piece.matrix
            tensor = tensors[i]
            return tensor[e - starts[i]] if tensor.dim() == 3 else tensor

        def send(bucket: Bucket) -> _AllToAll:
            return self._start(bucket.out, lambda piece: part_of(parts, piece), dtype)

        results = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
        plan = self._plan(parameters, cost)
        coming = deque(plan.buckets)
        ahead = len(plan.buckets) if plan.apart else 1
        incoming = deque(send(coming.popleft()) for _ in range(ahead))
        outgoing = []
        for bucket in plan.buckets:
            arrived = incoming.popleft().wait()
            if coming:
                incoming.append(send(coming.popleft()))
            returned: dict[Piece, Tensor] = {}
            wholes = self._wholes(bucket, placed, arrived, lambda piece: part_of(parts, piece))
            for matrix, result in function(wholes):
                size = placed[matrix.parameter].size[1:]
                assert (result.shape, result.dtype) == (size, dtype), (result.shape, size)
                for piece in bucket.owned[matrix]:
                    returned[piece] = result[slice(*piece.box.rows), slice(*piece.box.columns)]
                    if self._stage.rank in piece.holders:
                        part_of(results, piece).copy_(returned[piece])
            outgoing.append(self._start(bucket.back, returned.__getitem__, dtype))
        for back in outgoing:
            received = back.wait()
            if received:
                here = [part_of(results, piece) for piece in received]
                torch._foreach_copy_(here, list(received.values()))
        return results

    def _wholes(
        self,
        bucket: Bucket,
        placed: Sequence[Placed],
        arrived: dict[Piece, Tensor],
        own: Callable[[Piece], Tensor],
    ) -> Iterator[tuple[Matrix, Tensor]]:
        """Yield this rank's matrices of a bucket, assembled from local and received pieces."""
        for matrix, pieces in bucket.owned.items():
            for piece in pieces:
                if piece.source == self._stage.rank:
                    arrived[piece] = own(piece).to(self._device)
            yield matrix, _assembled(placed[matrix.parameter], pieces, arrived)

    def _start(
        self, messages: Messages, value: Callable[[Piece], Tensor], dtype: torch.dtype
    ) -> _AllToAll:
        """Start to send pieces to their destinations and to receive the others."""
        if messages.silent:
            return _AllToAll(None, None, {})
        sent = _Buffer(messages.sent, dtype, self._device)
        received = _Buffer(messages.received, dtype, self._device)
        if sent.views:
            values = [value(piece) for to in messages.sent for piece in to]
            torch._foreach_copy_(sent.views, values)
        group = self._stage.group
        work = dist.all_to_all_single(
            received.flat, sent.flat, received.sizes, sent.sizes, group=group, async_op=True
        )
        order = [piece for source in messages.received for piece in source]
        return _AllToAll(work, sent.flat, dict(zip(order, received.views, strict=True)))

    def _padded(self, placed: Placed, partial: Tensor) -> Tensor:
        """Return partial sums as [M], zero for other ranks' matrices and on further replicas."""
        rank, (size, _, _) = self._stage.rank, placed.size
        box = placed.boxes[rank]
        if box.numel == 0 or placed.holders[box][0] != rank:
            return torch.zeros(size, dtype=torch.float64, device=self._device)
        start, stop = box.matrices
        assert partial.shape == (stop - start,), (partial.shape, box)
        return torch.nn.functional.pad(partial.to(self._device), (start, size - stop))

    def _plan(self, parameters: Sequence[Tensor], cost: Cost) -> Plan:
        key = (cost, *map(id, parameters))
        if key not in self._plans:
            placed = [self._placements.of(parameter) for parameter in parameters]
            plan = plan_exchange(placed, cost, self._stage.rank, self._stage.size)
            self._plans[key] = tuple(parameters), plan
        return self._plans[key][1]


@dataclass
class _AllToAll:
    """An all-to-all in progress; ``sent`` must be kept alive until it has completed."""

    work: dist.Work | None
    sent: Tensor | None
    received: dict[Piece, Tensor]

    def wait(self) -> dict[Piece, Tensor]:
        """Return the received pieces, as views of one buffer."""
        if self.work is not None:
            self.work.wait()
        self.work = self.sent = None
        return self.received


class _Buffer:
    """Send or receive buffer of one rank in an all-to-all: concatenated pieces, and their views."""

    def __init__(
        self, pieces: Sequence[Sequence[Piece]], dtype: torch.dtype, device: torch.device
    ) -> None:
        shapes = [[piece.shape for piece in of_rank] for of_rank in pieces]
        numels = [[rows * columns for rows, columns in of_rank] for of_rank in shapes]
        self.sizes = [sum(of_rank) for of_rank in numels]
        self.flat = torch.empty(sum(self.sizes), dtype=dtype, device=device)
        each = torch.split(self.flat, [numel for of_rank in numels for numel in of_rank])
        flat_shapes = [shape for of_rank in shapes for shape in of_rank]
        self.views = [part.view(shape) for part, shape in zip(each, flat_shapes, strict=True)]


def _assembled(placed: Placed, pieces: Sequence[Piece], values: dict[Piece, Tensor]) -> Tensor:
    """Return a matrix [out, in] assembled from its pieces."""
    first = values[pieces[0]]
    if len(pieces) == 1:
        return aligned(first)
    whole = torch.empty(placed.size[1:], dtype=first.dtype, device=first.device)
    torch._foreach_copy_(
        [whole[slice(*piece.box.rows), slice(*piece.box.columns)] for piece in pieces],
        [values[piece] for piece in pieces],
    )
    return whole
