"""Report that steps wait for the disk of the optimizer states."""

from __future__ import annotations

import time

from typing_extensions import override

from allometry.optim.tiered import TieredOptimizer
from allometry.trainer.record.callbacks import Callback, Reporter


class SlowDisk(Callback):
    """Reports ``slow_disk`` once per launch if updates wait for the disk.

    The first ``FIRST`` steps, which write blocks for the first time, are skipped; the next
    ``STEPS`` are measured, and reported if more than ``SHARE`` of their time was spent waiting. The
    waiting time is limited to the time in which the disk was busy, since an update also waits for
    the device.
    """

    FIRST, STEPS, SHARE = 3, 20, 0.2

    def __init__(self, optimizer: TieredOptimizer, report: Reporter) -> None:
        self._optimizer, self._report = optimizer, report
        self._taken = 0
        self._begun = 0.0, 0.0, 0.0, 0

    @override
    def between_steps(self, step: int, *, last: bool) -> None:
        self._taken += 1
        moved, now = self._optimizer.moved, time.perf_counter()
        if self._taken == self.FIRST:
            self._begun = now, self._optimizer.waited_s, moved.seconds, moved.nbytes
        if self._taken != self.FIRST + self.STEPS:
            return
        begun, waited, seconds, nbytes = self._begun
        busy = moved.seconds - seconds
        share = min(self._optimizer.waited_s - waited, busy) / (now - begun)
        if share > self.SHARE:
            rate = (moved.nbytes - nbytes) / 1e9 / busy
            self._report(
                "slow_disk", step=step, waited_percent=100.0 * share, gb_per_s=rate,
                folder=self._optimizer.folder,
            )  # fmt: skip
