"""Build the next batches in the background during training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Self, TypeVar

Request = TypeVar("Request")
Item = TypeVar("Item")

_POLL_S = 0.1


class Prefetcher(Generic[Request, Item]):
    """Iterator over ``fetch(request)`` for each of ``requests``, ``depth`` items ahead.

    One thread fetches, in order. An error in ``fetch`` or ``requests`` is raised in the consumer
    after the items before it. ``close`` (or the end of the ``with`` block) ends the thread in any
    state; an item that is being fetched is completed and dropped. For example,
    ``for batch in Prefetcher(fetch, positions): ...``.
    """

    def __init__(
        self, fetch: Callable[[Request], Item], requests: Iterable[Request], depth: int = 2
    ) -> None:
        assert depth > 0
        self._ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._exhausted = False
        self._thread = threading.Thread(
            target=self._work, args=(fetch, requests), name="prefetch", daemon=True
        )
        self._thread.start()

    def _work(self, fetch: Callable[[Request], Item], requests: Iterable[Request]) -> None:
        end: BaseException = StopIteration()
        try:
            for request in requests:
                if self._closed.is_set() or not self._put((fetch(request), None)):
                    return
        except StopIteration as error:  # not the end of the requests
            end = RuntimeError("fetch raised StopIteration")
            end.__cause__ = error
        except BaseException as error:  # any error, or the consumer would wait for ever
            end = error
        self._put((None, end))

    def _put(self, item: tuple[Item | None, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                pass
        return False

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._exhausted or self._closed.is_set():
            raise StopIteration
        item, error = self._ready.get()
        if error is not None:
            self._exhausted = True
            raise error
        assert item is not None
        return item

    def close(self) -> None:
        """End the thread and wait for it; may be called twice."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
