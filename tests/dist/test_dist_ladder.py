"""A ladder as a user runs it: complete, interrupted, repeated, extended, wrong, with torchrun."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.ladder import load_ladder
from allometry.configs.run import RunConfig
from allometry.studies.ladder.plan import plan_ladder
from allometry.studies.ladder.run import torchrun
from allometry.studies.ladder.state import state_of
from gates import LIMIT_S, Gate
from run_folders import events, rows

Make = Callable[..., RunConfig]
Ladder = Callable[..., Path]
KEYS = ("step", "tokens", "flops", "loss", "grad_norm", "lr", "s1", "s2")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def ladder(tiny: Make, tmp_path: Path) -> Iterator[Ladder]:
    """Yield ``ladder(key=value)``, which writes a small ladder of the tiny run; its file."""
    tiny("checkpoint.every_steps=null")
    described = {
        "kind": "ladder",
        "base": "tiny.yaml",
        "folder": str(tmp_path / "ladder"),
        "set": {"checkpoint.every_steps": None, "evaluation.sequences_per_source": 8},
        "widths": [16, 32],
        "tokens": [5120, 10240],
    }

    def write(**keys: Any) -> Path:
        path = tmp_path / "ladder.yaml"
        path.write_text(json.dumps(described | keys))
        return path

    return write


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "allometry.launch.cli", "ladder", *map(str, arguments)]


def call(*arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=LIMIT_S
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def comparable(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.get(key) for key in KEYS) for row in rows(folder)]


def kinds(folder: Path) -> list[str]:
    wanted = ("started", "branched", "resumed", "stopped", "finished")
    return [event["event"] for event in events(folder) if event["event"] in wanted]


def test_ladder_from_nothing_and_once_more(ladder: Ladder, tmp_path: Path) -> None:
    path = ladder()
    said = call("run", path)
    assert "[4/4]" in said
    runs = tmp_path / "ladder/runs"
    assert sorted(p.name for p in runs.iterdir()) == [
        "w16-d10240-s0",
        "w16-d5120-s0",
        "w32-d10240-s0",
        "w32-d5120-s0",
    ]
    assert kinds(runs / "w16-d5120-s0") == ["started", "finished"]
    assert kinds(runs / "w16-d10240-s0") == ["branched", "finished"]
    facts = json.loads(call("status", tmp_path / "ladder", "--json"))
    assert [run["state"] for run in facts["runs"]] == ["done"] * 4
    assert facts["flops_spent"] == facts["flops"] < facts["flops_if_each_from_scratch"]
    before = {p: p.read_bytes() for p in runs.glob("*/metrics.jsonl")}
    assert "4 of 4 runs are done" in call("run", tmp_path / "ladder")
    assert {p: p.read_bytes() for p in runs.glob("*/metrics.jsonl")} == before

    # One rung in between and one above: only these are trained, and one branches from an older run.
    assert "[6/6]" in call("run", ladder(tokens=[5120, 10240, 15360], widths=[16, 32]))
    assert kinds(runs / "w16-d15360-s0") == ["branched", "finished"]
    assert {p: p.read_bytes() for p in before} == before

    # Changes to trained runs are refused.
    text = call("run", ladder(set={"optimizer.lr": 0.5}), code=2)
    assert "w16-d5120-s0 was trained with " in text
    assert "\n" not in text.strip()
    for words in (["fit"], ["run", "--only", "rungs"]):
        assert call(*words, tmp_path / "ladder.yaml", code=2) == text
    for words in (["status"], ["run", "--dry-run"]):
        facts = json.loads(call(*words, tmp_path / "ladder.yaml", "--json"))
        assert {run["state"] for run in facts["runs"]} == {"changed"}
        assert text.strip().removeprefix("allometry: ") in facts["notes"]
    # The folder's description is unchanged, so that it still describes the trained runs.
    facts = json.loads(call("status", tmp_path / "ladder", "--json"))
    assert {run["state"] for run in facts["runs"]} == {"done"}


@pytest.mark.slow
def test_interrupted_ladder_goes_on_to_the_same_bits(ladder: Ladder, tmp_path: Path) -> None:
    straight = ladder(tokens=[40960, 81920], widths=[32], folder=str(tmp_path / "straight"))
    call("run", straight)
    path = ladder(tokens=[40960, 81920], widths=[32])
    runs = tmp_path / "ladder/runs"
    for wanted, step in (("w32-d40960-s0", 21), ("w32-d81920-s0", 170)):
        process, gate = held("run", path, tmp_path / f"gate-{step}", step)
        gate.wait(process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 128 + signal.SIGINT, output
        assert "stopped by SIGINT" in output
        assert kinds(runs / wanted)[-1] == "stopped"
    call("run", path)
    for name in ("w32-d40960-s0", "w32-d81920-s0"):
        assert comparable(runs / name) == comparable(tmp_path / "straight/runs" / name)
        assert "resumed" in kinds(runs / name)
    assert kinds(runs / "w32-d81920-s0")[0] == "branched"


def held(action: str, path: Path, folder: Path, step: int) -> tuple["subprocess.Popen[str]", Gate]:
    """Start a ladder; return its process and the gate of its first run with ``step`` steps."""
    gate = Gate(folder, step)
    process = subprocess.Popen(
        command(action, path), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT | gate.environment
    )
    return process, gate


@pytest.mark.slow
def test_second_launch_beside_the_first_is_refused(ladder: Ladder, tmp_path: Path) -> None:
    path = ladder(tokens=[40960], widths=[32])
    process, gate = held("run", path, tmp_path / "gate", 4)
    gate.wait(process)
    assert "another allometry ladder run works in" in call("run", path, code=2)
    facts = json.loads(call("status", path, "--json"))
    assert [run["state"] for run in facts["runs"]] == ["running"]
    process.terminate()
    process.communicate(timeout=LIMIT_S)
    facts = json.loads(call("status", path, "--json"))
    assert [run["state"] for run in facts["runs"]] == ["partial"]


def test_a_run_that_fails_leaves_the_others_their_turn(ladder: Ladder, tmp_path: Path) -> None:
    sizes = [{"name": "bad", "set": {"optimizer.lr": 1e30}}, {"name": "good"}]
    sizes[1]["set"] = {"optimizer.lr": 1e-2}
    text = call("run", ladder(widths=[], sizes=sizes), code=2)
    assert "2 of 4 runs failed, the first of them bad-d5120-s0: step" in text
    facts = json.loads(call("status", tmp_path / "ladder", "--json"))
    assert {run["name"]: run["state"] for run in facts["runs"]} == {
        "bad-d5120-s0": "diverged",
        "bad-d10240-s0": "planned",
        "good-d5120-s0": "done",
        "good-d10240-s0": "done",
    }
    assert "gradient norm nan" in (tmp_path / "ladder/logs/bad-d5120-s0.log").read_text()
    assert "rungs are not done (bad-d" in call("fit", tmp_path / "ladder", code=2)


@pytest.mark.slow
def test_torchrun_and_several_at_a_time(ladder: Ladder, tmp_path: Path) -> None:
    launch = {"kind": "local", "processes": 2, "parallel": 2}
    assert "[4/4]" in call("run", ladder(launch=launch))
    plan = plan_ladder(*load_ladder(tmp_path / "ladder.yaml"))
    assert {state_of(run).stage for run in plan.runs} == {"done"}
    record = json.loads((plan.rungs[1].folder / "run.json").read_text())
    assert record["layout"]["world_size"] == 2
    # A branch on two ranks equals bitwise a two-rank run; one rank sums in another order.
    branch = plan.rungs[1]
    assert branch.parent is not None
    tree = branch.config.model_dump(mode="json")
    tree["run"] |= {"folder": str(tmp_path / "straight"), "parent": None}
    config = tmp_path / "straight.yaml"
    config.write_text(json.dumps(tree))
    subprocess.run([sys.executable, *torchrun(2, config)], env=ENVIRONMENT, check=True)
    assert comparable(tmp_path / "straight") == comparable(branch.folder)
    alone = ladder(folder=str(tmp_path / "alone"), launch={"kind": "local", "parallel": 2})
    call("run", alone)
    one = comparable(tmp_path / "alone/runs/w16-d10240-s0")
    two = comparable(plan.rungs[1].folder)
    assert [row[3] for row in two] == pytest.approx([row[3] for row in one], rel=1e-4)


@pytest.mark.slow
def test_the_whole_story(ladder: Ladder, tmp_path: Path) -> None:
    target = {"size": {"width": 64}, "tokens": 40960}
    path = ladder(widths=[16, 32, 48], tokens=[5120, 10240, 20480], seeds=[0, 1], target=target)
    said = call("run", path)
    folder = tmp_path / "ladder"
    assert (
        said.index("predicts") < said.index("[1/1] target-w64-d40960-s0") < said.index("measured")
    )
    found = json.loads((folder / "prediction.json").read_text())
    assert found["target_state"] == "planned"
    assert found["low"] < found["predicted"] < found["high"]
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.5)
    begun = events(folder / "runs/target-w64-d40960-s0")[0]["time"]
    assert found["time"] < begun
    assert (folder / "fit.json").exists()
    # After a measurement the prediction is kept; a new one records that it came later.
    assert json.loads(call("predict", folder, "--json"))["time"] == found["time"]
    later = json.loads(call("predict", folder, "--again", "--json"))
    assert later["target_state"] == "done"
    assert later["time"] > found["time"]
    assert "AFTER" in call("predict", folder)
    # A prediction by another law than the ladder's is kept, with a note.
    path = ladder(
        widths=[16, 32, 48], tokens=[5120, 10240, 20480], seeds=[0, 1], target=target, law="kaplan"
    )
    assert "is of law chinchilla, and the ladder now says kaplan" in call("predict", path)
