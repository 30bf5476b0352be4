"""Figures of coordcheck and transfer, messages of stopped commands, and depth without a rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from pydantic import TypeAdapter

from allometry.configs.model import ParameterizationConfig
from allometry.configs.run import RunConfig
from allometry.launch.figures import drawing
from allometry.launch.figures.figure import Figure, Panel, Series
from allometry.launch.studies import coordcheck, gates, transfer
from allometry.launch.studies.commands import CoordCheck, Transfer
from allometry.launch.studies.coordcheck import checked
from allometry.launch.studies.transfer import swept
from allometry.scaling.shapes import Axis
from allometry.studies.sweeps.outcome import Trial
from allometry.studies.sweeps.transfer import TransferSweep
from asked import about

Make = Callable[..., RunConfig]
MUP = ("parameterization={kind: mup, base_width: 16, embedding_std: 1.0}",)


def panels_of(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Panel]:
    """Return the list of panels drawn by a gate from now on."""
    seen: list[Panel] = []

    def draw(figure: Figure, out: Path) -> None:
        seen.extend(figure.panels)
        drawing.draw(figure, out)

    monkeypatch.setattr(module, "draw", draw)
    return seen


def series_of(panel: Panel, name: str) -> dict[str, Series]:
    """Return the series drawn under a name, by style."""
    return {series.style: series for series in panel.series if series.name == name}


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_figure_of_a_sweep(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: int
) -> None:
    def loss(_: TransferSweep, trial: Trial) -> float:
        vertex = -6.25 if trial.size == 16 else -20.0  # far outside: no best rate inside
        return (
            math.inf if trial.log2_lr > -4.0 else 2.0 + (trial.log2_lr - vertex) ** 2 + trial.seed
        )

    seen = panels_of(transfer, monkeypatch)
    monkeypatch.setattr(TransferSweep, "loss", loss)
    request = Transfer(
        config="",
        sizes="16,32", seeds=seeds, steps=2, sequences=2, length=8, processes=1,
        octaves=3.0, out=tmp_path / "t.png",
    )  # fmt: skip
    text = swept(about(tiny(*MUP), request)).text
    (panel,) = seen
    assert panel.y_label == "held-out loss, nats per token"
    near, far = series_of(panel, "width 16"), series_of(panel, "width 32")
    star = near["star"]
    assert (star.x[0], star.y[0]) == pytest.approx((2.0**-6.25, 2.0 + (seeds - 1) / 2))
    assert "star" not in far
    assert max(near["joined"].x) == 2.0**-4.0, "runs that diverged are left out"
    if seeds == 1:
        assert "band" not in near
        assert "over width, 1 seed, " in text
    else:
        assert near["band"].high - near["band"].low == pytest.approx(1.0)
        assert "over width, 2 seeds, " in text


def test_the_figure_of_a_check(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = panels_of(coordcheck, monkeypatch)
    request = CoordCheck(
        config="",
        widths="16,32",
        depths="1,2",
        seeds=2,
        steps=1,
        length=8,
        processes=1,
        out=tmp_path / "c.png",
    )
    checked(about(tiny(*MUP), request))
    assert [(panel.x_label, panel.x_marks) for panel in seen] == [
        ("width", (16, 32)),
        ("depth, layers", (1, 2)),
    ]
    assert seen[0].y_label == "rms of what moved in 1 step"
    bands = [series for series in seen[0].series if series.style == "band"]
    assert len(bands) == len(seen[0].series) / 2 > 0
    for band in bands:
        assert np.all((band.low <= band.y) & (band.y <= band.high))


def stop_after(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise Ctrl-C when ``number`` trials of a sweep have begun."""
    begun: list[Trial] = []
    train = TransferSweep.loss

    def loss(self: TransferSweep, trial: Trial) -> float:
        if len(begun) == number:
            raise KeyboardInterrupt
        begun.append(trial)
        return train(self, trial)

    monkeypatch.setattr(TransferSweep, "loss", loss)


@pytest.mark.parametrize(
    ("ended", "kept", "lost"),
    [
        (0, "no trial had ended", "no trial had ended"),
        (1, "1 trial is kept in {}", "the trial that had ended is lost: keep them with --trials"),
        (2, "2 trials are kept in {}, and the same command goes on from there", "the 2 trials "),
    ],
)
def test_a_stopped_sweep_says_what_it_kept(
    tiny: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ended: int,
    kept: str,
    lost: str,
) -> None:
    short = {"sizes": "16,32", "seeds": 1, "steps": 2, "sequences": 2, "length": 8, "processes": 1}
    for trials, said in ((tmp_path / "t.jsonl", kept), (None, lost)):
        request = Transfer(config="", **short, trials=trials, out=tmp_path / "t.png")
        config = tiny(*MUP)
        with monkeypatch.context() as patch:
            stop_after(ended, patch)
            with pytest.raises(SystemExit) as end:
                swept(about(config, request))
        assert end.value.code == 130
        assert capsys.readouterr().err.startswith(f"allometry: stopped; {said.format(trials)}")
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 1 + ended


def test_a_stopped_check_says_that_nothing_is_kept(
    tiny: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(coordcheck.CoordinateCheck, "movement", stop)
    request = CoordCheck(config="", widths="16,32", length=8, processes=1, out=tmp_path / "c.png")
    with pytest.raises(SystemExit) as end:
        checked(about(tiny(*MUP), request))
    assert end.value.code == 130
    assert capsys.readouterr().err == (
        "allometry: stopped; nothing is kept: a check is run from its beginning\n"
    )


COMPLETEP = "parameterization={kind: completep, base_width: 16, base_layers: 1}"
NO_RULE = "parameterization.kind=mup has no rule for depth; completep (with depth_alpha 0.5: "


@pytest.mark.parametrize("bound", [0.0, 99.0])
def test_a_check_that_fails_over_depth_names_rules_for_it(
    tiny: Make, tmp_path: Path, bound: float
) -> None:
    small = {"seeds": 1, "steps": 1, "length": 8, "processes": 1, "out": tmp_path / "c.png"}
    bounds = {"block_bound": bound, "logit_bound": bound}
    deep = CoordCheck(config="", depths="1,2", **small, **bounds)
    report = checked(about(tiny(*MUP), deep))
    text, passed = report.text, report.passed
    assert passed == (bound > 0.0)
    assert (NO_RULE in text) == (not passed)
    text = checked(about(tiny(COMPLETEP), deep)).text
    assert "no rule for depth" not in text
    wide = CoordCheck(config="", widths="16,32", **small, **bounds)
    text = checked(about(tiny(*MUP), wide)).text
    assert "no rule for depth" not in text


def test_a_sweep_that_fails_over_depth_names_rules_for_it(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(_: TransferSweep, trial: Trial) -> float:
        return 2.0 + (trial.log2_lr + 6.0 + trial.size) ** 2

    monkeypatch.setattr(TransferSweep, "loss", loss)
    small = {"seeds": 2, "steps": 2, "sequences": 2, "length": 8, "processes": 1}
    for axis, kind, said in (
        ("depth", MUP[0], True),
        ("depth", COMPLETEP, False),
        ("horizon", MUP[0], False),
    ):
        request = Transfer(config="", axis=axis, sizes="2,4", **small, out=tmp_path / "t.png")
        report = swept(about(tiny(kind), request))
        assert not report.passed
        assert (NO_RULE in report.text) == said


def test_what_has_a_rule_for_depth() -> None:
    parse = TypeAdapter(ParameterizationConfig).validate_python
    base = {"base_width": 16, "base_layers": 2}
    mssp = {"regime": "I", "base_experts": 4, "base_experts_per_token": 1, "base_expert_width": 16}
    for kind in ("completep", "mupp", "hyperp"):
        assert gates.has_depth_rule(parse({"kind": kind, **base}))
    assert gates.has_depth_rule(parse({"kind": "mssp", **base, **mssp}))
    without = parse({"kind": "mssp", "base_width": 16, **mssp})
    assert not gates.has_depth_rule(without)
    (line,) = gates.depth_words(without, Axis.DEPTH)
    assert line.startswith("parameterization.kind=mssp has no rule for depth without base_layers; ")
    assert not gates.has_depth_rule(parse({"kind": "sp"}))
