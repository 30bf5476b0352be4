"""Rendezvous of the ranks of a launch: the launcher's environment variables and the shared store.

Only this file reads RANK and the related variables, and only this file starts a process group.

torchrun keeps one store for all restarts of its ranks, so restarted ranks would find the addresses
of ended ranks. TORCHELASTIC_RESTART_COUNT does not distinguish restarts: each node counts its own
failures, and nodes that join or leave are not counted. Ranks therefore first agree on a number that
no earlier ranks had, and prefix all their keys with this number.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from allometry.configs.errors import UserError
from allometry.parallel.groups import allow_sockets

RESTART = "ALLOMETRY_RESTART"
"""Environment variable in which our torchrun reports earlier starts of the ranks and the reason for
the restart: [count, reason] in JSON.
"""
LOOK_S = 0.01


@dataclass(frozen=True, slots=True)
class Restart:
    """Number of restarts of the ranks in this launch, and the reason of the last one, if known."""

    count: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """The launcher's description of this process; ``address`` None: a single process.

    ``one_node``: all ranks are on this machine. ``shared_store``: the store at ``address`` belongs
    to torchrun and serves all restarts. ``restart``: the restarts known to this node.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str | None
    one_node: bool = False
    shared_store: bool = False
    restart: Restart = Restart()


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Return the launch described by the variables of torchrun or a compatible scheduler.

    Raises UserError if a variable is missing, is not a number or contradicts another variable. For
    example, ``read_launch({})`` is a single process: rank 0 of 1.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if not given:
        return Launch(rank=0, world_size=1, local_rank=0, address=None)
    numbers = {"LOCAL_RANK": 0}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = environment.get(name)
        if text is None:
            if name != "LOCAL_RANK":
                raise UserError(
                    f"the environment has {given[0]} but not {name}; start the run with torchrun, "
                    f"or unset {given[0]} to run one process"
                )
        elif text.isdecimal():
            numbers[name] = int(text)
        else:
            raise UserError(
                f"{name}={text!r} in the environment is not a number; start the run with torchrun"
            )
    rank, world_size = numbers["RANK"], numbers["WORLD_SIZE"]
    if rank >= world_size:
        raise UserError(
            f"RANK={rank} in the environment must be below WORLD_SIZE={world_size}; start the run "
            "with torchrun"
        )
    address = None
    if world_size > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise UserError(
                f"WORLD_SIZE={world_size} in the environment needs {missing[0]}, where the ranks "
                "meet; start the run with torchrun, which sets it"
            )
        address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    return Launch(
        *(rank, world_size, numbers["LOCAL_RANK"], address),
        one_node=environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE"),
        shared_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restart=_restart(environment),
    )


def _restart(environment: Mapping[str, str]) -> Restart:
    if RESTART in environment:
        return Restart(*json.loads(environment[RESTART]))
    count = environment.get("TORCHELASTIC_RESTART_COUNT", "")
    return Restart(int(count) if count.isdecimal() else 0)


def this_launch() -> Launch:
    """Return the launch of this process, from the environment or the caller's process group."""
    if not dist.is_initialized():
        return read_launch(os.environ)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return Launch(dist.get_rank(), dist.get_world_size(), local_rank, address=None)


def launched_world_size() -> int:
    """Return the number of ranks of the launcher or of the caller's process group."""
    return this_launch().world_size


def start(launch: Launch, device: torch.device, timeout: timedelta) -> Restart | None:
    """Start the default process group: NCCL, bound to this rank's GPU, or gloo.

    Returns the reason for the restart; None on the first start of a launch. Raises UserError if
    ranks are missing after ``timeout``.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    allow_sockets(launch.world_size)
    if launch.address is None:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
        return launch.restart if launch.restart.count else None
    begun = time.monotonic()
    try:
        # env:// rather than a new store: torchrun runs its store at that address.
        meeting = dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout)
        store, *_ = next(meeting)
        store.set_timeout(timeout)
        restart = launch.restart
        if launch.shared_store:
            store, restart = meet(store, launch.rank, launch.world_size, restart, timeout)
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            # NCCL creates its communicator now, and other groups are split from it; otherwise each
            # pair of ranks with point-to-point messages would get its own communicator.
            device_id=device if device.type == "cuda" else None,
        )
        return restart if restart.count else None
    except dist.DistError as error:
        if time.monotonic() - begun < 0.9 * timeout.total_seconds():
            raise  # another rank has ended and reports the reason
        raise UserError(
            f"rank {launch.rank} did not meet the other ranks of WORLD_SIZE={launch.world_size} at "
            f"{launch.address} within {timeout.total_seconds():.0f} s; check that "
            f"all were started and can reach that address ({error})"
        ) from error


def meet(
    store: dist.Store, rank: int, world_size: int, restart: Restart, timeout: timedelta
) -> tuple[dist.Store, Restart]:
    """Return a new prefix of ``store``, equal on all ranks, and the restart known to rank 0.

    Every rank calls this function with the restart known to its node: rank 0 returns the largest
    count and the first reason. ``store`` may contain keys of earlier ranks, which have all ended.
    Each rank therefore stores a unique token, and rank 0 answers the token with the number of this
    meeting. Rank 0 keeps checking for a newer token until the rank has confirmed the answer. Raises
    DistStoreError after ``timeout``.
    """
    letters = dist.PrefixStore("allometry", store)
    if rank > 0:
        token = uuid.uuid4().hex
        letters.set(f"token/{rank}", json.dumps([token, restart.count, restart.reason]))
        number = int(letters.get(f"answer/{token}"))
        letters.set(f"met/{number}/{rank}", "")
        return dist.PrefixStore(f"{number}", letters), restart
    number = letters.add("meetings", 1)
    told = {0: restart}
    absent = set(range(1, world_size))
    until = time.monotonic() + timeout.total_seconds()
    while absent:
        for other in sorted(absent):
            if letters.check([f"met/{number}/{other}"]):
                absent.remove(other)
            elif letters.check([f"token/{other}"]):
                token, *knows = json.loads(letters.get(f"token/{other}"))
                told[other] = Restart(*knows)
                letters.set(f"answer/{token}", str(number))
        if absent and time.monotonic() > until:
            raise dist.DistStoreError(f"rank(s) {sorted(absent)} did not come")
        time.sleep(LOOK_S)
    count = max(each.count for each in told.values())
    reason = next((each.reason for each in told.values() if each.reason), None)
    return dist.PrefixStore(f"{number}", letters), Restart(count, reason)


@contextmanager
def on_loopback(launch: Launch) -> Iterator[None]:
    """Make gloo and NCCL use only the loopback device if all ranks are on this machine.

    Values set by the user are kept.
    """
    there = "lo" in (name for _, name in socket.if_nameindex())
    wanted = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if launch.one_node and there else ()
    ours = [name for name in wanted if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, "lo"))
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
