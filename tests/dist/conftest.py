"""Fixtures of tests that need several ranks."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Test files here import shared helpers as plain modules; ranks have the same folder on their path.
sys.path.insert(0, str(Path(__file__).parent))

from harness import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def run_ranks(rank_pool: RankPool) -> Callable[..., list[Any]]:
    """Return ``run_ranks(function, world_size, *args)``, which returns results in rank order."""
    return rank_pool.run
