"""Restarted ranks rendezvous under a new prefix of the store, and learn the reason."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from allometry.parallel.rendezvous import Launch, Restart, meet, on_loopback, read_launch

TIMEOUT = timedelta(seconds=20)
NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def meeting(
    store: dist.Store, known: Sequence[Restart], timeout: timedelta = TIMEOUT
) -> list[tuple[dist.Store, Restart]]:
    """Run the rendezvous of all ranks; return each rank's result."""
    with ThreadPoolExecutor(len(known)) as pool:
        ranks = [
            pool.submit(meet, store, rank, len(known), restart, timeout)
            for rank, restart in enumerate(known)
        ]
        return [rank.result() for rank in ranks]


def test_each_meeting_has_keys_of_its_own() -> None:
    store = dist.HashStore()
    store.set_timeout(TIMEOUT)
    first = meeting(store, [Restart()] * 3)
    first[1][0].set("address", "of a rank that has ended")
    assert first[0][0].get("address") == b"of a rank that has ended"
    second = meeting(store, [Restart()] * 3)
    assert not any(part.check(["address"]) for part, _ in second)
    second[2][0].set("address", "new")
    assert second[0][0].get("address") == second[1][0].get("address") == b"new"


def test_the_first_rank_hears_of_the_failures_of_all_nodes() -> None:
    store = dist.HashStore()
    store.set_timeout(TIMEOUT)
    _, told = meeting(store, [Restart(1), Restart(), Restart(3, "rank 2 was killed")])[0]
    assert told == Restart(3, "rank 2 was killed")


def test_a_token_that_an_earlier_rank_left_is_nobody_s() -> None:
    """Ranks 1 and 2 rendezvous; rank 2 is present only through its earlier token."""
    store = dist.HashStore()
    store.set_timeout(TIMEOUT)
    meeting(store, [Restart()] * 3)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(meet, store, 1, 3, Restart(), TIMEOUT)
        with pytest.raises(dist.DistStoreError, match=r"rank\(s\) \[2\] did not come"):
            meet(store, 0, 3, Restart(), timedelta(seconds=0.3))
        other.result()


def test_what_a_launcher_says_of_restarts() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert read_launch(environment).restart == Restart(2)
    told = environment | {"ALLOMETRY_RESTART": '[3, "rank 1 ended with code 1"]'}
    assert read_launch(told).restart == Restart(3, "rank 1 ended with code 1")


@pytest.mark.parametrize(("one_node", "wanted"), [(True, "lo"), (False, None)])
def test_ranks_of_one_machine_listen_on_loopback_alone(
    monkeypatch: pytest.MonkeyPatch, one_node: bool, wanted: str | None
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    launch = Launch(0, 2, 0, "127.0.0.1:1", one_node=one_node)
    with on_loopback(launch):
        assert [os.environ.get(name) for name in NAMES] == [wanted] * 2
    assert not any(name in os.environ for name in NAMES)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    with on_loopback(launch):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
