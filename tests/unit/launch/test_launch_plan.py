"""``allometry plan``: answers, files and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from allometry.configs.loader import load
from allometry.launch.cli import app
from allometry.scaling.plan import RunPlan

WHERE = ("--cluster", "h100", "--gpus", "16")
LARGE = (
    *("model.width=8192", "model.num_layers=80", "model.num_heads=64", "model.ffn_width=28672"),
    "batch.ramp=null",
)


def plan(*arguments: str, preset: str = "preset:dense_7b") -> Result:
    return CliRunner().invoke(app, ["plan", preset, *arguments])


def facts(*arguments: str, preset: str = "preset:dense_7b") -> dict[str, Any]:
    done = plan(*arguments, "--json", preset=preset)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.output)
    return found


def test_it_says_first_whether_it_fits_and_then_the_layouts() -> None:
    done = plan(*WHERE, "--price", "2", "--tokens", "1T", "--top", "3", "--explain", "1")
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[1].startswith("16 GPUs: fits 67.06 GiB of 74.51 GiB in ")
    for word in ("matrix products", "optimizer states", "1T tokens", "GPU-hours", "cost"):
        assert word in done.output
    assert "not in the prediction: batch.ramp" in done.output
    assert "believed, not measured" not in done.output  # H100, 16 bit, dense: published
    unseen = plan("--cluster", "mi300x", "--gpus", "8", "--top", "1", preset="preset:demo")
    assert "believed, not measured" in unseen.output


def test_what_is_written_is_a_run_with_the_overrides_that_were_given(tmp_path: Path) -> None:
    out = tmp_path / "layout.yaml"
    given = ("parallel=auto", "optimizer.lr=1e-3", "batch.ramp=null")
    found = facts(*WHERE, "--top", "1", "--write", str(out), *given)
    [best] = found["layouts"]
    written = load(out)
    expected = load("preset:dense_7b", list(given))
    assert written.parallel.auto is None
    assert written.optimizer == expected.optimizer
    assert written.batch.sequences == expected.batch.sequences
    laid = RunPlan.of(written, 16)
    assert laid.memory.total == best["memory"]["total"] <= found["limit_bytes"]
    for axis in ("tp", "pp", "ep", "hdp"):
        assert getattr(laid.layout.degrees, axis) == best["layout"][axis]


def test_a_written_file_names_a_file_of_a_user_beside_it(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: preset:demo\nbatch: {sequences: 64}\n")
    (tmp_path / "plans").mkdir()
    out = tmp_path / "plans" / "layout.yaml"
    facts(*WHERE, "--write", str(out), preset=str(mine))
    assert "base: ../mine.yaml" in out.read_text()
    assert load(out).batch.sequences == 64
    done = CliRunner().invoke(app, ["train", str(out), "--dry-run", "--world-size", "16"])
    assert done.exit_code == 0, done.output


def test_files_of_a_user_are_not_written_over(tmp_path: Path) -> None:
    """Neither the planned run nor another file is overwritten; an earlier plan is."""
    mine, out = tmp_path / "mine.yaml", tmp_path / "layout.yaml"
    mine.write_text("base: preset:demo\n")
    for _ in range(2):
        facts(*WHERE, "--write", str(out), preset=str(mine))
    for config, target in ((mine, mine), (out, mine), (out, out)):
        before = target.read_text()
        done = plan(*WHERE, "--write", str(target), preset=str(config))
        assert "did not write, or CONFIG itself; name another" in str(done.exception)
        assert target.read_text() == before


@pytest.mark.slow
def test_several_numbers_of_gpus_and_objectives() -> None:
    odd = ("--cluster", "h100", "--gpus", "16,32,37")
    by_time = facts(*odd, "--top", "4")
    assert by_time["layouts"][0]["gpus"] == 32
    assert by_time["fits"]["37"] == {"layouts": 0, "fit": 0}
    assert "37 GPUs: no layout shares the batches" in plan(*odd).output
    by_cost = facts("--cluster", "h100", "--gpus", "16,32", "--objective", "cost", "--top", "4")
    hours = [one["gpu_hours"] for one in by_cost["layouts"]]
    assert hours == sorted(hours)
    least = facts("--cluster", "h100", "--gpus", "16", "--objective", "memory", "--top", "4")
    bytes_ = [one["memory"]["total"] for one in least["layouts"]]
    assert bytes_ == sorted(bytes_)
    assert bytes_[0] <= min(one["memory"]["total"] for one in by_cost["layouts"])


def test_what_does_not_fit_ends_with_code_1_and_what_would() -> None:
    done = plan("--cluster", "h100", "--gpus", "8", *LARGE)
    assert done.exit_code == 1
    assert "does not fit" in done.output
    assert "nearest: hdp=2 tp=4 zero=3" in done.output
    assert "32 GPUs" in done.output
    assert "parallel.zero.offload=cpu" in done.output
    found = json.loads(plan("--cluster", "h100", "--gpus", "8", "--json", *LARGE).output)
    assert found["nearest"]["bytes"] > found["limit_bytes"]
    assert all(remedy["bytes"] <= found["limit_bytes"] for remedy in found["remedies"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cluster", "h101", "--gpus", "8"), "there is no hardware 'h101'"),
        (("--cluster", "h100", "--gpus", "0"), "--gpus=0"),
        (("--cluster", "h100", "--gpus", "8,"), "--gpus=8,"),
        ((*WHERE, "--tokens", "many"), "--tokens=many"),
        ((*WHERE, "--tokens", "infT"), "--tokens=infT"),
        ((*WHERE, "--tokens", "nan"), "--tokens=nan"),
        ((*WHERE, "--objective", "speed"), "--objective=speed"),
        ((*WHERE, "--keep", "model.width"), "model.width cannot be kept"),
        ((*WHERE, "training.cuda_graphs=true"), "training.cuda_graphs=true"),
        (
            (*WHERE, "--write", "/nowhere/x.yaml"),
            "--write=/nowhere/x.yaml cannot be written: /nowhere",
        ),
        ((*WHERE, "--write", "x.yaml", "data.sources.0.weight=2"), "changes one item of a list"),
        (
            (*WHERE, "--constants", "no.json"),
            "no.json cannot be read as a calibration (No such file or directory); write one with",
        ),
        (("--cluster", "a100", "--gpus", "8", "precision.linears=fp8_rowwise"), "no rate for fp8"),
        (("--cluster", "h100", "--gpus", "97", "model.num_layers=8"), "use 96 or 112 GPUs"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = plan(*arguments)
    assert done.exception is not None
    assert said in str(done.exception)
    assert not list(tmp_path.iterdir())
