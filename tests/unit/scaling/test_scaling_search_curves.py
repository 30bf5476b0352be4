"""Scale curves: strong scaling keeps the batch, weak scaling grows it, gaps have reasons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from allometry.configs.loader import load
from allometry.configs.machine import load_hardware
from allometry.configs.run import RunConfig
from allometry.launch.cli import app
from allometry.scaling.search.curves import scale_curve
from allometry.scaling.search.search import Asked

SMALL = ("batch.ramp=null", "model.num_layers=4", "batch.sequences=64")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load("preset:dense_7b", list(SMALL))


@pytest.fixture(scope="module")
def asked() -> Asked:
    return Asked(load_hardware("h100"), "h100")


def test_strong_scaling_keeps_the_batch_and_loses_rate(config: RunConfig, asked: Asked) -> None:
    points = scale_curve(config, asked, "strong", 8, gpus=(64, 8, 256))
    assert [(p.gpus, p.sequences) for p in points] == [(8, 64), (64, 64), (256, 64)]
    assert points[0].efficiency == 1.0
    shares = [p.efficiency for p in points]
    assert all(share is not None for share in shares)
    assert shares[0] > shares[1] > shares[2] > 0  # type: ignore[operator]
    seconds = [p.best.seconds for p in points if p.best is not None]
    assert seconds == sorted(seconds, reverse=True)


def test_weak_scaling_grows_the_batch_and_loses_less(config: RunConfig, asked: Asked) -> None:
    strong, weak = (
        scale_curve(config, asked, kind, 8, gpus=(8, 64)) for kind in ("strong", "weak")
    )
    assert [p.sequences for p in weak] == [64, 512]
    assert weak[0].best == strong[0].best
    assert weak[1].efficiency is not None
    assert strong[1].efficiency is not None
    assert weak[1].efficiency > strong[1].efficiency


def test_a_number_without_a_layout_says_why(config: RunConfig, asked: Asked) -> None:
    odd = scale_curve(config, asked, "weak", 7, gpus=(8,))
    assert odd[0].best is None
    assert "9.14 sequences a GPU make no whole batch" in odd[0].reason
    none = scale_curve(config, asked, "strong", 8, gpus=(97,))
    assert (none[0].best, none[0].reason) == (None, "no layout shares this batch")
    large = load("preset:dense_7b", [*SMALL, "model.num_layers=400"])
    full = scale_curve(large, asked, "strong", 8, gpus=(8,))
    assert (full[0].best, full[0].reason) == (None, "does not fit")


def test_the_command_prints_draws_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allometry.scaling.search.curves.scale_curve.__defaults__", (None, (8, 16)))
    out = tmp_path / "curves.png"
    where = ("plan", "preset:dense_7b", "--cluster", "h100", "--gpus", "8", "--scale", *SMALL)
    done = CliRunner().invoke(app, [*where, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert [(p["kind"], p["gpus"]) for p in facts["points"]] == [
        *(("strong", 8), ("strong", 16)),
        *(("weak", 8), ("weak", 16)),
    ]
    assert out.stat().st_size > 10_000
    for more, said in (
        (("--write", "x.yaml"), "--write keeps one run's"),
        (("-o", "x.doc"), "--out="),
    ):
        refused = CliRunner().invoke(app, [*where, *more])
        assert said in str(refused.exception)
