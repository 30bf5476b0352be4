"""Reference for the schedule of a changing mixture: one sample after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

UNITS = 2**32


def plain_samples(
    changes: Sequence[tuple[int, Mapping[str, float]]], names: Sequence[str], count: int
) -> list[tuple[str, int]]:
    """Return the source and index of each of ``count`` samples.

    ``changes``: positions and shares, integer multiples of 2**-32; ties follow the order of
    ``names``.
    """
    given = dict.fromkeys(names, 0)
    owed = dict.fromkeys(names, Fraction(0))
    found: list[tuple[str, int]] = []
    ends = [position for position, _ in changes[1:]] + [count]
    for (begin, shares), end in zip(changes, ends, strict=True):
        rate = {name: Fraction(shares.get(name, 0.0)) for name in names}
        owed = _settled(owed, rate)
        before = dict(given)
        for _ in range(begin, min(end, count)):
            due = {
                name: max(
                    Fraction(0), (given[name] - before[name] + Fraction(1, 2) - owed[name]) / share
                )
                for name, share in rate.items()
                if share
            }
            source = min(due, key=lambda name: (due[name], names.index(name)))
            found.append((source, given[source]))
            given[source] += 1
        owed = {
            name: owed[name] + rate[name] * (end - begin) - (given[name] - before[name])
            for name in names
        }
    return found


def _settled(owed: Mapping[str, Fraction], rate: Mapping[str, Fraction]) -> dict[str, Fraction]:
    """Distribute the deficit of a stopped source over the others by share, rounded down."""
    rest = sum((owed[name] for name, share in rate.items() if not share), Fraction(0))
    kept = {
        name: owed[name] + Fraction(rest * share * UNITS // 1, UNITS) if share else Fraction(0)
        for name, share in rate.items()
    }
    largest = max(rate, key=lambda name: rate[name])  # the first of equal shares
    kept[largest] -= sum(kept.values())
    return kept
