"""The watchdog of one process: state of threads, conditions for a report, output."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from allometry.configs.errors import HUNG
from allometry.configs.execution import ParallelConfig
from allometry.data.prefetch import Prefetcher
from allometry.parallel.rendezvous import Launch
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.watch import place as places
from allometry.trainer.watch.board import Beat, Process
from allometry.trainer.watch.flights import Flight, parse
from allometry.trainer.watch.place import Place, Places, Wait
from allometry.trainer.watch.stragglers import SAMPLES, Stragglers
from allometry.trainer.watch.watchdog import Limits, Watchdog, beat_s

ALONE = Launch(0, 1, 0, None)
SHORT = {"start_s": 1, "first_step_s": 1, "checkpoint_s": 1}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def read_for_ever(request: int) -> int:
    """Disk that does not answer until the test is over."""
    GATE.wait(20)
    return request


GATE = threading.Event()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    GATE.clear()
    yield GATE
    GATE.set()


def test_data_that_does_not_come_is_named_and_ends_the_run(
    folder: RunFolder, gate: threading.Event
) -> None:
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        gate.set()

    begun = time.monotonic()
    parallel = ParallelConfig.model_validate({"timeout_s": 1, "watch": SHORT})
    with Watchdog(parallel, folder, ALONE, end), Prefetcher(read_for_ever, [1]) as ahead:
        assert next(ahead) == 1
    assert codes == [HUNG]
    assert 1.0 < time.monotonic() - begun < 6.0
    (event,) = map(json.loads, folder.events.read_text().splitlines())
    assert (event["event"], event["late"], event["phase"]) == ("hang", [0], "start")
    assert event["work"] == "waiting for data"
    assert "read_for_ever" in event["said"]
    log = folder.log(0).read_text()
    assert event["said"] in log
    assert "read_for_ever" in log.partition("Thread 0x")[2]  # stacks of threads


def test_what_moves_is_left_alone(folder: RunFolder) -> None:
    codes: list[int] = []
    parallel = ParallelConfig.model_validate({"timeout_s": 1, "watch": SHORT})
    with Watchdog(parallel, folder, ALONE, codes.append):
        for _ in range(25):
            time.sleep(0.06)  # 2.5 s in all, at two places
            time.sleep(0.04)
    assert not codes
    assert not folder.events.exists()


def broken() -> None:
    message = "the other rank is gone"
    raise RuntimeError(message)


def test_after_an_error_the_place_is_where_it_was_raised() -> None:
    """Ranks can lose another within a heartbeat, before the watchdog samples them."""
    seen = Places(threading.get_ident())
    with pytest.raises(RuntimeError) as raised:
        broken()
    looks = []

    def look() -> None:
        looks.extend([seen.look(error=raised.value.__traceback__), seen.look()])

    watching = threading.Thread(target=look)
    watching.start()
    watching.join()
    at_error, now = (each.place.where for each in looks)
    assert at_error.endswith("broken")
    assert "broken" not in now


def test_a_slow_read_is_not_a_hang(tmp_path: Path, gate: threading.Event) -> None:
    """While the awaited thread reads data, it makes progress."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)

    def fetch(_: int) -> int:
        with path.open("rb", buffering=0) as file:
            while file.read(1) and not gate.wait(0.01):
                pass
        return 0

    seen = Places(threading.get_ident())
    ahead = Prefetcher(fetch, [0])
    marks: list[object] = []

    def look() -> None:
        for _ in range(5):
            time.sleep(0.1)
            marks.append(seen.look().mark)
        gate.set()

    watching = threading.Thread(target=look)
    watching.start()
    next(ahead)
    watching.join()
    ahead.close()
    assert len(set(marks)) == 5


@pytest.mark.parametrize(
    ("place", "first", "limit"),
    [
        (Place(places.START), True, 100.0),
        (Place(places.START, work="loading", busy=True), True, 100.0),
        (Place(places.START, work="loading", wait=Wait("all_reduce", "host", (0, 1))), True, 10.0),
        (Place(places.STEP), True, 200.0),
        (Place(places.STEP), False, 10.0),
        (Place(places.STEP, compiles=True), False, 200.0),
        (Place(places.EVALUATION), False, 10.0),
        (Place(places.CHECKPOINT), False, 300.0),
        (Place(places.CHECKPOINT, work="saving", busy=True), False, 300.0),
        (Place(places.CHECKPOINT, wait=Wait("all_reduce", "hdp", (0, 1))), False, 10.0),
        (Place(places.END), False, 100.0),
    ],
)
def test_each_phase_has_its_limit(place: Place, first: bool, limit: float) -> None:
    watch = {"start_s": 100, "first_step_s": 200, "checkpoint_s": 300}
    limits = Limits.of(ParallelConfig.model_validate({"timeout_s": 10, "watch": watch}))
    assert limits.at(place, first=first) == limit


def test_heartbeats_are_fewer_where_thousands_share_a_store() -> None:
    assert beat_s(600.0, 2) == 0.5
    assert beat_s(600.0, 16384) == 8.0
    assert beat_s(2.0, 2) == 0.25


def test_messages_under_way_are_read_from_torch_s_record() -> None:
    entry = {
        "process_group": ["3", "tp"],
        "profiling_name": "nccl:all_gather",
        "state": "started",
        "retired": False,
        "collective_seq_id": 12,
        "p2p_seq_id": 0,
        "is_p2p": False,
    }
    done = entry | {"state": "completed", "collective_seq_id": 11}
    sent = entry | {"profiling_name": "nccl:send 1->2", "is_p2p": True, "p2p_seq_id": 4}
    record = {"entries": [done, entry | {"retired": True}, entry, sent]}
    assert parse(record, on_device=True) == [
        Flight("3", "tp", "all_gather", 12, True),
        Flight("3", "tp", "send", 4, True, 2),
    ]


def beats(number: int, step: int, waiting: dict[int, int], stage: int = 0) -> dict[int, Beat]:
    """Return each rank's beat after ``number`` windows with ``waiting`` waits each."""
    return {
        rank: Beat(
            number,
            Process("node", rank, "0"),
            Place(places.STEP, step),
            stage=stage,
            samples=number * SAMPLES,
            waiting=number * waited,
        )
        for rank, waited in waiting.items()
    }


def test_a_rank_that_waits_less_than_its_peers_is_a_straggler() -> None:
    found = Stragglers(20)
    for number in range(4):
        found.see(beats(number, 10 * number, {0: 75, 1: 0, 2: 75, 3: 75}))
    assert [(kind, f["rank"], f["since_step"]) for kind, f in found.events] == [("straggler", 1, 1)]
    assert found.slowest is not None
    assert (found.slowest.rank, found.slowest.percent) == (1, 100.0)
    last = beats(3, 30, {0: 75, 1: 0, 2: 75, 3: 75})
    even = {
        rank: replace(
            beat,
            number=4,
            place=Place(places.STEP, 40),
            samples=beat.samples + SAMPLES,
            waiting=beat.waiting + 40,
        )
        for rank, beat in last.items()
    }
    found.see(even)
    assert found.events[-1] == ("straggler_ended", {"rank": 1, "step": 40})


def test_chance_and_other_stages_make_no_straggler() -> None:
    found = Stragglers(20)
    for number in range(5):
        found.see(beats(number, number, {0: 75, 1: 65, 2: 80, 3: 70}))  # within random variation
    assert not found.events
    staged = Stragglers(20)
    for number in range(5):  # the stages of a pipeline have different work
        staged.see(beats(number, number, {0: 0}) | beats(number, number, {1: 100}, stage=1))
    assert not staged.events
    assert staged.slowest is None
