"""Save a run's state between steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from typing_extensions import override

from allometry.configs.errors import UserError
from allometry.optim.offload.held import Stored
from allometry.parallel.agree import from_main_rank, on_all_ranks
from allometry.parallel.mesh import Mesh
from allometry.trainer.loop import Progress
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.record.corruption import Response
from allometry.trainer.record.timing import StepTimer
from allometry.trainer.save_times import SaveTimes
from allometry.trainer.state.checkpoint import Checkpointer
from allometry.trainer.state.finite import not_finite
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.local import LocalCopies
from allometry.trainer.state.local_choice import launch_name
from allometry.trainer.state.planners import State
from allometry.trainer.state.resume import Start

RETRY_AFTER_S = (1.0, 5.0)
"""Pauses before the retries of a launch's last checkpoint."""


class Copier:
    """Makes local copies in turn with checkpoints, and reports them.

    ``run``: the run's identity; ``kept``: step of the copies from which this launch began, which
    are kept until newer copies exist.
    """

    def __init__(
        self,
        local: LocalCopies,
        checkpointer: Checkpointer,
        folder: RunFolder,
        run: str,
        kept: int | None,
        report: Callable[..., None],
    ) -> None:
        self._local, self._checkpointer = local, checkpointer
        self._folder, self._run, self._report = folder, run, report
        self._launch: str | None = None
        self._said = False
        self._waited_s = 0.0
        on_all_ranks(local.mesh, local.make, "making folders of local copies")
        local.settle(kept)

    @classmethod
    def of(
        cls,
        local: LocalCopies | None,
        checkpointer: Checkpointer,
        folder: RunFolder,
        start: Start,
        report: Callable[..., None],
    ) -> Copier | None:
        """Return the copier of a launch, None if the run has no local copies."""
        if local is None:
            return None
        run, kept = start.identity.run, start.step if start.offer else None
        return cls(local, checkpointer, folder, run, kept, report)

    def copy(self, step: int, state: State, facts: dict[str, Any]) -> None:
        """Begin a copy; return once the tensors are staged. No rank may be writing."""
        mesh = self._local.mesh
        if self._launch is None:
            name = partial(launch_name, self._folder)
            self._launch = from_main_rank(mesh, name, "naming local copies")
        self._checkpointer.poll()
        self.poll()
        begun_s = time.monotonic()
        copied, launch = self._local.staged(state), self._launch
        self._waited_s = time.monotonic() - begun_s
        self._checkpointer.begin(
            lambda: self._local.write(step, copied, facts, launch, self._run), f"copy-{step}"
        )
        stored = any(isinstance(value, Stored) for value in copied.values())  # not staged
        if stored or not self._checkpointer.asynchronous:
            self._checkpointer.wait()

    def poll(self) -> None:
        """Report an ended copy: the first of the launch, and each failure."""
        ended, self._local.outcome = self._local.outcome, None
        if ended is None:
            return
        folder = str(self._local.folder)
        if ended.failure is not None:
            self._report("local_copy_failed", step=ended.step, reason=ended.failure, folder=folder)
        elif ended.lacking:
            self._report("local_copy_alone", step=ended.step, ranks=ended.lacking, folder=folder)
        elif not self._said:
            self._said = True
            self._report(
                "local_copies", step=ended.step, folder=folder, bytes=ended.nbytes,
                seconds=ended.seconds, waited_s=self._waited_s,
            )  # fmt: skip

    def finish(self, *, saved: bool) -> None:
        """End a launch: remove all copies if its last state is in a checkpoint (``saved``)."""
        self.poll()
        if saved:
            self._local.remove()


class Saver(Callback):
    """Saves at the configured steps and times and at the end of a launch, off the step timer.

    Before a save all numbers are read and all tensors are checked for finiteness, so that no
    checkpoint of a diverged run is written. ``state`` returns the tensors and facts of a
    checkpoint; ``response`` forbids further checkpoints after a failed check.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        progress: Progress,
        state: Callable[[], tuple[State, dict[str, Any]]],
        timer: StepTimer,
        mesh: Mesh,
        times: SaveTimes,
        copier: Copier | None = None,
        response: Response | None = None,
    ) -> None:
        self.times, self._copier, self._response = times, copier, response
        self._checkpointer, self._progress = checkpointer, progress
        self._state, self._timer, self._mesh = state, timer, mesh
        self._begun_step = progress.saved_step  # saved or being saved
        self._first_step = progress.step
        self._unsaved_copy = progress.step > (progress.saved_step or 0)  # launched from a copy
        self._failed: tuple[int, str] | None = None  # the newest failed save, with its reason

    @override
    def needs_numbers(self, step: int, *, last: bool) -> bool:
        return last or self.times.checkpoint_due(step) or self.times.copy_due(step)

    @override
    def between_steps(self, step: int, *, last: bool) -> None:
        begun_s = time.monotonic()
        with self._timer.paused():
            if last or self.times.checkpoint_due(step):
                if self._begun_step != step and self._refusal is None:
                    self._save(step)
                    self.times.begun(step, copy=False, cost_s=time.monotonic() - begun_s)
            elif self._copier is not None and self.times.copy_due(step) and self._refusal is None:
                self._copier.copy(step, *self._state())
                self.times.begun(step, copy=True, cost_s=time.monotonic() - begun_s)
            self._checkpointer.poll()
            if self._copier is not None:
                self._copier.poll()

    def _save(self, step: int) -> None:
        tensors, facts = self._state()
        name = not_finite(tensors, self._mesh)
        if name is not None:
            self._checkpointer.wait()  # so that the message names the checkpoint before
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
        """Wait for the last checkpoint, and retry it if it failed.

        Raises UserError on every rank if the checkpoint cannot be written.
        """
        step = self._progress.step
        self._checkpointer.wait()
        if (refused := self._refusal) is not None:
            raise UserError(
                f"step {step}: no checkpoint is made, as {refused}; {self._kept()}: take that "
                "machine out and run again, which goes on from there"
            )
        if self._unsaved_copy and step == self._first_step:  # the launch took no step
            self._save(step)
            self._checkpointer.wait()
        for pause in RETRY_AFTER_S:
            if self._missing() is None:
                break
            time.sleep(pause)
            self._save(step)
            self._checkpointer.wait()
        if self._copier is not None:
            self._copier.finish(saved=self._progress.saved_step == step)
        reason = self._missing()
        if reason is not None:
            raise UserError(
                f"step {step}: the last checkpoint could not be written ({reason}); "
                f"{self._kept()}: mend that and run again, which goes on from there"
            )

    def _missing(self) -> str | None:
        """Return why the current state could not be saved; None if it was."""
        step, reason = self._failed or (None, None)
        return reason if step == self._progress.step else None

    @override
    def abort(self, seconds: float | None) -> None:
        self._checkpointer.join(seconds)
        self._checkpointer.poll()
