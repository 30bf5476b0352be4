"""What ranks tell one another of themselves, through a store beside the run's messages."""

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
    """A process of some host. ``began``: when, in the kernel's ticks; its number may come again."""

    host: str
    number: int
    began: str

    @classmethod
    def own(cls) -> Process:
        """Return this one."""
        return cls(socket.gethostname(), os.getpid(), _stat(os.getpid())[1])

    def fate(self) -> str | None:
        """Return what has become of a process of this host that is silent; None of another's."""
        if self.host != socket.gethostname():
            return None
        state, began = _stat(self.number)
        if began != self.began or state in ("", "Z", "X"):
            return "died"
        return {"T": "is stopped", "t": "is stopped", "D": "is blocked in the kernel"}.get(state)

    def __str__(self) -> str:
        return f"process {self.number} on {self.host}"


def _stat(number: int) -> tuple[str, str]:
    """Return a process's state, "" if there is none, and when it began."""
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


@dataclass(frozen=True)
class Beat:
    """A rank's report; ``number`` counts them.

    ``stuck_s``: seconds in which nothing has moved at ``place``. ``stage`` tells ranks apart that
    have different work. ``samples`` and ``waiting``: how often the rank was looked at in steps, and
    how often it was then waiting for others. ``seconds`` of its last step. ``ended``: how the
    launch ended on this rank; "" well.
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
        """Return JSON."""
        return json.dumps({**asdict(self), "place": self.place.facts()})

    @classmethod
    def load(cls, text: bytes | str) -> Beat:
        """Return what ``dump`` made JSON of."""
        facts: dict[str, Any] = json.loads(text)
        process, place = Process(**facts.pop("process")), Place.of(facts.pop("place"))
        return cls(process=process, place=place, **facts)


@dataclass
class Board:
    """The beats of all ranks of a launch, and the one verdict on it.

    ``store`` is used by no collective: it must answer while ranks hang.
    """

    store: Any
    rank: int
    world_size: int
    attempt: str = ""
    _prefix: str = field(init=False)

    def __post_init__(self) -> None:
        self._prefix = f"{PREFIX}/{self.attempt}"

    def post(self, beat: Beat) -> None:
        """Tell how this rank is."""
        self.store.set(f"{self._prefix}/{self.rank}", beat.dump())

    def read(self, ranks: Iterable[int] | None = None) -> dict[int, Beat]:
        """Return the last beat of each rank (or of these); a rank that has sent none is absent."""
        ranks = list(range(self.world_size) if ranks is None else ranks)
        keys = [f"{self._prefix}/{rank}" for rank in ranks]
        if not self.store.check(keys):
            pairs = [(r, k) for r, k in zip(ranks, keys, strict=True) if self.store.check([k])]
            ranks, keys = [r for r, _ in pairs], [k for _, k in pairs]
        values = self.store.multi_get(keys) if keys else []
        return {rank: Beat.load(value) for rank, value in zip(ranks, values, strict=True)}

    def settle(self, verdict: str) -> tuple[str, bool]:
        """Return the one verdict of all ranks, and whether it is this one."""
        settled = self.store.compare_set(f"{self._prefix}/verdict", "", verdict)
        text = settled.decode() if isinstance(settled, bytes) else settled
        return text, text == verdict

    def verdict(self) -> str | None:
        """Return the verdict, if there is one."""
        key = f"{self._prefix}/verdict"
        return self.store.get(key).decode() if self.store.check([key]) else None

    def note_written(self) -> None:
        """Tell that the verdict is in the run's record."""
        self.store.set(f"{self._prefix}/written", "1")

    def is_written(self) -> bool:
        """Return whether it is."""
        return bool(self.store.check([f"{self._prefix}/written"]))


def local_store() -> Any:
    """Return a store for a rank that is alone."""
    return dist.HashStore()  # type: ignore[attr-defined]
