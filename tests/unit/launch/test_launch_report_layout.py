"""The report's page at several widths: rows are full, tables fit, no part is blank or covered."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allometry.launch.report.commands import WriteReport
from allometry.launch.report.report import written
from allometry.laws.observations import Observations
from browser import browse, need_browser, with_script
from fake_ladder import add_columns, add_event, fake_ladder, watched_run, write_fit
from fake_runs import fake_run
from report_sections import trial_file

MEASURE = """
const box = (element) => element.getBoundingClientRect();
const found = { width: innerWidth, panels: 0, wide: [], tables: [], rows: [], blank: [],
                outside: [], covered: [] };
if (document.documentElement.scrollWidth > innerWidth) found.wide.push("page");
for (const table of document.querySelectorAll(".table")) {
  if (table.scrollWidth > table.clientWidth) found.tables.push(table.closest("section").id);
}
for (const figure of document.querySelectorAll(".figure")) {
  const ends = {};
  for (const panel of figure.children) {
    const { top, right } = box(panel);
    ends[Math.round(top)] = Math.max(ends[Math.round(top)] || 0, right);
  }
  for (const end of Object.values(ends)) {
    if (end < box(figure).right - 3) found.rows.push(figure.firstChild.dataset.figure);
  }
}
for (const div of document.querySelectorAll("[data-figure]")) {
  const key = div.dataset.figure;
  found.panels += 1;
  const drawn = [...div.querySelectorAll(".scatterlayer path")].filter((path) =>
    path.classList.contains("point") || (box(path).width > 1 && path.style.strokeWidth !== "0px"));
  if (!drawn.length) found.blank.push(key);
  const whole = box(div);
  const texts = [...div.querySelectorAll("svg text")].filter((text) => box(text).width > 0);
  const boxes = texts.map(box);
  boxes.forEach((one, i) => {
    const name = `${key}: ${texts[i].textContent}`;
    if (one.left < whole.left - 1 || one.right > whole.right + 1 || one.bottom > whole.bottom + 1)
      found.outside.push(name);
    boxes.slice(i + 1).forEach((other, j) => {
      if (one.left < other.right - 2 && other.left < one.right - 2
          && one.top < other.bottom - 3 && other.top < one.bottom - 3)
        found.covered.push(`${name} | ${texts[i + 1 + j].textContent}`);
    });
  });
}
document.body.dataset.found = JSON.stringify(found);
"""
NARROW = 1000
SLICES_OF = 1.234567e6 * 2.0 ** np.arange(12)
LONG = "a-very-long-name_lr=6e-3_width=32_layers=2_seed=0_data=web+code_schedule=wsd_of_a_run_" * 2
MANY = ", ".join(
    f"{{name: source-number-{i}-with-a-long-name, train: s{i}, weight: 1.0}}" for i in range(15)
)


def odd_runs(place: Path) -> Path:
    """Write runs with one step, one row, a branch, many sources, long names, and divergence."""
    one = ("training.total_steps=1", "schedule.warmup_steps=0")
    watched_run(place / "one-step", *one)
    fake_run(place / "one-row", "record.every_steps=40", "evaluation.every_steps=40")
    watched_run(place / "trunk", noise=0.05)
    branch = watched_run(place / "branch", "training.total_steps=80", noise=0.05)
    record = json.loads((branch / "run.json").read_text())
    record["parent"] = {"folder": "somewhere/trunk", "step": 20}
    (branch / "run.json").write_text(json.dumps(record))
    diverged = watched_run(place / "diverged", "optimizer.lr=100.0", stop=2)
    add_columns(diverged, {"loss": float("nan"), "router/max_vio": 0.1, "router/entropy": 0.0})
    add_event(diverged, {"event": "not_finite", "step": 2, "where": "layer " * 60})
    fake_run(place / LONG, "optimizer.lr=0.5", "run.seed=7")
    fake_run(place / "many", f"data.sources=[{MANY}]", "schedule.kind=wsd", held_out=())
    return place


def many_slices() -> Observations:
    """Return a fit with the maximum number of curves, each named in the legend."""
    size, tokens = (grid.ravel() for grid in np.meshgrid(10.0 ** np.arange(4, 9), SLICES_OF))
    loss = 1.7 + 400.0 / size**0.34 + 410.0 / tokens**0.28
    return Observations.of(
        {"N": size, "D": tokens, "loss": loss}, [str(row) for row in range(len(size))]
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    need_browser()
    folder = tmp_path_factory.mktemp("layout")
    rows: list[tuple[int, float, int, float | None]] = [
        (size, rate, 0, 2 + rate * rate) for size in (32, 64, 128, 256) for rate in (-1, 0, 1)
    ]
    fit = folder / "fit.json"
    write_fit(fit, many_slices(), samples=5)
    made = {}
    for name, runs in (
        ("ladder", fake_ladder(folder / "ladder")),
        ("odd", odd_runs(folder / "odd")),
        ("one", folder / "odd" / "one-step"),
    ):
        page = folder / f"{name}.html"
        sweeps = (trial_file(folder / f"{name}.jsonl", rows),)
        written(WriteReport(runs=(runs,), out=page, trials=sweeps, fits=(fit,)))
        made[name] = with_script(page, page, MEASURE)
    return made


@pytest.mark.parametrize("width", [700, 1280, 1920])
@pytest.mark.parametrize("name", ["ladder", "odd", "one"])
def test_nothing_is_blank_cut_or_covered(
    pages: dict[str, Path], tmp_path: Path, name: str, width: int
) -> None:
    dom, said = browse(pages[name], tmp_path, width)
    assert said == ""
    answer = re.search(r'data-found="([^"]*)"', dom)
    assert answer
    found: dict[str, Any] = json.loads(html.unescape(answer[1]))
    assert found.pop("width") == width
    assert found.pop("panels") > 5
    if width < NARROW:  # a table may scroll sideways there
        del found["tables"]
    assert not any(found.values()), found
