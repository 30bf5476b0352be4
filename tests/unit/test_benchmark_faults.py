"""The fault campaign: known faults, criteria to pass, and the effective time."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(ROOT))
    import effective_time
    import fault_kinds
    import fault_launch
    import faults

    return SimpleNamespace(
        faults=faults, kinds=fault_kinds, launch=fault_launch, time=effective_time
    )


def done(fault: str, **changes: Any) -> dict[str, Any]:
    """Return the result of a case that passed."""
    keys = ("code", "orphans", "steps_lost", "rows_differ", "tensors_differ", "healed", "refused")
    return {"fault": fault, "restarts": 1, "felt": 0, **dict.fromkeys(keys, 0), **changes}


def test_a_case_passes_only_where_the_fault_was_felt_and_nothing_differs(
    modules: SimpleNamespace,
) -> None:
    passed = modules.faults.passed
    assert passed(done("kill"))
    assert not passed(done("kill", restarts=0))
    assert passed(done("launcher", restarts=0))
    for key in ("code", "orphans", "steps_lost", "rows_differ", "tensors_differ"):
        assert not passed(done("stop", **{key: 1})), key
    for fault in ("nan", "disk-full"):
        assert not passed(done(fault, restarts=0)), "it was not felt"
        assert passed(done(fault, restarts=0, felt=1))
        assert not passed(done(fault, restarts=1, felt=1))
    assert not passed(done("corrupt-read", felt=1)), "silent"
    assert passed(done("corrupt-read", felt=1, healed=1))
    assert passed(done("corrupt-read", felt=1, refused=1))


def test_what_a_machine_lacks_is_said(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = modules.kinds.FAULTS
    monkeypatch.setattr(modules.kinds.os, "geteuid", lambda: 1000)
    assert faults["disk-full"].lacking() == "the right to mount a tmpfs (root)"
    monkeypatch.setattr(modules.kinds.shutil, "which", lambda name: None)
    assert faults["corrupt-read"].lacking() == "a C compiler (cc)"
    assert faults["kill"].lacking() is None


def test_a_nan_is_compared_with_a_run_that_passes_the_batch_over(modules: SimpleNamespace) -> None:
    disturbed, straight = modules.kinds.FAULTS["nan"].overrides(7)
    assert disturbed == ("training.bad_steps={}",)
    assert straight == ("training.skip_steps=[7]",)
    assert modules.kinds.FAULTS["kill"].overrides(7) == ((), ())


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_reads_of_shards_alone_go_wrong_and_only_those_named(
    modules: SimpleNamespace, tmp_path: Path
) -> None:
    library, struck = modules.launch.shim(tmp_path), tmp_path / "struck"
    for name in ("__0_0.distcp", "other"):
        (tmp_path / name).write_bytes(bytes(1000))
    script = (
        f"import os; print([open(r'{tmp_path}/' + n, 'rb').read() == bytes(1000) "
        "for n in ('other', '__0_0.distcp', '__0_0.distcp', '__0_0.distcp')])"
    )

    def right(rank: str) -> str:
        environment = {"LD_PRELOAD": str(library), "RANK": rank, "FAULT_READS": f"1 2 2 {struck}"}
        return subprocess.run(
            [sys.executable, "-S", "-c", script], env=environment, capture_output=True, text=True
        ).stdout.strip()

    assert right("0") == "[True, True, True, True]"
    assert not struck.exists()
    assert right("1") == "[True, True, False, True]"
    assert struck.read_text() == "read 2 of 1000 bytes\n"


def test_effective_time_of_cases_that_are_known(modules: SimpleNamespace) -> None:
    time: ModuleType = modules.time
    free = time.Way(stall_s=0.0, write_s=0.0, load_s=0.0, every_s=1.0)
    mean = time.mtbf_s()
    assert mean == pytest.approx(11135, abs=1)
    # Only restarts cost time: the remaining share of each period, E[max(0, x - r)] / E[x].
    found = time.effective(free, None, 600.0, 0.0, 100)["mean"]
    assert found == pytest.approx(2.718281828 ** (-600.0 / mean), abs=2e-3)
    # Stalls take their share, and half an interval is lost with each failure.
    slow = time.Way(stall_s=10.0, write_s=0.0, load_s=0.0, every_s=490.0)
    found = time.effective(slow, None, 0.0, 0.0, 100)["mean"]
    assert found == pytest.approx(0.98 * (1 - 245 / mean), abs=3e-3)


def test_loading_and_writing_cost_and_a_restart_reaches_a_goal(modules: SimpleNamespace) -> None:
    time: ModuleType = modules.time
    near = time.Way(stall_s=0.1, write_s=2.0, load_s=1.0, every_s=50.0)
    far = time.Way(stall_s=0.1, write_s=50.0, load_s=50.0, every_s=60.0)

    def mean(one: Any, other: Any, restart_s: float = 10.0, lost: float = 0.02) -> float:
        found: float = time.effective(one, other, restart_s, lost, 60)["mean"]
        return found

    assert mean(near, far) > mean(far, None)
    assert mean(near, far, lost=0.0) > mean(near, far, lost=1.0)
    longest = time.restart_for(0.99, near, far, 0.02, 60)
    assert mean(near, far, longest - 2) >= 0.99 > mean(near, far, longest + 2)
    assert time.restart_for(0.99, time.Way(50.0, 0.0, 0.0, 50.0), None, 0.0, 20) == 0.0


def test_a_run_is_the_same_each_time_it_is_played(modules: SimpleNamespace) -> None:
    one = modules.time.Way(0.1, 2.0, 1.0, 50.0)
    shares = [modules.time.played(one, None, 11.0, 0.0, random.Random(4)) for _ in range(2)]
    assert shares[0] == shares[1]
    assert 0.98 < shares[0] < 1.0


def test_a_slow_rank_is_felt_where_it_alone_is_named(
    modules: SimpleNamespace, tmp_path: Path
) -> None:
    fault, folder = modules.kinds.FAULTS["slow-rank"], tmp_path / "run"
    folder.mkdir()
    folder.with_suffix(".log").write_text("")
    folder.with_suffix(".struck").write_text("1")
    assert fault.felt(folder) == 0
    named = folder / "events.jsonl"
    named.write_text('{"event": "straggler", "rank": 1}\n')
    assert fault.felt(folder) == 1
    with named.open("a") as file:
        file.write('{"event": "straggler", "rank": 0}\n')
    assert fault.felt(folder) == 0
