"""The harness fails loudly: a rank that raises, dies or hangs is named."""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness import RankFailure, RankPool

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
