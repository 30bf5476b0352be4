"""Endless token stream of a source, read in windows whose length may change during a run."""

# L tokens in a window; place: a token's index in a line; stretch: windows with a common permutation

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from allometry.data.shuffle import Shuffle

_SHUFFLES_KEPT = 2


@dataclass(frozen=True)
class Part:
    """Range of a source's samples, from sample ``first`` on, that contain ``length`` tokens each.

    ``limit``: largest length of a complete document; longer documents are cut.
    """

    first: int
    length: int
    limit: int | None = None


class Line(ABC):
    """Endless token stream in stretches; the windows that start in a stretch are shuffled.

    The permutation of a stretch's windows depends on (``key``, stretch, length) alone.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._shuffle = lru_cache(maxsize=_SHUFFLES_KEPT)(Shuffle)

    @abstractmethod
    def bound(self, stretch: int) -> int:
        """Return the place at which a stretch begins."""

    @abstractmethod
    def stretch(self, place: int) -> int:
        """Return the stretch that contains a place."""

    @abstractmethod
    def runs(self, place: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield (place, count) in the source's own line of ``count`` tokens from ``place`` on.

        Runs that are adjacent there are returned as one run.
        """

    def windows(self, stretch: int, length: int) -> tuple[int, Shuffle]:
        """Return the first window that starts in a stretch, and the permutation of its windows."""
        first, end = (-(-self.bound(at) // length) for at in (stretch, stretch + 1))
        return first, self._shuffle(f"{self.key}:{stretch}:{length}", end - first)

    def window(self, sample: int, length: int) -> int:
        """Return the window that a sample reads; window w starts at token w x ``length``.

        Windows are shuffled so that adjacent windows of a long document are not in one batch.
        """
        first, shuffle = self.windows(self.stretch(sample * length), length)
        return first + shuffle(sample - first)


class Rest(Line):
    """Rest of a line of which ``samples`` windows of ``length`` tokens were read.

    The unread windows of the current stretch come first, concatenated in the order of their places,
    and form stretch 0; then the line continues behind the last window of that stretch. Each
    remaining token is read exactly once per epoch, for any window length of this line.
    """

    def __init__(self, below: Line, length: int, samples: int) -> None:
        super().__init__(f"{below.key}:{samples} of {length}")
        self._below, self._length = below, length
        self._stretch = below.stretch(samples * length)
        first, shuffle = below.windows(self._stretch, length)
        begun = samples - first
        unread = shuffle.images(begun, shuffle.size) if begun else np.empty(0, np.int64)
        self._unread = np.sort(unread) + first
        self._behind = (first + (shuffle.size if begun else 0)) * length
        self._left = len(unread) * length

    @override
    def bound(self, stretch: int) -> int:
        if not stretch:
            return 0
        further = self._below.bound(self._stretch + stretch) - self._behind
        return self._left + max(0, further)

    @override
    def stretch(self, place: int) -> int:
        if place < self._left:
            return 0
        return self._below.stretch(place - self._left + self._behind) - self._stretch

    @override
    def runs(self, place: int, count: int) -> Iterator[tuple[int, int]]:
        for start, number in _joined(self._parts(place, count)):
            yield from self._below.runs(start, number)

    def _parts(self, place: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield ``runs`` in the line below, window by window."""
        while count:
            window, offset = divmod(place, self._length)
            if place < self._left:
                start = int(self._unread[window]) * self._length + offset
                number = min(count, self._length - offset)
            else:
                start, number = place - self._left + self._behind, count
            yield start, number
            place, count = place + number, count - number

    def of_below(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Convert unread places of the line below to places of this line."""
        windows, offsets = np.divmod(places, self._length)
        left = np.searchsorted(self._unread, windows) * self._length + offsets
        return np.where(places < self._behind, left, places - self._behind + self._left)


def _joined(runs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Merge runs that are adjacent."""
    start, number = next(runs)
    for at, count in runs:
        if at == start + number:
            number += count
        else:
            yield start, number
            start, number = at, count
    yield start, number


class Windows:
    """Samples of a source that is read in ``parts``, each with its own window length.

    ``line`` is the source's own line; each part reads the tokens that the parts before it have not
    read. For example, parts ``[Part(0, 2048), Part(1000, 4096)]`` read 1000 samples of 2048 tokens,
    and then samples of 4096 tokens.
    """

    def __init__(self, line: Line, parts: Sequence[Part]) -> None:
        assert parts[0].first == 0
        self.parts = tuple(parts)
        self._lines = [line]
        self._firsts = [part.first for part in parts]
        self._through: tuple[int, int, int] | None = None
        self._again: NDArray[np.int64] | None = None  # samples that repeat a token

    def line(self, number: int) -> Line:
        """Return the line of a part; it is built on first use, at 8 bytes per unread window."""
        while len(self._lines) <= number:
            done, begun = self.parts[len(self._lines) - 1], self.parts[len(self._lines)]
            count = begun.first - done.first
            self._lines.append(Rest(self._lines[-1], done.length, count))
        return self._lines[number]

    def sample(self, number: int) -> Iterator[tuple[int, int]]:
        """Yield (place, count) in the source's own line of the tokens of a sample."""
        at = bisect_right(self._firsts, number) - 1
        part, line = self.parts[at], self.line(at)
        return _joined(
            line.runs(line.window(number - part.first, part.length) * part.length, part.length)
        )

    def tokens(self, samples: int) -> int:
        """Return the number of tokens in the first ``samples`` samples."""
        ends = [*self._firsts[1:], max(samples, self._firsts[-1])]
        return sum(
            part.length * max(0, min(end, samples) - part.first)
            for part, end in zip(self.parts, ends, strict=True)
        )

    def unique(
        self, samples: int, places_of: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    ) -> int:
        """Return the exact number of distinct tokens in the first ``samples`` samples.

        The windows that start in the first epoch contain each of its tokens once. The last windows
        also contain tokens of the next epochs; such a token is a repeat once both of its samples
        are read. ``places_of`` converts places of the line to the places of the same tokens in the
        first epoch.
        """
        if self._through is None:
            self._through = self._first_epoch()
        through, part, end = self._through
        period = self._lines[0].bound(1)
        if samples >= through:
            return period
        if self._again is None:
            later = np.arange(period, end)
            first = places_of(later)
            own = np.unique(first)
            tokens = np.concatenate([own, first])
            times = self._samples_of(np.concatenate([own, later]), part)
            order = np.lexsort((times, tokens))
            tokens, times = tokens[order], times[order]
            self._again = np.sort(times[1:][tokens[1:] == tokens[:-1]])
        return self.tokens(samples) - int(np.searchsorted(self._again, samples))

    def _first_epoch(self) -> tuple[int, int, int]:
        """Return the end of the first epoch: sample, part, and place behind the last window."""
        for number, part in enumerate(self.parts):
            line = self.line(number)
            windows = -(-line.bound(1) // part.length)
            last = number + 1 == len(self.parts)
            if last or self.parts[number + 1].first - part.first >= windows:
                ((end, _),) = line.runs(windows * part.length, 1)
                return part.first + windows, number, end
        raise AssertionError("the last part has no end")

    def _samples_of(self, places: NDArray[np.int64], last: int) -> NDArray[np.int64]:
        """Return the samples that read these places of the first epoch, in parts up to ``last``."""
        found = np.full(len(places), -1, np.int64)
        open_ = np.arange(len(places))
        for number in range(last + 1):
            part, line = self.parts[number], self.line(number)
            assert not number or isinstance(line, Rest)
            if isinstance(line, Rest):
                places = line.of_below(places)
            _, shuffle = line.windows(0, part.length)
            windows, of = np.unique(places // part.length, return_inverse=True)
            read = [
                part.first + shuffle.inverse(w) if w < shuffle.size else -1
                for w in windows.tolist()
            ]
            samples = np.array(read, np.int64)[of]
            end = self.parts[number + 1].first if number < last else None
            here = (samples >= 0) if end is None else (samples >= 0) & (samples < end)
            found[open_[here]] = samples[here]
            places, open_ = places[~here], open_[~here]
        assert not len(open_)
        return found
