"""Runs with a really full disk for optimizer states: small file systems, mounted by the test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from run_folders import events, rows

Make = Callable[..., RunConfig]
pytestmark = pytest.mark.slow
TOOLS = ("mount", "umount", "losetup", "mkfs.ext4")


def _mounted(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 4 MiB."""
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("file systems are mounted by root")
    folder = tmp_path / "small"
    folder.mkdir()
    _mounted("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def thin(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a thin disk of 64 MiB backed by 12, and the folder that stores its blocks."""
    if os.geteuid() or not all(map(shutil.which, TOOLS)):
        pytest.skip("disks are made by root with losetup and mkfs.ext4")
    below, folder = tmp_path / "below", tmp_path / "thin"
    for each in (below, folder):
        each.mkdir()
    _mounted("mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", below)
    try:
        blocks = below / "blocks"
        with blocks.open("wb") as file:
            file.truncate(64 << 20)
        _mounted("mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", blocks)
        _mounted("mount", "-o", "loop,discard", blocks, folder)
        yield folder, below
        subprocess.run(["umount", "-l", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", below], check=True)


def fill(folder: Path, spare: int = 0) -> Path:
    """Use all free space except ``spare`` bytes; return the file that takes it."""
    found = os.statvfs(folder)
    path = folder / "others"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - spare)
    return path


def launched(run: RunConfig, file: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Train from the command line, on the CPU."""
    file.write_text(dump(run))
    return subprocess.run(
        [sys.executable, "-m", "allometry.launch.cli", "train", str(file), *more],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def config(tiny: Make, folder: Path, swap: Path | None) -> RunConfig:
    """Return a run with about 2 MiB of states."""
    states = {"nvme": str(swap), "bucket_mib": 0.2}
    away = [f"parallel.zero.optimizer_states={json.dumps(states)}"] if swap else []
    return tiny(*away, "model.width=96", "model.ffn_width=256", folder=folder)


def losses(run: RunConfig) -> list[float]:
    return [row["loss"] for row in rows(Path(run.run.folder))]


def test_what_others_write_later_takes_no_room_of_states(
    tiny: Make, tmp_path: Path, small: Path
) -> None:
    run = config(tiny, tmp_path / "run", small)
    assert launched(run, tmp_path / "run.yaml", "--stop-at-step", "5").returncode == 0
    taken = fill(small, spare=1 << 20)
    refused = launched(run, tmp_path / "run.yaml")
    assert refused.returncode == 2
    assert "No space left on device; a rank's optimizer states take" in refused.stderr
    assert "Traceback" not in refused.stderr
    taken.unlink()
    done = launched(run, tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    straight = config(tiny, tmp_path / "straight", None)
    assert launched(straight, tmp_path / "straight.yaml").returncode == 0
    assert losses(run) == losses(straight)


def test_a_disk_that_is_full_in_the_middle_of_a_write_loses_nothing(
    tiny: Make, tmp_path: Path, thin: tuple[Path, Path]
) -> None:
    """The disk has promised the space, as thin volumes do, and the file system relies on it."""
    swap, below = thin
    run = config(tiny, tmp_path / "run", swap)
    first = launched(run, tmp_path / "run.yaml", "--stop-at-step", "5")
    assert first.returncode == 0, first.stderr
    os.sync()
    subprocess.run(["fstrim", swap], check=False, capture_output=True)
    taken = fill(below, spare=1 << 20)
    for _ in range(2):
        broken = launched(run, tmp_path / "run.yaml")
        assert broken.returncode == 2, broken.stderr
        assert "writing optimizer states in parallel.zero.optimizer_states.nvme" in broken.stderr
        assert "checkpoint step-5 is kept" in broken.stderr
        assert "Traceback" not in broken.stderr
    taken.unlink()
    done = launched(run, tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    straight = config(tiny, tmp_path / "straight", None)
    assert launched(straight, tmp_path / "straight.yaml").returncode == 0
    assert losses(run) == losses(straight)
    assert len(losses(run)) == 20
    assert not [e for e in events(tmp_path / "run") if "damaged" in e["event"]]
