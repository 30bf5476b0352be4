"""Store connection between ranks that works before groups are created and while groups hang."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from allometry.parallel.rendezvous import Launch

CONNECT = timedelta(seconds=5)


def side_store(launch: Launch) -> Any | None:
    """Return a store shared by all ranks of a launch; None: not available yet, try again.

    The store has a separate connection, because a rank that waits in the group's store locks that
    connection. Blocks for a few seconds at most.
    """
    if launch.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if not isinstance(store, dist.TCPStore):
            return store  # a file store, locked only during each access
        host, port = store.host, store.port
    elif launch.address is not None:
        host, _, text = launch.address.rpartition(":")
        port = int(text)
    else:
        return None
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=CONNECT, wait_for_workers=False)
    except dist.DistError:
        return None
