"""Decide when to save by the clock, agreed between ranks without an additional message."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from allometry.configs.checkpoints import CheckpointConfig, Minutes
from allometry.parallel.mesh import Mesh
from allometry.trainer.state.interval import Uptime, best_interval_s
from allometry.trainer.state.room import due

FIRST_S = 60.0
"""Seconds before the first save with ``auto``, which measures the cost of a save."""


@dataclass
class _Timer:
    """Timer of one kind of save on the main rank."""

    minutes: Minutes | None
    mtbf_s: float
    last_s: float
    cost_s: float | None = None

    def interval_s(self) -> float | None:
        if self.minutes != "auto":
            return None if self.minutes is None else 60.0 * self.minutes
        return FIRST_S if self.cost_s is None else best_interval_s(self.cost_s, self.mtbf_s)

    def due(self, now_s: float) -> bool:
        interval_s = self.interval_s()
        return interval_s is not None and now_s - self.last_s >= interval_s


@dataclass
class SaveTimes:
    """Decides when to save, by steps and by the main rank's clock, equally on all ranks.

    ``told`` returns this rank's numbers in a step, and ``heard`` receives the maximum over ranks
    one step later (on a single rank at once); ``StopRequest`` sends these numbers with its own
    message. A local copy waits until no rank is ``writing``; a checkpoint does not wait.
    """

    config: CheckpointConfig
    mesh: Mesh
    writing: Callable[[], bool]
    uptime: Uptime
    clock: Callable[[], float] = time.monotonic
    _asked: bool = False
    _copy_asked: bool = False
    _busy: bool = False
    _begun_step: int = 0
    _timers: tuple[_Timer, _Timer] = field(init=False)

    LENGTH = 3

    def __post_init__(self) -> None:
        local = self.config.local
        minutes = (self.config.every_minutes, local.every_minutes if local else None)
        now_s, mtbf_s = self.clock(), self.uptime.mtbf_s(self.mesh.world_size)
        one, other = (_Timer(each, mtbf_s, now_s) for each in minutes)
        self._timers = one, other

    def told(self) -> Sequence[int]:
        """Return this rank's flags: checkpoint due, local copy due, writing."""
        now_s = self.clock()
        due = (self.mesh.is_main and timer.due(now_s) for timer in self._timers)
        return *map(int, due), int(self.writing())

    def heard(self, numbers: Sequence[int]) -> None:
        """Receive the maximum over ranks of each flag that ``told`` returned one step before."""
        checkpoint, copy, busy = map(bool, numbers)
        now_s = self.clock()
        for timer, told in zip(self._timers, (checkpoint, copy), strict=True):
            if told:  # a save in progress reports its flag again
                timer.last_s = now_s
        self._asked |= checkpoint
        self._copy_asked |= copy
        self._busy = busy

    def checkpoint_due(self, step: int) -> bool:
        """Return True if a checkpoint follows ``step``, even if the launch continues."""
        return self._asked or due(self.config, step)

    def copy_due(self, step: int) -> bool:
        """Return True if a local copy follows ``step``, unless a checkpoint does."""
        local = self.config.local
        if local is None:
            return False
        if local.every_steps is not None and step % local.every_steps == 0:
            self._copy_asked = True
        # Flags sent one step ago do not include a save begun after that step.
        known = step - self._begun_step > (1 if self.mesh.world_size > 1 else 0)
        return self._copy_asked and known and not self._busy

    def begun(self, step: int, *, copy: bool, cost_s: float) -> None:
        """Note that a save has begun, for which training waited ``cost_s`` seconds."""
        timer = self._timers[int(copy)]
        timer.last_s, timer.cost_s = self.clock(), cost_s
        self._begun_step = step
        self._copy_asked = False  # a checkpoint replaces a local copy
        if not copy:
            self._asked = False
