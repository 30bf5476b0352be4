"""Packing of documents into micro-batches."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(items: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items in order, each into the bin with the least remaining room; O(n log n) plus moves.

    ``sizes[i]`` is the size of item i. Of bins with equal room the oldest bin is used. For example,
    sizes 6, 5, 4 with capacity 10 give the bins [[0, 2], [1]].
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # bins with room: (tokens, bin), ascending
    for item in items:
        size = sizes[item]
        assert size <= capacity, (item, size, capacity)
        place = bisect_left(rooms, (size, -1))
        if place < len(rooms):
            room, number = rooms.pop(place)
            bins[number].append(item)
        else:
            room, number = capacity, len(bins)
            bins.append([item])
        if room > size:
            insort(rooms, (room - size, number))
    return bins


def first_fit(items: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items in order, each into the first bin with room; for small numbers of items."""
    bins: list[list[int]] = []
    rooms: list[int] = []
    for item in items:
        size = sizes[item]
        for number, room in enumerate(rooms):
            if size <= room:
                bins[number].append(item)
                rooms[number] = room - size
                break
        else:
            bins.append([item])
            rooms.append(capacity - size)
    return bins


def even_bins(
    items: Sequence[int],
    sizes: Sequence[int],
    weights: Sequence[float],
    capacity: int,
    count: int,
) -> list[list[int]] | None:
    """Pack items in order into ``count`` bins of similar weight, each into the lightest bin.

    A bin is closed when an item does not fit. Returns None if the bins are too few; empty bins are
    omitted. For example, sizes and weights 3, 2, 1 in two bins give [[0], [1, 2]].
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    rooms = [capacity] * count
    light = [(0.0, number) for number in range(count)]
    for item in items:
        size = sizes[item]
        while light and rooms[light[0][1]] < size:
            heapq.heappop(light)
        if not light:
            return None
        weight, number = light[0]
        bins[number].append(item)
        rooms[number] -= size
        heapq.heapreplace(light, (weight + weights[item], number))
    return [each for each in bins if each]
