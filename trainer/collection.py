"""When Python looks for cycles: between steps, on all ranks at once, rather than anywhere."""

from __future__ import annotations

import gc

from typing_extensions import override

from allometry.trainer.record.callbacks import Callback


class GarbageCollection(Callback):
    """Takes cyclic collection out of steps: one rank that stops for it stops all.

    After the first ``WARM_UP`` steps of a launch, what is there is taken for permanent
    (``gc.freeze``), so that later collections look at what has come since; they run every ``EVERY``
    steps, counted from 1 in the run and so the same ones on all ranks. Nothing else is collected
    until ``finish``, which leaves Python's collector as it was. A process that has frozen objects
    itself keeps those alone frozen.
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
