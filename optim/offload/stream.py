"""Transfers of state buckets to the device and back, overlapped with updates of other buckets."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager

import torch
from torch import Tensor
from typing_extensions import override

from allometry.optim.offload.swap import Region, StatesLost, SwapFile
from allometry.parallel.buffers import host_buffer, padded

SLOTS = 3  # one is filled and one emptied during an update of a third


class Slot:
    """Buffers for one bucket at a time: on the device, and on the host if files are read."""

    def __init__(self, nbytes: int, device: torch.device, *, files: bool) -> None:
        on_host = device.type == "cpu"
        self.host = host_buffer(nbytes if files or on_host else 0, device)
        self.device = (
            self.host if on_host else torch.zeros(nbytes, dtype=torch.uint8, device=device)
        )
        self.busy: Future[None] | None = None


class Home(ABC):
    """Storage of the states of one bucket; ``starts`` and ``sizes`` describe its tensors."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.starts, self.nbytes = [], 0
        for size in sizes:
            self.starts.append(self.nbytes)
            self.nbytes += padded(size)
        self.written: Future[None] | None = None

    @abstractmethod
    def fill(self, slot: Slot) -> None:
        """Copy the states to the slot."""

    @abstractmethod
    def empty(self, slot: Slot) -> None:
        """Copy the states from the slot."""

    @abstractmethod
    def get(self, index: int) -> Tensor:
        """Return one tensor's bytes on the host: the stored memory, or a copy read from a file."""

    @abstractmethod
    def put(self, index: int, data: Tensor) -> None:
        """Replace one tensor's bytes with data on any device."""


class HostHome(Home):
    """Storage in host memory."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        super().__init__(sizes)
        self._data = host_buffer(self.nbytes, device)

    @override
    def fill(self, slot: Slot) -> None:
        slot.device[: self.nbytes].copy_(self._data, non_blocking=True)

    @override
    def empty(self, slot: Slot) -> None:
        self._data.copy_(slot.device[: self.nbytes], non_blocking=True)

    @override
    def get(self, index: int) -> Tensor:
        return self._data[self.starts[index] :][: self.sizes[index]]

    @override
    def put(self, index: int, data: Tensor) -> None:
        if data.data_ptr() != self.get(index).data_ptr():
            self.get(index).copy_(data)


class FileHome(Home):
    """Storage in a file."""

    def __init__(self, sizes: Sequence[int], swap: SwapFile) -> None:
        super().__init__(sizes)
        self._swap, self._regions = swap, swap.allocate(sizes)

    @override
    def fill(self, slot: Slot) -> None:
        self._swap.read(self._regions, slot.host)
        if slot.device is not slot.host:
            slot.device[: self.nbytes].copy_(slot.host[: self.nbytes], non_blocking=True)

    @override
    def empty(self, slot: Slot) -> None:
        if slot.device is not slot.host:
            slot.host[: self.nbytes].copy_(slot.device[: self.nbytes])  # synchronous
        self._swap.write(self._regions, slot.host)

    @override
    def get(self, index: int) -> Tensor:
        region = self._regions[index]
        buffer = host_buffer(region.nbytes, torch.device("cpu"))
        self._swap.read([region], buffer)
        return buffer[: self.sizes[index]]

    @override
    def put(self, index: int, data: Tensor) -> None:
        region: Region = self._regions[index]
        buffer = host_buffer(region.nbytes, torch.device("cpu"))
        buffer[: self.sizes[index]].copy_(data)
        self._swap.write([region], buffer)


class Stream:
    """Prefetcher of ``homes`` into slots ahead of ``take``, cyclically in their order.

    The caller takes and gives back one home at a time. Threads of the stream copy the bytes; each
    thread waits for earlier operations on its slot and home, so neither is used twice at once. An
    error in a thread is raised by the next call that waits for its result. Raises StatesLost also
    if an operation takes longer than ``timeout_s``. ``waited_s``: seconds that callers have waited.
    """

    def __init__(
        self, homes: Sequence[Home], device: torch.device, timeout_s: float, *, files: bool
    ) -> None:
        self._homes, self._device, self._timeout_s = list(homes), device, timeout_s
        most = max(home.nbytes for home in homes)
        self._slots = [Slot(most, device, files=files) for _ in range(min(SLOTS, 1 + len(homes)))]
        self._threads = ThreadPoolExecutor(2, "optimizer-states")
        self._ahead: deque[tuple[Home, Slot, Future[None]]] = deque()
        self._filled = 0  # fills started since the last drain
        self._taken: tuple[Home, Slot] | None = None
        self.waited_s = 0.0

    def take(self) -> Tensor:
        """Return the next home's bytes on the device, uint8, to be changed in place."""
        assert self._taken is None
        self._fill_ahead(1)
        home, slot, filled = self._ahead.popleft()
        self._wait(filled, "reading")
        self._taken = home, slot
        # One slot is being emptied, and this home must not be read again yet.
        self._fill_ahead(min(len(self._slots) - 2, len(self._homes) - 1))
        return slot.device[: home.nbytes]

    def give_back(self) -> None:
        """Start to copy the taken bytes to their home, and prefetch the next homes."""
        assert self._taken is not None
        home, slot = self._taken
        self._taken = None
        if home.written is not None:
            self._wait(home.written, "writing")
        updated = None
        if self._device.type == "cuda":
            updated = torch.cuda.Event()  # type: ignore[no-untyped-call]
            updated.record(torch.cuda.current_stream(self._device))
        slot.busy = home.written = self._threads.submit(self._empty, home, slot, updated)
        self._fill_ahead(min(len(self._slots) - 1, len(self._homes)))

    def drain(self) -> None:
        """Wait until all homes contain their states, and drop prefetched data.

        The next ``take`` starts with the first home. Raises pending errors.
        """
        assert self._taken is None
        ahead, self._ahead, self._filled = self._ahead, deque(), 0
        for _, _, filled in ahead:
            self._wait(filled, "reading")
        self.settle()

    def settle(self) -> None:
        """Wait until all homes contain their states; keep prefetched data."""
        for home in self._homes:
            if home.written is not None:
                self._wait(home.written, "writing")

    def _fill_ahead(self, count: int) -> None:
        while len(self._ahead) < count:
            home = self._homes[self._filled % len(self._homes)]
            slot = self._slots[self._filled % len(self._slots)]
            self._filled += 1
            before = [each for each in (slot.busy, home.written) if each is not None]
            slot.busy = self._threads.submit(self._fill, home, slot, before)
            self._ahead.append((home, slot, slot.busy))

    def _fill(self, home: Home, slot: Slot, before: list[Future[None]]) -> None:
        for each in before:  # started earlier by one of these threads, so it ends
            each.result()
        with _own_stream(self._device):
            home.fill(slot)

    def _empty(self, home: Home, slot: Slot, updated: torch.cuda.Event | None) -> None:
        if updated is not None:
            updated.synchronize()
        with _own_stream(self._device):
            home.empty(slot)

    def _wait(self, future: Future[None], doing: str) -> None:
        begun = time.perf_counter()
        try:
            future.result(self._timeout_s)
        except FutureTimeoutError:
            raise StatesLost(
                f"{doing} a bucket of optimizer states took longer than "
                f"parallel.timeout_s={self._timeout_s:g}: the disk or the host is too slow or hangs"
            ) from None
        self.waited_s += time.perf_counter() - begun


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Run a thread's copies on a separate stream, and wait for them at the end."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
        stream.synchronize()
