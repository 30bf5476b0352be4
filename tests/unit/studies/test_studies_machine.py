"""Measuring this machine: known constants are recovered, and written files are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.machine import HardwareConfig, load_hardware
from allometry.launch.runs import doctor, doctor_measure
from allometry.launch.runs.commands import Doctor
from allometry.scaling.planner import operators
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants
from allometry.studies.machine import describe, pieces, ranks

PLANTED = {
    **{"rows_half": 20.0, "width_half": 12.0, "attention_half": 400.0, "launch_eager_s": 1.5e-3},
    **{"passes_eager": 210.0, "launch_experts": 2.5, "experts_products": 0.6, "loss_eager": 80.0},
}
RATES = {"bf16": 4e11, "fp32": 1e11}
ATTENTION, COPIES, BUS, WAIT = 9e10, 3e10, 2e9, 1e-4
MACHINE: dict[str, Any] = {
    **{"name": "planted", "memory_bytes": 2.4e10, "host_memory_bytes": 2.4e10, "ranks": 2},
    **{"disk_bandwidth": 1e9, "adam_rate": 2e8, "asynchronous": False},
}


def planted() -> dict[str, Any]:
    """Return simulated timings of a machine with these rates and constants."""
    constants = Constants(products=1.0, attention=1.0, memory=1.0, **PLANTED)
    found: dict[str, Any] = {
        **{"dtypes": list(RATES), "threads": 1, "copy_bytes_per_s": COPIES, "products": []},
        "at": dict.fromkeys(
            ("products", "attention", "copy_bytes_per_s", "layers", "heads", "adam_rate", "disk"),
            "now",
        ),
    }
    for dtype, rate in RATES.items():
        for rows, k, n in (*pieces.PRODUCTS, (1 << 20, 1 << 14, 1 << 14)):
            product = operators.product_time(*map(np.float64, (rows, k, n, rate)), constants)
            seconds = 3 * float(product)
            found["products"].append(
                {"dtype": dtype, "rows": rows, "k": k, "n": n, "seconds": seconds}
            )
    found["attention"] = [
        {"tokens": 1024, "length": s, "inner": 256}
        | {"seconds": 3.5 * 2 * 1024 * s * 256 / ATTENTION * (1 + 400.0 / s)}
        for s in pieces.LENGTHS
    ]
    shapes = [
        {"width": w, "heads": h, "sequences": b, "length": s, "expert_ffn": e * w}
        for e in (0, 1)
        for w, h, b, s in pieces.LAYERS
    ]
    hardware = described(found | {"layers": None, "heads": None})
    rows = [describe._layer_row(shape, "bf16") for shape in shapes]
    cases = Cases.of(rows, {describe.NAME: hardware})
    seconds_C = describe.layer_seconds(cases, constants, asynchronous=False)
    found["layers"] = [s | {"seconds": float(t)} for s, t in zip(shapes, seconds_C, strict=True)]
    heads = [{"width": w, "vocabulary": v, "tokens": t} for w, v, t in pieces.VOCABULARIES]
    cases = Cases.of([describe._head_row(h, "bf16") for h in heads], {describe.NAME: hardware})
    seconds_C = operators.head(cases, constants)
    found["heads"] = [h | {"seconds": float(t)} for h, t in zip(heads, seconds_C, strict=True)]
    return found


def described(found: dict[str, Any]) -> HardwareConfig:
    """Return the known rates as hardware, before any fit."""
    tree = load_hardware("h100").model_dump()
    tree["gpu"] |= {"peak_flops": RATES, "attainable": dict.fromkeys(RATES, 1.0)}
    tree["gpu"] |= {"attention": ATTENTION / RATES["bf16"], "asynchronous": False}
    tree["gpu"] |= {"memory_bandwidth": found["copy_bytes_per_s"], "copy_efficiency": 1.0}
    return HardwareConfig.model_validate(tree)


def together() -> dict[str, Any]:
    sizes = {"all-reduce": (1024, 1 << 23), "send forward": (1024, 1 << 23)}
    halves = dict.fromkeys(("all-gather", "reduce-scatter", "all-to-all"), (512, 1 << 22))
    told = [
        {"kind": kind, "bytes": size, "bus_bytes": size, "seconds": WAIT + (size - first) / BUS}
        for kind, (first, large) in (sizes | halves).items()
        for size in (first, large)
    ]
    at = {"messages": "now", "crowd": "now"}
    return {"ranks": 2, "messages": told, "crowd": {"products": 0.9, "memory": 0.7}, "at": at}


def test_planted_rates_and_constants_come_back() -> None:
    found = describe.describe(planted() | {"together": together()}, MACHINE)
    for dtype, rate in RATES.items():
        assert found.gpu.peak_flops[dtype] * found.gpu.attainable[dtype] == pytest.approx(
            rate, rel=0.01
        )
    assert found.gpu.attention * found.gpu.peak_flops["bf16"] == pytest.approx(ATTENTION, rel=0.01)
    for name, value in PLANTED.items():
        assert found.constants[name] == pytest.approx(value, rel=0.05), name
    assert found.inside.bandwidth == pytest.approx(BUS)
    assert found.inside.latency_s == pytest.approx(WAIT)
    assert found.constants["data_bandwidth"] == pytest.approx(1.0)
    assert found.left(2) == (0.9, 0.7)
    Constants.of_hardware(found)


def test_a_machine_of_one_rank_sends_nothing() -> None:
    found = describe.describe(planted(), MACHINE | {"ranks": 1})
    assert (found.gpus_per_node, found.crowds) == (1, ())
    assert "data_bandwidth" not in found.constants


def test_what_is_written_is_read_with_the_time_of_each_number(tmp_path: Path) -> None:
    timed = planted() | {"together": together()}
    hardware = describe.describe(timed, MACHINE)
    text = doctor_measure.as_yaml(hardware, timed, tmp_path)
    file = tmp_path / "here.yaml"
    file.write_text(text, encoding="utf-8")
    read = load_hardware(str(file))
    assert read.constants == pytest.approx(hardware.constants, rel=1e-3)
    assert read.model_dump(exclude={"constants", "gpu", "inside", "across"}) == hardware.model_dump(
        exclude={"constants", "gpu", "inside", "across"}
    )
    assert text.count("now") >= 8


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PRODUCTS", ((64, 64, 64), (32, 64, 32)))
    monkeypatch.setattr(pieces, "LENGTHS", (16, 32))
    monkeypatch.setattr(pieces, "LAYERS", ((32, 1, 1, 16), (64, 1, 1, 32)))
    monkeypatch.setattr(pieces, "VOCABULARIES", ((64, 128, 16),))
    monkeypatch.setattr(pieces, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(pieces, "ADAM_ELEMENTS", 1 << 10)


@pytest.mark.usefixtures("small")
def test_pieces_of_this_process_are_timed_and_described(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = pieces.Clock(torch.device("cpu"), seconds=0.0)
    found = pieces.pieces(clock, ("bf16", "fp32"))
    assert [p["dtype"] for p in found["products"]] == ["bf16"] * 2 + ["fp32"] * 2
    assert [layer["expert_ffn"] for layer in found["layers"]] == [0, 0, 32, 128]
    every = [*found["products"], *found["attention"], *found["layers"], *found["heads"]]
    assert all(one["seconds"] > 0 for one in every)
    hardware = describe.describe(found, MACHINE | {"ranks": 1})
    assert hardware.gpu.peak_flops["bf16"] > 1e6
    assert set(hardware.constants) <= set(Constants.names())


@pytest.mark.usefixtures("small")
def test_the_doctor_measures_says_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    clock = pieces.Clock(torch.device("cpu"), seconds=0.0)
    disk = doctor_measure.disk_rates
    monkeypatch.setattr(doctor_measure, "measure_alone", lambda _, d: pieces.pieces(clock, d))
    monkeypatch.setattr(doctor_measure, "measure_ranks", lambda *_: together())
    monkeypatch.setattr(doctor_measure, "disk_rates", lambda folder: disk(folder, 1 << 20))
    kept, out = tmp_path / "rates.json", tmp_path / "here.yaml"
    findings = list(doctor._machine(tmp_path, out, kept))
    assert {one.status for one in findings} == {"ok"}
    assert load_hardware(str(out)) == load_hardware("this-machine")
    assert '"adam_parameters_per_s"' in kept.read_text()


@pytest.mark.parametrize(
    ("out", "said"),
    [("here.txt", "YAML file; name it .*here.txt.yaml"), ("no/here.yaml", "no is not there")],
)
def test_a_file_that_cannot_be_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, said: str
) -> None:
    monkeypatch.setattr(doctor_measure, "measure_alone", None)
    with pytest.raises(UserError, match=said):
        doctor_measure.measure(tmp_path, tmp_path / out)


def test_a_file_without_a_measurement_is_refused() -> None:
    with pytest.raises(UserError, match="add --measure"):
        doctor.examined(Doctor(out=Path("here.yaml")))


def test_a_process_has_what_was_added_to_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOMETRY_ONE", "before")
    with ranks.added({"ALLOMETRY_ONE": "1", "ALLOMETRY_TWO": "2"}):
        assert (ranks.os.environ["ALLOMETRY_ONE"], ranks.os.environ["ALLOMETRY_TWO"]) == ("1", "2")
    assert ranks.os.environ["ALLOMETRY_ONE"] == "before"
    assert "ALLOMETRY_TWO" not in ranks.os.environ


@pytest.mark.slow
def test_two_processes_measure_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ranks.measure_ranks(2, 1, 1, 0.1, {})
    assert {one["kind"] for one in found["messages"]} == set(ranks.KINDS)
    assert all(one["seconds"] > 0 for one in found["messages"])
    assert all(0 < share <= 1 for share in found["crowd"].values())
