"""What rings of attention must do, written out: the rows of a member, and what it sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from allometry.parallel.hdp.shard import Ints, Ring, chunks


def local_positions(lengths: Sequence[int], n: int, member: int) -> tuple[Ints, tuple[int, ...]]:
    """Return what ``member`` holds of documents that share a ring of ``n``.

    Each row's place in its document, int64, and the lengths of the runs that attention takes for
    documents: two for each, either of which may be empty; on a ring of one the document itself.
    """
    if n == 1:
        runs = [range(length) for length in lengths]
    else:
        runs = [run for length in lengths for run in chunks(length, n, member)]
    places = [np.arange(run.start, run.stop, dtype=np.int64) for run in runs]
    return np.concatenate([np.zeros(0, np.int64), *places]), tuple(len(run) for run in runs)


class Traffic(NamedTuple):
    """What one member sends: messages (those without a row are not sent) and their bytes."""

    hops: int
    bytes: int


def ring_traffic(
    table: Tensor, features: int, dtype: torch.dtype, *, backward: bool = False
) -> Traffic:
    """Return what the member of ``table`` sends in one attention layer: exact, and pure.

    ``features``: K * H of this rank, keys alone; ``dtype``: theirs.
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
