"""Write access to a run folder, and its stored state."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from allometry.configs.errors import UserError
from allometry.trainer.record.writer import Recorder
from allometry.trainer.state.folder import RunFolder, write_atomically


def test_second_live_run_is_refused_and_a_dead_one_is_not(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from allometry.trainer.state.folder import RunFolder\n"
        f"folder = RunFolder({str(tmp_path / 'run')!r})\n"
        "folder.claim(); print('held', flush=True); sys.stdin.read()\n"
    )
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        folder = RunFolder(tmp_path / "run")
        with pytest.raises(UserError, match=f"in use by process {other.pid}"):
            folder.claim()
        other.kill()
        other.wait()
    folder.claim()
    folder.release()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"run\.folder=.*cannot be written"):
        RunFolder(tmp_path / "file" / "run").claim()


def test_rows_past_the_checkpoint_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step}) for step in range(1, 8)]
    folder.metrics.write_text("\n".join(lines) + '\n{"step": 8, "lo')
    assert folder.forget_after(5) == 3
    assert [json.loads(x)["step"] for x in folder.metrics.read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert folder.forget_after(5) == 0


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    path = tmp_path / "x"
    before = os.umask(0o027)
    try:
        write_atomically(path, "text")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_rows_survive_a_disk_that_fills_and_empties(tmp_path: Path) -> None:
    """In a child process, because the limit on file size applies to the full process."""
    code = f"""
import resource, signal
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.record.writer import Recorder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
recorder = Recorder(RunFolder({str(tmp_path)!r}))
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for step in range(1, 11):
    if step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    if step == 8:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    recorder.row({{"step": step, "loss": 1.0 / step, "text": 3}})
recorder.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    # If the disk stays full, the lost rows are reported.
    code = code.replace("recorder.close()", "print(recorder.close())").replace("step == 8", "False")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    place = tmp_path / "metrics.jsonl"
    assert done.stdout == f"7 rows of {place} could not be written (File too large)\n"


def test_recorder_appends_to_what_is_there(tmp_path: Path) -> None:
    for step in (1, 2):
        recorder = Recorder(RunFolder(tmp_path))
        recorder.row({"step": step})
        recorder.event("saved", step=step)
        recorder.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    event = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert event["event"] == "saved"
    assert os.path.getmtime(tmp_path / "events.jsonl") == pytest.approx(event["time"], abs=60)
