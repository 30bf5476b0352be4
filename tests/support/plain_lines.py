"""A source that is read in windows of several lengths, by its definition: places in plain lists."""

from __future__ import annotations

from collections.abc import Sequence

from allometry.data.shuffle import Shuffle


def plain_windows(
    key: str, period: int, parts: Sequence[tuple[int, int]], epochs: int
) -> list[list[int]]:
    """The places of each sample's tokens in the source's own line.

    ``parts``: samples and their length, in order; what they read must lie in ``epochs`` epochs.
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
    """The stretch that a place lies in, and the windows that start there."""
    at = max(k for k, bound in enumerate(bounds) if bound <= place)
    return at, -(-bounds[at] // length), -(-bounds[at + 1] // length)
