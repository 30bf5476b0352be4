"""Schedule of sources: the source of each sample, exact and with random access.

Sample j of a source with share w is due at time (j + 1/2) / w; samples are taken in the order of
their due times, ties in the order of the sources (the method of Webster and Sainte-Laguë, applied
over time). By time t source s has given n_s(t) = floor(w_s t + 1/2) samples, so |n_s - w_s t| is at
most 1/2 and the sum over S sources differs from t by at most S/2. The sources of positions p to p +
n therefore depend only on the due times between p - S/2 and p + n + S/2: no state, no table, O(S
log S) work at any position.

Weights may change at a position. Each source then continues with its next sample, and the balance
w_s t - n_s of the shares so far is kept, so that counts remain near the sum of the shares over time
for any number of changes. A sample that is overdue at a change is due immediately.

Shares are multiples of 2**-32 and all arithmetic is exact, on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

_BITS = 32
_UNITS = 1 << _BITS
_MOST_SAMPLES = 1 << 28


class Mixture:
    """Schedule of sources by weight, from ``start_position`` on.

    ``weights`` are finite, in any scale; a share below 2**-32 is raised to 2**-32, and a source of
    weight 0 gives no samples. A change of weights during a run is a new ``Mixture``
    (``continued``): ``start_counts`` are the samples that each source gave before
    ``start_position``, and ``owed`` are the samples that the earlier mixtures still owe each
    source, in units of 2**-32 (sum 0).

    For example, ``Mixture([3, 1]).counts(8)`` is [6, 2].
    """

    def __init__(
        self,
        weights: Sequence[float],
        start_position: int = 0,
        start_counts: Sequence[int] | None = None,
        owed: Sequence[int] | None = None,
    ) -> None:
        self.units = _quantize(weights)
        self.start_position = start_position
        counts = [0] * len(self.units) if start_counts is None else list(start_counts)
        assert len(counts) == len(self.units)
        assert sum(counts) == start_position
        self._start_counts = np.array(counts, np.int64)
        self._owed = [0] * len(self.units) if owed is None else list(owed)
        assert sum(self._owed) == 0
        self._units = np.array(self.units, np.int64)
        # While a source that is ahead gives no samples, the others run ahead by the same amount.
        ahead = sum(max(0, -owed) for owed in self._owed)
        self._slack = (self.num_sources + 1) // 2 - (-ahead // _UNITS)

    @property
    def num_sources(self) -> int:
        """S."""
        return len(self.units)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each source after rounding; the shares sum to 1."""
        return tuple(units / _UNITS for units in self.units)

    def continued(self, weights: Sequence[float], position: int) -> Mixture:
        """Return the mixture that follows this one from ``position`` on, with other ``weights``."""
        counts = self.counts(position).tolist()
        time = position - self.start_position
        given = (after - before for after, before in zip(counts, self._start_counts, strict=True))
        owed = [
            owed + units * time - int(number) * _UNITS
            for owed, units, number in zip(self._owed, self.units, given, strict=True)
        ]
        return Mixture(weights, position, counts, _settled(owed, _quantize(weights)))

    def source(self, position: int) -> tuple[int, int]:
        """Return the source of the sample at ``position`` and its index within the source."""
        source_B, index_B = self.sources(position, 1)
        return int(source_B[0]), int(index_B[0])

    def sources(self, position: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ``source`` of ``count`` samples from ``position`` on, as two int64 arrays."""
        skip, _, source, index = self._due(position, count)
        chosen = slice(skip, skip + count)
        return source[chosen], index[chosen] + self._start_counts[source[chosen]]

    def counts(self, position: int) -> NDArray[np.int64]:
        """Return the samples of each source before ``position`` (int64, S).

        Their sum is ``position``.
        """
        skip, before, source, _ = self._due(position, 0)
        within = np.bincount(source[:skip], minlength=self.num_sources)
        return before + within + self._start_counts

    def _due(
        self, position: int, count: int
    ) -> tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Sort the samples of a time interval that contains ``count`` samples from ``position`` on.

        Returns the number of samples to skip, each source's samples before the interval, and the
        sources and indices of the samples in order.
        """
        first = position - self.start_position
        assert first >= 0
        assert 0 <= count < _MOST_SAMPLES
        begin, end = max(0, first - self._slack), first + count + self._slack
        # Samples that are overdue when the mixture begins come after its beginning.
        before = [self._given(s, begin) if begin else 0 for s in range(self.num_sources)]
        number = np.array([self._given(s, end) for s in range(self.num_sources)], np.int64)
        number -= before
        source = np.repeat(np.arange(self.num_sources), number)
        nth = np.arange(len(source)) - np.repeat(np.cumsum(number) - number, number)
        # Time from begin until sample (before + nth) is due, as a fraction over units[source].
        parts = zip(self.units, before, self._owed, strict=True)
        waits = [(2 * b + 1) * (_UNITS >> 1) - owed - u * begin for u, b, owed in parts]
        numerator = np.maximum(np.array(waits, np.int64)[source] + nth * _UNITS, 0)
        whole, fraction = _exact_order(numerator, self._units[source])
        order = np.lexsort((source, fraction, whole))
        before_S = np.array(before, np.int64)
        source = source[order]
        return first - sum(before), before_S, source, before_S[source] + nth[order]

    def _given(self, source: int, time: int) -> int:
        """Return the samples of a source due by ``time``: floor(owed + w t + 1/2), at least 0."""
        due = 2 * (self.units[source] * time + self._owed[source]) + _UNITS
        return max(0, due >> (_BITS + 1))


def _settled(owed: Sequence[int], units: Sequence[int]) -> list[int]:
    """Divide the balance of sources that end among the others, by their new shares."""
    rest = sum(one for one, share in zip(owed, units, strict=True) if not share)
    kept = [
        one + (rest * share >> _BITS) if share else 0
        for one, share in zip(owed, units, strict=True)
    ]
    kept[max(range(len(units)), key=lambda s: (units[s], -s))] -= sum(kept)
    return kept


def _exact_order(
    numerator: NDArray[np.int64], denominator: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Split fractions with denominators <= 2**32 into an integer and 64 fractional bits.

    Two different fractions differ by at least 2**-64 (the product of two sources' units is below
    2**64), so these keys order fractions exactly and are equal only for equal fractions.
    """
    whole, rest = np.divmod(numerator, denominator)
    divisor = denominator.astype(np.uint64)
    high, rest_high = np.divmod(rest.astype(np.uint64) << np.uint64(32), divisor)
    low = (rest_high << np.uint64(32)) // divisor
    return whole, (high << np.uint64(32)) | low


def _quantize(weights: Sequence[float]) -> tuple[int, ...]:
    """Round weights to integers that sum to 2**32, by largest remainder.

    Each weight above 0 gets at least 1.
    """
    assert 0 < len(weights) < _UNITS
    assert all(math.isfinite(weight) and weight >= 0 for weight in weights)
    assert any(weights)
    exact = [Fraction(weight) for weight in weights]
    scale = _UNITS / sum(exact)
    shares = [weight * scale for weight in exact]
    units = [max(1, math.floor(share)) if share else 0 for share in shares]
    missing = _UNITS - sum(units)
    if missing >= 0:
        by_remainder = sorted(range(len(units)), key=lambda s: (units[s] - shares[s], s))
        for s in by_remainder[:missing]:
            units[s] += 1
    else:  # tiny shares were raised to 1; the largest share is reduced
        units[max(range(len(units)), key=lambda s: (units[s], -s))] += missing
    assert sum(units) == _UNITS
    assert all(unit >= 1 for unit, share in zip(units, shares, strict=True) if share)
    return tuple(units)
