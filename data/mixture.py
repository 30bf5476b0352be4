"""Which source each sample comes from: an exact schedule with random access.

Sample j of a source with share w is due at time (j + 1/2) / w; samples are taken in the order of
their due times, ties in the order of the sources (the method of Webster and Sainte-Laguë, run in
time). By time t source s has given n_s(t) = floor(w_s t + 1/2) samples, so n_s is never further
than 1/2 from w_s t and the sum over S sources never further than S/2 from t. The sources of
positions p to p + n therefore follow from the due times between p - S/2 and p + n + S/2 alone:
no state, no table, O(S log S) work at any position.

Shares are whole multiples of 2**-32 and all arithmetic is exact, on any machine.
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
    """The schedule of sources by weight, from ``start_position`` on.

    ``weights`` are positive and finite, in any scale; a share below 2**-32 is raised to that.
    ``start_counts`` are the samples that each source gave before ``start_position``, under the
    mixtures before this one: a change of weights in mid-run is a new ``Mixture`` (``continued``).
    """

    def __init__(
        self,
        weights: Sequence[float],
        start_position: int = 0,
        start_counts: Sequence[int] | None = None,
    ) -> None:
        self.units = _quantize(weights)
        self.start_position = start_position
        counts = [0] * len(self.units) if start_counts is None else list(start_counts)
        assert len(counts) == len(self.units)
        assert sum(counts) == start_position
        self._start_counts = np.array(counts, np.int64)
        self._units = np.array(self.units, np.int64)

    @property
    def num_sources(self) -> int:
        """S."""
        return len(self.units)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each source, as used; their sum is 1."""
        return tuple(units / _UNITS for units in self.units)

    def continued(self, weights: Sequence[float], position: int) -> Mixture:
        """The mixture with other ``weights`` from ``position`` on, after this one."""
        return Mixture(weights, position, [int(count) for count in self.counts(position)])

    def source(self, position: int) -> tuple[int, int]:
        """Source of the sample at ``position`` and that sample's index within the source."""
        source_B, index_B = self.sources(position, 1)
        return int(source_B[0]), int(index_B[0])

    def sources(self, position: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``source`` of ``count`` samples from ``position`` on, as two int64 arrays."""
        skip, _, source, index = self._due(position, count)
        chosen = slice(skip, skip + count)
        return source[chosen], index[chosen] + self._start_counts[source[chosen]]

    def counts(self, position: int) -> NDArray[np.int64]:
        """Samples of each source among the first ``position`` (int64, S); their sum is it."""
        skip, before, source, _ = self._due(position, 0)
        within = np.bincount(source[:skip], minlength=self.num_sources)
        return before + within + self._start_counts

    def _due(
        self, position: int, count: int
    ) -> tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Samples in order over a time that holds ``count`` from ``position`` on.

        Returns how many of them to skip, each source's samples before them, and their sources and
        indices.
        """
        first = position - self.start_position
        assert first >= 0
        assert 0 <= count < _MOST_SAMPLES
        slack = (self.num_sources + 1) // 2
        begin, end = max(0, first - slack), first + count + slack
        before = [self._given(units, begin) for units in self.units]
        number = np.array([self._given(units, end) for units in self.units], np.int64)
        number -= before
        source = np.repeat(np.arange(self.num_sources), number)
        nth = np.arange(len(source)) - np.repeat(np.cumsum(number) - number, number)
        # Time from begin to when sample (before + nth) is due, as a fraction over units[source].
        pairs = zip(self.units, before, strict=True)
        wait = np.array([(2 * b + 1) * (_UNITS >> 1) - u * begin for u, b in pairs], np.int64)
        numerator = wait[source] + nth * _UNITS
        whole, fraction = _exact_order(numerator, self._units[source])
        order = np.lexsort((source, fraction, whole))
        before_S = np.array(before, np.int64)
        source = source[order]
        return first - sum(before), before_S, source, before_S[source] + nth[order]

    @staticmethod
    def _given(units: int, time: int) -> int:
        """Samples due by ``time``: floor(w t + 1/2)."""
        return (2 * units * time + _UNITS) >> (_BITS + 1)


def _exact_order(
    numerator: NDArray[np.int64], denominator: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Whole part and the first 64 fractional bits of fractions whose denominators are <= 2**32.

    Two different fractions differ by at least 2**-64 (the product of two sources' units is below
    2**64), so these keys order fractions exactly and are equal only for equal ones.
    """
    whole, rest = np.divmod(numerator, denominator)
    divisor = denominator.astype(np.uint64)
    high, rest_high = np.divmod(rest.astype(np.uint64) << np.uint64(32), divisor)
    low = (rest_high << np.uint64(32)) // divisor
    return whole, (high << np.uint64(32)) | low


def _quantize(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole units, at least 1 each, that sum to 2**32, by largest remainder."""
    assert 0 < len(weights) < _UNITS
    assert all(math.isfinite(weight) and weight > 0 for weight in weights)
    exact = [Fraction(weight) for weight in weights]
    scale = _UNITS / sum(exact)
    shares = [weight * scale for weight in exact]
    units = [max(1, math.floor(share)) for share in shares]
    missing = _UNITS - sum(units)
    if missing >= 0:
        by_remainder = sorted(range(len(units)), key=lambda s: (units[s] - shares[s], s))
        for s in by_remainder[:missing]:
            units[s] += 1
    else:  # tiny shares were raised to 1: the largest pays
        units[max(range(len(units)), key=lambda s: (units[s], -s))] += missing
    assert sum(units) == _UNITS
    assert min(units) >= 1
    return tuple(units)
