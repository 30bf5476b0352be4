"""torchrun's agent, which starts the ranks of a node, as ``allometry.launch.torchrun`` runs it.

It restarts ranks as torchrun does. What it adds: a refusal (exit code 2) is not tried again, the
others are not waited for when a rank has crashed, new ranks are told why they were started, a
launch on one node listens on the loopback device alone, and ranks end with their agent.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from subprocess import Popen
from typing import Any

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import api as multiprocessing
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import (
    c10d_rendezvous_backend,
    dynamic_rendezvous,
    static_tcp_rendezvous,
)
from torch.distributed.launcher import api as launcher
from typing_extensions import override

from allometry.configs.errors import HUNG
from allometry.launch.fork_server import Forked, ForkServer
from allometry.parallel.rendezvous import RESTART

USER_ERROR = 2
"""Exit code of a rank that has said what is wrong."""
CRASH_GRACE_S = 5
"""Seconds that the other ranks of a node get to end by themselves once one has crashed."""
LOOPBACK = "127.0.0.1"
IMPORT_AFTER_S = 30.0
"""Seconds for which ranks have the processor before another process imports for their restarts."""
NODES_HEARD_S = 1.1
"""Seconds after which a node certainly has seen others that wait to join."""


class Agent(LocalElasticAgent):
    """The agent of a node; ``stopping`` says whether a signal has asked the ranks to stop."""

    def __init__(self, stopping: Callable[[], bool], server: ForkServer, **given: Any) -> None:
        super().__init__(**given)
        self._stopping, self._restarts = stopping, 0
        self._server, self._import_at = server, time.monotonic() + IMPORT_AFTER_S

    @override
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        context = self._pcontext
        assert isinstance(context, SubprocessContext)
        if self._remaining_restarts and time.monotonic() > self._import_at:
            self._server.start(command_of(context))
        codes = {
            worker.global_rank: context.subprocess_handlers[worker.local_rank].proc.poll()
            for worker in worker_group.workers
        }
        failed = {rank: code for rank, code in codes.items() if code}
        if any(code != USER_ERROR for code in failed.values()):
            context.close(timeout=CRASH_GRACE_S)
        result: RunResult = super()._monitor_workers(worker_group)
        # Its list has the others, too, who were ended because of these; a rank may fail meanwhile.
        failed = failed or {rank: each.exitcode for rank, each in result.failures.items()}
        if failed:
            self._tell(how_ended(failed))
            if self._stopping() or all(code == USER_ERROR for code in failed.values()):
                self._remaining_restarts = 0
        if result.state == WorkerState.SUCCEEDED and self._stopped_for_new_nodes(worker_group):
            return RunResult(state=WorkerState.HEALTHY)  # and the caller sees who waits
        return result

    @override
    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY:
            self._tell("another node came, or ranks of another node ended")
        assert isinstance(self._pcontext, SubprocessContext)
        self._server.start(command_of(self._pcontext))
        super()._restart_workers(worker_group)

    def _tell(self, reason: str) -> None:
        self._restarts += 1
        os.environ[RESTART] = json.dumps([self._restarts, reason])

    def _stopped_for_new_nodes(self, worker_group: WorkerGroup) -> bool:
        """Whether ranks ended well because the agent of another node, which saw it first, asked."""
        handler = self._rdzv_handler
        most = getattr(getattr(handler, "settings", None), "max_nodes", 1)
        if worker_group.group_world_size == most or self._stopping():
            return False
        time.sleep(NODES_HEARD_S)
        return bool(handler.num_nodes_waiting())


def command_of(context: SubprocessContext) -> list[str]:
    """Return the command line of the first rank of a node."""
    return [str(context.entrypoint), *map(str, context.args[0])]


def how_ended(codes: dict[int, int]) -> str:
    """Return a clause that says how ranks ended; ``codes``: exit codes, -N for signal N.

    Where some were killed, the others crashed because of it.
    """
    killed = {rank: code for rank, code in codes.items() if code < 0 or code > 128}
    said = []
    for rank, code in sorted((killed or codes).items()):
        number = -code if code < 0 else code - 128
        named = code < 0 or (code > 128 and number in set(signal.Signals))
        how = f"was ended by {signal.Signals(number).name}" if named else f"ended with code {code}"
        if code == HUNG:
            how = "ended because the run hung"
        memory = " (out of memory?)" if named and number == signal.SIGKILL else ""
        said.append(f"rank {rank} {how}{memory}")
    return ", ".join(said)


class LoopbackStore(dist.TCPStore):
    """A store whose server, if this is one, listens on the loopback device alone."""

    def __init__(
        self,
        host_name: str,
        port: int,
        world_size: int | None = None,
        is_master: bool = False,
        *more: Any,
        **named: Any,
    ) -> None:
        if is_master:
            host_name = LOOPBACK
            listening = socket.create_server((host_name, port))
            port = listening.getsockname()[1]
            named["master_listen_fd"] = listening.detach()
        super().__init__(host_name, port, world_size, is_master, *more, **named)


class Rank(SubprocessHandler):
    """A rank that ``server`` forks, if it can, and that is started as torchrun does otherwise."""

    def __init__(self, server: ForkServer, **given: Any) -> None:
        self._server = server
        super().__init__(**given)

    @override
    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Popen[bytes] | Forked:
        outputs = (
            each.fileno() if each else standard
            for each, standard in ((self._stdout, 1), (self._stderr, 2))
        )
        return self._server.fork(args, env, tuple(outputs)) or super()._popen(args, env)


def launch(arguments: list[str], stopping: Callable[[], bool], server: ForkServer) -> None:
    """Do what torchrun does with these arguments; raises ChildFailedError, as it does."""
    asked = run.parse_args(arguments)
    ours: list[tuple[Any, str, Any]] = [
        (launcher, "LocalElasticAgent", functools.partial(Agent, stopping, server)),
        (multiprocessing, "get_subprocess_handler", functools.partial(Rank, server)),
    ]
    if run.parse_min_max_nnodes(asked.nnodes)[1] == 1:
        asked.local_addr = asked.master_addr = LOOPBACK  # where ranks are told to meet
        handler = dynamic_rendezvous.DynamicRendezvousHandler
        ours.append((handler, "_create_tcp_store_server", _serve_here))
        ours.append((c10d_rendezvous_backend, "TCPStore", LoopbackStore))
        if not asked.rdzv_endpoint:
            ours.append((static_tcp_rendezvous, "TCPStore", LoopbackStore))
    for owner, name, mine in ours:  # torchrun takes none of them as an argument
        setattr(owner, name, mine)
    run.run(asked)


def _serve_here(_: Any, address: str, port: int) -> dist.TCPStore:
    return LoopbackStore(address, port, is_master=True, multi_tenant=True)
