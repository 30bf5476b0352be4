"""Short measurements of this machine's disk and processor for offloaded optimizer states."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim.adamw import adamw

from allometry.optim.offload.swap import SwapFile
from allometry.parallel.buffers import host_buffer


class DiskRates(NamedTuple):
    """Bytes per second of a folder's disk, bypassing the page cache, including checksums."""

    write: float
    read: float


def disk_rates(folder: Path, nbytes: int = 128 << 20, rounds: int = 3) -> DiskRates:
    """Return the median rates of writing and reading ``nbytes`` in a scratch file of ``folder``.

    Raises:
        UserError: the folder cannot be used or is too small.
        StatesLost: the written data cannot be read back.
    """
    swap = SwapFile(folder, nbytes)
    regions = swap.allocate([nbytes])
    buffer = host_buffer(nbytes, torch.device("cpu"))
    buffer.view(torch.int64).copy_(torch.arange(nbytes // 8))  # not zeros, which a disk may skip
    swap.write(regions, buffer)  # the first write of reserved blocks is slower
    write = sorted(_seconds(lambda: swap.write(regions, buffer)) for _ in range(rounds))
    read = sorted(_seconds(lambda: swap.read(regions, buffer)) for _ in range(rounds))
    return DiskRates(nbytes / write[rounds // 2], nbytes / read[rounds // 2])


def adam_update(elements: int) -> Callable[[], None]:
    """Return a step of torch's fused AdamW on ``elements`` parameters, to be timed."""
    parameter, gradient, mean, square = (torch.full((elements,), 0.01) for _ in range(4))
    step = torch.tensor(0.0)

    def update() -> None:
        adamw(
            *([parameter], [gradient], [mean], [square], [], [step]),
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.95,
            lr=1e-3,
            weight_decay=0.1,
            eps=1e-8,
            maximize=False,
        )

    return update


def adam_rate(elements: int = 16 << 20, rounds: int = 3) -> float:
    """Return the median rate of torch's fused AdamW on this process's threads, parameters/s."""
    update = adam_update(elements)
    update()
    return elements / sorted(_seconds(update) for _ in range(rounds))[rounds // 2]


def _seconds(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
