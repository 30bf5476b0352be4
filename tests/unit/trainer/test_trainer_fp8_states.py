"""Runs with optimizer states in FP8 learn, resume bitwise, branch from fp32, and record it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.execution import MonitorConfig, ParallelConfig
from allometry.configs.run import RunConfig
from allometry.optim.fp8_states import Fp8States
from allometry.parallel.mesh import open_mesh
from allometry.trainer import restore
from allometry.trainer.record.states import CompressedStates
from allometry.trainer.state import checkpoint, states
from allometry.trainer.state.states import load
from allometry.trainer.train import train
from rule_groups import give, optimizer, weights
from run_folders import events, rows

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
FP8 = "optimizer.states.kind=fp8"
RANDOM = "optimizer.states.rounding=stochastic"
KINDS: dict[str, list[str]] = {
    "adamw": [],
    "adamw at random": [RANDOM],
    "muon at random": ["optimizer.kind=muon", "optimizer.lr=0.01", RANDOM],
    "muonh": ["optimizer.kind=muonh", "optimizer.lr=0.03", "optimizer.adamw_lr=0.01"],
    "adamh": ["optimizer.kind=adamh", "optimizer.lr=0.03", "optimizer.adamw_lr=0.01"],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(config: RunConfig, **options: Any) -> Path:
    train(config, device=CPU, callbacks=[], **options)
    return Path(config.run.folder)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] if kind in ("adamw", "adamh") else [])
        for kind in KINDS
    ],
)
def test_it_learns_and_two_resumes_are_bit_exact(tiny: Make, tmp_path: Path, kind: str) -> None:
    said = [FP8, *KINDS[kind]]
    straight = losses(run(tiny(*said, folder=tmp_path / "straight")))
    parts = tiny(*said, folder=tmp_path / "parts")
    run(parts, stop_at_step=7)
    run(parts, stop_at_step=12)
    assert losses(run(parts)) == straight
    plain = [each for each in KINDS[kind] if each != RANDOM]
    other = losses(run(tiny(*plain, folder=tmp_path / "plain")))
    assert other[1:] != straight[1:], "the comparison can fail"
    assert straight == pytest.approx(other, rel=0.02)
    assert straight[-1] < 0.8 * straight[0], "it learns to count"


def test_a_resume_that_changes_a_state_is_seen(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal losses imply equal states: here one row of one state differs in its last place."""
    said = [FP8, "training.total_steps=8"]
    straight = losses(run(tiny(*said, folder=tmp_path / "straight")))
    run(tiny(*said, folder=tmp_path / "parts"), stop_at_step=4)

    def changed(path: Path, state: Any, *others: Any) -> Any:
        found = load(path, state, *others)
        name = next(n for n in sorted(state) if n.endswith(f".wv.weight.exp_avg_sq.{part}"))
        row = state[name][0]
        if part == "scale":
            row.copy_(torch.nextafter(row, 2 * row))
        else:
            row.view(torch.uint8).sub_(1)
        return found

    monkeypatch.setattr(restore, "load", changed)
    for part in ("q", "scale", "exponent"):
        shutil.copytree(tmp_path / "parts", tmp_path / part)
        resumed = losses(run(tiny(*said, folder=tmp_path / part)))
        assert len(resumed) == 8
        assert resumed[:4] == straight[:4]
        assert resumed[4:] != straight[4:]


def test_what_rounding_does_is_recorded_and_changes_nothing(tiny: Make, tmp_path: Path) -> None:
    watched = rows(run(tiny(FP8, "record.monitors.every_steps=4", folder=tmp_path / "watched")))
    plain = rows(run(tiny(FP8, "record.monitors.every_steps=null", folder=tmp_path / "plain")))
    assert [row["loss"] for row in watched] == [row["loss"] for row in plain]
    for row in watched:
        seen = {k: v for k, v in row.items() if k.startswith("monitors/state_")}
        assert bool(seen) == (row["step"] % 4 == 0)
        for key, value in seen.items():
            name, role, state = key.removeprefix("monitors/state_").split("/")
            assert role != "vector"
            assert state in ("exp_avg", "exp_avg_sq")
            if name == "error":
                assert 0.001 < value < 0.05, key
            elif name == "saturated_percent":
                assert 100 / 128 < value < 20, key
            else:
                assert value == 0.0, key
    facts = json.loads((tmp_path / "watched" / "run.json").read_text())["optimizer_states"]
    assert facts["kind"] == "fp8"
    assert facts["bytes"] < 0.4 * (facts["bytes"] + facts["bytes_saved"])


def test_a_run_may_not_change_how_it_keeps_states(tiny: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(tiny(folder=folder), stop_at_step=5)
    with pytest.raises(UserError, match=r"optimizer\.states\.kind='fp8' differs from 'fp32'") as no:
        run(tiny(FP8, folder=folder))
    assert "\n" not in str(no.value)
    assert len(rows(folder)) == 5


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ([], [FP8], "fp32 -> fp8"),
        ([FP8], [], "fp8 -> fp32"),
        (["optimizer.kind=muon"], ["optimizer.kind=muon", FP8, RANDOM], "fp32 -> fp8"),
        (["optimizer.kind=muon", FP8], ["optimizer.kind=muon", FP8, RANDOM], None),
    ],
)
def test_a_branch_may(
    tiny: Make, tmp_path: Path, before: list[str], after: list[str], change: str | None
) -> None:
    parent = run(tiny(*before, "checkpoint.keep_steps=[10]", folder=tmp_path / "parent"))
    said = [f"run.parent={{folder: {parent}, step: 10, changes: [optimizer.states]}}", *after]
    branch = tmp_path / "branch"
    run(tiny(*said, folder=branch), stop_at_step=12)  # before its first own checkpoint
    run(tiny(*said, folder=branch))
    told = [event for event in events(branch) if event["event"] == "states_converted"]
    assert [event["change"] for event in told] == ([change] if change else [])
    assert all(event["step"] == 10 and event["states"] > 10 for event in told)
    found, wanted = losses(branch), losses(parent)
    assert found[:11] == wanted[:11]
    assert found[11:] != wanted[11:]
    assert found[11:] == pytest.approx(wanted[11:], rel=0.02)


def test_states_are_converted_some_at_a_time(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["training.total_steps=6", "checkpoint.keep_steps=[4]"]
    parent = run(tiny(*said, folder=tmp_path / "parent"))
    inner, loads = checkpoint.load, [0]

    def counted(*given: Any) -> None:
        loads[0] += 1
        inner(*given)

    monkeypatch.setattr(checkpoint, "load", counted)
    found = []
    for name, most in (("at once", 1 << 30), ("each alone", 1), ("some", 20_000)):
        monkeypatch.setattr(states, "READ_BYTES", most)
        loads[0] = 0
        start = f"run.parent={{folder: {parent}, step: 4, changes: [optimizer.states]}}"
        folder = run(tiny(*said[:1], start, FP8, folder=tmp_path / name))
        (told,) = (event for event in events(folder) if event["event"] == "states_converted")
        found.append((loads[0], told["states"], losses(folder)))
    assert found[0][1:] == found[1][1:] == found[2][1:]
    assert found[0][0] == 2
    assert found[1][0] == 1 + found[1][1]
    assert 2 < found[2][0] < found[1][0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_state_that_is_not_finite_is_an_event(bad: float) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    parameters = weights({"a": (8, 200), "b": (4, 128)})
    fp8 = Fp8States("nearest", 0)
    made = optimizer("adamw", parameters, fp8=fp8, role="hidden")
    with open_mesh(ParallelConfig(), CPU) as mesh:
        callback = CompressedStates(
            MonitorConfig(every_steps=1),
            *(made, fp8, mesh),
            lambda event, **details: told.append((event, details)),
        )
        for step in (1, 2, 3):
            give(parameters, step)
            grad = parameters["a"].grad
            assert grad is not None
            if step == 2:
                grad[3, 150] = bad
            callback.before_step(step)
            made.step()
            callback.after_step(step)
            finished: Any = type("Finished", (), {"step": step})()
            row = callback.additions(finished)
            assert 0.0 < row["monitors/state_error/hidden/exp_avg"] < 0.05
    groups = {"hidden/exp_avg": 1, "hidden/exp_avg_sq": 1}
    assert told == [("alarm", {"step": 2, "alarm": "state_not_finite", "groups": groups})]
    assert not parameters["a"][3, 128:].isfinite().any(), "nor are parameters made of it"
    assert parameters["a"][:3].isfinite().all()
