"""Training of a ladder's runs on this machine, one or several at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from allometry.configs.errors import UserError
from allometry.configs.format import duration, human
from allometry.configs.loader import dump
from allometry.data.processes import ended_with_this
from allometry.studies.ladder.share import Plan, PlannedRun
from allometry.studies.ladder.state import as_stored, spent, state_of
from allometry.trainer.state.status import last_row
from allometry.trainer.stop import StopSignals

Say = Callable[[str], None]
PROGRESS_S = 20.0
"""Seconds between progress lines."""


@dataclass
class Ended:
    """Result of the runs: messages of failed runs, by name; the signal that stopped training."""

    failed: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None


def train_runs(plan: Plan, wanted: Sequence[PlannedRun], parallel: int, say: Say) -> Ended:
    """Train the remaining runs of ``wanted``, each after the run from which it branches.

    A failed run does not stop the others, except runs that branch from it. A signal stops running
    runs with a checkpoint, and no further run is started. Raises UserError: a folder has another
    run than the planned one. For example, ``train_runs(plan, plan.runs, 2, print).failed``.
    """
    missing = [run for run in wanted if state_of(run).stage != "done"]
    names = {run.name for run in missing}
    for run in wanted:  # all errors are raised before any step
        as_stored(run, plan, names)
    todo = []
    for run, remark in [as_stored(run, plan, names) for run in missing]:
        todo.append(run)
        if remark:
            say(remark)
    done = len(wanted) - len(todo)
    if done:
        say(f"{done} of {len(wanted)} runs are done")
    if not todo:
        return Ended()
    parallel = min(parallel, len(todo))  # a single run uses all cores
    board = _Board(plan, todo, len(wanted), say, parallel)
    with StopSignals(board.stop, board.kill):
        threads = [
            threading.Thread(target=_serve, args=(board,), name=f"slot-{number}")
            for number in range(parallel)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            board.wait()
        for thread in threads:
            thread.join()
    return board.ended


class _Board:
    """Pending and running runs with their progress; shared by the slots."""

    def __init__(
        self, plan: Plan, todo: list[PlannedRun], total: int, say: Say, parallel: int
    ) -> None:
        self.plan, self.total, self.parallel = plan, total, parallel
        self.ended = Ended()
        self._say, self._todo = say, list(todo)
        self._count = total - len(todo)
        self._running: dict[str, PlannedRun] = {}
        self._all = list(todo)
        self._changed = threading.Condition()
        self._children: set[_Child] = set()
        self._spent_before = self._spent()
        self._begun = self._said = time.monotonic()

    def take(self) -> PlannedRun | None:
        """Return the next run for a slot, after waiting for its parent; None at the end."""
        with self._changed:
            while True:
                if self.ended.stopped or not self._todo:
                    return None
                names = [other.name for other in self._todo]
                waiting = {*names, *self._running, *self.ended.failed}
                ready = [run for run in self._todo if run.parent not in waiting]
                if ready:
                    # With several slots the longest chains are first, so that no chain is left at
                    # the end.
                    run = max(ready, key=self._ahead) if self.parallel > 1 else ready[0]
                    self._todo.remove(run)
                    self._running[run.name] = run
                    return run
                self._drop_orphans()
                if self._todo:
                    self._changed.wait()

    def ready(self, run: PlannedRun) -> PlannedRun:
        """Return the run with the parent that its folder and the parent's folder allow now."""
        run, remark = as_stored(run, self.plan, ())
        if remark:
            self._say(remark)
        return run

    def give(self, run: PlannedRun, error: str | None, seconds: float) -> None:
        """Report the end of a run."""
        with self._changed:
            del self._running[run.name]
            state = state_of(run)
            if error is not None:
                self.ended.failed[run.name] = error
                self._say(f"{run.name} FAILED: {error}")
            elif state.stage == "done":
                self._count += 1
                self._said = time.monotonic()
                self._say(
                    f"[{self._count:>{len(str(self.total))}}/{self.total}] {run.name}: "
                    f"{state.loss_text}, {human(run.tokens)} tokens, "
                    f"{run.own_flops:.2g} FLOPs in {duration(seconds)} | {self._left()}"
                )
            else:
                text = f"stopped at step {state.step} of {run.steps}"
                if not self.ended.stopped:  # stopped by another process
                    self.ended.failed[run.name] = text
                self._say(f"{run.name}: {text}")
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait for a change, for one second at most; print progress at intervals."""
        with self._changed:
            self._changed.wait(1.0)
            if time.monotonic() - self._said < PROGRESS_S or not self._running:
                return
            self._said = time.monotonic()
            steps = [
                f"{run.name} step {last_row(run.folder / 'metrics.jsonl').get('step', 0)}"
                f"/{run.steps}"
                for run in self._running.values()
            ]
        self._say(f"  running {', '.join(steps)} | {self._left()}")

    @contextmanager
    def child(self, process: _Child) -> Iterator[None]:
        """Return a context in which signals are passed on to a child."""
        self._children.add(process)
        if self.ended.stopped:  # the signal came while the child was being started
            _stop(process)
        try:
            yield
        finally:
            self._children.discard(process)

    def stop(self, received: signal.Signals) -> None:
        """Stop starting runs, and stop the children with a checkpoint. For a signal handler."""
        self.ended.stopped = received.name
        for process in list(self._children):
            _stop(process)

    def kill(self) -> None:
        """Kill the children and their children. For a signal handler."""
        for process in list(self._children):
            with suppress(psutil.NoSuchProcess):
                for one in psutil.Process(process.pid).children(recursive=True):
                    one.kill()
            process.kill()

    def _drop_orphans(self) -> None:
        for run in list(self._todo):
            if run.parent in self.ended.failed:
                self._todo.remove(run)
                reason = f"the run it branches from, {run.parent}, failed"
                self.ended.failed[run.name] = reason
                self._say(f"{run.name} FAILED: {reason}")

    def _ahead(self, run: PlannedRun) -> int:
        after = [other for other in self._todo if other.parent == run.name]
        return run.own_flops + max((self._ahead(other) for other in after), default=0)

    def _spent(self) -> int:
        return sum(spent(run, state_of(run)) for run in self._all)

    def _left(self) -> str:
        whole = sum(run.own_flops for run in self._all)
        now = self._spent()
        rate = (now - self._spent_before) / (time.monotonic() - self._begun)
        left = duration((whole - now) / rate) if rate > 0 else "unknown time"
        return f"{now / whole:.0%} of {whole:.2g} FLOPs, {left} left"


_Child = subprocess.Popen[str]


def _serve(board: _Board) -> None:
    """Train runs in one slot until none is left."""
    slot = _Torchrun(board) if board.plan.processes > 1 else _Worker(board)
    try:
        while (run := board.take()) is not None:
            begun = time.monotonic()
            try:
                run = board.ready(run)
                log = board.plan.folder / "logs" / f"{run.name}.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                error = slot.train(write_config(board.plan, run), log)
            except UserError as problem:
                error = str(problem)
            except Exception as problem:  # reported with others; slots may wait for this run
                error = f"it could not be started: {type(problem).__name__}: {problem}"
            board.give(run, error, time.monotonic() - begun)
    finally:
        slot.close()


def write_config(plan: Plan, run: PlannedRun) -> Path:
    """Write a run's full configuration into the plan's folder; ``allometry train`` accepts it."""
    path = plan.folder / "configs" / f"{run.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(run.config), encoding="utf-8")
    return path


class _Worker:
    """A child process that trains runs in its own process, one at a time."""

    def __init__(self, board: _Board) -> None:
        self._board = board
        self._process: _Child | None = None

    def train(self, config: Path, log: Path) -> str | None:
        """Train a run; return an error message or None."""
        process = self._process or self._start()
        with self._board.child(process):
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps({"config": str(config), "log": str(log)}) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
        if line:
            answer: dict[str, str | None] = json.loads(line)
            return answer["error"]
        self.close()
        if self._board.ended.stopped:
            return None
        return f"its process ended with code {process.returncode}; its log is {log}"

    def _start(self) -> _Child:
        threads = {"OMP_NUM_THREADS": "1"} if self._board.parallel > 1 else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "allometry.launch.ladder_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | threads | ended_with_this(),
            start_new_session=True,  # Ctrl-C of the terminal goes to this process only
        )
        return self._process

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None


class _Torchrun:
    """Starts a torchrun for each run."""

    def __init__(self, board: _Board) -> None:
        self._board = board

    def train(self, config: Path, log: Path) -> str | None:
        """Train a run; return an error message or None."""
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        with open(log, "a", encoding="utf-8") as out:
            process = subprocess.Popen(
                [sys.executable, *torchrun(self._board.plan.processes, config)],
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": threads} | ended_with_this(),
                start_new_session=True,
            )
        with self._board.child(process):
            code = process.wait()
        if code == 0 or self._board.ended.stopped:
            return None
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.startswith("allometry: ")]
        error = said[-1].removeprefix("allometry: ") if said else f"its log is {log}"
        return f"torchrun ended with code {code}: {error}"

    def close(self) -> None:
        """Do nothing: no process is left running."""


def torchrun(processes: int, config: Path) -> list[str]:
    """Return arguments for Python that train a run on ``processes`` processes of this machine.

    For example, ``[sys.executable, *torchrun(8, Path("run.yaml"))]``.
    """
    start = ["-m", "allometry.launch.torchrun", "--nproc-per-node", str(processes), "--standalone"]
    return [*start, "--local-addr", "127.0.0.1", "-m", "allometry.launch.train", str(config)]


def _stop(process: _Child) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
