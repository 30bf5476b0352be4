"""Reference for ring attention: the rows of each member and its messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from allometry.parallel.hdp.shard import Ints, Ring, chunks


def local_positions(lengths: Sequence[int], n: int, member: int) -> tuple[Ints, tuple[int, ...]]:
    """Return the rows stored by ``member`` for documents that share a ring of ``n``.

    Returns each row's position in its document, int64, and the lengths of the runs that attention
    treats as documents: two per document, either of which may be empty; on a ring of one, the
    document itself.
    """
    if n == 1:
        runs = [range(length) for length in lengths]
    else:
        runs = [run for length in lengths for run in chunks(length, n, member)]
    places = [np.arange(run.start, run.stop, dtype=np.int64) for run in runs]
    return np.concatenate([np.zeros(0, np.int64), *places]), tuple(len(run) for run in runs)


class Traffic(NamedTuple):
    """Messages sent by one member, without empty ones, and their bytes."""

    hops: int
    bytes: int


def ring_traffic(
    table: Tensor, features: int, dtype: torch.dtype, *, backward: bool = False
) -> Traffic:
    """Return the exact number and size of messages in one attention layer for ``table``'s member.

    ``features``: K * H of this rank, keys only; ``dtype``: dtype of the keys.
    """
    ring = Ring.of(table)
    sizes = [
        2 * features * dtype.itemsize * ring.tokens(ring.source(step)) for step in range(ring.size)
    ]
    messages = sizes[:-1]
    if backward:
        wider = torch.promote_types(dtype, torch.float32).itemsize // dtype.itemsize
        messages = messages + [wider * size for size in sizes[1:]]
    messages = [size for size in messages if size]
    return Traffic(len(messages), sum(messages))
