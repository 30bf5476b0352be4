"""The harness reports a rank that raises, dies or hangs."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness import RankCrash, RankFailure, RankPool

RunRanks = Callable[..., list[Any]]


def ranks_and_process(offset: int) -> tuple[int, int, int]:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), int(value), os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ArithmeticError("this rank fails on purpose")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)


def crash(place: Path, times: int) -> int:
    """Crash ``times`` times, in as many calls."""
    if dist.get_rank() == 1 and len(list(place.iterdir())) < times:
        (place / str(time.time())).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()
    return len(list(place.iterdir()))


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def test_results_come_in_rank_order_from_processes_that_stay(run_ranks: RunRanks) -> None:
    first = run_ranks(ranks_and_process, 2, 10)
    again = run_ranks(ranks_and_process, 2, 0)
    assert [(rank, total) for rank, total, _ in first] == [(0, 21), (1, 21)]
    assert [(rank, total) for rank, total, _ in again] == [(0, 1), (1, 1)]
    assert [process for *_, process in first] == [process for *_, process in again]


def test_failures_are_loud_and_the_next_call_works() -> None:
    pool = RankPool()
    try:
        with pytest.raises(RankFailure, match="ArithmeticError: this rank fails on purpose"):
            pool.run(fail_on, 2, 1)
        with pytest.raises(RankFailure, match=r"rank 0 died with exit code 7"):
            pool.run(die_on, 2, 0)
        with pytest.raises(RankFailure, match=r"(?s)ranks \[1\] of 2.*rank 1 hung.*sleep_on"):
            pool.run(sleep_on, 2, 1, timeout_s=4.0)
        assert len(pool.run(ranks_and_process, 2, 0)) == 2
    finally:
        pool.close()


def test_a_call_is_made_once_more_when_a_rank_crashed_and_no_more_than_that(
    tmp_path: Path,
) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "always").mkdir()
    pool = RankPool()
    try:
        with pytest.warns(UserWarning, match=r"(?s)rank 1 died.*Fatal Python error: Segmentation"):
            assert pool.run(crash, 2, tmp_path / "once", 1) == [1, 1]
        with (
            pytest.warns(UserWarning, match="once more"),
            pytest.raises(RankCrash, match="died with exit code -11"),
        ):
            pool.run(crash, 2, tmp_path / "always", 9)
        assert len(list((tmp_path / "always").iterdir())) == 2
    finally:
        pool.close()
