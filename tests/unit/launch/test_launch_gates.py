"""suggest, coordcheck and transfer as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.launch import coordcheck, suggest, transfer
from allometry.launch.cli import app

Make = Callable[..., RunConfig]
MUP = ("parameterization={kind: mup, base_width: 16, embedding_std: 1.0}",)


def cli(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    return done.exit_code, done.output


def test_suggest_prints_a_table_and_json() -> None:
    code, text = cli("suggest", "preset:dense_1b", "--params", "1e9", "--tokens", "1e11")
    assert code == 0
    assert "step-law  " in text
    assert "0.00163" in text
    assert "1,107,715" in text
    code, text = cli("suggest", "preset:dense_1b", "--params", "1e9", "--tokens", "1e11", "--json")
    facts = json.loads(text)
    assert code == 0
    assert facts["target"]["parameters"] == 10**9
    by_law = {one["law"]: one for one in facts["suggestions"]}
    assert by_law["step-law"]["lr"] == pytest.approx(1.632499e-3, rel=1e-6)
    assert by_law["ling"]["refused"]
    assert facts["base"]["width"] <= 512


def test_suggest_says_what_lies_outside_and_what_disagrees() -> None:
    text = suggest.report(load("preset:demo"), None, None, None, as_json=False)
    assert "step-law*" in text
    assert "below the smallest behind the law" in text
    far = suggest.report(load("preset:dense_1b"), None, 10**13, None, as_json=False)
    assert "octaves apart" in far


def test_coordcheck_passes_mup_and_fails_sp(tiny: Make, tmp_path: Path) -> None:
    request = coordcheck.Request(
        widths="16,32,64", lr=2.0**-6, seeds=2, length=32, processes=1, out=tmp_path / "c.png"
    )
    text, passed = coordcheck.run(tiny(*MUP), request, as_json=True)
    facts = json.loads(text)
    assert passed == (not facts["axes"][0]["failures"]) == facts["passed"]
    assert (tmp_path / "c.png").stat().st_size > 0
    wide = facts["axes"][0]["slopes"]
    sp = "parameterization={kind: sp, embedding_std: 1.0}"
    text, passed = coordcheck.run(tiny(sp), request, as_json=False)
    assert not passed
    assert "FAILED: blocks.1 moves as width^+" in text
    assert "NOT passed" in text
    text, _ = coordcheck.run(tiny(sp), request, as_json=True)
    narrow = json.loads(text)["axes"][0]["slopes"]
    assert narrow["blocks.1"] > wide["blocks.1"] + 0.2


def test_coordcheck_checks_the_axes_that_are_asked_for(tiny: Make, tmp_path: Path) -> None:
    request = coordcheck.Request(
        depths="1,2",
        seeds=1,
        steps=1,
        length=16,
        processes=1,
        out=tmp_path / "c.png",
        block_bound=9.0,
        logit_bound=9.0,
    )
    text, passed = coordcheck.run(tiny(*MUP), request, as_json=False)
    assert passed
    assert "depth" in text
    assert "width" not in text
    with pytest.raises(UserError, match=r"--depths=2: give two or more"):
        coordcheck.run(tiny(), coordcheck.Request(depths="2"), as_json=False)
    with pytest.raises(UserError, match="no experts to vary"):
        coordcheck.run(tiny(), coordcheck.Request(experts="2,4"), as_json=False)


def test_transfer_reports_and_goes_on_from_its_file(tiny: Make, tmp_path: Path) -> None:
    request = transfer.Request(
        sizes="16,32",
        seeds=1,
        steps=10,
        sequences=4,
        length=16,
        step=1.0,
        bound=50.0,
        processes=1,
        trials=tmp_path / "trials.jsonl",
        out=tmp_path / "t.png",
    )
    config = tiny(*MUP)
    text, passed = transfer.run(config, request, as_json=True)
    facts = json.loads(text)
    assert facts["passed"] == passed
    assert [size["size"] for size in facts["sizes"]] == [16, 32]
    assert (tmp_path / "t.png").stat().st_size > 0
    written = (tmp_path / "trials.jsonl").read_text()
    again, _ = transfer.run(config, request, as_json=True)
    assert json.loads(again) == facts
    assert (tmp_path / "trials.jsonl").read_text() == written, "nothing was run twice"


def test_transfer_fails_beyond_its_bound(tiny: Make, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    tiny(*MUP)
    code, text = cli(
        "transfer",
        path,
        "--sizes",
        "16,32",
        "--seeds",
        "1",
        "--steps",
        "10",
        "--sequences",
        "4",
        "--length",
        "16",
        "--step",
        "1",
        "--bound",
        "0",
        "--processes",
        "1",
        "--out",
        tmp_path / "t.png",
        *MUP,
    )
    assert code == 1, text
    assert "drift" in text
    assert "FAILED" in text


def test_mistakes_are_said_in_one_sentence(tiny: Make) -> None:
    with pytest.raises(UserError, match="--axis=hight is not known; use one of width, depth"):
        transfer.run(tiny(), transfer.Request(axis="hight"), as_json=False)
    with pytest.raises(UserError, match="--step=2 must be above 0 and at most --octaves=1"):
        transfer.run(
            tiny(), transfer.Request(step=2.0, steps=2, sizes="16,32", length=8), as_json=False
        )
    with pytest.raises(UserError, match="would be read more than once"):
        transfer.run(tiny(), transfer.Request(steps=10**5, sizes="16,32"), as_json=False)
    with pytest.raises(UserError, match="a figure is written as"):
        coordcheck.run(tiny(), coordcheck.Request(out=Path("a.txt")), as_json=False)
