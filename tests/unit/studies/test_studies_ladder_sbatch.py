"""Scripts for Slurm: contents and order (test_dist_slurm.py runs them)."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.ladder import load_ladder
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.studies.ladder.plan import LadderPlan, plan_ladder
from allometry.studies.ladder.sbatch import ENDING, write_scripts


@pytest.fixture
def base(tiny: Callable[..., RunConfig], tmp_path: Path) -> Path:
    tiny()
    return tmp_path / "tiny.yaml"


def planned(base: Path, /, **keys: Any) -> LadderPlan:
    described = {"kind": "ladder", "base": base.name, "folder": str(base.parent / "ladder")}
    path = base.parent / "ladder.yaml"
    path.write_text(json.dumps(described | {"widths": [16, 32], "tokens": [2048]} | keys))
    return plan_ladder(*load_ladder(path))


def test_scripts_for_slurm(base: Path) -> None:
    launch = {
        "kind": "sbatch",
        "processes": 16,
        "nodes": 2,
        "options": ["--partition=gpu", "--gres=gpu:8"],
        "setup": "module load cuda",
    }
    keys = {"batch.sequences": 32}
    plan = planned(base, launch=launch, seeds=[0], set=keys, tokens=[8192, 20480])
    submit, *scripts = write_scripts(plan, plan.rungs)
    assert [path.name for path in scripts] == [f"{run.name}.sbatch" for run in plan.rungs]
    for path in (submit, *scripts):
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    text = scripts[1].read_text()
    assert text.startswith("#!/bin/bash\n#SBATCH --job-name=w16-d20480-s0\n")
    assert "#SBATCH --partition=gpu\n#SBATCH --gres=gpu:8\n" in text
    assert text.index("#SBATCH") < text.index("module load cuda") < text.index("srun ")
    assert "--nnodes 2 --nproc-per-node 8" in text
    assert "-m allometry.launch.torchrun " in text
    assert "#SBATCH --requeue\n" in text
    described = load(base.parent / "ladder/configs/w16-d20480-s0.yaml")
    assert described.run.parent is not None
    assert described.run.parent.folder.endswith("w16-d8192-s0")
    # A substitute for sbatch records its arguments; the decay waits for its trunk.
    fake = base.parent / "bin"
    fake.mkdir()
    (fake / "sbatch").write_text('#!/bin/bash\necho "$@" >> "$CALLS"\nwc -l < "$CALLS"\n')
    (fake / "sbatch").chmod(0o755)
    calls = base.parent / "calls"
    done = subprocess.run(
        [submit], env={"PATH": f"{fake}:/usr/bin:/bin", "CALLS": str(calls)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert calls.read_text().splitlines() == [
        "--parsable w16-d8192-s0.sbatch",
        "--parsable --dependency=afterok:1 --kill-on-invalid-dep=yes w16-d20480-s0.sbatch",
        "--parsable w32-d8192-s0.sbatch",
        "--parsable --dependency=afterok:3 --kill-on-invalid-dep=yes w32-d20480-s0.sbatch",
    ]


def test_scripts_of_one_process_need_no_torchrun(base: Path) -> None:
    plan = planned(base, launch={"kind": "sbatch"})
    text = write_scripts(plan, plan.rungs)[1].read_text()
    assert "torchrun" not in text
    assert f"srun {sys.executable} -m allometry.launch.train " in text


def test_the_example_of_one_run_ends_as_the_scripts_of_a_ladder_do() -> None:
    path = Path(__file__).resolve().parents[3] / "examples/slurm/train.sbatch"
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.read_text().endswith("\n".join(ENDING) + "\n")


@pytest.mark.parametrize(
    ("code", "last", "before", "again"),
    [
        (0, "finished", 0, False),
        (0, "stopped", 0, True),
        (0, "stopped", 25, True),
        (2, "started", 0, False),
        (1, "resumed", 0, True),
        (137, "resumed", 19, True),
        (1, "resumed", 20, False),
    ],
)
def test_a_job_goes_back_into_the_queue_unless_it_ended_or_refused(
    tmp_path: Path, code: int, last: str, before: int, again: bool
) -> None:
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": last}) + "\n")
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "scontrol").chmod(0o755)
    lines = ["set -euo pipefail", f"code={code}", f"events={tmp_path}/events.jsonl", *ENDING]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_RESTART_COUNT": str(before)} if before else {}
    words = ["bash", "-c", "\n".join(lines)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (code, "requeue 7\n" if again else ""), done.stderr
