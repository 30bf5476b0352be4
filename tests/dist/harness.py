"""Ranks that stay alive between tests, forked by servers that have imported torch (``forks``).

``RankPool.run(function, world_size, *args)`` runs a module-level function on gloo ranks and returns
what they returned, in rank order. A rank that raises fails the call with its traceback; ranks that
do not answer in time are named, with the stacks they hang in, and replaced.

The ranks are given the function by file and name, and know where ``allometry`` lies, so an
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

# A collective that hangs raises, with a traceback, before the call gives up on its rank.
COLLECTIVE_TIMEOUT_S = 30.0  # of up to 3 ranks
CALL_TIMEOUT_S = 90.0  # of up to 7
# What the others get to finish or fail once one rank has failed.
GRACE_S = 3.0
CRASHES = tuple(-each for each in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT))
MOST_CRASHES = 2
FATAL = "Fatal Python error"  # where the stacks of a crash begin in a log


def collective_timeout_s(world_size: int) -> float:
    """Seconds that a collective may take: each rank must find all others, on few cores by turns."""
    return COLLECTIVE_TIMEOUT_S * max(1, world_size // 2)


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message holds tracebacks, stacks and logs."""


class RankCrash(RankFailure):
    """A rank was ended by a fault in native code."""


class RankPool:
    """Ranks started when first needed and reused by every later call."""

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

        Arguments and results travel pickled: send plain things and tensors. ``start_group`` False
        leaves the process group to the function; the rank's environment is torchrun's, but
        without MASTER_ADDR and MASTER_PORT.

        A call in which a rank crashed in native code is made once more, with a warning and at most
        ``MOST_CRASHES`` times in all: gloo's threads let go of tensors while Python does, which
        torch 2.13 does not always survive (github.com/pytorch/pytorch/pull/179291 is of its kind).
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
        for number in new:  # importing torch is not part of any call's time
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
                except EOFError:  # the process is gone: give_up() will say how
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
    value: Any  # the result, or the traceback


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
        """Say what has become of a rank that gave no answer, and end it."""
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
    """Be rank ``rank``: run what comes over ``link`` until the other end is gone."""
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
        except BaseException:  # whatever it is, the test must see it
            message = pickle.dumps(_Answer(False, traceback.format_exc()))
        link.send_bytes(message)


class _Collector:
    """Collections after calls: models and meshes hang in cycles, and a gloo group has a thread.

    They pass over what imports have brought, which takes a fifth of a second to walk through; what
    the server had imported is frozen already.
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
        sys.modules[name] = module  # dataclasses look their module up
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
        dist.barrier()  # or a rank that is quick would leave while others still connect
    try:
        return function(*call.args)
    finally:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # a broken group has been reported already
                dist.destroy_process_group()
        if "torch._dynamo" in sys.modules:  # it counts variants up to a limit
            torch.compiler.reset()
        collector.run()
