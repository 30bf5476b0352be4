"""Complete documents as a pure function of (seed, sample position)."""

# C documents or pieces of documents, of any length; s tokens in a piece; L tokens in a window

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from allometry.configs.data import DocumentData
from allometry.data.batch import IGNORE
from allometry.data.changes import DataStage
from allometry.data.cuts import CutStream, PieceStream
from allometry.data.sources import Sources, evenly
from allometry.data.store import TokenStore


@dataclass(frozen=True)
class Pieces:
    """C pieces of documents, known by their positions; tokens are read on request.

    Piece i is ``lengths[i]`` tokens from ``offsets[i]`` on of document ``documents[i]`` of source
    ``sources[i]``, whose store is ``stores[sources[i]]`` (all int64). ``ends[i]`` is True for the
    last piece of a document; the last token of such a piece has no target.
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
        """Number of tokens in all pieces."""
        return int(self.lengths.sum())

    @property
    def num_targets(self) -> int:
        """Number of targets in the loss: all tokens except the last of each document."""
        return self.num_tokens - int(np.count_nonzero(self.ends))

    def read(
        self, piece: int, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Read tokens ``start`` to ``stop`` (exclusive) of a piece and their targets (both int64).

        The last token of a document has the target ``IGNORE``. For example,
        ``tokens, targets = pieces.read(0)`` reads the complete first piece.
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


class DocumentStream(Sources):
    """Training and held-out documents of a data configuration, not cut at sample boundaries.

    Sample i of a source is window [i L, i L + L) of its token stream, in stream order (the
    documents are permuted already): it contains the pieces that begin in the window, even if they
    end behind it. Targets are the next tokens of the same document, so each token after the first
    of a document is a target once an epoch. A sample may have no pieces, if an earlier piece covers
    the complete window.
    """

    data: DocumentData

    def __init__(self, data: DocumentData, seed: int, stages: Sequence[DataStage] = ()) -> None:
        self._cut_at = cache(lambda source, limit: PieceStream(self._train[source], limit))
        super().__init__(data, seed, stages, whole=True)

    @override
    def _settle(self) -> None:
        self.max_document_tokens = self.data.max_document_tokens
        self._streams = [
            CutStream(order, self.parts(source), partial(self._cut_at, source))
            for source, order in enumerate(self._train)
        ]

    def _settings(self) -> dict[str, Any]:
        return {"kind": "documents", "max_document_tokens": self.max_document_tokens}

    def _epoch_tokens(self, source: int) -> int:
        return self._cut_at(source, self.max_document_tokens).epoch_tokens

    def _epoch_squares(self, source: int) -> float:
        limit = self.max_document_tokens
        whole, rest = np.divmod(self._train[source].store.lengths.astype(np.float64), limit)
        return float((whole * limit**2 + np.where(rest > 1, rest, 0) ** 2).sum())

    def pieces(self, position: int, count: int) -> Pieces:
        """Return the pieces of the ``count`` samples from ``position``, in order."""
        source_B, index_B = self.samples(position, count)
        parts, rows, sources = [], [], []
        for source in np.unique(source_B).tolist():
            row_of = np.flatnonzero(source_B == source)
            first = int(index_B[row_of[0]])  # a source's samples follow each other
            begin, end = (self._streams[source].place(k) for k in (first, first + len(row_of)))
            *piece, begins = self._streams[source].begin_in(begin, end)
            parts.append(piece)
            rows.append(row_of[(begins - begin) // self.sequence_length])
            sources.append(np.full(len(begins), source, np.int64))
        stores = {source: order.store for source, order in enumerate(self._train)}
        order = np.argsort(np.concatenate(rows), kind="stable")
        columns = (np.concatenate(column)[order] for column in zip(*parts, strict=True))
        documents, offsets, lengths, ends = columns
        return Pieces(lengths, np.concatenate(sources)[order], documents, offsets, ends, stores)

    def _tokens_in(self, source: int, samples: int) -> int:
        stream = self._streams[source]
        return sum(tokens for tokens, _ in stream.tokens_before(stream.place(samples)))

    def _unique_in(self, source: int, samples: int) -> int:
        return self._streams[source].unique_before(self._streams[source].place(samples))

    def _epochs_in(self, source: int, samples: int) -> float:
        stream = self._streams[source]
        counted = stream.tokens_before(stream.place(samples))
        return sum(tokens / epoch for tokens, epoch in counted)

    def _order(self) -> dict[str, Any]:
        return {**super()._order(), "data.max_document_tokens": self.max_document_tokens}

    def validation_pieces(self, count: int) -> dict[str, Pieces]:
        """Return evenly spaced documents of each held-out split: about ``count`` windows of tokens.

        Documents are in the order in which they are stored and are cut like training documents. A
        split of fewer windows returns all its pieces, which is logged.
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
