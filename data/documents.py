"""Whole documents as a pure function of (seed, sample position)."""

# C documents, or pieces of them, of any lengths; s tokens in one; L tokens in a sample's window

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.data import DocumentData
from allometry.data.batch import IGNORE
from allometry.data.order import DocumentOrder
from allometry.data.sources import Sources, evenly
from allometry.data.store import TokenStore

_EPOCHS_KEPT = 2


@dataclass(frozen=True)
class Pieces:
    """C pieces of documents, known by their places; tokens are read when asked for.

    Piece i is ``lengths[i]`` tokens from ``offsets[i]`` on of document ``documents[i]`` of source
    ``sources[i]``, whose store is ``stores[sources[i]]`` (int64 all). ``ends[i]``: it is the last
    of its document, so that its last token has no target.
    """

    lengths: NDArray[np.int64]
    sources: NDArray[np.int64]
    documents: NDArray[np.int64]
    offsets: NDArray[np.int64]
    ends: NDArray[np.bool_]
    stores: Mapping[int, TokenStore]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces."""
        return int(self.lengths.sum())

    @property
    def num_targets(self) -> int:
        """Targets that count: all tokens but the last ones of documents."""
        return self.num_tokens - int(np.count_nonzero(self.ends))

    def read(
        self, piece: int, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens ``start`` to ``stop`` (exclusive) of a piece and their targets (int64 both).

        The last token of a document has the target ``IGNORE``.
        """
        length = int(self.lengths[piece])
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length
        store, offset = self.stores[int(self.sources[piece])], int(self.offsets[piece])
        window = np.full(stop - start + 1, IGNORE, np.int64)
        known = len(window) - int(stop == length and self.ends[piece])
        first = offset + start
        window[:known] = store.read(int(self.documents[piece]), first, first + known)
        return window[:-1].copy(), window[1:].copy()


_Columns = tuple[
    NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]
]


class PieceStream:
    """A source's token stream, each document cut into pieces of ``limit`` tokens and a rest.

    A rest of one token predicts nothing, as its document ends with it: it is left out, and a
    document of one token with it. What stands where is found by bisection.
    """

    def __init__(self, order: DocumentOrder, limit: int) -> None:
        self.order = order
        self.limit = limit
        lengths = order.store.lengths
        self._lone = (lengths > 0) & ((lengths - 1) % limit == 0)
        self.epoch_tokens = order.store.num_tokens - int(np.count_nonzero(self._lone))
        """Tokens of the pieces of an epoch."""
        self._lone_places = lru_cache(maxsize=_EPOCHS_KEPT)(self._find_lone)

    def _find_lone(self, epoch: int) -> NDArray[np.int64]:
        """Places in an epoch's order of the documents whose last token is left out."""
        documents = self.order.epoch(epoch).documents
        return np.flatnonzero(self._lone if documents is None else self._lone[documents])

    def tokens_before(self, place: int) -> int:
        """Tokens of the pieces that begin among the first ``place`` tokens of the stream."""
        epoch, offset = divmod(place, self.order.store.num_tokens)
        return epoch * self.epoch_tokens + (self._tokens_in(epoch, offset) if offset else 0)

    def _tokens_in(self, epoch: int, offset: int) -> int:
        """``tokens_before`` inside an epoch; ``offset`` > 0."""
        epoch = 0 if self.order.seed is None else epoch
        made = self.order.epoch(epoch)
        # The document that holds the last token before the offset; all before it are whole.
        index = int(np.searchsorted(made.ends, offset - 1, side="right"))
        document = int(made.numbers(index, index + 1)[0])
        length = int(self.order.store.lengths[document])
        start = int(made.ends[index]) - length
        begun = min(length, -(-(offset - start) // self.limit) * self.limit)
        left_out = int(np.searchsorted(self._lone_places(epoch), index))
        return start + begun - left_out - int(begun == length and self._lone[document])

    def begin_in(self, start: int, stop: int) -> _Columns:
        """The pieces that begin at tokens ``start`` to ``stop`` of the stream, in order.

        ``stop`` is exclusive. Returns documents, offsets, lengths, ends (as in ``Pieces``) and
        where each begins.
        """
        period = self.order.store.num_tokens
        parts = []
        while start < stop:
            epoch, offset = divmod(start, period)
            end = min(period, offset + stop - start)
            *piece, begins = self._begin_in_epoch(epoch, offset, end)
            parts.append((*piece, begins + epoch * period))
            start += end - offset
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return columns[0], columns[1], columns[2], columns[3], columns[4]

    def _begin_in_epoch(self, epoch: int, start: int, stop: int) -> _Columns:
        made = self.order.epoch(0 if self.order.seed is None else epoch)
        first, last = np.searchsorted(made.ends, (start, stop - 1), side="right")
        documents = made.numbers(int(first), int(last) + 1)
        lengths = self.order.store.lengths[documents]
        begins = made.ends[first : last + 1] - lengths
        # Of each document the pieces number low to high (exclusive) begin in the stretch.
        low = -(-np.maximum(start - begins, 0) // self.limit)
        high = -(-np.minimum(stop - begins, lengths) // self.limit)
        number = np.maximum(high - low, 0)
        of = np.repeat(np.arange(len(documents)), number)
        nth = np.arange(len(of)) - np.repeat(np.cumsum(number) - number, number)
        offsets = (low[of] + nth) * self.limit
        left = lengths[of] - offsets
        kept = left > 1  # a rest of one token has nothing to predict
        of, offsets, left = of[kept], offsets[kept], left[kept]
        lengths, ends = np.minimum(left, self.limit), left <= self.limit
        return documents[of], offsets, lengths, ends, begins[of] + offsets


class DocumentStream(Sources):
    """Training and held-out documents of a data configuration, whole.

    Sample i of a source is window [i L, i L + L) of its token stream, in order (documents are
    permuted already): it holds the pieces that begin there, wherever they end. Targets are the
    tokens that follow in the same document, so each of them counts once an epoch. A sample may hold
    no piece: the one before it then ends behind it.
    """

    def __init__(self, data: DocumentData, seed: int) -> None:
        super().__init__(data, seed, whole=True)
        self.max_document_tokens = data.max_document_tokens
        self._streams = [PieceStream(order, self.max_document_tokens) for order in self._train]

    def _settings(self) -> dict[str, Any]:
        return {"kind": "documents", "max_document_tokens": self.max_document_tokens}

    def _epoch_tokens(self, source: int) -> int:
        return self._streams[source].epoch_tokens

    def _epoch_squares(self, source: int) -> float:
        limit = self.max_document_tokens
        whole, rest = np.divmod(self._train[source].store.lengths.astype(np.float64), limit)
        return float((whole * limit**2 + np.where(rest > 1, rest, 0) ** 2).sum())

    def pieces(self, position: int, count: int) -> Pieces:
        """The pieces of the ``count`` samples from ``position`` on, by position, then by place."""
        source_B, index_B = self.samples(position, count)
        parts, rows, sources = [], [], []
        for source in np.unique(source_B).tolist():
            row_of = np.flatnonzero(source_B == source)
            first = int(index_B[row_of[0]])  # a source's samples follow each other
            begin, end = (k * self.sequence_length for k in (first, first + len(row_of)))
            *piece, begins = self._streams[source].begin_in(begin, end)
            parts.append(piece)
            rows.append(row_of[begins // self.sequence_length - first])
            sources.append(np.full(len(begins), source, np.int64))
        stores = {source: order.store for source, order in enumerate(self._train)}
        order = np.argsort(np.concatenate(rows), kind="stable")
        columns = (np.concatenate(column)[order] for column in zip(*parts, strict=True))
        documents, offsets, lengths, ends = columns
        return Pieces(lengths, np.concatenate(sources)[order], documents, offsets, ends, stores)

    def _tokens_in(self, source: int, samples: int) -> int:
        return self._streams[source].tokens_before(samples * self.sequence_length)

    def _unique_in(self, source: int, samples: int) -> int:
        # No piece goes on in another epoch.
        return min(self._tokens_in(source, samples), self._epoch_tokens(source))

    def _order(self) -> dict[str, Any]:
        return {**super()._order(), "data.max_document_tokens": self.max_document_tokens}

    def validation_pieces(self, count: int) -> dict[str, Pieces]:
        """Documents of each held-out split, evenly spread: on average ``count`` windows of tokens.

        They come as they are stored and are cut as training documents are. A split of fewer windows
        gives what it has, which is logged.
        """
        assert count > 0
        by_name = {}
        for name, order in self._validation.items():
            total = order.store.num_tokens
            available = -(-total // self.sequence_length)
            share = len(self._held_out_windows(name, available, count)) / available
            stream = PieceStream(order, self.max_document_tokens)
            documents, offsets, lengths, ends, _ = stream.begin_in(0, total)
            at = evenly(len(documents), max(1, round(len(documents) * share)))
            source = self.sources.index(name)
            by_name[name] = Pieces(
                *(lengths[at], np.full(len(at), source, np.int64), documents[at], offsets[at]),
                *(ends[at], {source: order.store}),
            )
        return by_name
