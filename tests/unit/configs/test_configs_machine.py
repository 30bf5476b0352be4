"""Descriptions of hardware: all that ship are read, and a mistake is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from allometry.configs.errors import ConfigError
from allometry.configs.machine import known_hardware, load_hardware


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
