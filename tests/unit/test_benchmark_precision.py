"""The precision benchmark: its formats match their names, and its sums are right."""

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
    """Set the import path of that folder's scripts, on one thread."""
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
    # A value halfway between two can round either way.
    assert torch.isclose(found, wanted, rtol=1e-6, atol=0.0).double().mean() > 0.999


def test_expansion_is_better_and_exponents_that_stay_are_better_yet() -> None:
    formats = module("contenders.formats")
    ratios = {}
    for case in formats.CASES:
        found = formats.once(case)
        ratios[case] = found["plain update"] / found["expanded update"]
        assert found["expanded m with zeros"] < 0.02
        assert found["expanded m"] < found["plain m"]
    assert ratios["v log-normal, 1.0"] == pytest.approx(2.7, abs=0.1)
    assert ratios["columns, 0.0"] > ratios["columns, 0.3"] > ratios["columns, 0.5"] > 2.0
    # Wider groups leave less to expand, until plain E4M3 rounds elements of v to zero.
    assert 1.9 < ratios["columns, 0.7"] < 2.0
    assert ratios["columns, 1.0"] > 1000.0
    averages = formats.averaged(0.99, 200)
    assert averages["expanded"] < averages["fresh"] < averages["plain"]


def test_trials_are_kept_and_summed(tmp_path: Path) -> None:
    precision = module("precision")
    given = precision.arguments(["--quick", "--kinds", "dense", "--work", str(tmp_path)])
    settings = precision.Settings(given.size, 4, 0.95)
    log = precision.Log(tmp_path / "states.jsonl", settings, precision.Trial)
    for states in ("fp32", "fp8", "fp8 at random", "plain E4M3"):
        trial = precision.Trial("dense", states, 0)
        log.add(trial, precision.run(settings, trial))
    again: Any = precision.Log(tmp_path / "states.jsonl", settings, precision.Trial)
    assert again.known == log.known
    rows = {row["states"]: row for row in precision.summary(["dense"], 1, again.known)}
    assert rows["fp32"]["change_percent"] == 0.0
    assert rows["fp8"]["bytes_per_parameter"] < 2.4 < rows["fp32"]["bytes_per_parameter"]
    for states in ("fp8", "fp8 at random", "plain E4M3"):
        assert 0.0 < abs(rows[states]["change_percent"]) < 1.0
    mean, half = precision.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-3)


def test_torchao_s_states_are_those_of_its_optimizers() -> None:
    """With fp32 states it takes our steps; and the rounding of a format equals
    the stored values."""
    torchao = module("contenders.torchao_states")
    if torchao.missing():
        pytest.skip(torchao.missing())
    precision, formats = module("precision"), module("contenders.formats")
    settings = precision.Settings("tiny", 1, 0.95)
    batch = precision.source_bytes(8, 128)
    fp32 = precision.probe_of(settings, precision.Trial("dense", "fp32", 0))
    first = fp32.step(batch)
    wanted = fp32.loss(batch)
    for name in torchao.OPTIMIZERS:
        probe = precision.probe_of(settings, precision.Trial("dense", name, 0))
        with torch.compiler.set_stance("force_eager"):
            assert probe.step(batch) == first
        # A first step of Adam is the sign of the gradient, whatever the format.
        assert probe.loss(batch) == pytest.approx(wanted, rel=1e-3)
        round_to = formats.formats()[name]
        held = 0
        pairs = zip(*(precision.parameters_of(p.optimizer) for p in (fp32, probe)), strict=True)
        for exact, p in pairs:
            for key in ("exp_avg", "exp_avg_sq"):
                kept = probe.optimizer.state[p][key]
                signed = key == "exp_avg"
                expected = round_to(fp32.optimizer.state[exact][key], signed)
                is_compressed = hasattr(type(kept), "tensor_attrs")
                values = kept.dequantize() if is_compressed else kept
                torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-12)
                held += is_compressed
        assert held > 4
        per_parameter = precision.state_bytes(probe.optimizer) / sum(
            p.numel() for p in precision.parameters_of(probe.optimizer)
        )
        assert 2.0 < per_parameter < 5.0, "the smallest matrices stay fp32"
