import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure as Drawn

from allometry.configs.errors import UserError
from allometry.launch.figures.drawing import draw_panel
from allometry.launch.figures.schedule import schedule_figure
from allometry.launch.runs.gantt import draw_plan, run_and_step
from allometry.parallel.hdp.replay import replay
from allometry.scaling.degrees import Degrees
from allometry.scaling.hdp.plan import Plan, Unit
from allometry.scaling.layout import Layout
from allometry.trainer.record.plans import plan_record
from allometry.trainer.record.writer import Recorder
from allometry.trainer.state.folder import RunFolder

PNG = b"\x89PNG"
PLAN = Plan(
    lengths=[300, 250, 7, 41],
    ranks=3,
    mode="aligned",
    units=(
        Unit((0,), (0, 2), cost=0.6),
        Unit((1, 2), (1,), cost=0.3),
        Unit((3,), (0,), cost=0.9),
    ),
    orders=((0, 2), (1, None), (0, None)),
    capacity=260,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a folder with step 3 without a pipeline, step 5 with two stages, and a torn line."""
    recorder = Recorder(RunFolder(tmp_path))
    for step, pp in ((3, 1), (5, 2)):
        degrees = Degrees(pp=pp, hdp=3, tp=1, ep=1, replicas=1)
        stages = tuple(range(k, k + 1) for k in range(pp))
        recorder.plan(step, plan_record(PLAN, Layout(degrees, "1f1b", stages)))
    recorder.close()
    with (tmp_path / "plans.jsonl").open("a") as file:
        file.write('{"step": 7, "mo')
    return tmp_path


def test_a_step_as_a_picture(run: Path) -> None:
    out = run / "pictures" / "plan.png"
    facts = draw_plan(run, 3, out).facts
    assert out.read_bytes().startswith(PNG)
    assert facts == {
        "figure": str(out),
        "step": 3,
        "mode": "aligned",
        "ranks": 3,
        "waves": 2,
        "dummies": 2,
        "balance": pytest.approx(1.5 / ((1.5 + 0.3 + 0.6) / 3)),
        "makespan_s": pytest.approx(1.5),
    }


def test_the_last_step_and_a_pipeline(run: Path) -> None:
    out = run / "plan.svg"
    text = draw_plan(run, None, out).text
    assert "step 5, aligned: 3 hdp ranks x 2 pipeline ranks (1f1b), 2 waves" in text
    assert "2 dummies" in text
    assert str(out) in text
    # Stage 0 runs both forwards (0.1 + 0.15 s), stage 1 runs unit 2's after unit 0. F0 [0, .1] F2
    # [.1, .25] on stage 0; F0 [.1, .2] B0 [.2, .4] F2 [.4, .55] B2 [.55, .85] on stage 1; B0 [.4,
    # .6] B2 [.85, 1.15] on stage 0.
    assert "1.15 s" in text


def test_what_is_drawn() -> None:
    figure = schedule_figure(replay(PLAN), PLAN, "title")
    (panel,) = figure.panels
    assert panel.rows == ("0", "1", "2")
    axes = Drawn().subplots()
    draw_panel(axes, panel)
    *bars, links = axes.collections
    boxes = {}
    for collection in bars:
        red, green, blue, alpha = collection.get_facecolors()[0]
        corners = [path.vertices for path in collection.get_paths()]
        rectangles = sorted((*c[:4, 0].take([0, 1]), c[:4, 1].mean()) for c in corners)
        boxes[(red, green, blue), alpha] = [tuple(np.round(box, 3).tolist()) for box in rectangles]
    by_colour = {colour: 0 for colour, _ in boxes}
    for (colour, _), rectangles in boxes.items():
        by_colour[colour] += len(rectangles)
    # Both members run the ring forward and backward, one rank runs single units, two run dummies.
    assert sorted(by_colour.values()) == [4, 4, 4]
    grey = (0.6, 0.6, 0.6)
    assert boxes[grey, 0.55] == [(0.3, 0.304, 1.0), (0.6, 0.604, 2.0)]
    ring = next(rectangles for rectangles in boxes.values() if (0.0, 0.2, 2.0) in rectangles)
    assert ring == [(0.0, 0.2, 0.0), (0.0, 0.2, 2.0)]
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["1 rank", "2 ranks", "counts nothing"]

    (line,) = links.get_segments()
    assert line[:, 1].tolist() == [0, 2]
    assert np.all((line[:, 0] > 0) & (line[:, 0] < 0.2))
    assert list(axes.lines[0].get_ydata()) == [0, 2]
    assert axes.get_xlim() == pytest.approx((0.0, 1.5))
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "rank 0 on top"


def test_a_step_without_a_plan(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no plan of step 4, only of 2 steps from 3 to 5"
    ) as caught:
        draw_plan(run, 4, run / "x.png")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"data\.kind: documents"):
        draw_plan(tmp_path / "nothing", None, run / "x.png")
    with pytest.raises(UserError, match=r"--out=.*\.png"):
        draw_plan(run, 3, run / "x.txt")
    assert not (run / "x.png").exists()


def test_run_and_step() -> None:
    assert run_and_step([Path("run")]) == (Path("run"), None)
    assert run_and_step([Path("run"), Path("12")]) == (Path("run"), 12)
    for wrong in ([Path("a"), Path("b")], [Path("a"), Path("1"), Path("2")]):
        with pytest.raises(UserError, match="--hdp draws one step of one run"):
            run_and_step(wrong)


def test_the_command_line(run: Path) -> None:
    out = run / "plan.png"
    command = [sys.executable, "-m", "allometry.launch.cli", "plot"]

    def plot(*arguments: object) -> "subprocess.CompletedProcess[str]":
        every = [*command, *map(str, arguments)]
        return subprocess.run(every, capture_output=True, text=True, check=False)

    done = plot(run, "--hdp", 3, "--json", "--out", out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 3
    assert out.read_bytes().startswith(PNG)
    failed = plot(run, "--hdp", 4)
    assert failed.returncode == 2
    assert "no plan of step 4" in failed.stderr
