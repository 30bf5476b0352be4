"""The report in a browser: every figure is drawn, no request is sent, boxes hide runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from allometry.launch.report.commands import WriteReport
from allometry.launch.report.report import written
from browser import browse, need_browser, with_script
from fake_ladder import fake_ladder, watched_run

HOSTILE = "<img src=x onerror=\"document.title='pwned'\">"
CLICKS = """
const count = () => [...document.querySelectorAll("[data-figure]")].map((div) =>
  div.data.filter((trace) => trace.visible !== false && trace.meta.run === 0).length);
const seen = { before: count() };
document.querySelector('input[data-run="0"]').click();
seen.after = count();
seen.others = document.querySelector("[data-figure=loss-1]").data
  .filter((trace) => trace.visible && trace.meta.run === 1).length;
seen.rows = document.querySelectorAll('[data-row-run="0"]:not([hidden])').length;
document.querySelector('input[data-run="0"]').click();
document.getElementById("layers").value = "recorded";
document.getElementById("layers").dispatchEvent(new Event("change"));
seen.layers = [...new Set(document.querySelector("[data-figure=loss-1]").data
  .filter((trace) => trace.visible).map((trace) => trace.meta.layer))];
document.getElementById("filter").value = "W64";
document.getElementById("filter").dispatchEvent(new Event("input"));
document.getElementById("none").click();
seen.chosen = [...document.querySelectorAll("input[data-run]:checked")].length;
document.body.dataset.seen = JSON.stringify(seen);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_browser()
    folder = tmp_path_factory.mktemp("report")
    out = folder / "report.html"
    ladder, hostile = fake_ladder(folder / "ladder"), watched_run(folder / HOSTILE)
    written(WriteReport(runs=(ladder, hostile), out=out))
    return out


def test_every_figure_is_drawn_and_nothing_is_asked_for(page: Path, tmp_path: Path) -> None:
    dom, said = browse(page, tmp_path)
    assert said == ""
    _, *divs = re.split(r'<div class="[^"]*" data-figure=', dom)
    keys = [div.split('"')[1] for div in divs]
    figures = list(dict.fromkeys(key.rpartition("-")[0] for key in keys))
    assert figures == [
        "loss", "fit-1", "isoflop", "sources", "forecast", "stability", "throughput"
    ]  # fmt: skip
    for key, div in zip(keys, divs, strict=True):
        assert '<svg class="main-svg"' in div, key
        assert div.count('class="trace scatter') > 0, key
    assert "<title>Allometry report</title>" in dom


def test_the_console_would_tell_of_a_request_or_a_script(page: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    added = (
        "<script>document.title = 'ran'</script><img src='https://example.invalid/x.png'></body>"
    )
    before, _, after = page.read_text().rpartition("</body>")
    bad.write_text(before + added + after)
    dom, said = browse(bad, tmp_path / "profile")
    assert "<title>ran</title>" not in dom
    assert said.count("Content Security Policy") == 2, said


def test_boxes_hide_a_run_everywhere(page: Path, tmp_path: Path) -> None:
    clicked = with_script(page, tmp_path / "clicked.html", CLICKS)
    dom, said = browse(clicked, tmp_path / "profile")
    assert said == ""
    answer = re.search(r'data-seen="([^"]*)"', dom)
    assert answer
    seen = json.loads(answer[1].replace("&quot;", '"'))
    assert sum(count > 0 for count in seen["before"]) >= 5  # figures with run 0
    assert set(seen["after"]) == {0}
    assert seen["others"] > 0
    assert seen["rows"] == 0
    assert set(seen["layers"]) == {"recorded", None}
    assert seen["chosen"] == 5  # of seven runs, except the two named w64
