"""Measurements by the doctor for offloaded optimizer states, and their storage."""

import json
import platform
from pathlib import Path

import pytest

from allometry.launch.runs import doctor
from allometry.optim.offload import rates


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    adam, disk = rates.adam_rate, rates.disk_rates
    monkeypatch.setattr(rates, "adam_rate", lambda: adam(1 << 16))
    monkeypatch.setattr(rates, "disk_rates", lambda folder: disk(folder, 1 << 20))


def test_rates_are_said_and_kept_by_folder(tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "offload.json"
    for folder in ("one", "two"):
        findings = list(doctor._offload(tmp_path / folder, kept))
        assert [f.status for f in findings] == ["ok", "ok"]
        assert "GB/s written" in findings[1].detail
        assert not list((tmp_path / folder).iterdir())
    list(doctor._offload(None, kept))
    known = json.loads(kept.read_text())[platform.node()]
    assert known["adam_parameters_per_s"] > 0
    assert [Path(name).name for name in known["disks"]] == ["one", "two"]
    assert all(rate > 0 for disk in known["disks"].values() for rate in disk.values())


def test_a_damaged_file_and_a_folder_that_cannot_be(tmp_path: Path) -> None:
    kept = tmp_path / "offload.json"
    kept.write_text("[")
    (tmp_path / "file").touch()
    findings = list(doctor._offload(tmp_path / "file" / "x", kept))
    assert [f.status for f in findings] == ["ok", "problem"]
    assert "Not a directory" in findings[1].detail
    assert json.loads(kept.read_text())[platform.node()]["disks"] == {}
