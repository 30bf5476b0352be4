"""Stopping cleanly when the operator or the scheduler asks for it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from allometry.parallel.mesh import Mesh


class StopRequest:
    """SIGTERM and SIGINT become a request that all ranks see at the same step.

    Use as a context manager around the loop. A second SIGINT interrupts at once.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._exchange: Any = None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # After an error other ranks may never join.
        if self._exchange is not None and kind is None:
            self._exchange.wait()

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)

    def agreed(self) -> str | None:
        """The signal's name once every rank knows of it; call it once a step, on every rank.

        The ranks' flags are exchanged in the background and read one call later, so that no step
        waits for them.
        """
        if self._mesh.world_size == 1:
            return self._received.name if self._received else None
        if self._exchange is not None:
            self._exchange.wait()
            number = int(self._flag.item())
            if number:
                self._exchange = None
                return signal.Signals(number).name
        self._flag.fill_(int(self._received or 0))
        self._exchange = dist.all_reduce(
            self._flag, op=dist.ReduceOp.MAX, group=self._mesh.host_group, async_op=True
        )
        return None
