"""Run examples/continual from its command to its result, with very short runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from allometry.configs.loader import load

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "continual"


def test_the_example_describes_runs() -> None:
    for width in (32, 48, 64):
        more = [f"model.width={width}", f"model.ffn_width={3 * width}", "data.sources.1.weight=1"]
        config = load(
            EXAMPLE / "base.yaml", [*more, "data.replay={ratio: 0.1, sources: [python-code]}"]
        )
        assert config.schedule.kind == "constant"
        assert config.data.replay is not None


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_example_is_stopped_and_goes_on_to_its_result(tmp_path: Path) -> None:
    """From a folder other than the repository's; a third call trains nothing."""
    words = [sys.executable, "-u", str(EXAMPLE / "run.py"), "--out", "made", "--widths", "16"]
    words += ["--trunk-steps", "60", "--steps", "20", "--skip", "0", "--rise", "100"]
    words += ["--bound", "0.15"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if re.match(r"\[1/6\] trunk", line):
                first.send_signal(signal.SIGINT)
                break
        assert "the same command goes on from here" in first.stdout.read()
    assert first.returncode == 128 + signal.SIGINT
    out = tmp_path / "made"
    assert not (out / "result.json").exists()

    def run() -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = run()
    result = json.loads((out / "result.json").read_text())
    assert list(result["held out"]) == ["r=0.75"]  # one size, none held out
    assert result["law"]["rows"] == 5 * 10
    replay = result["check"]["replay"]
    assert 0.0 < replay < 0.75
    assert "at the critical ratio, replay" in said
    rows = (tmp_path / result["check"]["run"] / "metrics.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    own = last["tokens"] - 60 * last["tokens"] // 80
    assert last["tokens/python-prose"] == pytest.approx((1 - replay) * own, rel=0.02)
    assert (out / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]

    before = {path: path.stat().st_mtime_ns for path in out.glob("width-16/runs/*/metrics.jsonl")}
    assert "at the critical ratio, replay" in run()
    assert len(before) == 7
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert json.loads((out / "result.json").read_text())["check"] == result["check"]
