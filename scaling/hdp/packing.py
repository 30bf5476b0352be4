"""Packing documents into micro-batches."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(items: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items, in their order, each where it leaves the least room; O(n log n) but for moves.

    ``sizes[i]`` is the size of item i. Among bins of equal room the oldest one gets the item.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # of bins with room: (tokens, bin), ascending
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
    """Pack items, in their order, each into the first bin with room; for few of them."""
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
    """Pack items, in their order, into ``count`` bins of like weights, each into the lightest.

    A bin that an item finds too full is closed. None where the bins do not suffice so; empty ones
    are left out.
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
