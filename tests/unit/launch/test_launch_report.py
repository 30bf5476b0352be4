"""The report: the command, its page and pictures, its refusals."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from allometry.configs.errors import UserError
from allometry.launch.cli import app
from allometry.launch.report.commands import WriteReport
from allometry.launch.report.report import written
from allometry.launch.runs.commands import Plot
from allometry.launch.runs.plot import plotted
from fake_ladder import fake_ladder, small_fit, watched_run, write_fit
from fake_runs import fake_run

HOSTILE = "<img src=x onerror=\"document.title='pwned'\">&amp;'$x$"
ALL = ("runs", "loss", "fits", "isoflop", "transfer", "sources", "forecast", "stability")


class Elements(HTMLParser):
    """Collect start tags with their attributes, and the text of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if not self._script:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def figures(page: str) -> dict[str, Any]:
    script = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page)
    assert script
    return json.loads(script[1])


def made(tmp_path: Path, *runs: Path, **options: Any) -> str:
    out = tmp_path / "made" / "report.html"
    written(WriteReport(runs=runs, out=out, **options))
    return out.read_text()


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_ladder(tmp_path_factory.mktemp("ladders") / "ladder")


@pytest.fixture
def trials(tmp_path: Path) -> Path:
    path = tmp_path / "trials.jsonl"
    rows: list[dict[str, Any]] = [{"axis": "width"}]
    for size, best in ((32, -6.0), (64, -5.5)):
        for rate in (-8.0, -7.0, -6.0, -5.0, -4.0):
            for seed in range(2):
                loss = 2.0 + 0.1 * (rate - best) ** 2 + 0.001 * seed
                rows.append({"size": size, "log2_lr": rate, "seed": seed, "loss": loss})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_writes_page_and_pictures(ladder: Path, trials: Path, tmp_path: Path) -> None:
    out, png = tmp_path / "deep" / "r.html", tmp_path / "png"
    arguments = ["report", ladder, "-o", out, "--transfer", trials, "--png", png, "--json"]
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    facts = json.loads(done.output)
    shown = {one["section"]: one["shown"] for one in facts["sections"]}
    absent = [section for section, there in shown.items() if not there]
    assert absent == ["forgetting", "selection", "scores"]
    assert set(ALL) <= set(shown)
    assert facts["bytes"] == out.stat().st_size
    page = out.read_text()
    keys = set(figures(page))
    pictures = {Path(path).stem for path in facts["pictures"]}
    assert {key.rpartition("-")[0] for key in keys} == pictures  # one for the panels of a figure
    assert pictures >= {"loss", "fit-1", "isoflop", "transfer", "sources", "forecast", "stability"}
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in facts["pictures"])
    places = [a["data-figure"] for a in Elements(page).named("div") if "data-figure" in a]
    assert len(places) == len(keys)
    assert set(places) == keys


def test_the_page_needs_nothing_from_anywhere(ladder: Path, tmp_path: Path) -> None:
    page = Elements(made(tmp_path, ladder))
    links = [
        value
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "srcset", "href", "action", "data", "poster", "xlink:href")
    ]
    assert links
    assert all(str(link).startswith("#") for link in links), links
    policies = [m for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    policy = str(policies[0]["content"])
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    assert policy.count("sha256-") == 2
    script = next(part for part in policy.split(";") if "script-src" in part)
    assert "unsafe-inline" not in script


def test_a_hostile_name_is_text(tmp_path: Path) -> None:
    folder = watched_run(tmp_path / HOSTILE)
    page = made(tmp_path, folder, title="</title><script>alert(1)</script>", png=tmp_path / "png")
    elements = Elements(page)
    assert not elements.named("img")
    assert HOSTILE in elements.text
    assert len(elements.named("script")) == 3  # the figures, plotly.js and the page's script
    assert "alert(1)" not in page.replace("&lt;script&gt;alert(1)", "")
    data = figures(page)
    names = {trace["name"] for one in data.values() for trace in one["data"]}
    assert not any("<" in name for name in names)
    assert not any(
        "<img" in trace.get("hovertemplate", "") for one in data.values() for trace in one["data"]
    )


def test_sections_without_data_say_why(tmp_path: Path) -> None:
    fake_run(tmp_path / "alone")
    page = Elements(made(tmp_path, tmp_path / "alone")).text
    for why in (
        "no fit was given (--fit)",
        "no three finished runs of different sizes",
        "no file of trials was given (--transfer)",
        "no run recorded a forecast",
        "no run has a norm or a monitor",
        "no run was stopped, resumed or alarmed",
    ):
        assert f"Not shown: {why}" in page


def test_only_a_fit(tmp_path: Path) -> None:
    write_fit(tmp_path / "fit.json", small_fit(), samples=0)
    page = made(tmp_path, fits=(tmp_path / "fit.json",))
    text = Elements(page).text
    assert text.count("Not shown: no run folder was given") == 11
    assert "no bands" in text
    assert "runs" not in Elements(page).named("ul")


def test_runs_that_have_not_begun_are_named(tmp_path: Path) -> None:
    fake_run(tmp_path / "ladder" / "runs" / "a")
    (tmp_path / "ladder" / "runs" / "b").mkdir()
    fake_run(tmp_path / "ladder" / "runs" / "c")
    (tmp_path / "ladder" / "runs" / "c" / "metrics.jsonl").write_text('{"step": 1')
    text = written(WriteReport(runs=(tmp_path / "ladder",), out=tmp_path / "r.html")).text
    assert f"{tmp_path}/ladder/runs/b is left out: it is no run's folder, or has not begun." in text
    assert f"{tmp_path}/ladder/runs/c is left out: it has no row yet." in text
    assert "is left out" in (tmp_path / "r.html").read_text()


def test_of_several_what_is_no_run_is_left_out(tmp_path: Path) -> None:
    """As a shell expands runs/*."""
    place = tmp_path / "runs"
    for name in ("a", "b", "c"):
        fake_run(place / name)
    (place / "a/metrics.jsonl").write_text("")
    (place / "plots").mkdir()
    (place / "notes.txt").write_text("mine")
    paths = tuple(sorted(place.iterdir()))
    report = written(WriteReport(runs=paths, out=tmp_path / "r.html"))
    assert report.facts["runs"] == ["b", "c"]
    assert len(report.facts["left_out"]) == 3
    for name in ("plots", "notes.txt"):
        assert f"{place}/{name} is left out: it is no run's folder, or has" in report.text
    assert f"{place}/a is left out: it has no row yet." in report.text
    with pytest.raises(UserError, match=r"none of the 2 that are named is a run; .*/plots is left"):
        written(WriteReport(runs=(place / "plots", place / "notes.txt"), out=tmp_path / "n.html"))
    with pytest.raises(UserError, match="absent is not a folder"):  # a typo
        written(WriteReport(runs=(place / "b", place / "absent"), out=tmp_path / "n.html"))


def test_plot_leaves_out_what_is_no_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        watched_run(tmp_path / "runs" / name)
    (tmp_path / "runs/plots").mkdir()
    paths = tuple(sorted((tmp_path / "runs").iterdir()))
    report = plotted(Plot(runs=paths, out=tmp_path / "loss.png"))
    assert [Path(run["folder"]).name for run in report.facts["runs"]] == ["a", "b"]
    assert f"left out: {tmp_path}/runs/plots holds no config.yaml" in report.text
    (tmp_path / "runs/a/metrics.jsonl").write_text("{broken\n{}\n")
    with pytest.raises(UserError, match=r"runs/a/metrics\.jsonl"):  # damaged, not skipped
        plotted(Plot(runs=paths, out=tmp_path / "loss.png"))


def test_a_folder_of_runs_stands_for_them(tmp_path: Path) -> None:
    for name in ("w128-s0", "w64-s10", "w64-s9"):
        fake_run(tmp_path / "all" / name)
    out = tmp_path / "r.html"
    facts = written(WriteReport(runs=(tmp_path / "all",), out=out)).facts
    assert facts["runs"] == ["w64-s9", "w64-s10", "w128-s0"]


def test_a_run_named_twice_is_shown_once(ladder: Path, tmp_path: Path) -> None:
    first = next((ladder / "runs").iterdir())
    page = made(tmp_path, ladder, first)
    boxes = [a for a in Elements(page).named("input") if "data-run" in a]
    assert len(boxes) == 6


def test_the_same_thing_named_twice_is_refused(ladder: Path, tmp_path: Path) -> None:
    first = next((ladder / "runs").iterdir())
    fit = ladder / "fit.json"
    for options in (
        {"runs": (first, first.parent / ".." / "runs" / first.name)},
        {"runs": (ladder, ladder)},
        {"runs": (first,), "fits": (fit, fit)},
        {"runs": (), "trials": (tmp_path / "t.jsonl", tmp_path / "t.jsonl")},
    ):
        with pytest.raises(UserError, match="is given twice; give it once"):
            written(WriteReport(**options, out=tmp_path / "r.html"))  # type: ignore[arg-type]
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to report on"),
        ({"fits": ("absent.json",)}, "--fit=.*absent.json is no file"),
        ({"fits": ("bad.json",)}, "bad.json is not JSON"),
        ({"trials": ("absent.jsonl",)}, "absent.jsonl is no file"),
        ({"trials": ("bad.json",)}, "bad.json, line 1, is not JSON"),
        ({"trials": ("empty.jsonl",)}, "is no file of trials"),
        ({"runs": ("absent",)}, "absent is not a folder"),
        ({"runs": ("hollow",)}, "hollow holds no config.yaml"),
        ({"runs": ("ladder",)}, "ladder/runs holds no run"),
        ({"runs": ("odd",)}, "odd/prediction.json is not a prediction"),
        ({"runs": ("run",), "out": "page.pdf"}, "name it something.html"),
        ({"runs": ("run",), "out": "bad.json/r.html"}, "cannot be written"),
        ({"runs": ("run",), "smoothing": 0.7}, "--smooth=0.7 must be"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "bad.json").write_text("{nothing\n")
    (tmp_path / "empty.jsonl").write_text("{}\n")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "ladder" / "runs").mkdir(parents=True)
    fake_run(tmp_path / "run")
    fake_run(tmp_path / "odd" / "runs" / "a")
    (tmp_path / "odd" / "prediction.json").write_text('{"law": "chinchilla"}')
    given = {"out": "r.html", "runs": (), **options}
    paths: dict[str, Any] = {
        key: tuple(tmp_path / one for one in value) if isinstance(value, tuple) else value
        for key, value in given.items()
    }
    paths["out"] = tmp_path / paths["out"]
    with pytest.raises(UserError, match=message) as error:
        written(WriteReport(**paths))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r.html").exists()
