"""Messages of law commands about misspelled options and rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from allometry.laws.fit.engine import fit
from allometry.laws.fit.store import save_fit
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from fake_runs import fake_run
from shell import Shell

QUICK = ("--starts", 48, "--bootstraps", 0, "--hold-out", "none")


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def written(path: Path, columns: dict[str, np.ndarray]) -> Path:
    lines = [
        ",".join(columns),
        *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True)),
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(2e8, 2e10, 4)))
    loss = 1.8 + 480 / n**0.35 + 2000 / d**0.37
    return written(tmp_path / "runs.csv", {"N": n, "D": d, "loss": loss})


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Return a fit of a mixture law."""
    shares_n = np.linspace(0.05, 0.95, 12)
    loss = 2.0 + np.exp(0.5 * shares_n - 1.2 * (1 - shares_n))
    rows = Observations.of({"a": shares_n, "b": 1 - shares_n, "loss": loss})
    path = tmp_path / "mixed.json"
    save_fit(path, fit(form_named("mixing_exponential:a,b"), rows), None)
    return path


def test_a_text_that_is_no_assignment_is_told_the_form_of_its_option(
    shell: Shell, runs: Path, mixed: Path
) -> None:
    asked = ("fit", "chinchilla", runs, *QUICK)
    fixed = shell.refusal(*asked, "--fix", "E")
    assert "--fix 'E' is not NAME=VALUE; write as --fix PARAMETER=NUMBER as in --fix E=0" in fixed
    assert "or the .json file of a fit" in fixed
    assert "write as --map N=COLUMN" in shell.refusal(*asked, "--map", "N")
    best = ("mix", "best", mixed)
    for flag in ("--weight", "--least", "--most"):
        said = shell.refusal(*best, flag, "a")
        assert f"write as {flag} DOMAIN=NUMBER, as in {flag} code=0.5" in said
    assert "write as --with INPUT=NUMBER as in --with N=7e9" in shell.refusal(*best, "--with", "N")
    assert "write as --at N=7e9,D=1.4e11" in shell.refusal("sweeps", sweep(runs), "--at", "N")


def sweep(runs: Path) -> Path:
    """Return three sizes, each with a bowl over lr and B."""
    size, lr, batch = (
        x.ravel()
        for x in np.meshgrid([1e7, 1e8, 1e9], 2.0 ** np.arange(-12, -5), 2.0 ** np.arange(14, 20))
    )
    away = (np.log2(lr) + 8 + np.log10(size / 1e8)) ** 2 + (np.log2(batch) - 16.5) ** 2
    loss = (3 - 0.2 * np.log10(size / 1e7)) * (1 + 1e-3 * away)
    columns = {"N": size, "D": 20 * size, "lr": lr, "B": batch, "loss": loss}
    return written(runs.with_name("sweep.csv"), columns)


@pytest.mark.parametrize("text", ["x", "nan", "7B", ""])
def test_a_value_that_is_no_number_is_told_what_one_looks_like(
    shell: Shell, runs: Path, text: str
) -> None:
    said = shell.refusal("fit", "chinchilla", runs, *QUICK, "--fix", f"alpha={text}")
    expected = "is no number; give one such as 0.5 or 7e9" if text else "is not NAME=VALUE"
    assert expected in said
    assert "=1e9" not in said, "no parameter is 1e9"


def test_shares_in_percent_are_recognised(shell: Shell, tmp_path: Path, mixed: Path) -> None:
    shares_n = np.linspace(5.0, 95.0, 12)
    columns = {"a": shares_n, "b": 100 - shares_n, "loss": 2.0 + shares_n / 100}
    path = written(tmp_path / "percent.csv", columns)
    law = ("fit", "mixing_exponential:a,b", path, *QUICK)
    said = shell.refusal(*law)
    assert "sum to 100" in said
    assert "look like percent: divide each by 100, in a table --map NAME=COLUMN/100" in said
    shell(*law, "--map", "a=a/100", "--map", "b=b/100")
    assert "look like percent" in shell.refusal("predict", mixed, "a=40", "b=60")
    short = shell.refusal("predict", mixed, "a=0.4", "b=0.5")
    assert "of row 1 sum to 0.9" in short, "a row of predict has no name"
    assert short.endswith("add the columns of the others")


def test_groups_that_could_be_dropped_are_named_as_far_as_they_fit(
    shell: Shell, runs: Path
) -> None:
    said = shell.refusal("fit", "chinchilla", runs, *QUICK, "--drop", "x")
    assert said.endswith("runs.csv:8, runs.csv:9 and 8 more")


def test_copies_say_which_row_they_repeat(shell: Shell, runs: Path) -> None:
    again = runs.with_name("again.csv")
    again.write_text(runs.read_text())
    text = shell("fit", "chinchilla", runs, again, *QUICK)
    assert "(row 17 is row 1 again, runs.csv:2), and count twice" in text


def test_a_held_out_part_that_leaves_the_law_open_has_no_intervals(
    shell: Shell, runs: Path, tmp_path: Path
) -> None:
    asked = ("fit", "chinchilla", runs, "--starts", 48, "--bootstraps", 20)
    table = [line.split(",") for line in runs.read_text().splitlines()[1:]]
    more = np.array([[1e7, 10.0**x, 0.0] for x in np.linspace(8.5, 10.5, 5)])
    more[:, 2] = 1.8 + 480 / 1e7**0.35 + 2000 / more[:, 1] ** 0.37
    rows = np.concatenate([np.array(table, np.float64), more])
    path = written(tmp_path / "more.csv", dict(zip(("N", "D", "loss"), rows.T, strict=True)))
    asked = (*asked[:2], path, *asked[3:], "--hold-out")
    note = "the rows that are not held out cannot identify E, A, alpha"
    text = shell(*asked, "N > 2e7")
    assert note in text
    assert "intervals of one run" not in text
    assert shell.json(*asked, "N > 2e7")["held_out"]["covered"] is None
    text = shell(*asked, "N > 5e8")
    assert note not in text
    assert "intervals of one run" in text


def test_a_parameter_at_a_bound_is_warned_of_by_what_predicts(
    shell: Shell, runs: Path, tmp_path: Path
) -> None:
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(2e8, 2e10, 4)))
    steep = written(
        tmp_path / "steep.csv", {"N": n, "D": d, "loss": 1.8 + (n / 1e8) ** -4.5 + (d / 1e9) ** -5}
    )
    kept, quick = tmp_path / "steep.json", ("--starts", 48, "--bootstraps", 20)
    shell("fit", "chinchilla", steep, *quick, "--hold-out", "none", "--out", kept)
    warning = "the data want alpha, beta of chinchilla outside of what the law allows"
    for asked in (("predict", kept, "N=1e10", "D=1e11"), ("optimum", kept, "--flops", "1e19")):
        assert warning in shell(*asked)
        assert any(warning in one for one in shell.json(*asked)["warnings"])
    # The fit reports a constant at 0 in another message.
    small = written(tmp_path / "small.csv", {"N": n, "D": d, "loss": 480 / n**0.35 + 99 / d**0.37})
    shell("fit", "chinchilla", small, *quick, "--hold-out", "none", "--out", kept)
    assert "outside of what the law allows" not in shell("predict", kept, "N=1e10", "D=1e11")


def test_a_copied_run_folder_is_named(shell: Shell, tmp_path: Path) -> None:
    for width in (16, 32, 64):
        for steps in (40, 80):
            name = f"w{width}-s{steps}"
            fake_run(tmp_path / "runs" / name, f"training.total_steps={steps}", width=width)
    asked = ("fit", "unique_data_tied", tmp_path / "runs", *QUICK)
    assert "are copies" not in shell(*asked)
    shutil.copytree(tmp_path / "runs" / "w16-s40", tmp_path / "runs" / "w16-s40-copy")
    assert any("1 of 7 rows are copies of others in N, D" in n for n in shell.json(*asked)["notes"])
    fake_run(tmp_path / "runs" / "seed", "training.total_steps=40", "run.seed=1", width=16)
    assert any(n.startswith("1 of 8 rows are copies") for n in shell.json(*asked)["notes"])
