"""Exchange heartbeats between ranks, through a store that is separate from the run's messages."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from allometry.trainer.watch.place import Place

PREFIX = "watch"


@dataclass(frozen=True)
class Process:
    """A process on a host; ``began`` is its start in kernel ticks, since process ids are reused."""

    host: str
    number: int
    began: str

    @classmethod
    def own(cls) -> Process:
        """Return the current process."""
        return cls(socket.gethostname(), os.getpid(), _stat(os.getpid())[1])

    def fate(self) -> str | None:
        """Describe the state of a silent process; None if it runs or is on another host."""
        if self.host != socket.gethostname():
            return None
        state, began = _stat(self.number)
        if began != self.began or state in ("", "Z", "X"):
            return "died"
        return {"T": "is stopped", "t": "is stopped", "D": "is blocked in the kernel"}.get(state)

    def __str__(self) -> str:
        return f"process {self.number} on {self.host}"


def _stat(number: int) -> tuple[str, str]:
    """Return a process's state and start; "" for both if it does not exist."""
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


@dataclass(frozen=True)
class Beat:
    """Heartbeat of a rank, numbered by ``number``.

    ``stuck_s``: seconds without progress at ``place``. ``stage``: pipeline stage, as ranks of
    different stages have different work. ``samples`` and ``waiting``: number of samples taken
    during steps, and of samples in which the rank waited for others. ``seconds``: time of its last
    step. ``ended``: how the launch ended on this rank, "" without an error.
    """

    number: int
    process: Process
    place: Place
    stuck_s: float = 0.0
    stage: int = 0
    samples: int = 0
    waiting: int = 0
    seconds: float | None = None
    ended: str | None = None

    def dump(self) -> str:
        """Return the heartbeat as JSON."""
        return json.dumps({**asdict(self), "place": self.place.facts()})

    @classmethod
    def load(cls, text: bytes | str) -> Beat:
        """Return the heartbeat of a text from ``dump``."""
        facts: dict[str, Any] = json.loads(text)
        process, place = Process(**facts.pop("process")), Place.of(facts.pop("place"))
        return cls(process=process, place=place, **facts)


@dataclass
class Board:
    """The heartbeats of all ranks of a launch, and its single verdict.

    ``store`` must not be used by collectives, because it must answer while ranks hang.
    """

    store: Any
    rank: int
    world_size: int
    attempt: str = ""
    _prefix: str = field(init=False)

    def __post_init__(self) -> None:
        self._prefix = f"{PREFIX}/{self.attempt}"

    def post(self, beat: Beat) -> None:
        """Post this rank's heartbeat."""
        self.store.set(f"{self._prefix}/{self.rank}", beat.dump())

    def read(self, ranks: Iterable[int] | None = None) -> dict[int, Beat]:
        """Return the last heartbeat of each rank in ``ranks`` (None: all) that has sent one."""
        ranks = list(range(self.world_size) if ranks is None else ranks)
        keys = [f"{self._prefix}/{rank}" for rank in ranks]
        if not self.store.check(keys):
            pairs = [(r, k) for r, k in zip(ranks, keys, strict=True) if self.store.check([k])]
            ranks, keys = [r for r, _ in pairs], [k for _, k in pairs]
        values = self.store.multi_get(keys) if keys else []
        return {rank: Beat.load(value) for rank, value in zip(ranks, values, strict=True)}

    def settle(self, verdict: str) -> tuple[str, bool]:
        """Return the single verdict of all ranks, and True if it is ``verdict``."""
        settled = self.store.compare_set(f"{self._prefix}/verdict", "", verdict)
        text = settled.decode() if isinstance(settled, bytes) else settled
        return text, text == verdict

    def verdict(self) -> str | None:
        """Return the verdict, None without one."""
        key = f"{self._prefix}/verdict"
        return self.store.get(key).decode() if self.store.check([key]) else None

    def note_written(self) -> None:
        """Note that the verdict is in the run's record."""
        self.store.set(f"{self._prefix}/written", "1")

    def is_written(self) -> bool:
        """Return True if the verdict is in the run's record."""
        return bool(self.store.check([f"{self._prefix}/written"]))


def local_store() -> Any:
    """Return a store for a single rank."""
    return dist.HashStore()  # type: ignore[attr-defined]
