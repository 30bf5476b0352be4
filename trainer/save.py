"""Saving a run's state between steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import override

from allometry.trainer.loop import Progress
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.record.timing import StepTimer
from allometry.trainer.state.checkpoint import Checkpointer


class Saver(Callback):
    """Saves where the configuration asks for it, and at the end of a launch; off the clock.

    All numbers are read first, so that no checkpoint is made of a run that has gone wrong.
    ``state`` returns the tensors and the facts of a checkpoint.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        progress: Progress,
        state: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]],
        timer: StepTimer,
    ) -> None:
        self._checkpointer, self._progress = checkpointer, progress
        self._state, self._timer = state, timer
        self._begun_step = progress.saved_step  # saved or being saved

    @override
    def needs_numbers(self, step: int, *, last: bool) -> bool:
        return last or self._checkpointer.due(step)

    @override
    def between_steps(self, step: int, *, last: bool) -> None:
        with self._timer.paused():
            if self.needs_numbers(step, last=last) and self._begun_step != step:
                self._begun_step = step
                self._checkpointer.save(step, *self._state())
            self._checkpointer.poll()

    @override
    def on_event(self, kind: str, details: dict[str, Any]) -> None:
        if kind == "checkpoint_saved":
            self._progress.saved_step = details["step"]
        elif kind == "checkpoint_failed" and self._begun_step == details["step"]:
            self._begun_step = None

    @override
    def finish(self) -> None:
        self._checkpointer.wait()

    @override
    def abort(self, seconds: float | None) -> None:
        self._checkpointer.join(seconds)
        self._checkpointer.poll()
