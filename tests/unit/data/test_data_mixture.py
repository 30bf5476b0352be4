from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from allometry.data.mixture import Mixture, _exact_order

WEIGHTS = st.lists(
    st.one_of(
        st.floats(1e-12, 1e12),
        st.sampled_from([0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0]),
    ),
    min_size=1,
    max_size=9,
)
POSITIONS = st.one_of(st.integers(0, 200), st.integers(0, 10**12))


def plain_schedule(units: tuple[int, ...], count: int) -> list[tuple[int, int]]:
    """Reference: sort samples by due time, as exact fractions."""
    due = []
    for source, unit in enumerate(units):
        for j in range(count + len(units)):
            due.append((Fraction((2 * j + 1) << 31, unit), source, j))
            if due[-1][0] > count + len(units):
                break
    due.sort()
    return [(source, j) for _, source, j in due[:count]]


@settings(max_examples=60)
@given(WEIGHTS)
def test_schedule_is_the_order_of_due_times(weights: list[float]) -> None:
    mixture = Mixture(weights)
    source, index = mixture.sources(0, 120)
    assert list(zip(source.tolist(), index.tolist(), strict=True)) == plain_schedule(
        mixture.units, 120
    )


@settings(max_examples=150)
@given(WEIGHTS, POSITIONS, st.integers(1, 50))
def test_random_access_agrees_with_itself(weights: list[float], position: int, count: int) -> None:
    mixture = Mixture(weights)
    source, index = mixture.sources(position, count)
    counts = mixture.counts(position)
    assert counts.sum() == position
    for k in range(count):
        assert mixture.source(position + k) == (source[k], index[k])
        assert index[k] == counts[source[k]]
        after = mixture.counts(position + k + 1)
        expected = counts.copy()
        expected[source[k]] += 1
        np.testing.assert_array_equal(after, expected)
        counts = after


@settings(max_examples=150)
@given(WEIGHTS, POSITIONS)
def test_counts_stay_near_their_shares(weights: list[float], position: int) -> None:
    mixture = Mixture(weights)
    for units, count in zip(mixture.units, mixture.counts(position).tolist(), strict=True):
        assert abs(count - Fraction(units, 2**32) * position) <= Fraction(len(weights) + 1, 2)


@settings(max_examples=60)
@given(WEIGHTS)
def test_shares_are_the_weights(weights: list[float]) -> None:
    shares = Mixture(weights).shares
    assert sum(shares) == 1.0
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - weight / sum(weights)) <= (len(weights) + 1) * 2.0**-32


def test_exact_at_a_trillion() -> None:
    mixture = Mixture([0.75, 0.25])
    assert mixture.counts(10**12).tolist() == [750_000_000_000, 250_000_000_000]
    assert [mixture.source(10**12 + k)[0] for k in range(8)] == [0, 0, 1, 0, 0, 0, 1, 0]
    assert mixture.source(10**12 + 2) == (1, 250_000_000_000)


def test_ties_go_to_the_first_source() -> None:
    assert Mixture([1.0, 1.0, 1.0]).sources(0, 6)[0].tolist()[::3] == [0, 0]
    assert Mixture([5.0]).source(7) == (0, 7)


def test_large_batches_equal_small_ones() -> None:
    mixture = Mixture([3.0, 1.0, 0.2])
    source, index = mixture.sources(12345, 10_000)
    parts = [mixture.sources(12345 + k, 100) for k in range(0, 10_000, 100)]
    np.testing.assert_array_equal(source, np.concatenate([part[0] for part in parts]))
    np.testing.assert_array_equal(index, np.concatenate([part[1] for part in parts]))


def test_change_of_weights_in_mid_run_continues_the_counts() -> None:
    before = Mixture([3.0, 1.0])
    after = before.continued([1.0, 3.0], 1001)
    np.testing.assert_array_equal(after.counts(1001), before.counts(1001))
    np.testing.assert_array_equal(after.counts(1401) - after.counts(1001), [100, 300])
    source, index = after.sources(1001, 50)
    for s in (0, 1):
        mine = index[source == s]
        assert mine.tolist() == list(range(int(before.counts(1001)[s]), int(mine[-1]) + 1))
    with pytest.raises(AssertionError):
        after.source(1000)


@settings(max_examples=200)
@given(
    st.tuples(st.integers(0, 2**40), st.integers(1, 2**31)),
    st.tuples(st.integers(0, 2**40), st.integers(1, 2**31)),
    st.booleans(),
)
def test_keys_order_fractions_exactly(a: tuple[int, int], b: tuple[int, int], near: bool) -> None:
    if near:  # the hardest case: as close as the denominators allow
        b = (a[0] * b[1] // a[1] + 1, b[1])
    assume(b[0] < 2**63)  # numerators are int64: below 2**62 for the largest allowed call
    whole, fraction = _exact_order(np.array([a[0], b[0]]), np.array([a[1], b[1]]))
    keys = list(zip(whole.tolist(), fraction.tolist(), strict=True))
    exact = [Fraction(*a), Fraction(*b)]
    assert (keys[0] < keys[1]) == (exact[0] < exact[1])
    assert (keys[0] == keys[1]) == (exact[0] == exact[1])
