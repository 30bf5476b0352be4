"""The gallery: one page and pictures that follow the colours of the page that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from allometry.launch.cli import main
from allometry.launch.figures.figure import PALETTE, Figure, Panel, Series, ordered
from allometry.launch.figures.picture import lifted, luminance, picture
from allometry.scaling.degrees import Degrees
from allometry.scaling.hdp.plan import Plan, Unit
from allometry.scaling.layout import Layout
from allometry.trainer.record.plans import plan_record
from allometry.trainer.record.writer import Recorder
from allometry.trainer.state.folder import RunFolder
from fake_ladder import fake_ladder, watched_run
from report_sections import trial_file

DARK_PAGE, WHITE = 0.0110, 1.0  # luminance of #1b1b1b and of white
STEPS = {
    dtype: {"gradients": {"worst": 1e-15}, "parameters": {"worst": 2e-15}}
    for dtype in ("fp64", "fp32")
}
LAYOUT = {"layout": "tp=2", "world_size": 2, "steps": STEPS, "loss": 0.0, "refused": None}


def contrast(one: float, other: float) -> float:
    """Return the contrast of two luminances (WCAG 2.1)."""
    low, high = sorted((one, other))
    return (high + 0.05) / (low + 0.05)


def of_hex(colour: str) -> float:
    return luminance([int(colour[at : at + 2], 16) for at in (1, 3, 5)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a ladder, a sweep, experts, documents and a certificate."""
    folder = tmp_path_factory.mktemp("gallery")
    fake_ladder(folder / "ladder")
    rows = [
        (size, rate, 0, 3.0 + (rate + 5) ** 2 / 10) for size in (32, 64) for rate in (-6, -5, -4)
    ]
    trial_file(folder / "mup.jsonl", rows)
    watched_run(folder / "experts")
    recorder = Recorder(RunFolder(folder / "experts"))
    for step in (1, 2, 3):
        recorder.loads(step, {"0": [0.5, 0.25, 0.25], "1": [0.2, 0.4, 0.4]})
    recorder.close()
    watched_run(folder / "documents")
    recorder = Recorder(RunFolder(folder / "documents"))
    units = (Unit((0,), (0, 1), cost=0.6), Unit((1, 2), (1,), cost=0.3))
    plan = Plan([300, 250, 7], 2, "aligned", units, orders=((0,), (0, 1)), capacity=260)
    degrees = Degrees(pp=1, hdp=2, tp=1, ep=1, replicas=1)
    recorder.plan(1, plan_record(plan, Layout(degrees, "1f1b", (range(1),))))
    recorder.close()
    more = {"resume_bit_exact": True, "passed": True}
    refused = {"layout": "tp=3", "world_size": 3, "refused": "tp=3 must divide 4"}
    certificate = {"config_sha256": "0", "layouts": [LAYOUT | more, refused | {"passed": False}]}
    (folder / "certificate.json").write_text(json.dumps(certificate))
    return folder


def test_one_command_writes_the_page_and_its_pictures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "docs" / "gallery.md"
    with pytest.raises(SystemExit) as end:
        main(["gallery", str(folder), "--out", str(out), "--json"])
    assert end.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert [s["section"] for s in facts["sections"] if s["absent"] is None] == [
        *("loss", "fits", "transfer", "documents", "experts", "certificate")
    ]
    text = out.read_text()
    pictures = re.findall(r"!\[[^\]]+\]\((gallery/[\w-]+\.svg)\)", text)
    assert len(pictures) == facts["pictures"] == 5
    for name in pictures:
        root = ElementTree.parse(out.parent / name).getroot()
        svg = (out.parent / name).read_text()
        assert root.get("viewBox")
        assert root.get("width") is None
        assert "currentColor" in svg
        assert "\n\n" not in svg
        used = re.findall(r'href="#([^"]*)"', svg) + re.findall(r"url\(#([^)]*)\)", svg)
        assert set(used) <= set(re.findall(r'\bid="([^"]*)"', svg))
    assert "| tp=2 | 2 | 1.0e-15 | 1.0e-15 | 2.0e-15 | 0.0e+00 | same bits | yes |" in text
    assert "not possible: tp=3 must divide 4" in text
    assert re.search(
        r"\*Trained: 6 runs, up to [\d,]+ tokens .* commit 0123456789ab, torch 2", text
    )


def test_ids_of_two_pictures_differ() -> None:
    """A page contains several pictures, whose clip paths are found by id."""
    series = Series("a", np.arange(3.0), np.arange(3.0))
    figures = [Figure(key, (Panel("t", "x", "y", (series,)),)) for key in ("one", "two")]
    ids = [set(re.findall(r'\bid="([^"]*)"', picture(figure, "t"))) for figure in figures]
    assert picture(figures[0], "t") == picture(figures[0], "t")
    assert ids[0]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("colour", [*PALETTE, *ordered(range(9))])
def test_curves_are_visible_on_a_dark_page(colour: str) -> None:
    if colour != "#000000":  # the colour of the page's text
        assert contrast(of_hex(lifted(colour)), DARK_PAGE) >= 3.0
        assert contrast(of_hex(lifted(colour)), WHITE) >= 1.9
    assert contrast(of_hex("#440154"), DARK_PAGE) < 3.0  # the darkest of the scale needs it


def test_parts_that_are_not_there_have_a_reason(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "c.json").write_bytes((folder / "certificate.json").read_bytes())
    out = tmp_path / "gallery.md"
    with pytest.raises(SystemExit) as end:
        main(["gallery", str(tmp_path / "in"), "--out", str(out)])
    assert end.value.code == 0
    assert "Expert loads: no run has a file expert_load.jsonl" in capsys.readouterr().out
    assert out.read_text().count("Not shown: ") == 6


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("", "", "in has no ladder, run, sweep"),
        ("c.json", '{"layouts": [{}], "config_sha256": 1}', "c.json is not a certificate"),
        ("t.jsonl", "{}\n", "t.jsonl"),
    ],
)
def test_damaged_input_is_one_sentence(
    name: str, content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    if name:
        (tmp_path / "in" / name).write_text(content)
    with pytest.raises(SystemExit) as end:
        main(["gallery", str(tmp_path / "in"), "--out", str(tmp_path / "gallery.md")])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
