"""Ranks that stay alive between tests, forked by servers that have imported torch (``forks``).

``RankPool.run(function, world_size, *args)`` runs a module-level function on gloo ranks and returns
the results in rank order. A rank that raises fails the call with its traceback. Ranks that do not
answer in time are reported with the stacks of their threads, and replaced.

Ranks receive the function as a file and a name, and know the path of ``allometry``, so that an
uninstalled tree works.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from forks import START_TIMEOUT_S, Fork, Server, servers

# A hanging collective raises, with a traceback, before the call gives up on its rank.
COLLECTIVE_TIMEOUT_S = 30.0  # for up to 3 ranks
CALL_TIMEOUT_S = 90.0  # for up to 7
# Time for the other ranks to finish or fail once one rank has failed.
GRACE_S = 3.0
CRASHES = tuple(-each for each in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT))
MOST_CRASHES = 2
FATAL = "Fatal Python error"  # begins the stacks of a crash in a log


def collective_timeout_s(world_size: int) -> float:
    """Return the timeout of a collective: each rank must connect to all others on a few cores."""
    return COLLECTIVE_TIMEOUT_S * max(1, world_size // 2)


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message contains tracebacks, stacks and logs."""


class RankCrash(RankFailure):
    """A rank was ended by a fault in native code."""


class RankPool:
    """Ranks that are started when first needed and reused by later calls."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._scratch = tempfile.TemporaryDirectory(prefix="allometry-ranks-")
        self._calls = 0
        self._crashes = 0

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float | None = None,
        start_group: bool = True,
    ) -> list[Any]:
        """Return ``function(*args)`` of each of ``world_size`` ranks; raise RankFailure.

        Arguments and results are pickled: use plain objects and tensors. With ``start_group`` False
        the function creates the process group; the rank's environment is torchrun's, but without
        MASTER_ADDR and MASTER_PORT.

        A call in which a rank crashed in native code is repeated once, with a warning and at most
        ``MOST_CRASHES`` times in all: gloo's threads release tensors at the same time as Python,
        which sometimes crashes torch 2.13 (github.com/pytorch/pytorch/pull/179291 is similar).
        """
        try:
            return self._run(function, world_size, args, timeout_s, start_group)
        except RankCrash as crash:
            self._crashes += 1
            if self._crashes > MOST_CRASHES:
                raise
            warnings.warn(f"made once more, as a rank crashed: {crash}", stacklevel=2)
        return self._run(function, world_size, args, timeout_s, start_group)

    def _run(
        self,
        function: Callable[..., Any],
        world_size: int,
        args: tuple[Any, ...],
        timeout_s: float | None,
        start_group: bool,
    ) -> list[Any]:
        self._start(world_size)
        self._calls += 1
        ranks = self._ranks[:world_size]
        store = Path(self._scratch.name) / f"store-{self._calls}" if start_group else None
        call = _Call(function.__code__.co_filename, function.__qualname__, args, world_size, store)
        for rank in ranks:
            rank.link.send_bytes(pickle.dumps(call))
        if timeout_s is None:
            timeout_s = CALL_TIMEOUT_S * max(1, world_size // 4)
        answers = self._collect(ranks, timeout_s)
        failed = [i for i in range(world_size) if i not in answers or not answers[i].ok]
        if not failed:
            return [answers[i].value for i in range(world_size)]
        fates = {i: self._ranks[i].give_up() for i in failed if i not in answers}
        crashed = any(self._ranks[i].process.poll() in CRASHES for i in fates)
        report = [f"{function.__qualname__} failed on ranks {failed} of {world_size}"]
        report += [f"--- rank {i} {fate}" for i, fate in fates.items()]
        report += [f"--- rank {i}\n{answers[i].value}" for i in failed if i in answers]
        if fates:
            self.close()
        raise (RankCrash if crashed else RankFailure)("\n".join(report))

    def _start(self, world_size: int) -> None:
        new = range(len(self._ranks), world_size)
        for number in new:  # importing torch does not count towards a call's time
            server = servers()[number % len(servers())]
            self._ranks.append(_Rank.start(number, server, Path(self._scratch.name)))
        for number in new:
            rank = self._ranks[number]
            if not rank.link.poll(START_TIMEOUT_S):
                raise RankFailure(f"rank {number} did not start: it {rank.give_up()}")
            try:
                rank.link.recv_bytes()
            except EOFError:
                raise RankFailure(f"rank {number} did not start: it {rank.give_up()}") from None

    def _collect(self, ranks: list[_Rank], timeout_s: float) -> dict[int, _Answer]:
        answers: dict[int, _Answer] = {}
        deadline = time.monotonic() + timeout_s
        waiting = {rank.link: rank.number for rank in ranks}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for link in wait(list(waiting), left):
                assert isinstance(link, Connection)
                number = waiting.pop(link)
                try:
                    answers[number] = pickle.loads(link.recv_bytes())
                except EOFError:  # the process has ended: give_up() reports how
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                else:
                    if not answers[number].ok:
                        deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def close(self) -> None:
        """End all ranks; the next call starts new ones."""
        for rank in self._ranks:
            rank.kill()
        self._ranks = []


@dataclass(frozen=True)
class _Call:
    file: str
    name: str
    args: tuple[Any, ...]
    world_size: int
    store: Path | None


@dataclass(frozen=True)
class _Answer:
    ok: bool
    value: Any  # result, or traceback


@dataclass
class _Rank:
    number: int
    process: Fork
    link: Connection
    log: Path

    @classmethod
    def start(cls, number: int, server: Server, scratch: Path) -> _Rank:
        ours, theirs = Pipe()
        log = scratch / f"rank{number}.log"
        with theirs:
            process = server.fork(number, theirs, log)
        return cls(number, process, ours, log)

    def give_up(self) -> str:
        """Kill a rank that has not answered, and return its state and stacks."""
        time.sleep(0.1)
        code = self.process.poll()
        if code is None:
            self.process.send_signal(signal.SIGUSR1)  # faulthandler writes the stacks to the log
            time.sleep(0.5)
            fate = "hung; its stacks are the end of its log"
        else:
            fate = f"died with exit code {code}"
        self.kill()
        text = self.log.read_text(errors="replace")
        tail = text[max(0, text.rfind(FATAL)) :].splitlines()[-60:]
        return "\n".join([fate, *tail])

    def kill(self) -> None:
        self.process.kill()
        self.link.close()


def serve(link: Connection, rank: int) -> None:
    """Serve as rank ``rank``: run functions from ``link`` until the other end is closed."""
    import torch

    torch.set_num_threads(1)
    modules: dict[str, ModuleType] = {}
    collector = _Collector()
    link.send_bytes(b"ready")
    while True:
        try:
            call = pickle.loads(link.recv_bytes())
        except EOFError:
            return
        try:
            answer = _Answer(True, _run(call, rank, modules, collector))
            message = pickle.dumps(answer)
        except BaseException:  # the test must see any error
            message = pickle.dumps(_Answer(False, traceback.format_exc()))
        link.send_bytes(message)


class _Collector:
    """Garbage collection after calls: models and meshes form cycles, and gloo groups keep threads.

    Collections skip the objects created by imports, which take a fifth of a second to traverse; the
    server's imports are already frozen.
    """

    def __init__(self) -> None:
        self._imported = len(sys.modules)

    def run(self) -> None:
        gc.collect()
        if self._imported != len(sys.modules):
            gc.freeze()
            self._imported = len(sys.modules)


def _run(call: _Call, rank: int, modules: dict[str, ModuleType], collector: _Collector) -> Any:
    import torch
    import torch.distributed as dist

    if call.file not in modules:
        name = f"rank_functions_{len(modules)}"
        spec = importlib.util.spec_from_file_location(name, call.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look up their module
        spec.loader.exec_module(module)
        modules[call.file] = module
    function = getattr(modules[call.file], call.name)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(call.world_size), LOCAL_RANK=str(rank))
    torch.manual_seed(0)
    if call.store is not None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{call.store}",
            rank=rank,
            world_size=call.world_size,
            timeout=timedelta(seconds=collective_timeout_s(call.world_size)),
        )
        dist.barrier()  # a fast rank must not leave while others still connect
    try:
        return function(*call.args)
    finally:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # a broken group was already reported
                dist.destroy_process_group()
        if "torch._dynamo" in sys.modules:  # dynamo limits the number of variants
            torch.compiler.reset()
        collector.run()
