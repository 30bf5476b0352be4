from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.runs import read_run


def write(folder: Path, rows: list[dict[str, object]], tail: bytes = b"") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("model:\n  width: 8\noptimizer: {lr: 3e-4}\n")
    (folder / "run.json").write_text(json.dumps({"commit": "abc"}))
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    (folder / "metrics.jsonl").write_bytes(lines + tail)
    return folder


def test_reads_everything(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 2.5, "loss/a": 2.0, "tokens/a": 10},
        {"step": 2, "loss": 2.25, "loss/b": 3.0, "loss/a": None, "mfu": 0.5},
    ]
    write(tmp_path, rows)
    (tmp_path / "events.jsonl").write_text('{"event": "resumed", "step": 2}\n')
    run = read_run(tmp_path)
    assert run.config == {"model": {"width": 8}, "optimizer": {"lr": 3e-4}}
    assert run.record == {"commit": "abc"}
    assert run.events == [{"event": "resumed", "step": 2}]
    assert run.sources == ["a", "b"]
    np.testing.assert_array_equal(run.metrics["loss"], [2.5, 2.25])
    np.testing.assert_array_equal(run.metrics["loss/a"], [2.0, np.nan])
    np.testing.assert_array_equal(run.metrics["loss/b"], [np.nan, 3.0])
    assert run.metrics["step"].dtype == np.float64


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b'{"step": 3, "a": "\xc3', b"\n"])
def test_a_torn_last_line_is_left_out(tmp_path: Path, tail: bytes) -> None:
    run = read_run(write(tmp_path, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}], tail))
    np.testing.assert_array_equal(run.metrics["step"], [1, 2])


def test_steps_done_again_after_a_resume_count_once(tmp_path: Path) -> None:
    steps = [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0), (3, 3.5), (4, 2.5)]
    run = read_run(write(tmp_path, [{"step": step, "loss": loss} for step, loss in steps]))
    np.testing.assert_array_equal(run.metrics["step"], [1, 2, 3, 4])
    np.testing.assert_array_equal(run.metrics["loss"], [5.0, 4.0, 3.5, 2.5])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no config.yaml"):
        read_run(tmp_path)
    with pytest.raises(UserError, match=r"holds no rows yet"):
        read_run(write(tmp_path / "empty", []))
    (tmp_path / "empty" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"holds no rows yet"):
        read_run(tmp_path / "empty")


def test_damage_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "middle", [{"step": 1}], b'{"step": 2,\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2, is not JSON"):
        read_run(folder)
    with pytest.raises(UserError, match=r"'loss' that is not a number"):
        read_run(write(tmp_path / "text", [{"step": 1, "loss": "high"}]))
    with pytest.raises(UserError, match=r"without a whole number 'step'"):
        read_run(write(tmp_path / "stepless", [{"loss": 1.0}]))
    folder = write(tmp_path / "yaml", [{"step": 1}])
    (folder / "config.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"config.yaml:.* not valid YAML"):
        read_run(folder)
    with pytest.raises(UserError) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)
    folder = write(tmp_path / "plan", [{"step": 1}])
    (folder / "run.json").write_text('{"plan": null}')
    with pytest.raises(UserError, match=r"run.json: plan is not a JSON object"):
        read_run(folder)
    folder = write(tmp_path / "json", [{"step": 1}])
    (folder / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json is not JSON"):
        read_run(folder)
