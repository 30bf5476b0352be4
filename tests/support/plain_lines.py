"""Reference for a source read in windows of several lengths: positions in plain lists."""

from __future__ import annotations

from collections.abc import Sequence

from allometry.data.shuffle import Shuffle


def plain_windows(
    key: str, period: int, parts: Sequence[tuple[int, int]], epochs: int
) -> list[list[int]]:
    """Return the positions of each sample's tokens in the source's sequence.

    ``parts``: number of samples and their length, in order; they must fit in ``epochs`` epochs.
    """
    line = list(range(period * epochs))
    bounds = [period * epoch for epoch in range(epochs + 1)]
    found: list[list[int]] = []
    for count, length in parts:
        read = set()
        for sample in range(count):
            at, first, end = _windows(bounds, sample * length, length)
            window = first + Shuffle(f"{key}:{at}:{length}", end - first)(sample - first)
            read.add(window)
            found.append(line[window * length : (window + 1) * length])
        at, first, end = _windows(bounds, count * length, length)
        begun = count > first
        unread = [window for window in range(first, end) if begun and window not in read]
        behind = (end if begun else first) * length
        left = [place for w in unread for place in line[w * length : (w + 1) * length]]
        bounds = [0, *(len(left) + max(0, bound - behind) for bound in bounds[at + 1 :])]
        line, key = left + line[behind:], f"{key}:{count} of {length}"
    return found


def _windows(bounds: Sequence[int], place: int, length: int) -> tuple[int, int, int]:
    """Return the epoch that contains a position, and the range of windows that start in it."""
    at = max(k for k, bound in enumerate(bounds) if bound <= place)
    return at, -(-bounds[at] // length), -(-bounds[at + 1] // length)
