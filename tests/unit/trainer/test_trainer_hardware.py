"""The reference rate of MFU: measured once per machine, in CPU time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from allometry.trainer.record import hardware

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Return the measured dtypes; each measurement gives a different rate."""
    types: list[torch.dtype] = []

    def measure(device: torch.device, dtype: torch.dtype, size: int) -> float:
        types.append(dtype)
        return 1e9 * len(types)

    monkeypatch.setattr(hardware, "_measure", measure)
    return types


def test_a_machine_is_measured_once(tmp_path: Path, measured: list[torch.dtype]) -> None:
    kept, threads = tmp_path / "new" / "peaks.json", torch.get_num_threads()
    first = hardware.peak(CPU, torch.float32, kept)
    assert first == hardware.peak(CPU, torch.float32, kept)
    assert first.flops_per_s == 1e9 * threads
    assert hardware.peak(CPU, torch.bfloat16, kept).flops_per_s == 2e9 * threads
    assert measured == [torch.float32, torch.bfloat16]
    kept.unlink()
    assert hardware.peak(CPU, torch.float32, kept).flops_per_s == 3e9 * threads


def test_other_machines_and_threads(
    tmp_path: Path, measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "peaks.json"
    hardware.peak(CPU, torch.float32, kept)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    many = hardware.peak(CPU, torch.float32, kept)
    assert (many.flops_per_s, len(measured)) == (7e9, 1)
    assert many.source == "measured, float32 product of 1024x1024, 7 x one thread"
    monkeypatch.setattr(hardware.platform, "node", lambda: "another")
    assert hardware.peak(CPU, torch.float32, kept).flops_per_s == 14e9
    assert len(json.loads(kept.read_text())) == 2


@pytest.mark.parametrize("content", ["", "[1.0]", '{"a": 0.0}', '{"a": "b"}', '{"a": NaN}', "\xff"])
def test_a_damaged_file_is_written_anew(
    tmp_path: Path, measured: list[torch.dtype], content: str
) -> None:
    kept = tmp_path / "peaks.json"
    kept.write_bytes(content.encode("latin-1"))
    first = hardware.peak(CPU, torch.float32, kept)
    assert first == hardware.peak(CPU, torch.float32, kept)
    assert list(json.loads(kept.read_text()).values()) == [1e9]
    assert len(measured) == 1


def test_where_nothing_can_be_kept_each_launch_measures(
    tmp_path: Path, measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    hardware.peak(CPU, torch.float32, tmp_path / "file" / "peaks.json")

    def homeless(path: Path) -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.chdir(tmp_path)
    hardware.peak(CPU, torch.float32)
    assert len(measured) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_waiting_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted process measures the same peak; its threads and random
    numbers are unchanged."""
    product, seen = torch.mm, set()

    def interrupted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        time.sleep(0.05)
        return product(left, right)

    monkeypatch.setattr(torch, "mm", interrupted)
    monkeypatch.setattr(hardware, "MEASURED_S", 0.0)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    rate = hardware._measure(CPU, torch.float32, 64)
    assert rate > 10.0 * 2 * 64**3 / 0.05
    assert seen == {1}
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)
