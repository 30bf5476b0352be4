"""The late rank among ranks that report their places: on every axis, and with missing ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from allometry.trainer.watch.board import Beat, Process
from allometry.trainer.watch.place import Place, Wait
from allometry.trainer.watch.verdict import Report, judge, numbers
from allometry.trainer.watch.watchdog import _ranks_of

HERE = Process("node0", 17, "4711")


def report(wait: Wait | None = None, step: int = 7, stuck_s: float = 9.0, **more: Any) -> Report:
    """Return the report of a rank that answers; without ``wait`` it is in its own work."""
    place = Place("step", step, 1, where="parallel/reduce.py:1 f", wait=wait, **more)
    return Report(Beat(5, HERE, place, stuck_s))


def over(axis: str, *ranks: int, peer: int | None = None, number: int | None = None) -> Wait:
    return Wait("all_reduce", axis, ranks, peer, number)


def silent(fate: str | None, wait: Wait | None = None) -> Report:
    return replace(report(wait), silent=True, fate=fate)


@pytest.mark.parametrize("axis", ["hdp", "tp", "ep", "pp", "checkpoint", "host"])
def test_the_rank_that_does_not_come_is_late(axis: str) -> None:
    waits = over(axis, 0, 1, 2)
    found = judge({0: report(waits), 1: report(), 2: report(waits)})
    assert (found.late, found.waiting, found.place.wait) == ((1,), (0, 2), waits)
    facts = found.facts()
    expected = {"late": [1], "axis": axis, "operation": "all_reduce", "step": 7, "micro_batch": 1}
    assert expected.items() <= facts.items()
    assert f"rank 0,2 has waited 9 s for it in all_reduce over {axis}" in found.sentence


def test_who_waits_for_one_that_waits_is_not_late() -> None:
    """Rank 3 is in its own work; 2 waits for it over tp, 0 and 1 for 2 and 3 over hdp."""
    found = judge(
        {
            0: report(over("hdp", 0, 2)),
            1: report(over("hdp", 1, 3)),
            2: report(over("tp", 2, 3)),
            3: report(),
        }
    )
    assert found.late == (3,)
    assert found.waiting == (1, 2)


def test_a_pipeline_waits_for_its_stopped_stage() -> None:
    ranks = {rank: report(over("pp", 0, 1, 2, 3, peer=rank - 1)) for rank in (2, 3)}
    ranks[0] = report(over("pp", 0, 1, 2, 3, peer=1))
    ranks[1] = silent("is stopped", over("pp", 0, 1, 2, 3, peer=0))
    found = judge(ranks)
    assert found.late == (1,)
    assert found.waiting == (0, 2)
    assert "rank 1 is stopped (process 17 on node0)" in found.sentence


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (silent("died"), "rank 1 died (process 17 on node0); it was last seen in step 7"),
        (silent(None), "rank 1 sends no heartbeats"),
        (Report(None), "rank 1 has not come: it has sent no heartbeat since the start"),
        (
            Report(replace(report().beat, ended="OutOfMemoryError: 3 GiB")),  # type: ignore[type-var]
            "rank 1 has ended (OutOfMemoryError: 3 GiB)",
        ),
    ],
)
def test_a_rank_that_is_gone_is_told_from_one_that_hangs(lost: Report, said: str) -> None:
    found = judge({0: report(over("hdp", 0, 1)), 1: lost})
    assert found.late == (1,)
    assert found.sentence.startswith(said)
    assert lost.lost == (lost.fate == "died" or "ended" in said)


def test_of_ranks_that_wait_for_one_another_the_one_behind_is_late() -> None:
    found = judge({0: report(over("tp", 0, 1)), 1: report(over("hdp", 0, 1), step=6)})
    assert found.late == (1,)
    numbered = {
        0: report(over("hdp", 0, 1, number=58)),
        1: report(over("hdp", 0, 1, number=57)),
    }
    assert judge(numbered).late == (1,)
    even = judge({0: report(over("tp", 0, 1)), 1: report(over("hdp", 0, 1))})
    assert even.late == ()


def test_a_message_that_all_have_come_to_has_no_late_rank() -> None:
    found = judge({rank: report(over("hdp", 0, 1)) for rank in (0, 1)})
    assert found.late == ()
    assert found.waiting == (0, 1)
    assert "all have come: the network or a device does not answer" in found.sentence


def test_a_rank_that_nobody_waits_for_yet_is_late_itself() -> None:
    found = judge({0: report(stuck_s=1.0), 1: report(stuck_s=9.0)})
    assert found.late == (1,)
    assert found.sentence.endswith("and has been there for 9 s")


def test_slow_work_that_others_meet_for_is_named() -> None:
    meeting = report(over("host", 0, 1), work="loading step-5")
    found = judge({0: meeting, 1: report(work="loading step-5", busy=True)})
    assert found.late == (1,)
    assert found.facts()["work"] == "loading step-5"
    assert "at 'loading step-5'" in found.sentence


def test_ranks_that_did_the_same_share_a_line() -> None:
    waits = over("hdp", *range(6))
    found = judge({rank: report(waits) if rank != 4 else report() for rank in range(6)})
    assert [line["ranks"] for line in found.facts()["ranks"]] == ["0-3,5", "4"]


@pytest.mark.parametrize("text", ["0", "0-3", "1,3", "0-2,4-5,9"])
def test_ranks_in_words_are_read_back(text: str) -> None:
    assert numbers(_ranks_of(text)) == text


def test_beats_are_read_back() -> None:
    place = Place("step", 3, 0, "blocks.1", "f.py:1 f", over("hdp", 0, 1, peer=1, number=4))
    beat = Beat(3, HERE, place, 1.5, 1, 100, 40, 0.25, "")
    assert Beat.load(beat.dump()) == beat
    assert Beat.load(replace(beat, place=Place("start")).dump()).place == Place("start")
