"""Figures as data: visible range of a panel, rows of panels, branches drawn from trunks."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from allometry.launch.figures.branches import branched, taken_over, trunks_first
from allometry.launch.figures.drawing import draw, draw_panel
from allometry.launch.figures.figure import (
    NAME,
    Figure,
    Panel,
    Series,
    above_zero,
    rows_of,
    shortened,
)
from allometry.launch.report.section import Section, Table
from allometry.launch.text import number
from allometry.laws.runs import Run


def curve(*points: tuple[float, float], **more: Any) -> Series:
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    return Series("a", x, y, **more)


def panel(*series: Series, **more: Any) -> Panel:
    return Panel("title", "x", "y", series, **more)


@pytest.mark.parametrize(
    ("count", "most", "rows"),
    [(1, 2, [1]), (3, 2, [2, 1]), (4, 3, [2, 2]), (7, 3, [3, 2, 2]), (14, 3, [3, 3, 3, 3, 2])],
)
def test_rows_are_even_and_full(count: int, most: int, rows: list[int]) -> None:
    assert rows_of(count, most) == rows


def test_no_row_of_a_picture_is_half_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plt, "close", lambda drawn: None)
    line = curve((1, 1), (2, 2))
    for count in (1, 2, 3, 5):
        draw(Figure("f", (panel(line),) * count), tmp_path / "f.png")
        drawn = plt.gcf()
        rows: dict[int, float] = {}
        for axis in drawn.axes:
            box = axis.get_tightbbox()
            assert box is not None
            rows[round(axis.get_position().y0, 2)] = float(box.x1)
        assert all(end > 0.95 * drawn.bbox.width for end in rows.values()), (count, rows)
    monkeypatch.undo()
    plt.close("all")


@pytest.mark.parametrize("style", ["line", "dashed", "dotted", "joined", "band"])
def test_one_point_is_a_point(style: Any) -> None:
    ends = {"low": np.array([1.0, 1.0]), "high": np.array([3.0, 3.0])} if style == "band" else {}
    (one,) = panel(curve((1, 2), (2, math.nan), style=style, **ends)).drawn()
    assert one.style == "point"
    axis = plt.figure().subplots()
    draw_panel(axis, panel(one))
    marked = [line for line in axis.get_lines() if line.get_marker() == "s"]
    assert len(marked) == 1
    plt.close("all")
    (two,) = panel(curve((1, 2), (2, 3), style=style, **ends)).drawn()
    assert two.style == style


def test_what_would_not_be_seen_is_not_drawn() -> None:
    nothing = [curve(), curve((1, math.nan)), curve((math.inf, 1))]
    assert panel(*nothing).drawn() == ()
    zero = curve((1, 0), (2, 0))
    assert len(panel(zero).drawn()) == 1
    assert panel(zero, y_log=True).drawn() == ()
    assert panel(curve((0, 1), (-1, 1)), x_log=True).drawn() == ()
    (left,) = panel(curve((0, 1), (5, 1)), x_log=True).drawn()
    assert left.style == "point"
    assert not above_zero([curve((1, 1)), zero])
    assert above_zero([curve((1, 1), (2, math.nan)), curve()])


def test_a_section_leaves_out_blank_panels_and_names_them() -> None:
    seen, blank = panel(curve((1, 1))), Panel("nowhere", "x", "y", (curve((1, math.nan)),))
    section = Section("k", "t", figures=(Figure("f", (seen, blank)),))
    kept = section.without_blanks()
    assert kept.figures[0].panels == (seen,)
    assert kept.notes == ("No finite value to draw for: nowhere.",)
    alone = Section("k", "t", figures=(Figure("f", (blank,)),)).without_blanks()
    assert (alone.figures, alone.absent) == ((), "no finite value to draw for: nowhere")
    table = Table(("a",), (("1",),))
    beside = Section("k", "t", figures=(Figure("f", (blank,)),), tables=(table,)).without_blanks()
    assert (beside.figures, beside.absent) == ((), None)
    assert beside.notes == kept.notes
    assert Section("k", "t", absent="why").without_blanks().absent == "why"


def test_what_is_the_same_in_all_rows_is_said_once() -> None:
    table = Table(("run", "lr", "seed"), (("a", "1", "0"), ("b", "2", "0")), "Caption.", (0, 1))
    short = table.without_equal_columns()
    assert short.head == ("run", "lr")
    assert short.rows == (("a", "1"), ("b", "2"))
    assert short.caption == "Caption. The same in all rows: seed 0."
    assert short.run_s == (0, 1)
    one = Table(("run", "lr"), (("a", "1"),))
    assert one.without_equal_columns() == one
    joined = Table(("run", "loss"), (("a", "3"), ("b", "4"))).beside(short)
    assert joined.head == ("run", "loss", "lr")
    assert joined.rows == (("a", "3", "1"), ("b", "4", "2"))


def run(folder: Path, parent: Any = None) -> Run:
    step = np.arange(10.0, 60.0, 10.0)
    record = {} if parent is None else {"parent": parent}
    return Run(folder, {}, record, {"step": step, "tokens": 100 * step}, [])


def test_trunks_come_before_their_branches(tmp_path: Path) -> None:
    a, b, c, d = (tmp_path / name for name in "abcd")
    runs = [
        run(a, {"folder": str(b), "step": 20}),
        run(b, {"folder": "elsewhere/when/it/ran/c", "step": 10}),  # in the same folder now
        run(c),
        run(d, {"folder": "nowhere", "step": 10}),
    ]
    assert trunks_first(runs) == [2, 1, 0, 3]
    assert trunks_first(runs[2:]) == [0, 1]
    circle = [run(a, {"folder": str(b)}), run(b, {"folder": str(a)}), run(c, {"folder": str(c)})]
    assert sorted(trunks_first(circle)) == [0, 1, 2]


def test_what_a_branch_took_over_is_dotted(tmp_path: Path) -> None:
    branch = run(tmp_path / "a", {"folder": "b", "step": 20})
    assert taken_over(branch, "tokens") == 2000.0
    line = Series("a", branch.metrics["tokens"], branch.metrics["step"], layer="smooth")
    taken, own = branched(line, taken_over(branch, "tokens"))
    assert (taken.style, taken.named, own.style, own.named) == ("dotted", False, "line", True)
    assert taken.x.tolist() == [1000.0, 2000.0]
    assert own.x.tolist() == [2000.0, 3000.0, 4000.0, 5000.0]  # no gap between them
    assert taken.layer == own.layer == "smooth"
    assert branched(line, math.nan) == [line]
    assert branched(line, 10.0) == [line]
    assert [one.style for one in branched(line, 1e9)] == ["dotted"]
    for parent in (None, {"folder": "b"}, {"folder": "b", "step": 1}, "text"):
        assert math.isnan(taken_over(run(tmp_path / "a", parent), "tokens"))


def test_long_names_lose_their_middle() -> None:
    assert shortened("a" * NAME) == "a" * NAME
    cut = shortened("begin" + "x" * 100 + "end")
    assert len(cut) == NAME
    assert cut.startswith("begin")
    assert cut.endswith("xend")
    assert "…" in cut


@pytest.mark.parametrize("log", [True, False])
def test_numbers_of_a_short_axis_are_apart_and_differ(log: bool) -> None:
    drawn = plt.figure(figsize=(6.5, 4.3))
    axis = drawn.subplots()
    ends = [(4e4, 8.0801), (1e5, 8.0866), (3.6e5, 8.1067)]
    draw_panel(axis, panel(curve(*ends), x_log=True, y_log=log))
    drawn.canvas.draw()
    for scale in (axis.xaxis, axis.yaxis):
        low, high = scale.get_view_interval()
        texts = [
            label
            for label, place in zip(scale.get_ticklabels(), scale.get_majorticklocs(), strict=True)
            if low <= place <= high and label.get_text()
        ]
        assert len(texts) >= 3
        assert len({text.get_text() for text in texts}) == len(texts)
        boxes = [text.get_window_extent() for text in texts]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))
        if scale is axis.xaxis:
            assert [text.get_text() for text in texts] == ["50k", "100k", "200k"]
    plt.close("all")


def test_a_number_that_is_almost_nothing_is_0() -> None:
    assert [number(value) for value in (2.172e-300, -1e-120, 0.0)] == ["0", "0", "0"]
    others = (1e-22, -3.14159265, 1e120, math.nan)
    assert [number(value) for value in others] == ["1e-22", "-3.1416", "1e+120", "nan"]
