"""Data of the report's figures: numbers of runs, fits and sweeps, thinned and labelled."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.launch.figures.figure import (
    POINTS,
    Panel,
    Series,
    colours,
    smooth,
    thin,
)
from allometry.launch.report import losses, mixture, stability, throughput
from allometry.launch.report.interactive import specification
from allometry.launch.report.report import sections
from fake_ladder import (
    add_columns,
    add_event,
    chinchilla,
    fake_ladder,
    watched_run,
)
from fake_runs import fake_run
from report_sections import inputs, panels, trial_file


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
    sizes = [3.0, 1.0, 2.0] * 4
    many = colours(sizes)
    assert len(set(many)) == 12
    by_size = sorted(range(12), key=lambda place: sizes[place])  # the first among equal sizes
    lightness = [sum(int(many[p][i : i + 2], 16) for i in (1, 3, 5)) for p in by_size]
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
    by_title = panels(losses.sources(inputs(tmp_path / "a", tmp_path / "b")))
    assert set(by_title) == {"web", "code", "prose"}
    assert {one.run for one in by_title["web"].series} == {0}
    assert {one.run for one in by_title["prose"].series} == {1}
    assert not any(one.style == "dots" for one in by_title["prose"].series)
    assert any(one.style == "dots" for one in by_title["web"].series)


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


def test_how_the_last_launch_ended_is_said(tmp_path: Path) -> None:
    """A restarted launch does not report the end of the previous one."""
    folder = watched_run(tmp_path / "a")  # finished at step 40

    def state(*events: dict[str, Any]) -> str:
        for event in events:
            add_event(folder, event)
        return inputs(folder).runs[0].state

    failed = {"event": "checkpoint_failed", "reason": "No space left on device"}
    assert state() == "finished"
    assert state({"event": "resumed", "step": 20}) == "running or cut off, step 40"
    assert state({**failed, "step": 30}) == "running or cut off, step 40"
    assert state({**failed, "step": 40}) == "not saved at step 40"
    assert throughput.runs(inputs(folder)).tables[0].rows[0][1] == "not saved at step 40"
    assert state({"event": "checkpoint_saved", "step": 40}, {"event": "stopped", "step": 40}) == (
        "stopped at step 40"
    )
    assert state({"event": "branched", "step": 20}) == "running or cut off, step 40"
    assert state({"event": "not_finite", "step": 40}) == "not finite at step 40"
    assert state({"event": "resumed", "step": 20}, {"event": "finished", "step": 40}) == "finished"


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
            for panel in figure.panels:
                json.dumps(specification(panel, legend=figure.legend), allow_nan=False)


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


def test_plotly_takes_every_figure(tmp_path: Path) -> None:
    from plotly import graph_objects

    rows: list[tuple[int, float, int, float | None]] = [(32, r, 0, 2 + r * r) for r in (-1, 0, 1)]
    sweep = trial_file(tmp_path / "t.jsonl", rows)
    shown = inputs(fake_ladder(tmp_path / "ladder"), sweeps=(sweep,))
    figures = [figure for section in sections(shown) for figure in section.figures]
    assert len(figures) >= 8
    for panel, legend in [(panel, one.legend) for one in figures for panel in one.panels]:
        spec = specification(panel, legend=legend)
        graph_objects.Figure(spec)  # raises for a key or value unknown to plotly
        json.dumps(spec, allow_nan=False)
        assert len(spec["data"]) == len(panel.series)
    with pytest.raises(ValueError, match="colour"):
        graph_objects.Figure({"data": [{"type": "scatter", "colour": "red"}]})


def test_names_are_no_markup_to_plotly() -> None:
    series = Series(name='<b>"a" & %{x}', x=np.ones(1), y=np.ones(1))
    panel = Panel(title="<i>", x_label="x", y_label="y", series=(series,))
    spec = specification(panel, legend=True)
    escaped = '&lt;b&gt;"a" &amp; %&#123;x}'
    assert spec["data"][0]["name"] == escaped
    assert spec["data"][0]["hovertemplate"].endswith(f"<extra>{escaped}</extra>")
    assert spec["layout"]["title"]["text"] == "<b>&lt;i&gt;</b>"


def test_what_is_not_finite_is_null() -> None:
    series = Series(name="a", x=np.array([1.0, 2.0]), y=np.array([np.nan, 0.123456789]))
    panel = Panel(title="", x_label="", y_label="", series=(series,))
    spec = specification(panel, legend=False)
    assert spec["data"][0]["y"] == [None, 0.123457]
    assert spec["data"][0]["mode"] == "markers"  # one point is not a line


def test_forgetting_begins_at_nothing_and_the_ledger_is_a_table(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    path = tmp_path / "a" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["step"] % 20 == 0:
            line["forgetting/web"] = line["step"] / 100
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (tmp_path / "a" / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "held_out_before", "step": 0, "losses": {"web": 3.0}}))
        file.write("\n")
    shown = inputs(tmp_path / "a")
    (panel,) = panels(mixture.forgetting(shown)).values()
    assert panel.title == "web, replayed"
    (curve,) = panel.series
    assert curve.x.tolist() == [0, 20 * 256, 40 * 256]
    assert curve.y.tolist() == [0, 0.2, 0.4]
    (table,) = mixture.ledger(shown).tables
    assert table.rows == (
        ("a", "web", "natural", "7.68k", "75.0%", "5k", "1.54", "0.994", "0.966"),
        ("a", "code", "natural", "2.56k", "25.0%", "2.56k", "0.512", "1.000", "1.000"),
    )
    assert "no run replays" in str(mixture.forgetting(inputs(_other(tmp_path))).absent)


def _other(tmp_path: Path) -> Path:
    fake_run(tmp_path / "other")
    return tmp_path / "other"
