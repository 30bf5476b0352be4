"""Hardware configs: all shipped files load, and an error is one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import BaseModel

from allometry.configs import machine
from allometry.configs.errors import ConfigError
from allometry.configs.machine import HardwareConfig, known_hardware, load_hardware

ROOT = Path(machine.__file__).resolve().parents[1]


def test_every_shipped_description_is_read() -> None:
    asked = {"a100", "h100", "h200", "b200", "gb200", "mi250x", "mi300x"}
    assert asked <= set(known_hardware())
    for name in known_hardware():
        found = load_hardware(name)
        assert set(found.gpu.attainable) == set(found.gpu.peak_flops), name
        assert found.network_bandwidth <= found.inside.bandwidth, name
        assert found.gpu.memory_bytes < found.host.memory_bytes, name


def test_the_h100_is_what_its_datasheet_says() -> None:
    found = load_hardware("h100")
    assert (found.gpu.peak_flops["bf16"], found.gpu.memory_bandwidth) == (989.4e12, 3.35e12)
    assert found.network_bandwidth == 50e9
    assert load_hardware("mi250x").network_bandwidth == 4 * 25e9 / 8


@pytest.mark.parametrize(
    "generations", [("a100", "h100", "h200", "b200", "gb200", "gb300"), ("mi250x", "mi300x")]
)
def test_a_later_generation_is_no_slower_and_no_smaller(generations: tuple[str, ...]) -> None:
    for before, after in pairwise(map(load_hardware, generations)):
        for dtype in before.gpu.peak_flops:
            assert after.gpu.peak_flops[dtype] >= before.gpu.peak_flops[dtype], after.name
        for one, other in ((before.gpu, after.gpu), (before.host, after.host)):
            assert other.memory_bytes >= one.memory_bytes, after.name
            assert other.power_w >= one.power_w, after.name
        assert after.gpu.memory_bandwidth >= before.gpu.memory_bandwidth, after.name
        assert after.inside.bandwidth >= before.inside.bandwidth, after.name
        assert after.across.bandwidth >= before.across.bandwidth, after.name
        assert after.host.bandwidth >= before.host.bandwidth, after.name
        assert after.host.adam_rate >= before.host.adam_rate, after.name


@pytest.mark.parametrize("name", sorted(known_hardware()))
def test_numbers_are_in_their_units(name: str) -> None:
    found = load_hardware(name)
    gpu, host, nodes = found.gpu, found.host, found.gpus_per_node / 8
    assert gpu.peak_flops["fp16"] == gpu.peak_flops["bf16"]
    assert 2 <= gpu.peak_flops["bf16"] / gpu.peak_flops["fp32"] <= 4.01
    if "fp8" in gpu.peak_flops:
        assert gpu.peak_flops["fp8"] == pytest.approx(2 * gpu.peak_flops["bf16"], rel=0.001)
    assert 0.2e12 < gpu.peak_flops["bf16"] / gpu.power_w < 3e12
    assert 60 < gpu.peak_flops["bf16"] / gpu.memory_bandwidth < 350  # FLOPs per byte
    assert 0.01 < gpu.memory_bytes / gpu.memory_bandwidth < 0.06  # seconds to read the full memory
    assert 100 < gpu.power_w < 2000
    assert 500 * nodes <= host.power_w < 10000 * nodes
    assert 3e-6 < found.inside.latency_s <= found.across.latency_s < 1e-3
    assert 1e9 < host.disk_bandwidth < host.bandwidth < gpu.memory_bandwidth
    # 28 bytes per parameter, at a CPU's memory bandwidth
    assert 0.1e12 < 28 * host.adam_rate / max(nodes, 1) < 2e12


@pytest.mark.parametrize("name", sorted(known_hardware()))
def test_every_number_says_where_it_is_from(name: str) -> None:
    lines = known_hardware()[name].read_text(encoding="utf-8").splitlines()
    told = False
    for line in lines:
        key = line.strip().split(":")[0]
        if line.strip().startswith("#"):
            told = True
        elif re.fullmatch(r"\s*[a-z_]+:", line):
            told = False
        elif key not in ("name", "generation", "gpus_per_node", "nics_per_node"):
            assert told, f"{name}: {key} has no source"
            told = key == "memory_bytes"  # reported in one line with its bandwidth


def leaves(kind: type[BaseModel]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        inside = field.annotation
        if isinstance(inside, type) and issubclass(inside, BaseModel):
            yield from leaves(inside)
        yield name


def test_every_field_is_used() -> None:
    sources = [*ROOT.glob("scaling/**/*.py"), *ROOT.glob("launch/**/*.py"), ROOT / machine.__file__]
    text = "\n".join(
        line
        for file in sources
        for line in file.read_text(encoding="utf-8").splitlines()
        if file.name not in ("doctor.py", "doctor_measure.py")
    )
    unused = {name for name in leaves(HardwareConfig) if not re.search(rf"\.{name}\b", text)}
    assert not unused


def test_ranks_that_share_a_processor_have_less_each() -> None:
    alone = load_hardware("h100")
    assert alone.left(8) == (1.0, 1.0)
    assert alone.rank_memory(8) == alone.gpu.memory_bytes
    crowds = [
        {"ranks": 8, "products": 0.5, "memory": 0.2},
        {"ranks": 2, "products": 0.9, "memory": 0.8},
    ]
    tree = alone.model_dump() | {"crowds": crowds}
    tree["gpu"]["asynchronous"] = False
    shared = HardwareConfig.model_validate(tree)
    assert shared.left(1) == (1.0, 1.0)
    assert shared.left(2) == (0.9, 0.8)
    assert shared.left(5) == pytest.approx((0.7, 0.5))
    assert shared.left(16) == pytest.approx((0.25, 0.1))
    assert shared.rank_memory(2) == alone.gpu.memory_bytes / 2
    assert shared.rank_memory(64) == alone.gpu.memory_bytes / 8


def test_this_machine_is_read_where_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"this-machine was not measured yet .*doctor --measure"):
        load_hardware("this-machine")
    file = machine.measured_file()
    assert tmp_path in file.parents
    file.parent.mkdir(parents=True)
    file.write_text(known_hardware()["h100"].read_text(encoding="utf-8"), encoding="utf-8")
    assert load_hardware("this-machine") == load_hardware("h100")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("gpus_per_node: 8", "gpus_per_nod: 8", r"gpus_per_nod is not a known key; did you mean"),
        ("gpus_per_node: 8", "gpus_per_node: 0", r"gpus_per_node=0 is not valid"),
        ("attention: 0.48", "attention: 48", r"gpu.attention=48 is not valid"),
        ("{fp32: 4.947e+14", "{int8: 4.947e+14", r"peak_flops.int8"),
        ("host:", "hosts:", r"hosts is not a known key"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_place(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    text = known_hardware()["h100"].read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as raised:
        load_hardware(str(file))
    assert "mine.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no hardware 'h1000'; use one of a100, b200"):
        load_hardware("h1000")
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_hardware(str(tmp_path / "absent.yaml"))
