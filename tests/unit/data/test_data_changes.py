"""Changing mixtures: replay in steps and ramps, edits during a run, at any position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from allometry.configs.data import SequenceData
from allometry.configs.errors import UserError
from allometry.data.changes import STAIRS, Change, ChangingMixture, check_sum, declared, followed
from allometry.data.mixture import Mixture
from plain_mixture import plain_samples

NAMES = ("a", "b", "c", "d")
LENGTH = 10
WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.sampled_from([1.0, 2.0, 0.5]), st.floats(1e-6, 1e6)),
    min_size=4,
    max_size=4,
).filter(any)


def shares(weights: list[float]) -> dict[str, float]:
    return dict(zip(NAMES, Mixture(weights).shares, strict=True))


def changes_of(weights: list[list[float]], lengths: list[int]) -> list[Change]:
    starts = np.cumsum([0, *lengths]).tolist()
    return [Change(start, shares(one), LENGTH) for start, one in zip(starts, weights, strict=False)]


@st.composite
def changing(draw: st.DrawFn) -> list[Change]:
    weights = draw(st.lists(WEIGHTS, min_size=1, max_size=6))
    number = len(weights) - 1
    return changes_of(weights, draw(st.lists(st.integers(1, 30), min_size=number, max_size=number)))


def config(replay: dict[str, Any] | None = None, **weights: float) -> SequenceData:
    sources = [{"name": name, "train": name, "weight": w} for name, w in weights.items()]
    return SequenceData.model_validate(
        {"sequence_length": LENGTH, "sources": sources, "replay": replay}
    )


@settings(max_examples=120)
@given(changing(), st.integers(1, 40), st.integers(1, 25))
def test_the_schedule_is_the_definition_at_any_position(
    changes: list[Change], beyond: int, step: int
) -> None:
    total = changes[-1].position + beyond
    plain = plain_samples([(c.position, c.shares) for c in changes], NAMES, total)
    mixture = ChangingMixture(changes, NAMES)
    for position in range(0, total, step):
        count = min(step, total - position)
        source, index = mixture.sources(position, count)
        found = [(NAMES[s], i) for s, i in zip(source.tolist(), index.tolist(), strict=True)]
        assert found == plain[position : position + count]
        counts = [sum(name == one for one, _ in plain[:position]) for name in NAMES]
        assert mixture.counts(position).tolist() == counts


@settings(max_examples=120)
@given(changing(), st.integers(1, 3000))
def test_counts_stay_near_the_sum_of_the_shares(changes: list[Change], beyond: int) -> None:
    """For any number of changes; a stopped source transfers its deficit."""
    changes = [c for c in changes if all(c.shares.values())] or [
        Change(0, shares([1.0] * 4), LENGTH)
    ]
    changes[0] = Change(0, changes[0].shares, LENGTH)
    total = changes[-1].position + beyond
    counts = ChangingMixture(changes, NAMES).counts(total).tolist()
    ends = [c.position for c in changes[1:]] + [total]
    for name, count in zip(NAMES, counts, strict=True):
        spans = zip(changes, ends, strict=True)
        wanted = sum(c.shares[name] * (end - c.position) for c, end in spans)
        assert abs(count - wanted) <= len(NAMES)


def test_a_source_that_stops_gives_nothing_more() -> None:
    changes = [Change(k, shares([1.0, 0.3, 0.2, 0.0]), LENGTH) for k in (0,)]
    for position in range(1, 60, 7):
        stop = Change(position, shares([0.0, 1.0, 1.0, 1.0]), LENGTH)
        source, _ = ChangingMixture([*changes, stop], NAMES).sources(position, 200)
        assert 0 not in source


def test_far_positions_cost_no_more() -> None:
    mixture = ChangingMixture(
        [Change(0, shares([1, 1, 1, 1]), LENGTH), Change(10**12, shares([3, 1, 0, 0]), LENGTH)],
        NAMES,
    )
    far = mixture.counts(2 * 10**12) - mixture.counts(10**12)
    assert far.tolist() == [750_000_000_000, 250_000_000_000, 0, 0]
    source, index = mixture.sources(10**12 - 4, 8)
    assert source.tolist() == [0, 1, 2, 3, 0, 0, 1, 0]
    assert index.tolist()[:5] == [250_000_000_000 - 1] * 4 + [250_000_000_000]


@settings(max_examples=100)
@given(changing(), changing(), st.integers(0, 120), st.integers(0, 60))
def test_an_edit_keeps_the_past_and_resumes_change_nothing(
    past: list[Change], wanted: list[Change], position: int, later: int
) -> None:
    edited = followed(past, wanted, position)
    before, after = ChangingMixture(past, NAMES), ChangingMixture(edited, NAMES)
    np.testing.assert_array_equal(before.sources(0, position), after.sources(0, position))
    assert after.shares(position) == ChangingMixture(wanted, NAMES).shares(position)
    # A later resume with the same file, or without an edit, changes nothing.
    assert followed(edited, wanted, position + later) == edited
    once = followed(past, past, 0)
    assert followed(once, once, position) == once


def test_an_edit_may_order_and_add_sources() -> None:
    past = declared(config(a=1, b=1))
    edited = followed(past, declared(config(c=2, b=1, a=1)), 7)
    old, new = ChangingMixture(past, ("a", "b")), ChangingMixture(edited, ("c", "b", "a"))
    assert [("a", "b")[s] for s in old.sources(0, 7)[0]] == [
        ("c", "b", "a")[s] for s in new.sources(0, 7)[0]
    ]
    assert new.counts(407)[0] == 200
    # A different order of sources is not a change.
    assert followed(past, declared(config(b=1, a=1)), 7) == past


def test_replay_is_a_share_whatever_the_weights() -> None:
    (only,) = declared(config({"ratio": 0.25, "sources": ["b", "c"]}, a=7, b=3, c=1, d=1))
    assert sum(only.shares.values()) == 1.0
    expected = {"a": 0.75 * 7 / 8, "b": 0.25 * 3 / 4, "c": 0.25 / 4, "d": 0.75 / 8}
    assert dict(only.shares) == pytest.approx(expected, abs=1e-8)


def test_replay_in_steps_and_ramps() -> None:
    replay = {
        "ratio": 0.5,
        "sources": ["b"],
        "changes": [
            {"after_tokens": 1000, "ratio": 0.1},
            {"after_tokens": 20_005, "ratio": 0.9, "over_tokens": 40_000},
        ],
    }
    changes = declared(config(replay, a=1, b=1))
    assert len(changes) == 2 + STAIRS + 1
    assert changes[1] == Change(100, changes[1].shares, LENGTH)
    mixture = ChangingMixture(changes, ("a", "b"))
    assert mixture.shares(99)["b"] == 0.5
    assert mixture.shares(100)["b"] == pytest.approx(0.1)
    assert mixture.shares(2000)["b"] == pytest.approx(0.1)  # 20,000 tokens: before the change
    assert mixture.shares(4001)["b"] == pytest.approx(0.5, abs=0.8 / STAIRS)
    assert mixture.shares(6001)["b"] == pytest.approx(0.9)
    ramp = mixture.counts(6001) - mixture.counts(2001)
    assert ramp[1] == pytest.approx(4000 * 0.5, abs=4)
    # Counts are not rounded between steps of a ramp.
    assert mixture.counts(2001)[1] == pytest.approx(50 + 1901 * 0.1, abs=1)


def test_a_ramp_shorter_than_its_stairs() -> None:
    change = {"after_tokens": 20, "ratio": 1.0, "over_tokens": 30}
    changes = declared(config({"ratio": 0.0, "sources": ["b"], "changes": [change]}, a=1, b=1))
    mixture = ChangingMixture(changes, ("a", "b"))
    found = [mixture.shares(position)["b"] for position in range(7)]
    assert found == pytest.approx([0, 0, 1 / 6, 3 / 6, 5 / 6, 1, 1], abs=1e-8)
    assert mixture.counts(5).tolist() == pytest.approx([3.5, 1.5], abs=1)


@pytest.mark.parametrize(
    ("replay", "weights", "said"),
    [
        ({"ratio": 1.5, "sources": ["b"]}, {"a": 1, "b": 1}, "less than or equal to 1"),
        ({"ratio": -0.1, "sources": ["b"]}, {"a": 1, "b": 1}, "greater than or equal to 0"),
        ({"ratio": 0.1, "sources": ["x"]}, {"a": 1, "b": 1}, "names 'x', which is none of"),
        ({"ratio": 0.1, "sources": ["b", "b"]}, {"a": 1, "b": 1}, "names 'b' twice"),
        ({"ratio": 0.1, "sources": []}, {"a": 1, "b": 1}, "at least 1 item"),
        ({"ratio": 0.1, "sources": ["b"]}, {"a": 1, "b": 0}, "whose weights are all 0"),
        ({"ratio": 0.1, "sources": ["b", "a"]}, {"a": 1, "b": 1}, "leaves 0.9 of the samples"),
        (None, {"a": -1, "b": 1}, "greater than or equal to 0"),
        (None, {"a": 0, "b": 0}, "every source has weight 0"),
        (
            {
                "ratio": 0.1,
                "sources": ["b"],
                "changes": [
                    {"after_tokens": 100, "ratio": 0.2, "over_tokens": 50},
                    {"after_tokens": 149, "ratio": 0.2},
                ],
            },
            {"a": 1, "b": 1},
            "after_tokens=149 is before 150",
        ),
    ],
)
def test_what_cannot_be_mixed(
    replay: dict[str, Any] | None, weights: dict[str, float], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        config(replay, **weights)


@pytest.mark.parametrize("weights", [(0.7, 0.2), (0.8, 0.3), (0.5, 0.2, 0.1)])
def test_shares_that_do_not_sum_are_refused(weights: tuple[float, ...]) -> None:
    named = dict(zip(NAMES, weights, strict=False))
    with pytest.raises(UserError, match=r"sum to [0-9.]+ and not to 1"):
        check_sum(config(**named))


@pytest.mark.parametrize("weights", [(7, 2), (0.33, 0.33, 0.33), (1, 0.1), (0.7, 0.3), (0.4,)])
def test_weights_that_are_meant_are_not(weights: tuple[float, ...]) -> None:
    check_sum(config(**dict(zip(NAMES, weights, strict=False))))
    check_sum(config({"ratio": 0.5, "sources": ["a"]}, a=0.5, b=0.3))  # relative in both cases
