"""Run Python's garbage collector between steps, on all ranks at the same step."""

from __future__ import annotations

import gc

from typing_extensions import override

from allometry.trainer.record.callbacks import Callback


class GarbageCollection(Callback):
    """Disables automatic cyclic garbage collection in steps: one paused rank blocks all others.

    After the first ``WARM_UP`` steps of a launch, all live objects are frozen (``gc.freeze``), so
    that later collections visit only objects created since. Collections run every ``EVERY`` steps,
    counted from step 1 of the run and therefore at the same steps on all ranks. Automatic
    collection is disabled until ``finish``, which restores the collector's earlier state. If the
    process has already frozen objects, no further objects are frozen.
    """

    WARM_UP, EVERY = 3, 100

    def __init__(self, steps_taken: int) -> None:
        self._begin_at = steps_taken + self.WARM_UP
        self._running = False
        self._froze = False

    @override
    def between_steps(self, step: int, *, last: bool) -> None:
        if step == self._begin_at and gc.isenabled() and not last:
            gc.collect()
            self._froze = not gc.get_freeze_count()
            if self._froze:
                gc.freeze()
            gc.disable()
            self._running = True
        elif self._running and step % self.EVERY == 0:
            gc.collect()

    @override
    def finish(self) -> None:
        self._restore()

    @override
    def abort(self, seconds: float | None) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._running:
            if self._froze:
                gc.unfreeze()
            gc.enable()
            self._running = False
