"""The benchmark of precision: its formats are what they are called, and its sums are right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from allometry.optim.dre import Table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder_of_benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a script of that folder sees it, on one thread."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def module(name: str) -> ModuleType:
    return __import__(name, fromlist=["x"])


def test_plain_is_e4m3_with_one_scale_for_a_group() -> None:
    formats = module("contenders.formats")
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) ** 3
    groups = x.view(-1, 128)
    scale = groups.abs().amax(1, keepdim=True) / 448.0
    wanted = ((groups / scale).to(torch.float8_e4m3fn).float() * scale).view_as(x)
    found = formats.rounded(x, formats.plain(Table.on(torch.device("cpu"))))
    # A value halfway between two may go either way.
    assert torch.isclose(found, wanted, rtol=1e-6, atol=0.0).double().mean() > 0.999


def test_expansion_is_better_and_exponents_that_stay_are_better_yet() -> None:
    formats = module("contenders.formats")
    found = formats.once(0.3)
    assert found["plain update"] / found["expanded update"] > 2.0
    assert found["expanded m with zeros"] < 0.02
    averages = formats.averaged(0.99, 200)
    assert averages["expanded"] < averages["fresh"] < averages["plain"]


def test_trials_are_kept_and_summed(tmp_path: Path) -> None:
    precision = module("precision")
    given = precision.arguments(["--quick", "--kinds", "dense", "--work", str(tmp_path)])
    settings = precision.Settings(given.size, 4, 0.95)
    log = precision.Log(tmp_path / "states.jsonl", settings)
    for states in precision.STATES:
        trial = precision.Trial("dense", states, 0)
        log.add(trial, precision.run(settings, trial))
    again: Any = precision.Log(tmp_path / "states.jsonl", settings)
    assert again.known == log.known
    rows = {row["states"]: row for row in precision.summary(["dense"], 1, again.known)}
    assert rows["fp32"]["change_percent"] == 0.0
    assert rows["fp8"]["bytes_per_parameter"] < 2.4 < rows["fp32"]["bytes_per_parameter"]
    for states in ("fp8", "fp8 at random", "plain E4M3"):
        assert 0.0 < abs(rows[states]["change_percent"]) < 1.0
    mean, half = precision.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
