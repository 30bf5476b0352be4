"""Token stream of a source as pieces of documents, whose largest length may change during a run."""

# s tokens in a document; place: a token's index in the stream

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from allometry.data.lines import Part
from allometry.data.order import DocumentOrder

_EPOCHS_KEPT = 2

Columns = tuple[
    NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]
]


class PieceStream:
    """Token stream of a source, with documents cut into pieces of ``limit`` tokens and a rest.

    A rest of one token has no target, because its document ends there: it is left out, and so is a
    document of one token. Places are found by bisection. For example, with ``limit`` 4 a document
    of 9 tokens has two pieces of 4 tokens, and its last token is only a target.
    """

    def __init__(self, order: DocumentOrder, limit: int) -> None:
        self.order = order
        self.limit = limit
        lengths = order.store.lengths
        self._lone = (lengths > 0) & ((lengths - 1) % limit == 0)
        self.epoch_tokens = order.store.num_tokens - int(np.count_nonzero(self._lone))
        """Number of tokens of the pieces of an epoch."""
        self._lone_places = lru_cache(maxsize=_EPOCHS_KEPT)(self._find_lone)

    def _find_lone(self, epoch: int) -> NDArray[np.int64]:
        """Return the positions, in an epoch's order, of documents whose last token is left out."""
        documents = self.order.epoch(epoch).documents
        return np.flatnonzero(self._lone if documents is None else self._lone[documents])

    def tokens_before(self, place: int) -> int:
        """Return the tokens of pieces that begin in the first ``place`` tokens of the stream."""
        epoch, offset = divmod(place, self.order.store.num_tokens)
        return epoch * self.epoch_tokens + (self._tokens_in(epoch, offset) if offset else 0)

    def _tokens_in(self, epoch: int, offset: int) -> int:
        """Compute ``tokens_before`` inside an epoch; ``offset`` > 0."""
        epoch = 0 if self.order.seed is None else epoch
        made = self.order.epoch(epoch)
        # The document of the last token before the offset; the documents before it are complete.
        index = int(np.searchsorted(made.ends, offset - 1, side="right"))
        document = int(made.numbers(index, index + 1)[0])
        length = int(self.order.store.lengths[document])
        start = int(made.ends[index]) - length
        begun = min(length, -(-(offset - start) // self.limit) * self.limit)
        left_out = int(np.searchsorted(self._lone_places(epoch), index))
        return start + begun - left_out - int(begun == length and self._lone[document])

    def begin_in(self, start: int, stop: int) -> Columns:
        """Return the pieces that begin at tokens ``start`` to ``stop`` of the stream, in order.

        ``stop`` is exclusive. Returns documents, offsets, lengths and ends (as in ``Pieces``), and
        the place at which each piece begins.
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

    def _begin_in_epoch(self, epoch: int, start: int, stop: int) -> Columns:
        made = self.order.epoch(0 if self.order.seed is None else epoch)
        first, last = np.searchsorted(made.ends, (start, stop - 1), side="right")
        documents = made.numbers(int(first), int(last) + 1)
        lengths = self.order.store.lengths[documents]
        begins = made.ends[first : last + 1] - lengths
        # Pieces low to high (exclusive) of each document begin between start and stop.
        low = -(-np.maximum(start - begins, 0) // self.limit)
        high = -(-np.minimum(stop - begins, lengths) // self.limit)
        number = np.maximum(high - low, 0)
        of = np.repeat(np.arange(len(documents)), number)
        nth = np.arange(len(of)) - np.repeat(np.cumsum(number) - number, number)
        offsets = (low[of] + nth) * self.limit
        left = lengths[of] - offsets
        kept = left > 1  # a rest of one token has no target
        of, offsets, left = of[kept], offsets[kept], left[kept]
        lengths, ends = np.minimum(left, self.limit), left <= self.limit
        return documents[of], offsets, lengths, ends, begins[of] + offsets


@dataclass(frozen=True)
class _Cut:
    """Pieces from ``place`` of a source's stream on, up to the next cut.

    The document that spans ``place`` has the number ``document`` and extends from place ``start``
    to ``end``; the pieces before the cut have read its first ``read`` tokens, and the rest is cut
    from there. If no document spans ``place``, ``end`` equals ``place``.
    """

    place: int
    stream: PieceStream
    end: int
    document: int = 0
    start: int = 0
    read: int = 0

    def read_before(self, place: int) -> int:
        """Return the tokens of the cut document that are read by pieces before ``place``."""
        begun = -(-(place - self.start - self.read) // self.stream.limit)
        return min(self.read + max(0, begun) * self.stream.limit, self.end - self.start)

    def tokens_before(self, place: int) -> int:
        """Return the tokens of the pieces that begin from ``self.place`` up to ``place``."""
        tokens, length = 0, self.end - self.start
        if self.end > self.place:
            read = self.read_before(min(place, self.end))
            tokens = read - self.read
            lone = length - self.read > 0 and (length - self.read - 1) % self.stream.limit == 0
            tokens -= int(lone and read == length)
        if place > self.end:
            tokens += self.stream.tokens_before(place) - self.stream.tokens_before(self.end)
        return tokens

    def begin_in(self, start: int, stop: int) -> Iterator[Columns]:
        """Yield the pieces that begin at tokens ``start`` to ``stop``, from ``self.place`` on."""
        if start < self.end:
            limit, length = self.stream.limit, self.end - self.start
            offsets = np.arange(self.read, length, limit)
            begins = self.start + offsets
            left = length - offsets
            here = (begins >= start) & (begins < stop) & (left > 1)
            offsets, begins, left = offsets[here], begins[here], left[here]
            documents = np.full(len(offsets), self.document, np.int64)
            yield documents, offsets, np.minimum(left, limit), left <= limit, begins
        if stop > self.end:
            yield self.stream.begin_in(max(start, self.end), stop)


class CutStream:
    """Token stream of a source in windows; each part has its own window length and limit.

    A part continues at the token after the part before it. If a document spans that place, its
    pieces that have begun are unchanged, and its rest is cut with the limit of the new part.
    """

    def __init__(
        self,
        order: DocumentOrder,
        parts: Sequence[Part],
        cut_at: Callable[[int], PieceStream],
    ) -> None:
        self.order = order
        self.parts = tuple(parts)
        self._firsts = [part.first for part in parts]
        self._places = [0]
        for part, after in pairwise(parts):
            self._places.append(self._places[-1] + (after.first - part.first) * part.length)
        self._cuts: list[_Cut] = []
        self._late: NDArray[np.int64] | None = None
        for part, place in zip(parts, self._places, strict=True):
            assert part.limit is not None
            if not self._cuts or self._cuts[-1].stream.limit != part.limit:
                self._cuts.append(self._cut(cut_at(part.limit), place))

    def _cut(self, stream: PieceStream, place: int) -> _Cut:
        if not self._cuts:
            return _Cut(place, stream, place)
        period = self.order.store.num_tokens
        epoch, offset = divmod(place, period)
        made = self.order.epoch(epoch)
        index = int(np.searchsorted(made.ends, offset, side="right"))
        document = int(made.numbers(index, index + 1)[0])
        end = epoch * period + int(made.ends[index])
        start = end - int(self.order.store.lengths[document])
        if start == place:
            return _Cut(place, stream, place)
        last = self._cuts[-1]
        if last.end <= start:
            last = _Cut(start, last.stream, end, document, start)
        return _Cut(place, stream, end, document, start, last.read_before(place))

    def place(self, sample: int) -> int:
        """Return the place in the stream at which a sample's window begins."""
        at = bisect_right(self._firsts, sample) - 1
        return self._places[at] + (sample - self._firsts[at]) * self.parts[at].length

    def tokens_before(self, place: int) -> list[tuple[int, int]]:
        """Return the tokens of pieces that begin before ``place`` and of an epoch, for each cut."""
        ends = [*(cut.place for cut in self._cuts[1:]), max(place, self._cuts[-1].place)]
        return [
            (cut.tokens_before(min(end, place)), cut.stream.epoch_tokens)
            for cut, end in zip(self._cuts, ends, strict=True)
            if cut.place < place
        ]

    def unique_before(self, place: int) -> int:
        """Return the distinct tokens of the pieces before ``place``; pieces do not cross epochs."""
        period = self.order.store.num_tokens
        tokens = sum(number for number, _ in self.tokens_before(min(place, period)))
        if place <= period or len(self._cuts) == 1:
            return tokens
        if self._late is None:
            self._late = self._find_late()
        return tokens + int(np.searchsorted(self._late, place))

    def _find_late(self) -> NDArray[np.int64]:
        """Return the places of pieces with a last token that earlier cuts left out, ascending."""
        period, late = self.order.store.num_tokens, []
        known = np.zeros(self.order.store.num_documents, np.bool_)
        for epoch in range(self._cuts[-1].place // period + 2):
            documents, _, _, ends, begins = self.begin_in(epoch * period, (epoch + 1) * period)
            new = ends & ~known[documents]
            known[documents[new]] = True
            late += [begins[new]] if epoch else []
        return np.concatenate(late)

    def begin_in(self, start: int, stop: int) -> Columns:
        """Return the pieces that begin at tokens ``start`` to ``stop``; see ``PieceStream``."""
        parts: list[Columns] = []
        ends = [*(cut.place for cut in self._cuts[1:]), max(stop, self._cuts[-1].place)]
        for cut, end in zip(self._cuts, ends, strict=True):
            first, last = max(start, cut.place), min(stop, end)
            if first < last:
                parts += cut.begin_in(first, last)
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return columns[0], columns[1], columns[2], columns[3], columns[4]
