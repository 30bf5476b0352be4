"""No writer ends a run on a full disk, and a launch that lost output exits with an error code."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from allometry.trainer.record import appending
from allometry.trainer.record.appending import Appender
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.state import folder as folders
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.train import train
from disks import mounted
from run_folders import events, rows

Make = Callable[..., RunConfig]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Limit this process's files to ``size`` bytes: a write writes as much as fits, then fails."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appending, "RETRY_AFTER_S", (0.0, 0.0))
    monkeypatch.setattr(folders, "RETRY_AFTER_S", (0.0, 0.0))


def test_entries_wait_for_room_and_none_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    file = Appender(path)
    file.append(b"a" * 60 + b"\n")
    with files_of_at_most(100):
        assert file.append(b"b" * 60 + b"\n") == "File too large"
        assert path.read_bytes() == b"a" * 60 + b"\n"
        assert file.append(b"c\n") == "File too large"
    assert file.append(b"d\n") is None
    assert file.close() is None
    assert path.read_bytes() == b"a" * 60 + b"\n" + b"b" * 60 + b"\nc\nd\n"


def test_what_never_finds_room_is_said(tmp_path: Path) -> None:
    file = Appender(tmp_path / "rows")
    with files_of_at_most(10):
        file.append(b"b" * 60)
        said = file.close()
    assert said == f"1 rows of {tmp_path}/rows could not be written (File too large)"
    assert (tmp_path / "rows").read_bytes() == b""


def test_a_file_that_cannot_be_opened_yet(tmp_path: Path) -> None:
    file = Appender(tmp_path / "later/rows")
    assert file.append(b"a\n") == "No such file or directory"
    with pytest.raises(UserError, match="cannot be written: No such file"):
        file.open()
    (tmp_path / "later").mkdir()
    assert file.append(b"b\n") is None
    assert (tmp_path / "later/rows").read_bytes() == b"a\nb\n"


def test_a_small_file_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, left = os.replace, [28, 28]

    def full(*paths: str) -> None:
        if left:
            raise OSError(left.pop(), "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", full)
    write_atomically(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
    left[:] = [28] * 3
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", "other")
    left[:] = [13, 28]
    with pytest.raises(OSError, match="No space"):  # permissions do not change by themselves
        write_atomically(tmp_path / "b", "other")
    assert (tmp_path / "a").read_text() == "text"
    assert not list(tmp_path.glob(".*"))


def test_tensorboard_gets_all_rows_though_its_disk_was_full(tiny: Make) -> None:
    """TensorBoard is on by default, and its own writer fails with OSError."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Full(Callback):
        """Between steps 5 and 12 only checkpoints, which are larger than the
        limit's files, grow."""

        def __init__(self) -> None:
            self.limit = files_of_at_most(1)

        def before_step(self, step: int) -> None:
            if step == 6:
                self.limit.__enter__()
            if step == 12:
                self.limit.__exit__(None, None, None)

    from allometry.trainer.record.services import TensorBoard

    config = tiny("checkpoint.every_steps=null")
    folder = RunFolder(config.run.folder)
    train(config, device=torch.device("cpu"), callbacks=[Full(), TensorBoard(folder, 2)])
    shown = EventAccumulator(str(folder.tensorboard))
    shown.Reload()
    assert [each.step for each in shown.Scalars("train/loss")] == list(range(2, 21, 2))
    assert [row["step"] for row in rows(folder.path)] == list(range(1, 21))


def test_temporary_files_of_an_interrupted_launch_go(tiny: Make) -> None:
    config = tiny()
    train(config, device=torch.device("cpu"), callbacks=[], stop_at_step=3)
    folder = Path(config.run.folder)
    (folder / "pins").mkdir()
    left = [".latest.7.tmp", ".run.json.8.tmp", "checkpoints/.x.9.tmp"]
    left += [".scores.jsonl.7.tmp", "pins/.step-3.a.json.7.tmp"]
    stay = [".mine.tmp", "notes.9.tmp"]
    for name in (*left, *stay):
        (folder / name).write_text("{")
    train(config, device=torch.device("cpu"), callbacks=[], stop_at_step=4)
    others = left[3:]  # may be in progress
    assert [name for name in left if (folder / name).exists()] == others
    for name in others:
        os.utime(folder / name, (0, 0))
    train(config, device=torch.device("cpu"), callbacks=[], stop_at_step=5)
    assert not [name for name in left if (folder / name).exists()]
    assert all((folder / name).exists() for name in stay)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 4 MB."""
    with mounted(tmp_path / "disk", "4m") as place:
        yield place


def fill(disk: Path, spare: int = 0) -> None:
    """Use all space of the disk except ``spare`` bytes."""
    found = os.statvfs(disk)
    with open(disk / "others", "ab") as file:
        file.write(b"x" * max(0, found.f_bavail * found.f_frsize - spare))


def started(config: RunConfig, file: Path, log: Path | None = None) -> subprocess.Popen[str]:
    """Start the command of a user."""
    file.write_text(dump(config))
    return subprocess.Popen(
        [sys.executable, "-m", "allometry.launch.cli", "train", str(file), "--allocator=system"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=log.open("w") if log else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


FULL = ("record.tensorboard=true", "record.display_every_steps=1", "checkpoint.keep_last=1")


def test_a_start_on_a_full_disk_leaves_nothing(tiny: Make, tmp_path: Path, disk: Path) -> None:
    fill(disk, spare=600_000)  # space for a checkpoint, used up by the time it is needed
    config = tiny(*FULL, folder=disk / "run")
    taken = disk / "others"
    with taken.open("ab") as file:
        file.write(b"x" * 590_000)
    process = started(config, tmp_path / "run.yaml")
    _, said = process.communicate(timeout=100)
    assert process.returncode == 2, said
    assert "free, and a checkpoint takes" in said
    assert "Traceback" not in said
    assert not (disk / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["to the end", "SIGTERM"])
def test_a_launch_whose_disk_fills_says_what_is_safe(
    tiny: Make, tmp_path: Path, disk: Path, how: str
) -> None:
    config = tiny(
        *FULL,
        *("checkpoint.every_steps=20", "training.total_steps=400"),
        folder=disk / "run",
    )
    process = started(config, tmp_path / "run.yaml", disk / "log")
    pointer = disk / "run/latest"
    until = time.monotonic() + 100
    while not pointer.exists() and time.monotonic() < until:
        time.sleep(0.05)
    for _ in range(20):
        fill(disk)
        time.sleep(0.05)
    if how == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 2, said
    safe = pointer.read_text().strip()
    assert "the last checkpoint could not be written (No space left on device" in said
    assert f"{safe} is kept" in said
    assert "Traceback" not in said
    (disk / "others").unlink()
    again = started(config, tmp_path / "run.yaml")
    assert again.wait(timeout=200) == 0
    assert [e["checkpoint"] for e in events(disk / "run") if e["event"] == "resumed"] == [safe]
    assert [row["step"] for row in rows(disk / "run")] == list(range(1, 401))


@pytest.mark.slow
def test_a_log_on_a_full_disk_does_not_end_the_run(tiny: Make, tmp_path: Path, disk: Path) -> None:
    fill(disk)
    config = tiny("record.display_every_steps=1")
    process = started(config, tmp_path / "run.yaml", disk / "log")
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert "lines cannot be printed (No space left on device)" in said
    assert "lines could not be printed" in said
    assert "Traceback" not in said
    assert events(Path(config.run.folder))[-1]["event"] == "finished"
    assert json.loads((Path(config.run.folder) / "run.json").read_text())
