"""Uncertainty in the output of law commands: intervals, their parts, unidentified parameters."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.engine import fit
from allometry.laws.fit.store import save_fit
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from law_tables import MAPPED, noisy_table
from shell import Shell

QUICK = ("--starts", "48", "--bootstraps", "20")


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return noisy_table(tmp_path / "runs.csv")


def test_an_interval_says_what_it_is_made_of(shell: Shell, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.json"
    hold = ("--hold-out", "N * D > 3e17")
    text = shell("fit", "chinchilla", table, *MAPPED, "--out", out, *hold)
    assert re.search(r"held out .* (\d+) of 7 in their 95 % intervals of one run", text), text
    facts = shell.json("fit", "chinchilla", table, *MAPPED, *QUICK, *hold)
    assert facts["held_out"]["covered"]["of"] == 7
    assert facts["form_error"]["folds"] == 5
    said = re.search(r"beyond     the form adds a standard deviation of ([\d.]+) % .*5 folds", text)
    assert said is not None, text
    assert float(said[1]) < 1.0
    asked = ("predict", out, "N=1e8,1e11", "D=1e9,1e12", "--noise")
    at_95, at_80 = (shell.json(*asked, "--level", level) for level in (0.95, 0.8))
    for wide, narrow in zip(at_95["predictions"], at_80["predictions"], strict=True):
        assert wide["low"] < narrow["low"] < narrow["loss"] < narrow["high"] < wide["high"]
    inside, beyond = (point["half_widths"] for point in at_95["predictions"])
    assert inside["form"] == 0.0 < beyond["form"]
    assert inside["noise"] == beyond["noise"] > 0.0
    text = shell(*asked, "--level", "0.8")
    assert "80 % interval of one run" in text
    assert re.search(
        r"half of the widest interval, parts that add in quadrature: [\d.e+]+ % of the law's "
        r"parameters; [\d.e+]+ % of its form, .*; [\d.]+ % of one run's scatter",
        text,
    ), text


def test_an_interval_of_one_more_run_is_wider(shell: Shell, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.json"
    shell("fit", "chinchilla", table, *MAPPED, "--out", out, "--hold-out", "none")
    of_law, of_run = (
        shell.json("predict", out, "N=1e8", "D=1e9", *flags)["predictions"][0]
        for flags in ((), ("--noise",))
    )
    assert of_run["high"] - of_run["low"] > 1.5 * (of_law["high"] - of_law["low"]) > 0
    truth = 1.8 + 480 / 1e8**0.35 + 2000 / 1e9**0.37
    assert of_law["low"] < truth < of_law["high"]


def test_a_law_without_its_constant_is_kept_with_a_note(shell: Shell, tmp_path: Path) -> None:
    lines = ["N,D,loss"]
    for size in np.geomspace(1e6, 1e8, 5):
        for tokens in np.geomspace(1e8, 1e10, 5):
            lines.append(f"{size},{tokens},{20 / size**0.2 + 60 / tokens**0.2 - 0.01}")
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines))
    asked = ("fit", "chinchilla", path, "--bootstraps", "20", "--hold-out", "none")
    notes = shell.json(*asked)["notes"]
    (note,) = [note for note in notes if note.startswith("E went to 0")]
    assert "--fix E=0 holds it there" in note
    assert not any("went to 0" in note for note in shell.json(*asked, "--fix", "E=0")["notes"])


def test_no_interval_of_a_law_that_is_not_identified(shell: Shell, tmp_path: Path) -> None:
    n, out = np.geomspace(1e7, 1e10, 12), tmp_path / "f.json"
    rows = Observations.of({"N": n, "D": np.full(12, 1e10), "loss": 1.8 + 480 / n**0.35})
    found = fit(form_named("chinchilla"), rows)
    save_fit(out, found, bootstrap(found, 20))
    for command in (("predict", out, "N=1e9", "D=1e10"), ("optimum", out, "--flops", "1e20")):
        facts = shell.json(*command)
        assert any("no interval: the data do not identify E, B" in w for w in facts["warnings"])
    assert shell.json("predict", out, "N=1e9", "D=1e10")["predictions"][0]["low"] is None


def test_a_value_at_the_edge_of_its_interval_is_said(shell: Shell, tmp_path: Path) -> None:
    """Without a constant term in the data E goes to 0, its bound, in most samples."""
    rng = np.random.default_rng(1)
    lines = ["N,D,loss"]
    for size in (1e6, 1e7, 1e8):
        for tokens in (1e8, 1e9, 1e10):
            noise = 1 + 0.01 * rng.standard_normal()
            lines.append(f"{size},{tokens},{(20 / size**0.2 + 60 / tokens**0.2) * noise}")
    path, out = tmp_path / "runs.csv", tmp_path / "fit.json"
    path.write_text("\n".join(lines))
    asked = ("fit", "over_training", path, *QUICK, "--out", out, "--hold-out", "none")
    text = shell(*asked)
    assert "at the edge of its interval: E = 0, the least that the law allows, " in text
    assert sum("edge of its interval" in line for line in text.splitlines()) == 1
    notes = shell.json(*asked)["notes"]
    assert sum("edge of its interval" in note for note in notes) == 1
    assert "edge of its interval" not in shell(*asked, "--fix", "E=0")
    assert "edge of its interval" not in shell("predict", out, "N=1e7", "D=1e9")


def test_what_data_hardly_say_is_noted(shell: Shell, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = ["N,D,loss"]
    for size in (1e8 / 1.1, 1e8, 1.1e8):  # nearly equal, and with noise
        for tokens in np.geomspace(1e9, 1e11, 6):
            loss = 1.8 + 480 / size**0.35 + 2000 / tokens**0.37 + 0.003 * rng.standard_normal()
            lines.append(f"{size},{tokens},{loss}")
    path = tmp_path / "near.csv"
    path.write_text("\n".join(lines))
    asked = ("fit", "chinchilla", path, *QUICK, "--hold-out", "none")
    repeated, note = shell.json(*asked)["notes"]
    assert "3 values of N are in 18 rows" in repeated
    assert "hardly say what" in note
    assert "alpha" in note
