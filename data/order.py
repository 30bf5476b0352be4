"""Order in which a source's tokens are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from allometry.data.lines import Line
from allometry.data.store import TokenStore

_EPOCHS_KEPT = 2


@dataclass(frozen=True)
class Epoch:
    """Documents in the order in which an epoch reads them, and the place where each ends."""

    documents: NDArray[np.int64] | None  # None: as stored
    ends: NDArray[np.int64]

    def numbers(self, first: int, stop: int) -> NDArray[np.int64]:
        """Return the documents at places ``first`` to ``stop`` (exclusive)."""
        if self.documents is None:
            return np.arange(first, stop)
        return self.documents[first:stop]


class DocumentOrder(Line):
    """Source as one endless token stream: epochs, each a permutation of its documents.

    The stream is read in windows, which are shuffled within an epoch (in order if ``seed`` is
    None).

    The permutation of an epoch depends on (seed, name, epoch) alone; with ``seed`` None every epoch
    reads the documents as they are stored. A place in the stream is found by bisection over the
    epoch's cumulative lengths, which take 16 bytes per document; two epochs are cached.
    """

    def __init__(self, store: TokenStore, name: str, seed: int | None) -> None:
        super().__init__(f"{seed}:{name}")
        self.store = store
        self.name = name
        self.seed = seed
        self.epoch = lru_cache(maxsize=_EPOCHS_KEPT)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> Epoch:
        if self.seed is None:
            return Epoch(None, self.store.starts[1:])
        documents = permutation(f"{self.key}:{epoch}", self.store.num_documents)
        return Epoch(documents, np.cumsum(self.store.lengths[documents]))

    @override
    def bound(self, stretch: int) -> int:
        return stretch * self.store.num_tokens

    @override
    def stretch(self, place: int) -> int:
        return place // self.store.num_tokens

    @override
    def runs(self, place: int, count: int) -> Iterator[tuple[int, int]]:
        yield place, count

    @override
    def window(self, sample: int, length: int) -> int:
        return sample if self.seed is None else super().window(sample, length)

    def places_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Convert places of the stream to the places of the same tokens in the first epoch."""
        first = self.epoch(0)
        assert first.documents is not None
        starts = np.empty(self.store.num_documents, np.int64)
        starts[first.documents] = first.ends - self.store.lengths[first.documents]
        found = np.empty_like(places)
        epochs, offsets = np.divmod(places, self.store.num_tokens)
        for epoch in np.unique(epochs).tolist():
            here, made = epochs == epoch, self.epoch(epoch)
            assert made.documents is not None
            at = np.searchsorted(made.ends, offsets[here], side="right")
            documents = made.documents[at]
            begins = made.ends[at] - self.store.lengths[documents]
            found[here] = starts[documents] + offsets[here] - begins
        return found

    def read(self, start: int, out: NDArray[np.int64]) -> NDArray[np.int64]:
        """Fill ``out`` with the stream's tokens from ``start`` on.

        Returns the number of tokens of each document in ``out`` (int64, positive, sum
        ``len(out)``); the first and the last document may be cut by the window.
        """
        period, filled = self.store.num_tokens, 0
        lengths = []
        while filled < len(out):
            epoch, offset = divmod(start + filled, period)
            count = min(len(out) - filled, period - offset)
            made = self.epoch(0 if self.seed is None else epoch)
            lengths.append(self._read_epoch(made, offset, out[filled : filled + count]))
            filled += count
        return np.concatenate(lengths) if len(lengths) > 1 else lengths[0]

    def _read_epoch(self, epoch: Epoch, offset: int, out: NDArray[np.int64]) -> NDArray[np.int64]:
        first, last = np.searchsorted(epoch.ends, (offset, offset + len(out) - 1), side="right")
        ends = epoch.ends[first : last + 1]
        documents = epoch.numbers(int(first), int(last) + 1)
        lengths = self.store.lengths[documents]
        offsets = np.zeros_like(lengths)
        offsets[0] = offset - (ends[0] - lengths[0])
        lengths[0] -= offsets[0]
        lengths[-1] -= ends[-1] - (offset + len(out))
        filled = lengths > 0  # a store may contain empty documents
        if not filled.all():
            documents, offsets, lengths = documents[filled], offsets[filled], lengths[filled]
        self.store.read_into(documents, offsets, lengths, out)
        return lengths


def permutation(key: str, count: int) -> NDArray[np.int64]:
    """Return a permutation of range(count) that is the same on all machines and numpy versions.

    The raw 64-bit stream of Philox, keyed by the SHA-256 of ``key``, gives each number a random
    sort key (numpy guarantees the raw streams of bit generators, but not the methods of
    ``Generator``). The low bits of a sort key are the number itself, so that a plain sort has no
    ties. For example, ``permutation("7:web:0", 3)`` returns the same order of 0, 1 and 2 in each
    process.
    """
    digest = hashlib.sha256(key.encode()).digest()
    raw = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    low = np.uint64((1 << max(1, (count - 1).bit_length())) - 1)
    keys = (raw & ~low) | np.arange(count, dtype=np.uint64)
    keys.sort()
    return (keys & low).astype(np.int64)
