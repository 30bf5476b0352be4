"""Assignment of optimizer states to tiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum


class Tier(StrEnum):
    """Location of states between steps, from near to far."""

    DEVICE = "device"
    CPU = "cpu"
    NVME = "nvme"


def assign(sizes: Sequence[int], limits: Mapping[Tier, int]) -> list[Tier]:
    """Return the tier of each of ``sizes`` bytes; the total of a tier does not exceed its limit.

    Each tier gets its share in every part of the order, so that resident and offloaded states
    alternate. The last tier of ``limits`` takes the remaining states, regardless of its limit. For
    example, four equal sizes with half of the room on the device alternate between the tiers.
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
    # Remaining room is filled in order, nearest tier first.
    for number, size in enumerate(sizes):
        for place, tier in enumerate(near):
            if tiers[number] is last and held[place] + size <= limits[tier]:
                held[place] += size
                tiers[number] = tier
    return tiers
