"""Hostile configs are refused quickly in one sentence, and no part of them is executed."""

import json
import time
from pathlib import Path

import pytest

from allometry.configs import json_file
from allometry.configs.errors import ConfigError, UserError
from allometry.configs.loader import load
from allometry.configs.machine import load_hardware
from allometry.configs.source import parse_file, parse_value

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
HARMFUL = {
    "bomb": BOMB,
    "merged bomb": "y: &y {k: 1}\nz: {<<: *y}\n" + BOMB,
    "itself": "a: &a [*a]",
    "itself in a mapping": "a: &a {b: *a}",
    "deep": "a: " + "[" * 500 + "]" * 500,
    "deeper": "a: " + "[" * 50_000,
    "deep lines": "\n".join("  " * depth + "a:" for depth in range(300)),
    "python": "a: !!python/object/apply:os.system ['touch MARK']",
    "python name": "a: !!python/name:os.system",
    "tag": "a: !!bool x",
    "own tag": "a: !x y",
    "date": "a: 2001-01-01",
    "binary": "a: !!binary aGVsbG8=",
    "set": "a: !!set {x, y}",
    "digits": "a: " + "9" * 10_000,
    "zero": "a: \0",
    "key": "? [1, 2]\n: 3",
    "number as a key": "1: 2",
    "two documents": "a: 1\n---\nb: 2",
    "another version": "%YAML 9.9\n---\na: 1",
    "large": "a: " + "x" * 600_000,
}


@pytest.mark.parametrize("what", HARMFUL)
def test_harmful_yaml_is_refused(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(HARMFUL[what])
    begun = time.monotonic()
    for read in (load, load_hardware):
        with pytest.raises(ConfigError) as caught:
            read(str(path))
        said = str(caught.value)
        assert "\n" not in said
        assert len(said) < 1000
    assert time.monotonic() - begun < 30.0
    assert not (tmp_path / "MARK").exists()


def test_aliases_and_merges_may_be_used(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("x: &x {p: 1, q: &q true}\ny:\n  <<: *x\n  q: 2\nz: [*x, *q]\n")
    tree = parse_file(path)
    assert tree.data["y"] == {"p": 1, "q": 2}
    assert tree.data["z"] == [{"p": 1, "q": True}, True]
    assert tree.data["z"][1] is True
    assert tree.origin["y", "q"] == f"{path}:4"


def test_long_values_are_shortened() -> None:
    with pytest.raises(ConfigError) as caught:
        load("preset:demo", [f"model.width={'x' * 5000}"])
    assert len(str(caught.value)) < 600
    assert parse_value("[1, 2]", "here") == [1, 2]


def test_json_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for depth in (json_file.MOST_DEPTH + 1, 900, 100_000):
        for text in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            with pytest.raises(ValueError, match="nests too deeply"):
                json_file.parse(text)
    depth = json_file.MOST_DEPTH
    assert json_file.parse("[" * depth + "]" * depth)
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": "x" * 100}))
    assert json_file.read_object(path)
    monkeypatch.setattr(json_file, "MOST_BYTES", 50)
    with pytest.raises(ValueError, match="has more than"):
        json_file.read(path)


def test_paths_that_no_system_takes() -> None:
    for path in ("x" * 300, "a/" * 3000, "a\0b"):
        with pytest.raises(UserError, match="cannot be a path"):
            load("preset:demo", [f"run.folder={json.dumps(path)}"])
