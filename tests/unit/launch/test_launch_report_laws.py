"""The report's figures of fitted laws, IsoFLOP parabolas and sweeps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allometry.launch.report import fits, isoflop, transfer
from allometry.laws.fit.engine import FitOptions, fit
from allometry.laws.fit.store import save_fit
from allometry.laws.ladder import load_prediction, save_prediction
from allometry.laws.observations import LearningRates, Observations
from allometry.laws.registry import form_named
from allometry.laws.trials import read_trials
from fake_ladder import (
    chinchilla,
    fake_ladder,
    small_fit,
    write_fit,
)
from fake_runs import fake_run
from report_sections import inputs, panels, trial_file


def test_a_fit_is_drawn_with_its_band_and_target(tmp_path: Path) -> None:
    section = fits.fits(inputs(fake_ladder(tmp_path / "ladder")))
    by_title = panels(section)
    assert set(by_title) == {"chinchilla over N", "measured against predicted", "residuals"}
    law = by_title["chinchilla over N"].series
    bands = [one for one in law if one.style == "band"]
    assert len(bands) == 3  # one per D
    for band in bands:
        assert band.low is not None
        assert band.high is not None
        assert (band.low <= band.high).all()
        assert (band.high > band.low).any()
    against = by_title["measured against predicted"].series
    stars = [one for one in against if one.style == "star"]
    assert (stars[0].x[0], stars[0].y[0]) == (3.0, 3.05)
    assert section.tables[1].rows[0][3:] == (
        "3.0000",
        "2.9000 to 3.1000",
        "before the target began",
        "3.0500",
        "-1.64 %",
        "yes",
    )
    assert section.notes[0].endswith("ladder: N=1e8 is outside of the fitted range.")
    errors = by_title["residuals"].series[1].y
    assert 0.0 < np.abs(errors).max() < 5.0


def test_a_loss_has_one_unit_in_figures_and_tables(tmp_path: Path) -> None:
    form = form_named("d_cpt")
    assert form.target.unit == "nats per token"
    draw = np.random.default_rng(2)
    columns = {v.name: draw.uniform(0.1, 0.9, 40) for v in form.inputs}
    values = {p.name: float(np.mean(p.start)) for p in form.parameters}
    target = form.predict(values, form.prepare(Observations.of(columns)))
    rows = Observations.of(columns | {form.target.name: target})
    save_fit(tmp_path / "fit.json", fit(form, rows, FitOptions(starts=8)))
    section = fits.fits(inputs(fit=tmp_path / "fit.json"))
    for panel in panels(section).values():
        assert "unit of the data" not in panel.x_label + panel.y_label
    assert "(nats per token)" in panels(section)["residuals"].x_label
    units = {row[-1] for table in section.tables for row in table.rows}
    assert "nats per token" in units
    assert "unit of the data" not in units


def test_a_target_outside_of_its_interval_is_said(tmp_path: Path) -> None:
    section = fits.fits(inputs(fake_ladder(tmp_path / "ladder", measured=3.5)))
    assert section.tables[1].rows[0][-1] == "NO"
    section = fits.fits(inputs(fake_ladder(tmp_path / "other", measured=None)))
    assert section.tables[1].rows[0][-3:] == ("not trained yet", "–", "–")
    assert not any(
        one.style == "star" for one in panels(section)["measured against predicted"].series
    )


def test_a_target_without_an_interval_says_why(tmp_path: Path) -> None:
    folder = fake_ladder(tmp_path / "ladder", measured=3.5)
    kept = load_prediction(folder / "prediction.json")
    assert kept is not None
    save_prediction(folder / "prediction.json", replace(kept, low=None, high=None))
    row = fits.fits(inputs(folder)).tables[1].rows[0]
    assert "none: the law is not identified" in row
    assert row[-1] == "–"


def test_a_law_of_many_sizes_is_drawn_for_ranges(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    size, tokens = draw.uniform(1e6, 1e8, 60), draw.uniform(1e8, 1e10, 60)
    loss = 1.7 + 400.0 / size**0.34 + 410.0 / tokens**0.28
    rows = Observations.of({"N": size, "D": tokens, "loss": loss})
    write_fit(tmp_path / "fit.json", rows, samples=0)
    section = fits.fits(inputs(fit=tmp_path / "fit.json"))
    assert "curves are for the middle of 6 ranges" in section.figures[0].text
    drawn = panels(section)["chinchilla over D"].series
    dots = [one for one in drawn if one.style == "dots"]
    assert [len(one.x) for one in dots] == [10] * 6
    assert sorted(np.concatenate([one.x for one in dots])) == sorted(tokens)
    assert len([one for one in drawn if one.style == "line"]) == 6
    assert not any(one.style == "band" for one in drawn)  # no bootstrap


def test_what_a_fit_held_out_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    fitted = fit(form_named("chinchilla"), small_fit(), FitOptions(starts=16))
    held_out = {
        "how": "each by the others",
        "relative": True,
        "mean": 0.01,
        "max": 0.02,
        "predicted": [4.0, 5.0],
        "measured": [4.08, 5.0],
    }
    save_fit(path, fitted, None, {"held_out": held_out, "notes": ["E is hardly known"]})
    section = fits.fits(inputs(fit=path))
    assert "Note: E is hardly known." in section.figures[0].text
    assert "Held-out error: 1.000% in the mean, 2.000% at most" in section.figures[0].text
    crosses = [one for one in panels(section)["residuals"].series if one.style == "cross"]
    assert crosses[0].y.tolist() == pytest.approx([100 * (4.0 / 4.08 - 1), 0.0])
    save_fit(path, fitted, None, {"held_out": None})
    section = fits.fits(inputs(fit=path))
    assert not any(one.style == "cross" for one in panels(section)["residuals"].series)


def test_a_law_of_curves_is_drawn_over_steps(tmp_path: Path) -> None:
    steps = np.arange(20.0, 2001.0, 20.0)
    rates = 1e-3 * (1 - np.arange(2000) / 2200)
    groups = [name for name in ("a", "b") for _ in steps]
    loss = np.concatenate([3.0 + 2.0 / steps**0.5, 3.1 + 2.0 / steps**0.5])
    rows = Observations(
        {"step": np.tile(steps, 2), "loss": loss},
        tuple(groups),
        curves={name: LearningRates(rates, 10) for name in ("a", "b")},
    )
    fitted = fit(form_named("tissue"), rows, FitOptions(starts=8))
    save_fit(tmp_path / "fit.json", fitted)
    drawn = panels(fits.fits(inputs(fit=tmp_path / "fit.json")))["tissue over steps"].series
    lines = {one.name: one for one in drawn if one.style == "line"}
    assert set(lines) == {"a", "b"}
    assert (lines["a"].x == steps).all()
    assert lines["a"].y == pytest.approx(fitted.predict(rows)[:100])


def test_a_law_of_many_inputs_says_that_it_is_not_drawn(tmp_path: Path) -> None:
    form = form_named("qat")
    draw = np.random.default_rng(2)
    columns = {v.name: draw.uniform(2.0, 100.0, 40) for v in form.inputs}
    values = {p.name: float(np.mean(p.start)) for p in form.parameters}
    target = form.predict(values, form.prepare(Observations.of(columns)))
    rows = Observations.of(columns | {form.target.name: target})
    save_fit(tmp_path / "fit.json", fit(form, rows, FitOptions(starts=8)))
    section = fits.fits(inputs(fit=tmp_path / "fit.json"))
    assert "inputs, so it is not drawn as curves" in section.figures[0].text
    assert set(panels(section)) == {"measured against predicted", "residuals"}


def test_isoflop_of_runs_and_fits(tmp_path: Path) -> None:
    def runs(name: str, *shapes: tuple[int, int]) -> list[Path]:
        for width, steps in shapes:
            fake_run(
                tmp_path / f"{name}{width}",
                f"training.total_steps={steps}",
                "model.vocab_size=4",
                width=width,
            )
        return [tmp_path / f"{name}{width}" for width, _ in shapes]

    equal = runs("equal", (16, 320), (32, 88), (64, 23))
    section = isoflop.isoflops(inputs(*equal))
    (panel,) = section.figures[0].panels
    dots = next(one for one in panel.series if one.style == "dots")
    assert dots.notes == ("equal16", "equal32", "equal64")
    losses = [one.final_loss[0] for one in inputs(*equal).runs]
    assert dots.y.tolist() == losses
    curve = panel.series[0]  # three points: the parabola goes through them
    assert np.interp(np.log(dots.x[1]), np.log(curve.x), curve.y) == pytest.approx(dots.y[1], 1e-3)
    apart = runs("apart", (16, 320), (32, 80), (64, 20))  # FLOPs differ by 16 %
    assert isoflop.isoflops(inputs(*apart)).absent is not None
    assert isoflop.isoflops(inputs(*equal[:2])).absent is not None
    write_fit(tmp_path / "fit.json", small_fit(), samples=0)
    section = isoflop.isoflops(inputs(fit=tmp_path / "fit.json"))
    assert section.tables[0].rows[0][2] == "3"


def test_sweeps_of_files(tmp_path: Path) -> None:
    rows: list[tuple[int, float, int, float | None]] = [
        (size, rate, seed, 2.0 + (rate - best) ** 2)
        for size, best in ((32, -6.25), (64, -5.75))
        for rate in (-8.0, -7.0, -6.0, -5.0, -4.0)
        for seed in (0, 1)
    ]
    rows += [(32, -3.0, 0, None), (32, -3.0, 1, None), (64, -3.0, 0, 9.0)]
    path = trial_file(tmp_path / "t.jsonl", rows)
    section = transfer.transfer(inputs(sweeps=(path,)))
    (panel,) = section.figures[0].panels
    lines = [one for one in panel.series if one.style == "joined"]
    stars = [one for one in panel.series if one.style == "star"]
    assert [len(one.x) for one in lines] == [5, 5]  # diverged; and a rate missing for one seed
    assert [math.log2(one.x[0]) for one in stars] == pytest.approx([-6.25, -5.75])
    assert "t.jsonl, width 64: 1 rates are left out, as not all seeds have them." in section.notes
    assert any("drifts over width by 0.50 octaves" in note for note in section.notes)
    assert section.notes[-1] == (
        "t.jsonl: the best rate of width 32 costs 12.50 % of the loss at 64 (95 % over seeds: "
        "12.50 to 12.50)."
    )


def test_sweeps_among_runs(tmp_path: Path) -> None:
    folders = []
    for rate, offset in ((0.005, 0.1), (0.01, 0.0), (0.02, 0.1)):
        for seed in (0, 1):
            folder = tmp_path / f"lr{rate}-{seed}"

            def law(size: float, tokens: Any, offset: float = offset) -> Any:
                return chinchilla(size, tokens) + offset

            fake_run(folder, f"optimizer.lr={rate}", f"run.seed={seed}", law=law)
            folders.append(folder)
    section = transfer.transfer(inputs(*folders))
    (panel,) = section.figures[0].panels
    assert panel.series[0].x.tolist() == pytest.approx([0.005, 0.01, 0.02])
    assert panel.series[1].x.tolist() == pytest.approx([0.01])
    # Stopped runs are not compared with complete ones.
    for stopped in ("stopped", "checkpoint_failed"):
        events = folders[4] / "events.jsonl", folders[5] / "events.jsonl"
        for path in events:
            path.write_text(json.dumps({"event": stopped, "step": 40}) + "\n")
        assert transfer.transfer(inputs(*folders)).absent is not None
    # Two rates are not a sweep, nor are three runs that differ in more than the rate.
    assert transfer.transfer(inputs(*folders[:4])).absent is not None
    fake_run(tmp_path / "wide", "optimizer.lr=0.02", width=64)
    assert transfer.transfer(inputs(*folders[:4], tmp_path / "wide")).absent is not None


def test_trials_that_are_damaged(tmp_path: Path) -> None:
    path = trial_file(tmp_path / "t.jsonl", [(32, -5.0, 0, 2.0)])
    with path.open("a") as file:
        file.write('{"size": 32')  # an incomplete line
    assert read_trials(path).losses == {32: {-5.0: {0: 2.0}}}
    path.write_text('{"axis": "width"}\n{"size": 32}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2, is no trial"):
        read_trials(path)
    path.write_text('{"axis": "width"}\n')
    with pytest.raises(ValueError, match="holds no trial yet"):
        read_trials(path)
