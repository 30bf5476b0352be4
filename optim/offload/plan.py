"""Which states live where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum


class Tier(StrEnum):
    """Where states live between steps, from near to far."""

    DEVICE = "device"
    CPU = "cpu"
    NVME = "nvme"


def assign(sizes: Sequence[int], limits: Mapping[Tier, int]) -> list[Tier]:
    """Return the tier of each of ``sizes`` bytes; none holds more than its limit.

    Every tier gets its part of each stretch of the order, so that what stays and what travels
    alternate. The last of ``limits`` takes what has no room elsewhere, whatever its limit.
    """
    total = sum(sizes)
    *near, last = limits
    room: list[int] = []
    for tier in near:
        room.append(min(limits[tier], total - sum(room)))
    shares = [each / total if total else 0.0 for each in room]
    held, passed, tiers = [0] * len(near), 0, []
    for size in sizes:
        passed += size
        fitting = [i for i in range(len(near)) if held[i] + size <= room[i]]
        lacking = [(shares[i] * passed - held[i], -i) for i in fitting]
        most, place = max(lacking, default=(0.0, 0))
        if most >= size / 2:
            held[-place] += size
            tiers.append(near[-place])
        else:
            tiers.append(last)
    return tiers
