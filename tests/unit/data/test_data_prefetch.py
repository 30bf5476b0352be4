import threading
import time
from collections.abc import Iterator

import pytest

from allometry.data.prefetch import Prefetcher


def test_keeps_the_order() -> None:
    with Prefetcher(lambda n: n * n, range(100)) as items:
        assert list(items) == [n * n for n in range(100)]
        assert list(items) == []


def test_works_ahead_but_not_further_than_depth() -> None:
    fetched: list[int] = []
    items = Prefetcher(lambda n: fetched.append(n) or n, range(1000), depth=3)
    deadline = time.monotonic() + 120
    while len(fetched) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert fetched == [0, 1, 2, 3]  # three ready, and one waiting for space
    assert next(items) == 0
    items.close()


def test_error_comes_in_its_turn() -> None:
    def fetch(n: int) -> int:
        if n == 2:
            raise KeyError("bad sample")
        return n

    items = Prefetcher(fetch, range(5))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(KeyError, match="bad sample"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)
    items.close()


def test_stop_iteration_in_fetch_is_not_the_end() -> None:
    items: Prefetcher[int, int] = Prefetcher(lambda n: next(iter(())), range(5))
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        next(items)
    items.close()


def test_error_in_the_requests() -> None:
    def requests() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    items = Prefetcher(lambda n: n, requests())
    assert next(items) == 1
    with pytest.raises(OSError, match="gone"):
        next(items)


def test_close_ends_the_thread() -> None:
    before = threading.active_count()
    items = Prefetcher(lambda n: n, iter(int, 1))
    next(items)
    items.close()
    items.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(items)
