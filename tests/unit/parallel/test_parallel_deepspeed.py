"""The interface between DeepSpeed and a run: spans as boxes, checked files, the build."""

from __future__ import annotations

import fcntl
import importlib.metadata
import math
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.parallel.deepspeed import files, ops, package
from allometry.parallel.deepspeed.adamw import FlatAdamW
from allometry.parallel.deepspeed.boxes import Stretch, boxes
from allometry.parallel.deepspeed.files import CheckedHandle, FilesLost, SwapFolder
from deepspeed_cases import needs_nvme


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_are_the_stretch(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, numel)] * 2)))
    numbers = torch.arange(numel).view(shape)
    made = list(boxes(shape, start, stop))
    parts = []
    for offsets, sizes, begin in made:
        where = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        parts.append(numbers[where].flatten())
        assert int(parts[-1][0]) == begin
    joined = torch.cat(parts) if parts else torch.arange(0)
    assert torch.equal(joined, torch.arange(start, stop))
    assert len(made) <= max(1, 2 * len(shape) - 1)


def test_a_stretch_gives_views_of_what_is_here() -> None:
    stretch = Stretch((4, 3), 2, 10)
    flat = torch.arange(2, 10)
    for chunk in stretch.__create_chunk_list__():
        box = stretch.within(flat, chunk.offsets)
        assert tuple(box.shape) == tuple(chunk.sizes)
        assert int(box.flatten()[0]) == 3 * chunk.offsets[0] + chunk.offsets[1]
        assert box.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    with pytest.raises(AssertionError):
        stretch.within(flat, (3, 2))


def test_flat_adamw_is_torchs_bit_by_bit() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(1000), torch.randn(5, 1000)
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    flat = FlatAdamW([{"params": [ours], **settings}])
    flat.made(ours)
    assert not flat.state[ours]["exp_avg"].any()
    plain = torch.optim.AdamW([{"params": [theirs], **settings}], fused=True)
    for step, gradient in enumerate(gradients):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in (flat, plain):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(flat.state[ours]["exp_avg_sq"], plain.state[theirs]["exp_avg_sq"])
    assert float(flat.state[ours]["step"]) == 5


def test_the_folder_is_private_and_goes(tmp_path: Path) -> None:
    folder = SwapFolder(tmp_path / "swap", 1000)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    (folder.path / "rank0").mkdir()
    (folder.path / "rank0" / "x.tensor.swp").write_bytes(b"12345")
    assert folder.held_bytes() == 5
    other = SwapFolder(tmp_path / "swap", 1000)  # leaves the first alone
    assert other.removed == []
    folder.close()
    assert not folder.path.exists()
    assert other.path.exists()
    path = other.path
    del other
    assert not path.exists()


def test_what_a_killed_process_leaves_is_removed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from allometry.parallel.deepspeed.files import SwapFolder; "
        "made = SwapFolder(sys.argv[1], 0); (made.path / 'x.swp').write_bytes(b'x'); "
        "print(made.path, flush=True); time.sleep(100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        assert SwapFolder(tmp_path, 0).removed == []
        assert left.exists()
        process.send_signal(signal.SIGKILL)
    assert left.exists()
    assert SwapFolder(tmp_path, 0).removed == [left.name]
    assert not left.exists()


@pytest.mark.parametrize(
    ("nbytes", "name", "said"), [(1 << 60, "swap", "are free"), (0, "file/swap", "Not a directory")]
)
def test_a_place_that_cannot_be_used(tmp_path: Path, nbytes: int, name: str, said: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"optimizer_states.nvme=.*{said}; choose another folder"):
        SwapFolder(tmp_path / name, nbytes)


class Fake:
    """Substitute for DeepSpeed's I/O handle, with faults."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.pending = fault, 0

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        data = buffer.numpy().tobytes()
        Path(path).write_bytes(data[: len(data) // 2] if self.fault == "short" else data)
        self.pending += 1
        return -1 if self.fault == "refused" else 0

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        data = bytearray(Path(path).read_bytes())
        if self.fault == "flipped":
            data[len(data) // 2] ^= 1
        buffer.copy_(torch.frombuffer(data, dtype=buffer.dtype))
        self.pending += 1
        return 0

    def wait(self) -> int:
        """Report success."""
        count, self.pending = self.pending, 0
        return count - 1 if self.fault == "fewer" else count

    def is_pinned(self, buffer: Tensor) -> bool:
        return True


def through(handle: CheckedHandle, path: Path, size: int = 5000) -> Tensor:
    data, back = torch.randn(size), torch.zeros(size)
    handle.async_pwrite(data, path, 0)
    handle.wait()
    handle.async_pread(back, path, 0)
    handle.wait()
    assert torch.equal(data, back)
    return data


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("short", "the file has 10000 of 20000 bytes: is the disk full"),
        ("flipped", "not what was written"),
        ("refused", "the transfer was refused"),
        ("fewer", "0 transfers ended"),
    ],
)
def test_transfers_that_fail_in_silence_are_errors(tmp_path: Path, fault: str, said: str) -> None:
    folder = SwapFolder(tmp_path, 0)
    through(CheckedHandle(Fake()), folder.path / "good.swp")
    with pytest.raises(FilesLost, match=rf"optimizer_states.nvme={tmp_path} failed: .*{said}"):
        through(CheckedHandle(Fake(fault)), folder.path / "bad.swp")


def test_files_that_change_between_steps_are_noticed(tmp_path: Path) -> None:
    handle, path = CheckedHandle(Fake()), tmp_path / "x.swp"
    data = through(handle, path)
    assert handle.is_pinned(data)  # other attributes are passed through
    blocks = path.read_bytes()
    path.write_bytes(blocks[4096:8192] + blocks[:4096] + blocks[8192:])  # two blocks swapped
    handle.async_pread(torch.zeros(5000), path, 0)
    with pytest.raises(FilesLost, match="not what was written"):
        handle.wait()
    path.unlink()
    with pytest.raises(FilesLost, match="the file is gone"):
        handle.async_pread(torch.zeros(5000), path, 0)


def test_another_version_or_none_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.14.0")
    with pytest.raises(UserError, match=r"needs DeepSpeed 0.19.8, .* installed as 0.14.0; pip"):
        package.check_installed()

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(UserError, match=r"is not installed; pip install .*zero.engine: fsdp2$"):
        package.check_installed()


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a build folder, independent of the installed version."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(package.importlib.metadata, "version", lambda name: package.VERSION)
    return ops.folder()


def test_a_build_that_died_holds_nobody_up(builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import fcntl, sys, time; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(100)"
    )
    mark = builds / "async_io" / "lock"  # torch's own build would wait for it forever
    mark.parent.mkdir(parents=True)
    mark.touch()
    seen: list[bool] = []

    def load() -> Any:
        seen.append(mark.exists())
        with open(builds / "build.lock", "w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (builds / "async_io" / "async_io.so").touch()

    monkeypatch.setattr(ops, "_load", load)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(builds / "build.lock")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    with pytest.raises(UserError, match=r"needs the operator async_io.*allometry doctor --build"):
        ops.check_built()
    begun = time.monotonic()
    assert ops.build() == builds / "async_io"
    assert time.monotonic() - begun < 10
    assert seen == [False]
    ops.check_built()


def test_a_build_that_fails_says_what_it_needs(
    builds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Any:
        raise RuntimeError("Error building extension 'async_io'\nmuch more")

    monkeypatch.setattr(ops, "_load", fails)
    with pytest.raises(UserError, match=r"Error building extension .async_io.\); .*libaio-dev$"):
        ops.build()
    monkeypatch.setattr(ops.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt install g"):
        ops.build()


@needs_nvme
def test_the_operator_writes_and_reads(tmp_path: Path) -> None:
    ops.probe(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    assert files._KNOWN
    assert os.environ.get("DS_ACCELERATOR") in ("cpu", "cuda")
