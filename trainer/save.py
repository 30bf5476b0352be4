"""Saving a run's state between steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from allometry.configs.errors import UserError
from allometry.parallel.mesh import Mesh
from allometry.trainer.loop import Progress
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.record.corruption import Response
from allometry.trainer.record.timing import StepTimer
from allometry.trainer.state.checkpoint import Checkpointer
from allometry.trainer.state.finite import not_finite
from allometry.trainer.state.planners import State

RETRY_AFTER_S = (1.0, 5.0)
"""Pauses before the last checkpoint of a launch is tried again."""


class Saver(Callback):
    """Saves where the configuration asks for it, and at the end of a launch; off the clock.

    All numbers are read first, and tensors looked through, so that no checkpoint is made of a run
    that has gone wrong. ``state`` returns the tensors and the facts of a checkpoint; ``response``
    says where none is to be made any more.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        progress: Progress,
        state: Callable[[], tuple[State, dict[str, Any]]],
        timer: StepTimer,
        mesh: Mesh,
        response: Response | None = None,
    ) -> None:
        self._response = response
        self._checkpointer, self._progress = checkpointer, progress
        self._state, self._timer, self._mesh = state, timer, mesh
        self._begun_step = progress.saved_step  # saved or being saved
        self._failed: tuple[int, str] | None = None  # the newest save that failed, and why

    @override
    def needs_numbers(self, step: int, *, last: bool) -> bool:
        return last or self._checkpointer.due(step)

    @override
    def between_steps(self, step: int, *, last: bool) -> None:
        with self._timer.paused():
            due = self.needs_numbers(step, last=last) and self._begun_step != step
            if due and self._refusal is None:
                self._save(step)
            self._checkpointer.poll()

    def _save(self, step: int) -> None:
        tensors, facts = self._state()
        name = not_finite(tensors, self._mesh)
        if name is not None:
            self._checkpointer.wait()  # for the one before, which is named
            raise UserError(
                f"step {step}: its update left {name} not finite, so it is not saved; "
                f"{self._kept()}; lower optimizer.lr, lengthen the warm-up or check the data of "
                "that step, then run again"
            )
        self._begun_step = step
        self._checkpointer.save(step, tensors, facts)

    @property
    def _refusal(self) -> str | None:
        return None if self._response is None else self._response.refusal

    def _kept(self) -> str:
        kept = self._progress.saved_step
        return "there is none before" if kept is None else f"step-{kept} is kept"

    @override
    def on_event(self, kind: str, details: dict[str, Any]) -> None:
        if kind == "checkpoint_saved":
            self._progress.saved_step, self._failed = details["step"], None
        elif kind == "checkpoint_failed" and self._begun_step == details["step"]:
            self._begun_step = None
            self._failed = details["step"], details["reason"]

    @override
    def finish(self) -> None:
        """Wait for the last checkpoint; try again if it failed.

        Raises UserError on every rank: it cannot be written.
        """
        step = self._progress.step
        self._checkpointer.wait()
        if (refused := self._refusal) is not None:
            raise UserError(
                f"step {step}: no checkpoint is made, as {refused}; {self._kept()}: take that "
                "machine out and run again, which goes on from there"
            )
        for pause in RETRY_AFTER_S:
            if self._missing() is None:
                return
            time.sleep(pause)
            self._save(step)
            self._checkpointer.wait()
        reason = self._missing()
        if reason is not None:
            raise UserError(
                f"step {step}: the last checkpoint could not be written ({reason}); "
                f"{self._kept()}: mend that and run again, which goes on from there"
            )

    def _missing(self) -> str | None:
        """Why the state as it is now could not be saved; None if it was."""
        step, reason = self._failed or (None, None)
        return reason if step == self._progress.step else None

    @override
    def abort(self, seconds: float | None) -> None:
        self._checkpointer.join(seconds)
        self._checkpointer.poll()
