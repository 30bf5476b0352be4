"""Watchdog of a run: a thread in each rank that detects a hang and reports its location.

Each rank inspects its training thread twice a second, and posts its place (``Beat``). A rank that
stays at one place beyond the limit of its phase reads all ranks' heartbeats twice, to find silent
ranks and the ranks that others wait for (``verdict.py``). The first verdict is valid for all ranks.
It is written to events.jsonl and, with the stacks of all threads, to ``logs/rank-N.log`` of each
rank; then the processes exit with the code ``HUNG``.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist

from allometry.configs.errors import HUNG, UserError
from allometry.configs.execution import ParallelConfig
from allometry.parallel.mesh import Mesh
from allometry.parallel.rendezvous import Launch, this_launch
from allometry.parallel.side import side_store
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.watch import place as places
from allometry.trainer.watch.board import Beat, Board, Process
from allometry.trainer.watch.flights import dump, flights, record
from allometry.trainer.watch.place import Place, Places, groups_of
from allometry.trainer.watch.stragglers import Stragglers
from allometry.trainer.watch.verdict import Report, Verdict, judge, where

SAMPLE_S = 0.1
BEAT_S = 0.5
COMPARE_S = 5.0
_WRITTEN_S = 2.0
"""Seconds after which the rank that writes the record has done so, or has died."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Limits in seconds for a rank's stay at one place."""

    start: float
    first_step: float
    step: float
    checkpoint: float

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Limits:
        """Return the limits in a run's config."""
        watch, step = parallel.watch, float(parallel.timeout_s)
        return cls(watch.start_s, max(watch.first_step_s, step), step, watch.checkpoint_s)

    def at(self, place: Place, *, first: bool) -> float:
        """Return the limit at a place; ``first``: in the first step, or evaluation, of a launch."""
        if place.work is not None and not place.busy:
            return self.step  # ranks synchronize while another rank works
        if place.phase == places.CHECKPOINT:
            return self.checkpoint if place.wait is None or place.busy else self.step
        if place.phase in (places.STEP, places.EVALUATION):
            return self.first_step if first or place.compiles else self.step
        return self.start


def beat_s(step_limit_s: float, world_size: int) -> float:
    """Return the seconds between heartbeats: longer if one store serves thousands of ranks.

    For example, 0.5 s up to 1024 ranks and 2 s with 4096.
    """
    return min(BEAT_S * max(1.0, world_size / 1024), step_limit_s / 8)


def end_process(code: int) -> None:
    """End this process even if its threads are blocked, for example on standard output."""
    os._exit(code)


@dataclass
class Steps:
    """Progress that the training thread stores, by plain assignments."""

    seconds: float | None = None


class Watchdog:
    """Context manager that watches this rank and, with the others, the run.

    ``launch``: this rank's position in the launch; ``folder``: the run's folder. Call ``attach``
    once the mesh is open. ``end`` ends the process (tests replace it).
    """

    def __init__(
        self,
        parallel: ParallelConfig,
        folder: RunFolder,
        launch: Launch | None = None,
        end: Callable[[int], None] = end_process,
    ) -> None:
        self.launch = launch or this_launch()
        self.limits = Limits.of(parallel)
        self.beat_s = beat_s(self.limits.step, self.launch.world_size)
        self.steps = Steps()
        percent = parallel.watch.straggler_percent
        main = self.launch.rank == 0 and self.launch.world_size > 1
        self.stragglers = Stragglers(percent) if percent is not None and main else None
        self._folder, self._end = folder, end
        self._places = Places(threading.get_ident())
        self._process = Process.own()
        self._board: Board | None = None
        self._attempt, self._lock = f"{self.launch.restart.count}", threading.Lock()
        self._looking = threading.Lock()
        self._stage, self._on_cuda = 0, False
        self._number = self._samples = self._waiting = 0
        self._mark: Any = None
        self._since = self._compared = self._again = time.monotonic()
        self._place = Place(places.START)
        self._done: set[str] = set()  # phases that this launch has completed once
        self._first_step: int | None = None
        self._stop, self._lost = threading.Event(), threading.Event()
        self._jitter = random.Random(self.launch.rank)
        self._judged = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def attach(self, mesh: Mesh) -> None:
        """Set the mesh's process groups, which map messages to axes."""
        self._places.groups = groups_of(mesh)
        self._stage, self._on_cuda = mesh.pp.rank, mesh.device.type == "cuda"
        # torchrun's store keeps keys of earlier restarts; the token makes this mesh's keys unique.
        token = mesh.broadcast_object(uuid.uuid4().hex)
        with self._lock:
            self._attempt, self._board = token, None
        if (board := self._connected()) is not None:
            board.post(self._beat())

    def __enter__(self) -> Watchdog:
        record()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        alone = self.launch.world_size == 1
        if error is not None and not isinstance(error, UserError) and not alone:
            # The error may be a consequence of another rank's death or exit.
            with self._looking, suppress(Exception):
                self._lost.set()
                self._since = time.monotonic()
                self._place = self._places.look(error=traceback).place
            self._judged.wait(4 * self.beat_s + _WRITTEN_S)
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(_WRITTEN_S)
        if self._board is not None and not alone:
            text = "" if error is None else f"{type(error).__name__}: {error}".split("\n")[0][:300]
            with suppress(Exception):
                self._board.post(self._beat(ended=text))

    def _run(self) -> None:
        beaten = -math.inf
        asleep = time.monotonic()
        between = min(SAMPLE_S, self.beat_s)
        # At regular intervals a loop of the same period would seem to stay at one place.
        while not self._stop.wait(between * self._jitter.uniform(0.5, 1.5)):
            now = time.monotonic()
            if now - asleep > 2 * self.beat_s + 1.0:
                self._since = now  # this process was stopped: it has no samples of that time
            try:
                self._sample()
                if now - beaten >= self.beat_s or self._lost.is_set():
                    beaten = now
                    self._turn(now)
            except Exception as error:  # a failed watchdog must not end the run
                _log.debug("the watchdog: %s", error)
            asleep = time.monotonic()

    def _sample(self) -> None:
        if self._place.phase == places.STEP and not self._on_cuda:
            self._samples += 1
            self._waiting += places.is_waiting(self._places.thread)

    def _turn(self, now: float) -> None:
        """Inspect the training thread, post a heartbeat, and check for a hang."""
        board = self._connected()
        stuck_s = self._look(now)
        if board is None:
            return
        board.post(self._beat())
        if self.stragglers is not None and now - self._compared >= COMPARE_S:
            self._compared = now
            self.stragglers.see(board.read())
        settled = board.verdict()
        if settled is not None:
            self._close(settled, mine=False)
        elif self._lost.is_set() or (now >= self._again and stuck_s >= self._limit(self._place)):
            self._alarm()
            self._again = time.monotonic() + 2 * self.beat_s

    def _connected(self) -> Board | None:
        """Return the board; None while its store does not exist yet.

        Before the first synchronization of the ranks, restarts can be distinguished only on a
        single node (``rendezvous.py``).
        """
        launch = self.launch
        met = dist.is_initialized() or launch.one_node or not launch.shared_store
        with self._lock:
            if self._board is None and met and (store := side_store(launch)) is not None:
                self._board = Board(store, launch.rank, launch.world_size, self._attempt)
            return self._board

    def _look(self, now: float) -> float:
        """Locate the training thread; return the seconds without progress."""
        with self._looking:
            if not self._lost.is_set():  # after an error the thread is unwinding
                self._note(now)
        return now - self._since

    def _note(self, now: float) -> None:
        look = self._places.look()
        if look.mark != self._mark:
            if look.place.phase != self._place.phase:
                self._done.add(self._place.phase)
            self._mark, self._since, self._place = look.mark, now, look.place
            if look.place.phase == places.STEP and self._first_step is None:
                self._first_step = look.place.step
        elif now - self._since >= 2 * self.beat_s:  # possibly a message, which torch can identify
            self._place = self._places.look(flights()).place

    def _limit(self, place: Place) -> float:
        if place.phase == places.STEP:
            first = place.step is None or place.step == self._first_step
        else:
            first = place.phase not in self._done
        return self.limits.at(place, first=first)

    def _beat(self, ended: str | None = None) -> Beat:
        self._number += 1
        return Beat(
            number=self._number,
            process=self._process,
            place=self._place,
            stuck_s=round(time.monotonic() - self._since, 2),
            stage=self._stage,
            samples=self._samples,
            waiting=self._waiting,
            seconds=self.steps.seconds,
            ended=ended,
        )

    def _alarm(self) -> None:
        """Judge the ranks, and end the run if a rank is late beyond its limit."""
        board, rank = self._board, self.launch.rank
        assert board is not None
        if rank > 0 and board.world_size > 1:  # one rank that reads all heartbeats is enough
            time.sleep(self.beat_s * (1 if rank <= 8 else 2))
            if (settled := board.verdict()) is not None:
                self._close(settled, mine=False)
                return
        verdict, reports = self._judge(board)
        late = [reports[one] for one in verdict.late]
        if self._lost.is_set():
            guilty = any(report.lost for report in late)
        else:
            limits = [self._limit(r.beat.place) for r in late if r.beat is not None and r.answers]
            guilty = verdict.waited_s >= max(limits, default=0.0)
        if guilty:
            kind = "rank_lost" if any(report.lost for report in late) else "hang"
            text = json.dumps({"event": kind, "by": rank, **verdict.facts()})
            settled, mine = board.settle(text)
            self._close(settled, mine=mine)
        self._judged.set()

    def _judge(self, board: Board) -> tuple[Verdict, dict[int, Report]]:
        before = board.read()
        board.post(self._beat())
        time.sleep(2.2 * self.beat_s)
        board.post(self._beat())
        after = board.read()
        reports = {}
        for rank in range(board.world_size):
            was, now = before.get(rank), after.get(rank)
            silent = now is not None and was is not None and was.number == now.number
            silent = silent and now is not None and now.ended is None
            fate = now.process.fate() if silent and now is not None else None
            reports[rank] = Report(now, silent, fate)
        return judge(reports), reports

    def _close(self, settled: str, *, mine: bool) -> None:
        """Write the verdict to this rank's log and, if ``mine``, the record; end the process."""
        board = self._board
        assert board is not None
        facts: dict[str, Any] = json.loads(settled)
        with suppress(OSError):
            self._write_log(facts)
        if mine:
            with suppress(OSError):
                self._write_record(facts)
            with suppress(OSError):
                os.write(2, f"allometry: {facts['said']}\n".encode())
            with suppress(Exception):
                board.note_written()
            time.sleep(3 * self.beat_s)  # until the others have written their logs
        else:
            until = time.monotonic() + _WRITTEN_S
            with suppress(Exception):
                while time.monotonic() < until and not board.is_written():
                    time.sleep(0.05)
        self._judged.set()
        self._stop.set()
        self._end(HUNG)

    def _write_record(self, facts: dict[str, Any]) -> None:
        """Append the event, and the last known activity of late ranks to their logs."""
        row = {"event": facts["event"], "time": round(time.time(), 3), **facts}
        with open(self._folder.events, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        did = {rank: one["did"] for one in facts["ranks"] for rank in _ranks_of(one["ranks"])}
        for rank in facts["late"]:
            if rank != self.launch.rank:
                path = self._folder.log(rank)
                with open(path, "a", encoding="utf-8") as file:
                    file.write(f"{_now()} rank {self.launch.rank} of rank {rank}: {did[rank]}\n")

    def _write_log(self, facts: dict[str, Any]) -> None:
        """Append the verdict, this rank's place and the stacks of its threads to its log."""
        path = self._folder.log(self.launch.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{_now()} {facts['event']}: {facts['said']}\n")
            file.write(f"this rank is {where(self._place)}\n")
            for one in facts["ranks"]:
                file.write(f"rank {one['ranks']} {one['did']}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            for written in dump(path):
                file.write(f"torch's flight recorder: {written.name}\n")


def _ranks_of(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
