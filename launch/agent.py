"""Elastic agent of torchrun that starts and monitors the ranks of one node.

``allometry.launch.torchrun`` runs this agent. Restarts work as in torchrun, with five differences:
ranks that exit with a user error (code 2) are not restarted, the other ranks are ended
``CRASH_GRACE_S`` after a crash, restarted ranks receive the reason in the environment variable
``RESTART``, a launch on one node listens on the loopback device only, and ranks end with their
agent.
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
"""Exit code of a rank that ended with a UserError."""
CRASH_GRACE_S = 5
"""Seconds that the other ranks of a node have to exit after one rank has crashed."""
LOOPBACK = "127.0.0.1"
IMPORT_AFTER_S = 30.0
"""Seconds after the launch before the fork server imports, which competes with ranks for CPU."""
NODES_HEARD_S = 1.1
"""Seconds after which an agent has certainly seen the nodes that wait to join."""


class Agent(LocalElasticAgent):
    """Elastic agent of a node.

    ``stopping()`` returns True once a signal has been passed on to the ranks.
    """

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
        # ``result.failures`` also lists the ranks that were ended because of this failure, so it is
        # read only if no failure was seen before: a rank may fail between the two polls.
        failed = failed or {rank: each.exitcode for rank, each in result.failures.items()}
        if failed:
            self._tell(how_ended(failed))
            if self._stopping() or all(code == USER_ERROR for code in failed.values()):
                self._remaining_restarts = 0
        if result.state == WorkerState.SUCCEEDED and self._stopped_for_new_nodes(worker_group):
            return RunResult(state=WorkerState.HEALTHY)  # the caller checks for waiting nodes
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
        """Return True if the ranks exited with 0 because another node's agent restarts the group.

        The other agent saw a new node first and stopped the ranks.
        """
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
    """Return a clause that describes the failed ranks; ``codes``: exit codes, -N for signal N.

    If a rank was killed by a signal, only the killed ranks are named: the other ranks failed
    because of them. For example, ``how_ended({0: 1, 3: -9})`` returns
    ``"rank 3 was ended by SIGKILL (out of memory?)"``.
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
    """TCPStore that listens on the loopback device only, if this process serves the store."""

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
    """Handler of one rank, which ``server`` forks or, if it cannot, torchrun's ``Popen`` starts."""

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
    """Run torchrun with these arguments and this agent; raises ChildFailedError like torchrun."""
    asked = run.parse_args(arguments)
    ours: list[tuple[Any, str, Any]] = [
        (launcher, "LocalElasticAgent", functools.partial(Agent, stopping, server)),
        (multiprocessing, "get_subprocess_handler", functools.partial(Rank, server)),
    ]
    if run.parse_min_max_nnodes(asked.nnodes)[1] == 1:
        asked.local_addr = asked.master_addr = LOOPBACK  # the address that ranks connect to
        handler = dynamic_rendezvous.DynamicRendezvousHandler
        ours.append((handler, "_create_tcp_store_server", _serve_here))
        ours.append((c10d_rendezvous_backend, "TCPStore", LoopbackStore))
        if not asked.rdzv_endpoint:
            ours.append((static_tcp_rendezvous, "TCPStore", LoopbackStore))
    for owner, name, mine in ours:  # torchrun accepts none of these classes as an argument
        setattr(owner, name, mine)
    run.run(asked)


def _serve_here(_: Any, address: str, port: int) -> dist.TCPStore:
    return LoopbackStore(address, port, is_master=True, multi_tenant=True)
