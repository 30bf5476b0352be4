"""``allometry plot``: labels and figures for runs of every shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from allometry.configs.errors import UserError
from allometry.launch.runs import plot
from allometry.launch.runs.commands import Plot
from allometry.laws.runs import read_run
from fake_ladder import add_columns
from fake_runs import fake_run

ONE_STEP = ("training.total_steps=1", "schedule.warmup_steps=0")


def branch(folder: Path, trunk: Path, step: int) -> Path:
    """Write a run whose record names its parent and step."""
    fake_run(folder, "training.total_steps=80")
    record = json.loads((folder / "run.json").read_text())
    record["parent"] = {"folder": str(trunk), "step": step}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_labels_name_runs_in_the_figure_and_the_table(tmp_path: Path) -> None:
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        fake_run(folder)
    out = tmp_path / "loss.png"
    report = plot.plotted(Plot(runs=folders, out=out, labels=("wide & $x$", "narrow")))
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [run["label"] for run in report.facts["runs"]] == ["wide & $x$", "narrow"]
    assert report.text.startswith("wide & $x$\n")
    assert "\n\nnarrow\n" in report.text
    runs = [read_run(folder) for folder in folders]
    named = {one.name for one in plot._figure(runs, ("x", "y")).panels[0].series if one.named}
    assert named == {"x", "y"}
    plain = plot.plotted(Plot(runs=folders, out=out))
    assert [run["label"] for run in plain.facts["runs"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("labels", "more", "message"),
    [
        (("x",), {}, "--label is given 1 time for 2 runs; give it once for each run"),
        (("x", "y", "z"), {}, "--label is given 3 times for 2 runs"),
        (("x", "x"), {}, "--label 'x' is given to two runs"),
        (("x", "y"), {"hdp": True}, "--label names curves, and --hdp draws none"),
    ],
)
def test_labels_that_do_not_fit(
    tmp_path: Path, labels: tuple[str, ...], more: dict[str, bool], message: str
) -> None:
    for name in "ab":
        fake_run(tmp_path / name)
    out = tmp_path / "loss.png"
    with pytest.raises(UserError, match=message):
        plot.plotted(Plot(runs=(tmp_path / "a", tmp_path / "b"), out=out, labels=labels, **more))
    assert not out.exists()


def test_a_trunk_lies_under_its_branch_which_is_dotted_up_to_there(tmp_path: Path) -> None:
    trunk, late = tmp_path / "trunk", tmp_path / "branch"
    fake_run(trunk)
    runs = [read_run(branch(late, trunk, 20)), read_run(trunk)]
    figure = plot._figure(runs, ("late", "trunk"))
    for panel, key in zip(figure.panels, ("tokens", "flops"), strict=True):
        lines = [one for one in panel.series if one.layer == "smooth"]
        assert [one.name for one in lines] == ["trunk", "late", "late"]
        assert [one.style for one in lines] == ["line", "dotted", "line"]
        assert lines[1].x[-1] == lines[2].x[0] == runs[0].metrics[key][19]
        assert len({one.colour for one in lines}) == 2


def test_a_run_of_one_step_is_drawn_as_points(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", *ONE_STEP)
    report = plot.plotted(Plot(runs=(tmp_path / "a",), out=tmp_path / "loss.png"))
    assert "\n1 step, run folder" in report.text  # this record has no speeds
    for panel in plot._figure([read_run(tmp_path / "a")], ("a",)).panels:
        drawn = panel.drawn()
        assert len(drawn) == len(panel.series)
        assert {one.style for one in drawn} == {"point", "dots"}


def test_losses_that_are_not_finite(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    add_columns(tmp_path / "a", {"loss": lambda step: float("nan") if step > 20 else 3.0 - step})
    report = plot.plotted(Plot(runs=(tmp_path / "a",), out=tmp_path / "loss.png", json=True))
    json.dumps(report.facts, allow_nan=False)
    assert report.facts["runs"][0]["last_loss"] is None
    panel = plot._figure([read_run(tmp_path / "a")], ("a",)).panels[0]
    assert not panel.y_log  # a logarithmic axis would hide negative losses
