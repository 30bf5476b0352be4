"""The file of optimizer states: disk errors are detected, and no file remains."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.optim.offload.swap import StatesLost, SwapFile
from allometry.parallel.buffers import BLOCK, host_buffer

SIZES = [5000, 4096, 1, 70_000]


def filled(nbytes: int, seed: int = 0) -> Tensor:
    buffer = host_buffer(nbytes, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    buffer.copy_(torch.randint(256, (nbytes,), generator=generator, dtype=torch.uint8))
    return buffer


@pytest.fixture
def swap(tmp_path: Path) -> SwapFile:
    return SwapFile(tmp_path / "swap", 1 << 20)


def written(swap: SwapFile) -> tuple[list[Any], Tensor]:
    regions = swap.allocate(SIZES)
    data = filled(sum(region.nbytes for region in regions))
    swap.write(regions, data)
    return regions, data


def read(swap: SwapFile, regions: list[Any]) -> Tensor:
    buffer = host_buffer(sum(region.nbytes for region in regions), torch.device("cpu"))
    swap.read(regions, buffer)
    return buffer


def test_what_was_written_is_read_whole_or_in_parts(swap: SwapFile) -> None:
    regions, data = written(swap)
    assert torch.equal(read(swap, regions), data)
    for region in regions:
        part = data[region.start :][: region.nbytes]
        assert torch.equal(read(swap, [region]), part)
    swap.write([regions[1]], filled(BLOCK, 1))
    data[regions[1].start :][:BLOCK] = filled(BLOCK, 1)
    assert torch.equal(read(swap, regions), data)


def test_the_file_has_no_name_and_is_private(swap: SwapFile, tmp_path: Path) -> None:
    written(swap)
    found = os.fstat(swap._file)
    assert found.st_nlink == 0
    assert found.st_mode & 0o777 == 0o600
    assert (tmp_path / "swap").stat().st_mode & 0o777 == 0o700
    assert not list((tmp_path / "swap").iterdir())
    assert found.st_blocks * 512 >= 1 << 20, "its room is reserved"


def test_a_short_write_that_reports_success(swap: SwapFile, monkeypatch: Any) -> None:
    honest = swap._pwrite

    def short(data: Any, start: int) -> int:
        honest(data[: len(data) // 2 // BLOCK * BLOCK], start)
        return len(data)

    monkeypatch.setattr(swap, "_pwrite", short)
    regions, _ = written(swap)
    with pytest.raises(StatesLost, match="not what was written"):
        read(swap, regions)


def test_a_write_that_is_lost(swap: SwapFile, monkeypatch: Any) -> None:
    regions, _ = written(swap)
    monkeypatch.setattr(swap, "_pwrite", lambda data, start: len(data))
    swap.write(regions, filled(sum(region.nbytes for region in regions), seed=1))
    with pytest.raises(StatesLost, match="not what was written"):
        read(swap, regions)


@pytest.mark.parametrize("taken", [0, 100])
def test_a_write_that_takes_too_little(swap: SwapFile, monkeypatch: Any, taken: int) -> None:
    monkeypatch.setattr(swap, "_pwrite", lambda data, start: taken)
    with pytest.raises(StatesLost, match=f"{taken} bytes were taken"):
        written(swap)


def test_writes_and_reads_in_pieces(swap: SwapFile, monkeypatch: Any) -> None:
    write, take = swap._pwrite, swap._pread
    monkeypatch.setattr(swap, "_pwrite", lambda data, start: write(data[: 3 * BLOCK], start))
    monkeypatch.setattr(swap, "_pread", lambda data, start: take(data[: 5 * BLOCK], start))
    regions, data = written(swap)
    assert torch.equal(read(swap, regions), data)


def test_a_file_that_became_shorter(swap: SwapFile) -> None:
    regions, _ = written(swap)
    os.ftruncate(swap._file, regions[-1].start + BLOCK)
    with pytest.raises(StatesLost, match=r"reading .* the file ends \d+ bytes early"):
        read(swap, regions)


@pytest.mark.parametrize("kind", ["bit", "swapped"])
def test_changed_and_exchanged_blocks(swap: SwapFile, kind: str) -> None:
    regions, data = written(swap)
    last = regions[-1].start
    other = data[last:][: 2 * BLOCK].clone()
    if kind == "bit":
        other[77] ^= 1
    else:
        other = other.view(2, BLOCK).flip(0).flatten()
    buffer = host_buffer(2 * BLOCK, torch.device("cpu"))
    buffer.copy_(other)
    os.pwrite(swap._file, buffer.numpy().data, last)
    assert torch.equal(read(swap, regions[:-1]), data[:last])
    with pytest.raises(StatesLost, match="not what was written"):
        read(swap, regions)


def test_an_error_of_the_device(swap: SwapFile, monkeypatch: Any) -> None:
    regions, _ = written(swap)

    def broken(data: Any, start: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(swap, "_pread", broken)
    with pytest.raises(StatesLost, match=r"optimizer_states.nvme=.*: Input/output error"):
        read(swap, regions)


def test_a_disk_without_room_is_found_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"take 953,674,316 MiB there, [\d,]+ MiB are free; choose another"
    ):
        SwapFile(tmp_path, 10**15)


def test_room_that_is_limited_by_the_system(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            SwapFile(tmp_path, 2 << 20)
        swap = SwapFile(tmp_path, 1 << 20)
        with pytest.raises(StatesLost, match=r"reserving room .* File too large"):
            swap.allocate([1 << 20, 4096])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"optimizer_states.nvme=.*/file/swap: Not a directory"):
        SwapFile(tmp_path / "file" / "swap", 0)


def test_without_nameless_files(tmp_path: Path, monkeypatch: Any) -> None:
    inner = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return inner(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    swap = SwapFile(tmp_path, 1 << 20)
    regions, data = written(swap)
    assert torch.equal(read(swap, regions), data)
    assert os.fstat(swap._file).st_mode & 0o777 == 0o600
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from allometry.parallel.buffers import host_buffer\n"
        "from allometry.optim.offload.swap import SwapFile\n"
        "swap = SwapFile(sys.argv[1], 64 << 20)\n"
        "regions = swap.allocate([64 << 20])\n"
        "buffer = host_buffer(64 << 20, torch.device('cpu'))\n"
        "print('writing', flush=True)\n"
        "while True: swap.write(regions, buffer)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())
