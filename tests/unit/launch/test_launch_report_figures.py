"""What the report's figures hold: the numbers of runs, fits and sweeps, thinned and named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.launch.report import fits, isoflop, losses, stability, throughput, transfer
from allometry.launch.report.figure import (
    POINTS,
    Figure,
    Panel,
    Section,
    Series,
    colours,
    smooth,
    thin,
)
from allometry.launch.report.inputs import Inputs, read_inputs
from allometry.launch.report.interactive import specification
from allometry.launch.report.report import sections
from allometry.laws.observations import Observations
from allometry.laws.trials import read_trials
from fake_ladder import (
    add_columns,
    add_event,
    chinchilla,
    fake_ladder,
    small_fit,
    watched_run,
    write_fit,
)
from fake_runs import fake_run


def inputs(*runs: Path, fit: Path | None = None, sweeps: tuple[Path, ...] = ()) -> Inputs:
    return read_inputs(runs, () if fit is None else (fit,), sweeps, 0.05)


def panels(section: Section) -> dict[str, Panel]:
    return {panel.title: panel for figure in section.figures for panel in figure.panels}


def trial_file(path: Path, rows: list[tuple[int, float, int, float | None]]) -> Path:
    lines: list[dict[str, Any]] = [{"axis": "width"}]
    lines += [{"size": s, "log2_lr": r, "seed": k, "loss": v} for s, r, k, v in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("log", [False, True])
def test_thin_keeps_the_ends_and_its_bound(log: bool) -> None:
    x = np.arange(1.0, 20_001.0)
    few_x, few_y = thin(x, -x, log=log)
    assert 100 < len(few_x) <= POINTS
    assert (few_x[0], few_x[-1]) == (1.0, 20_000.0)
    assert (few_y == -few_x).all()
    assert (np.diff(few_x) > 0).all()
    share_early = (few_x < 200).mean()
    assert (share_early > 0.3) == log
    assert len(thin(x[:POINTS])[0]) == POINTS
    assert thin(x, most=3)[0].tolist() == [1.0, 10_001.0, 20_000.0]


def test_smooth_is_a_mean_of_what_came_before() -> None:
    values = np.array([1.0, 3.0, 5.0, 7.0])
    assert smooth(values, 0.5).tolist() == [1.0, 3.0, 4.0, 6.0]
    assert smooth(values, 0.01).tolist() == values.tolist()


def test_colours_are_hues_for_few_and_sizes_for_many() -> None:
    assert len(set(colours([1.0] * 8))) == 8
    many = colours([1.0, 2.0, 3.0] * 4)
    assert many[:3] == many[3:6]
    assert len(set(many)) == 3
    lightness = [sum(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in many[:3]]
    assert lightness == sorted(lightness)


def test_losses_are_those_of_the_record(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", noise=0.1)
    shown = inputs(tmp_path / "a")
    panel = panels(losses.losses(shown))["against tokens"]
    recorded, smoothed, dots = panel.series
    metrics = shown.runs[0].metrics
    assert (recorded.y == metrics["loss"]).all()
    assert recorded.layer == "recorded"
    assert smoothed.layer == "smooth"
    # Held out: the law plus 0.1 on three quarters and minus 0.3 on one, so the law itself.
    size = shown.runs[0].parameters["non_embedding"]
    law = chinchilla(size, dots.x)
    assert dots.y == pytest.approx(law, rel=1e-12)
    compute = panels(losses.losses(shown))["against compute"].series[0]
    assert (compute.x == metrics["flops"]).all()


def test_a_source_of_another_run_has_its_own_panel(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    fake_run(
        tmp_path / "b",
        "data.sources=[{name: prose, train: p.train, weight: 1.0}]",
        held_out=(),
    )
    found = panels(losses.sources(inputs(tmp_path / "a", tmp_path / "b")))
    assert set(found) == {"web", "code", "prose"}
    assert {one.run for one in found["web"].series} == {0}
    assert {one.run for one in found["prose"].series} == {1}
    assert not any(one.style == "dots" for one in found["prose"].series)
    assert any(one.style == "dots" for one in found["web"].series)


def test_more_sources_than_fit_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    fake_run(folder)
    few: dict[str, Any] = {f"loss/s{i}": 1.0 for i in range(losses.SOURCES)}
    add_columns(folder, few | {f"tokens/s{i}": i + 1 for i in range(losses.SOURCES)})
    section = losses.sources(inputs(folder))
    assert len(panels(section)) == losses.SOURCES
    assert section.notes[0].endswith("left out: s0, s1.")


def test_forecast_and_alarm(tmp_path: Path) -> None:
    shown = inputs(watched_run(tmp_path / "a"))
    series = panels(losses.forecasts(shown))["predicted final training loss"].series
    band, line, star = series
    assert (band.style, line.style, star.style) == ("band", "line", "star")
    assert (line.y == 3.0).all()
    last = shown.runs[0].metrics["loss"][-2:].mean()  # 5 % of 40 steps
    assert star.y[0] == pytest.approx(last, rel=1e-12)
    section = stability.stability(shown)
    logits = panels(section)["largest attention logit"].series
    assert logits[0].y.tolist() == [11.0, 21.0, 31.0, 41.0]  # layer 1 has the larger ones
    assert (logits[1].x.tolist(), logits[1].y.tolist()) == ([20.0], [21.0])
    assert "Alarms raised: 1." in section.notes
    other = panels(section)["norm of the gradient"].series
    assert all(one.style != "cross" for one in other)


def test_a_run_that_is_not_finished_has_no_measured_star(tmp_path: Path) -> None:
    shown = inputs(watched_run(tmp_path / "a", stop=30))
    series = panels(losses.forecasts(shown))["predicted final training loss"].series
    assert [one.style for one in series] == ["band", "line"]
    assert throughput.runs(shown).tables[0].rows[0][1] == "stopped at step 30"


def test_launches_divide_the_steps(tmp_path: Path) -> None:
    folder = watched_run(tmp_path / "a")
    add_columns(folder, {"tokens_per_s": lambda step: 100.0 if step <= 20 else 300.0})
    rows = throughput.throughput(inputs(folder)).tables[0].rows
    assert [row[2:4] for row in rows] == [("1", "20"), ("21", "40")]
    assert [row[5] for row in rows] == ["100", "300"]
    assert [row[6:8] for row in rows] == [("25.0%", "1.00 GiB")] * 2
    assert rows[0][4] == "hdp 2, ZeRO 1"


def test_events_but_regular_ones(tmp_path: Path) -> None:
    folder = watched_run(tmp_path / "a")
    add_event(folder, {"event": "resumed", "step": 20, "checkpoint": "step-20"})
    add_event(folder, {"event": "checkpoint_saved", "step": 40})
    rows = throughput.events(inputs(folder)).tables[0].rows
    assert [row[3] for row in rows] == ["alarm", "resumed"]
    assert rows[0][1] == "2001-09-09 01:46:40"
    assert rows[1][4] == "checkpoint step-20"


def test_a_record_without_run_json_is_shown(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    (tmp_path / "a" / "run.json").unlink()
    row = throughput.runs(inputs(tmp_path / "a")).tables[0].rows[0]
    assert row[2:5] == ("–", "–", "–")
    assert all(one.figures or one.tables or one.absent for one in sections(inputs(tmp_path / "a")))


def test_a_run_that_diverged_is_shown(tmp_path: Path) -> None:
    folder = watched_run(tmp_path / "a", stop=30)
    add_columns(folder, {"loss": lambda step: math.nan if step > 25 else 3.0})
    add_event(folder, {"event": "not_finite", "step": 30})
    shown = inputs(folder)
    assert throughput.runs(shown).tables[0].rows[0][1] == "not finite at step 30"
    series = panels(losses.losses(shown))["against tokens"].series
    assert np.isfinite(series[0].y).all()
    for section in sections(shown):
        for figure in section.figures:
            json.dumps(specification(figure), allow_nan=False)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.yaml", "optimizer:", "other:", "has no section 'optimizer'"),
        ("metrics.jsonl", '"flops"', '"other"', "has no 'flops' in any row"),
        ("metrics.jsonl", '"loss": ', '"loss": "x", "b": ', "is not a number"),
    ],
)
def test_records_of_something_else(
    tmp_path: Path, file: str, old: str, new: str, message: str
) -> None:
    fake_run(tmp_path / "a")
    path = tmp_path / "a" / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        inputs(tmp_path / "a")


def test_a_fit_is_drawn_with_its_band_and_target(tmp_path: Path) -> None:
    section = fits.fits(inputs(fake_ladder(tmp_path / "ladder")))
    found = panels(section)
    assert set(found) == {"chinchilla over N", "measured against predicted", "residuals"}
    law = found["chinchilla over N"].series
    bands = [one for one in law if one.style == "band"]
    assert len(bands) == 3  # one for each D
    for band in bands:
        assert band.low is not None
        assert band.high is not None
        assert (band.low <= band.high).all()
        assert (band.high > band.low).any()
    against = found["measured against predicted"].series
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
    errors = found["residuals"].series[1].y
    assert 0.0 < np.abs(errors).max() < 5.0


def test_a_target_outside_of_its_interval_is_said(tmp_path: Path) -> None:
    section = fits.fits(inputs(fake_ladder(tmp_path / "ladder", measured=3.5)))
    assert section.tables[1].rows[0][-1] == "NO"
    section = fits.fits(inputs(fake_ladder(tmp_path / "other", measured=None)))
    assert section.tables[1].rows[0][-3:] == ("not trained yet", "–", "–")
    assert not any(
        one.style == "star" for one in panels(section)["measured against predicted"].series
    )


def test_a_law_of_many_sizes_has_no_slices(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    size, tokens = draw.uniform(1e6, 1e8, 60), draw.uniform(1e8, 1e10, 60)
    loss = 1.7 + 400.0 / size**0.34 + 410.0 / tokens**0.28
    rows = Observations.of({"N": size, "D": tokens, "loss": loss})
    write_fit(tmp_path / "fit.json", rows, samples=0)
    found = panels(fits.fits(inputs(fit=tmp_path / "fit.json")))
    assert set(found) == {"measured against predicted", "residuals"}


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
    found = [one.final_loss[0] for one in inputs(*equal).runs]
    assert dots.y.tolist() == found
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
    assert [len(one.x) for one in lines] == [5, 5]  # diverged; and a rate that one seed lacks
    assert [math.log2(one.x[0]) for one in stars] == pytest.approx([-6.25, -5.75])
    assert "t.jsonl, width 64: 1 rates are left out, as not all seeds have them." in section.notes
    assert any("drifts over width by 0.50 octaves" in note for note in section.notes)


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
    # Two rates are no sweep, nor are three runs that differ in more than the rate.
    assert transfer.transfer(inputs(*folders[:4])).absent is not None
    fake_run(tmp_path / "wide", "optimizer.lr=0.02", width=64)
    assert transfer.transfer(inputs(*folders[:4], tmp_path / "wide")).absent is not None


def test_trials_that_are_damaged(tmp_path: Path) -> None:
    path = trial_file(tmp_path / "t.jsonl", [(32, -5.0, 0, 2.0)])
    with path.open("a") as file:
        file.write('{"size": 32')  # a line that is being written
    assert read_trials(path).losses == {32: {-5.0: {0: 2.0}}}
    path.write_text('{"axis": "width"}\n{"size": 32}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2, is no trial"):
        read_trials(path)
    path.write_text('{"axis": "width"}\n')
    with pytest.raises(ValueError, match="holds no trial yet"):
        read_trials(path)


def test_plotly_takes_every_figure(tmp_path: Path) -> None:
    from plotly import graph_objects

    rows: list[tuple[int, float, int, float | None]] = [(32, r, 0, 2 + r * r) for r in (-1, 0, 1)]
    sweep = trial_file(tmp_path / "t.jsonl", rows)
    shown = inputs(fake_ladder(tmp_path / "ladder"), sweeps=(sweep,))
    found = [figure for section in sections(shown) for figure in section.figures]
    assert len(found) >= 8
    for figure in found:
        spec = specification(figure)
        graph_objects.Figure(spec)  # raises for a key or value that plotly does not know
        json.dumps(spec, allow_nan=False)
        assert len(spec["data"]) == sum(len(panel.series) for panel in figure.panels)
        ends = [
            (axis["domain"][0], axis["domain"][1])
            for key, axis in spec["layout"].items()
            if key.startswith(("xaxis", "yaxis"))
        ]
        assert all(0.0 <= low < high <= 1.0 for low, high in ends), ends
    with pytest.raises(ValueError, match="colour"):
        graph_objects.Figure({"data": [{"type": "scatter", "colour": "red"}]})


def test_what_is_not_finite_is_null() -> None:
    series = Series(name="a", x=np.array([1.0, 2.0]), y=np.array([np.nan, 0.123456789]))
    panel = Panel(title="", x_label="", y_label="", series=(series,))
    spec = specification(Figure(key="k", text="", panels=(panel,)))
    assert spec["data"][0]["y"] == [None, 0.123457]
