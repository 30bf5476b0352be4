"""Stop cleanly on a signal from the user or the scheduler."""

from __future__ import annotations

import atexit
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # signals are watched before torch is imported
    from allometry.parallel.mesh import Mesh

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that request a save and a stop: users, terminals, schedulers (``sbatch --signal``)."""
TWICE_S = 2.0
"""Seconds in which a second Ctrl-C counts as a double press or as a duplicate of the first."""


def _interrupt() -> None:
    raise KeyboardInterrupt


def _ignore() -> None:
    """Ignore all stop signals while the interpreter exits and removes its handlers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Context manager that stores the first stop signal in ``received``.

    ``heard`` is called with the first signal at once, in the handler. A Ctrl-C more than two
    seconds after the first signal calls ``at_once``, which interrupts by default. An ignored SIGHUP
    (nohup) stays ignored; a stop signal that was blocked until now (``launch/torchrun.py``) is
    received.

    With ``to_the_end`` the signals are watched until the process ends, beyond the context. A signal
    that arrives after all work is done and saved, such as a second signal, then does not change the
    exit code.
    """

    def __init__(
        self,
        heard: Callable[[signal.Signals], None] = lambda _: None,
        at_once: Callable[[], None] = _interrupt,
        *,
        to_the_end: bool = False,
    ) -> None:
        self.received: signal.Signals | None = None
        self._heard, self._at_once, self._to_the_end = heard, at_once, to_the_end
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._blocked: set[int] = set()

    def __enter__(self) -> StopSignals:
        if self._to_the_end:
            atexit.register(_ignore)  # registered first, so that it is called last
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        self._blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        if self._to_the_end:
            return
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
            self._heard(self.received)
        elif number == signal.SIGINT and time.monotonic() - self._since > TWICE_S:
            self._at_once()


class Told(Protocol):
    """Numbers sent with the stop flag; every rank receives their maximum over ranks."""

    LENGTH: int

    def told(self) -> Sequence[int]:
        """Return this rank's ``LENGTH`` non-negative numbers."""

    def heard(self, numbers: Sequence[int]) -> None:
        """Receive the maximum over ranks of each number."""


class StopRequest:
    """Agreement of all ranks, at the same step, on a signal that any rank received.

    Use as a context manager around the loop. The numbers of ``others`` are sent in the same
    message. For example, with SIGTERM on rank 3 in step 10 ``agreed`` returns "SIGTERM" on all
    ranks after step 11.
    """

    def __init__(self, mesh: Mesh, signals: StopSignals, others: Told | None = None) -> None:
        import torch

        self._mesh, self._signals, self._others = mesh, signals, others
        self._flags = torch.zeros(1 + (others.LENGTH if others else 0), dtype=torch.int32)
        self._exchange: Any = None

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # After an error other ranks may never join the all-reduce.
        if self._exchange is not None and kind is None:
            self._exchange.wait()

    def agreed(self, *, now: bool = False) -> str | None:
        """Return the signal's name once all ranks know of it; call once per step on every rank.

        The flags are all-reduced in the background and read one call later, so that no step waits
        for the message; ``now`` waits.
        """
        import torch
        import torch.distributed as dist

        if self._mesh.world_size == 1:
            if self._others:
                self._others.heard(self._others.told())
            return self._signals.received.name if self._signals.received else None
        if self._exchange is not None and (found := self._read()) is not None:
            return found
        others = self._others.told() if self._others else ()
        self._flags.copy_(torch.tensor([int(self._signals.received or 0), *others]))
        self._exchange = dist.all_reduce(
            self._flags, op=dist.ReduceOp.MAX, group=self._mesh.host_group, async_op=True
        )
        return self._read() if now else None

    def _read(self) -> str | None:
        self._exchange.wait()
        self._exchange = None
        number, *others = self._flags.tolist()
        if self._others:
            self._others.heard(others)
        return signal.Signals(number).name if number else None
