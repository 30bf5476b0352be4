"""Self-test of machines: its messages, its output, and small versions of all presets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.launch.cli import main
from allometry.scaling.layout import Layout
from allometry.studies.certificate.small import shrunk
from allometry.studies.rehearse import rehearse
from allometry.studies.selftest.machine import DiskRates, Machine, Rates
from allometry.studies.selftest.messages import Message, messages_of
from allometry.studies.selftest.network import Timing
from allometry.studies.selftest.selftest import GradientCheck, SelfTest


def result(**changes: Any) -> SelfTest:
    message = Message("all-reduce", "hdp", 4, 1000, "float32", per_step=3)
    fine = SelfTest(
        machines=tuple(
            Machine(rank, f"node{rank // 2}", "H100", {"torch": "2.11"}) for rank in range(4)
        ),
        rates=(Rates(1e12, 1e9, None, None),) * 4,
        timings=(Timing(message, 0.01, 0.02, 1, 1000, 5, ()),),
        gradients=GradientCheck(1e-7, "head.weight", 1e-5),
        disk=DiskRates("/runs", 10, 1e9, 1e9),
        axes={"hdp": 4},
        seconds=1.0,
    )
    return replace(fine, **changes)


def test_nothing_wrong_is_nothing_said() -> None:
    fine = result()
    assert (fine.passed, fine.faults, fine.warnings) == (True, [], [])
    assert fine.step_seconds == pytest.approx(0.03)
    assert fine.describe()["hosts"] == {"node0": [0, 1], "node1": [2, 3]}
    json.dumps(fine.describe(), allow_nan=False)


def test_other_versions_and_devices_are_named() -> None:
    machines = list(result().machines)
    machines[3] = replace(machines[3], versions={"torch": "2.13"}, device="A100")
    told = " ".join(result(machines=tuple(machines)).faults)
    assert "torch is 2.13 on rank 3 (node1) and 2.11 on rank 0 (node0)" in told
    assert "the device is A100 on rank 3" in told


def test_wrong_numbers_and_gradients_are_faults() -> None:
    wrong = replace(result().timings[0], wrong_ranks=(2,))
    assert "wrong numbers arrive at 1 ranks (2)" in " ".join(result(timings=(wrong,)).faults)
    apart = result(gradients=GradientCheck(1e-3, "head.weight", 1e-5))
    assert "head.weight" in " ".join(apart.faults)
    assert not apart.passed


def test_a_slow_device_is_a_warning() -> None:
    rates = (*result().rates[:3], Rates(0.7e12, 1e9, None, None))
    slow = result(rates=rates)
    assert slow.passed
    assert "rank 3 on node1" in " ".join(slow.warnings)


@pytest.mark.parametrize(
    ("kind", "share"),
    [("all-reduce", 1.5), ("all-gather", 0.75), ("all-to-all", 0.75), ("send forward", 1.0)],
)
def test_bus_bytes_are_those_of_nccl_tests(kind: str, share: float) -> None:
    assert Message(kind, "tp", 4, 1000, "float32", 1).bus_bytes == 1000 * share


def test_messages_are_those_of_a_step_and_probes_of_each_axis() -> None:
    config = load(
        "preset:moe_demo",
        ["parallel.tp=2", "parallel.ep=2", "parallel.pp=2", "batch.micro_batch_sequences=4"],
    )
    messages = messages_of(config, 8)
    sent = {(m.kind, m.axis, m.bytes): m.per_step for m in messages if m.per_step}
    rehearsed: dict[tuple[str, str, int], int] = {}
    for report in rehearse(config, 8):
        for call, number in report.collectives:
            key = (call.kind, call.axis, call.bytes)
            rehearsed[key] = max(number, rehearsed.get(key, 0))
    assert set(sent) == set(rehearsed)
    probed = {(m.kind, m.axis) for m in messages if m.per_step == 0}
    assert probed == {(kind, axis) for kind, axis, _ in sent}
    assert {"send forward", "send backward"} <= {kind for kind, _ in probed}


def test_rings_are_sent_where_documents_are_spread() -> None:
    kinds = {m.kind for m in messages_of(load("preset:documents_demo"), 2)}
    assert "ring hop" in kinds


@pytest.mark.parametrize(
    ("preset", "world_size", "overrides"),
    [
        ("dense_7b", 64, ["parallel.tp=8", "parallel.pp=4"]),
        ("dense_1b", 16, ["parallel.tp=4"]),
        ("moe_1b_a200m", 16, ["parallel.ep=8"]),
        ("moe_mixtral_8x7b", 64, []),
        ("moe_ling_mini", 64, []),
        ("hyperp_208m", 8, []),
        ("documents_demo", 4, []),
    ],
)
def test_every_preset_has_a_small_twin_in_its_layout(
    preset: str, world_size: int, overrides: list[str]
) -> None:
    config = load(f"preset:{preset}", overrides)
    small = shrunk(config, world_size)
    assert Layout.of(small, world_size).degrees == Layout.of(config, world_size).degrees
    assert small.model.width <= 1024
    assert small.model.num_layers <= 8
    for kind in ("kind", "qk_norm", "tied_embeddings", "z_loss"):
        assert getattr(small.model, kind) == getattr(config.model, kind)


def test_a_small_twin_has_as_narrow_a_window() -> None:
    window = "model.window={tokens: 64, global_every: 3}"
    small = shrunk(load("preset:demo", [window, "parallel.tp=2"]), 2).model
    assert small.window is not None
    assert (small.window.tokens, small.window.global_every) == (16, 2)  # of 64 tokens, not 256


def test_a_layout_that_cannot_be_is_refused_before_ranks_meet() -> None:
    with pytest.raises(UserError, match="must divide the number of ranks"):
        shrunk(load("preset:demo", ["parallel.tp=4"]), 2)


def test_the_command_on_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["selftest", "preset:demo", "--disk-mib", "1"])
    assert ended.value.code in (0, None)
    assert "a run may be started" in capsys.readouterr().out
    written = json.loads((tmp_path / "selftest.json").read_text())
    assert written["passed"]
    assert written["messages"] == []
    assert written["disk"]["write_bytes_per_s"] > 0
