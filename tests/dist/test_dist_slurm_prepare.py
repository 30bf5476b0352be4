"""Preparation in tasks on a real Slurm on this machine."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from allometry.configs.errors import UserError
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.tasks.executors import Engine
from allometry.data.tasks.plan import Folder
from allometry.data.tasks.run import Submitted, prepare_in_tasks
from gates import LIMIT_S
from slurm_here import Shell, slurm
from task_stores import differences, needs_datatrove

__all__ = ["slurm"]
SBATCH = "partition=main", "time=10", "mem-per-cpu=500M"


@pytest.mark.slow
@pytest.mark.timeout(4 * LIMIT_S)
@needs_datatrove
def test_two_tasks_on_slurm_give_the_store_of_one_process(
    slurm: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm/slurm.conf"))
    (tmp_path / "in").mkdir()
    for part in range(3):
        lines = (f'{{"text": "document {k} of part {part}: the cat sat"}}\n' for k in range(50))
        (tmp_path / f"in/{part}.jsonl").write_text("".join(lines))
    request = PrepareRequest((f"web={tmp_path}/in",), str(tmp_path / "out"), vocab_size=300)
    engine = Engine("slurm", tasks=2, sbatch=SBATCH)
    made = prepare_in_tasks(request, engine, quiet=True)
    assert isinstance(made, Submitted)
    assert len(made.jobs) == 2
    with pytest.raises(UserError, match=f"by the Slurm jobs {made.jobs[0]}"):
        prepare_in_tasks(request, engine, quiet=True)
    folder, until = Folder(tmp_path / "out"), time.monotonic() + 2 * LIMIT_S
    while not (folder.out / "manifest.json").exists():
        listed = slurm("scontrol", "show", "job", "-o")
        assert time.monotonic() < until, listed
        assert not re.search("JobState=(FAILED|CANCELLED)", listed), listed
        time.sleep(0.5)
    prepare(replace(request, out=str(tmp_path / "one"), processes=1), quiet=True)
    assert differences(folder.out, tmp_path / "one") == []
