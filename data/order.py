"""The order in which a source's tokens are read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from allometry.data.shuffle import Shuffle
from allometry.data.store import TokenStore

_EPOCHS_KEPT = 2


@dataclass(frozen=True)
class Epoch:
    """Documents in the order in which an epoch reads them, and where each ends in it."""

    documents: NDArray[np.int64] | None  # None: as stored
    ends: NDArray[np.int64]

    def numbers(self, first: int, stop: int) -> NDArray[np.int64]:
        """The documents at places ``first`` to ``stop`` (exclusive)."""
        if self.documents is None:
            return np.arange(first, stop)
        return self.documents[first:stop]


class DocumentOrder:
    """A source as one endless token stream: epochs, each a permutation of its documents.

    The stream is read in windows, in an order of their own (``window``).

    The permutation of an epoch follows from (seed, name, epoch) alone; with ``seed`` None every
    epoch has the documents as they are stored. A place in the stream is found by bisection over the
    epoch's running lengths, which cost 16 bytes a document; two epochs are kept.
    """

    def __init__(self, store: TokenStore, name: str, seed: int | None) -> None:
        self.store = store
        self.name = name
        self.seed = seed
        self.epoch = lru_cache(maxsize=_EPOCHS_KEPT)(self._make_epoch)
        self._shuffle = lru_cache(maxsize=_EPOCHS_KEPT)(Shuffle)
        self._overhang = lru_cache(maxsize=1)(self._make_overhang)

    def _make_epoch(self, epoch: int) -> Epoch:
        if self.seed is None:
            return Epoch(None, self.store.starts[1:])
        documents = permutation(f"{self.seed}:{self.name}:{epoch}", self.store.num_documents)
        return Epoch(documents, np.cumsum(self.store.lengths[documents]))

    def window(self, sample: int, length: int) -> int:
        """Which window of the stream sample ``sample`` is: window w starts at token w x ``length``.

        The windows that start in an epoch are read in an order that follows from (seed, name,
        epoch, length): neighbours in a long document must not meet in one batch. With ``seed``
        None windows come in order.
        """
        if self.seed is None:
            return sample
        first, shuffle = self._windows(sample * length // self.store.num_tokens, length)
        return first + shuffle(sample - first)

    def _windows(self, epoch: int, length: int) -> tuple[int, Shuffle]:
        """The first window that starts in an epoch, and the order of all that do."""
        period = self.store.num_tokens
        first = -(-epoch * period // length)
        count = -(-(epoch + 1) * period // length) - first
        return first, self._shuffle(f"{self.seed}:{self.name}:{epoch}:{length}", count)

    def unique_tokens(self, samples: int, length: int) -> int:
        """Different tokens among those of the first ``samples`` samples, exactly.

        Tokens of the windows that start in the first epoch, of which the last may go on in the
        second one and there repeat what the others have read.
        """
        assert self.seed is not None
        period = self.store.num_tokens
        windows = -(-period // length)
        if samples >= windows:
            return period
        ranks, repeated = self._overhang(length)
        if not len(ranks) or samples <= ranks[0]:  # the last window was not read yet
            return samples * length
        return samples * length - int(repeated[np.searchsorted(ranks, samples) - 1])

    def _make_overhang(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """When the tokens that the first epoch's last window has of the second one come twice.

        Returns places in the order of samples, from the last window's own on, and how many of these
        tokens are read twice once the sample there is read.
        """
        period = self.store.num_tokens
        _, shuffle = self._windows(0, length)
        last = shuffle.size - 1
        left = (last + 1) * length - period
        none = np.empty(0, np.int64)
        if not left or not last:
            return none, none
        second, starts = self.epoch(1), self._starts_of_first()
        number = 1 + int(np.searchsorted(second.ends, left))
        documents = second.numbers(0, number)
        lengths = self.store.lengths[documents].copy()
        lengths[-1] -= int(lengths.sum()) - left
        first = np.repeat(starts[documents] - np.cumsum(lengths) + lengths, lengths)
        windows, tokens = np.unique((first + np.arange(left)) // length, return_counts=True)
        own = np.array([shuffle.inverse(window) for window in windows.tolist()], np.int64)
        # A token comes twice when both its own window and the last one have been read.
        ranks, at = np.unique(np.maximum(own, shuffle.inverse(last)), return_inverse=True)
        return ranks, np.cumsum(np.bincount(at, weights=tokens)).astype(np.int64)

    def _starts_of_first(self) -> NDArray[np.int64]:
        """Where each document begins in the first epoch."""
        first = self.epoch(0)
        assert first.documents is not None
        starts = np.empty(self.store.num_documents, np.int64)
        starts[first.documents] = first.ends - self.store.lengths[first.documents]
        return starts

    def read(self, start: int, out: NDArray[np.int64]) -> NDArray[np.int64]:
        """Fill ``out`` with the stream's tokens from ``start`` on.

        Returns the lengths of the runs of one document (int64, positive, sum ``len(out)``), the
        first and last cut where the window cuts them.
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
        filled = lengths > 0  # a store may hold empty documents
        if not filled.all():
            documents, offsets, lengths = documents[filled], offsets[filled], lengths[filled]
        self.store.read_into(documents, offsets, lengths, out)
        return lengths


def permutation(key: str, count: int) -> NDArray[np.int64]:
    """A permutation of range(count), the same on every machine and with every numpy.

    The raw 64-bit stream of Philox under the SHA-256 of ``key`` (numpy promises bit generators'
    raw streams, and not what ``Generator`` makes of them) gives each number a random key; the low
    bits hold the number itself, so that a plain sort orders them without ties.
    """
    digest = hashlib.sha256(key.encode()).digest()
    raw = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    low = np.uint64((1 << max(1, (count - 1).bit_length())) - 1)
    keys = (raw & ~low) | np.arange(count, dtype=np.uint64)
    keys.sort()
    return (keys & low).astype(np.int64)
