"""Rows that are not independent are grouped or reported; so are deviating units."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from allometry.laws.cells import by_cell, row_notes, unit_note
from allometry.laws.fit.engine import fit
from allometry.laws.forms.dense import Chinchilla
from allometry.laws.observations import Observations
from allometry.laws.tables import read_table
from shell import Shell

FORM = Chinchilla()


def law(n: float, d: float) -> float:
    return 1.8 + 480 / n**0.35 + 2000 / d**0.37


def notes(rows: Observations, *, grouped: bool = False) -> list[str]:
    return row_notes(rows, FORM.inputs, "loss", grouped=grouped)


def test_rows_of_one_cell_are_one_group() -> None:
    rows = Observations.of({"N": [1e7, 1e8, 1e7, 1e7], "D": [1e9, 1e9, 1e9, 2e9]}, list("abcd"))
    assert by_cell(rows, ["N", "D"]).groups == ("a", "b", "a", "d")
    assert by_cell(rows, ["N"]).groups == ("a", "b", "a", "a")


def test_copies_repetitions_and_checkpoints_are_named() -> None:
    n, d = np.array([1e7, 2e7, 4e7, 1e7]), np.array([1e9, 2e9, 4e9, 1e9])
    seeds = notes(Observations.of({"N": n, "D": d, "loss": [3.0, 2.9, 2.8, 3.01]}))
    assert len(seeds) == 1
    assert seeds[0].startswith("1 of 4 rows have the N, D of others and are one group")
    copies = notes(Observations.of({"N": n, "D": d, "loss": [3.0, 2.9, 2.8, 3.0]}, list("abcd")))
    assert copies[0].startswith(
        "1 of 4 rows are copies of others in N, D and loss (row 4 is row 1 again, a)"
    )
    one = Observations.of({"N": [1e7, 1e7, 2e7, 2e7], "D": [1e8, 2e8, 1e8, 2e8], "loss": [4.0] * 4})
    assert "2 values of N are in 4 rows" in notes(one)[0]
    assert notes(one, grouped=True) == []
    apart = Observations.of({"N": n[:3], "D": d[:3], "loss": [3.0, 2.9, 2.8]})
    assert notes(apart) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.07, 16.0], "N is 0.07 to 16: in millions or billions"),
        ([7.0], "N is 7: in millions or billions? N counts parameters; as billions it is N=7e+09"),
        ([7.0, 1e5], None),
    ],
)
def test_billions_are_told_from_parameters(values: list[float], words: str | None) -> None:
    note = unit_note(FORM.inputs[0], Observations.of({"N": values}))
    assert (note is None) == (words is None)
    assert words is None or words in str(note)


def test_compute_beyond_its_range_is_told_where_its_parts_are_within_theirs() -> None:
    n, d = np.geomspace(1e7, 1e9, 8), np.geomspace(1e11, 1e9, 8)  # of nearly equal compute
    n, d = np.concatenate([n, n, n]), np.concatenate([d, 2 * d, 4 * d])
    found = fit(FORM, Observations.of({"N": n, "D": d, "loss": law(n, d)}))
    (above,) = found.warnings_for(Observations.of({"N": [8e8], "D": [3e11]}))
    assert above.startswith(
        "6ND=1.44e+21 is outside of the fitted range 6e+18 to 2.4e+19 (60 times"
    )
    assert "N and D by themselves are within theirs" in above
    (below,) = found.warnings_for(Observations.of({"N": [2e7], "D": [2e9]}))
    assert "times below" in below
    assert found.warnings_for(Observations.of({"N": [1e8], "D": [2e10]})) == []
    (size,) = found.warnings_for(Observations.of({"N": [1e10], "D": [2e9]}))
    assert size.startswith("N=1e+10")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = ["run,N,D,loss,set,width"]
    for number, size in enumerate((1e7, 3e7, 1e8, 3e8, 1e9)):
        for ratio in (5, 20, 80):
            loss = law(size, ratio * size) * (1 + 0.002 * rng.standard_normal())
            lines.append(f"r{number},{size},{ratio * size},{loss},{'ab'[ratio > 50]},{64 * number}")
    path = tmp_path / "runs.csv"
    path.write_text("\n".join([*lines, lines[-1]]))
    return path


def test_what_the_command_says_of_such_rows(
    capsys: pytest.CaptureFixture[str], table: Path
) -> None:
    shell = Shell(capsys)
    quick = ("--starts", "48", "--bootstraps", "20")
    facts = shell.json("fit", "chinchilla", table, *quick, "--hold-out", "none")
    assert (facts["rows"], facts["groups"]) == (16, 15)
    said = "; ".join(facts["notes"])
    assert "1 of 16 rows are copies" in said
    assert "column 'run' names several rows alike" in said
    assert "--group 'run'" in said
    facts = shell.json("fit", "chinchilla", table, *quick, "--hold-out", "none", "--group", "run")
    assert facts["groups"] == 5
    assert "names several rows alike" not in "; ".join(facts["notes"])
    assert "run column" not in read_table(table, ["N"], group="run").conventions
    small = ("--map", "N=N/1e9", "--hold-out", "none")
    assert "in millions or billions?" in shell("fit", "chinchilla", table, *quick, *small)


@pytest.mark.parametrize(
    ("hold_out", "rows"),
    [
        ("set == 'b'", 6),
        ("set in ('b', 'c') or width > 200", 8),
        ("log10(N) > 8.2 and set == 'a'", 4),
        ("largest:width", 4),
    ],
)
def test_what_is_held_out_reads_every_column_of_the_table(
    capsys: pytest.CaptureFixture[str], table: Path, hold_out: str, rows: int
) -> None:
    shell = Shell(capsys)
    quick = ("--starts", "48", "--bootstraps", "0", "--hold-out", hold_out)
    facts = shell.json("fit", "chinchilla", table, *quick)
    assert len(facts["held_out"]["measured"]) == rows
    laws = ("--laws", "chinchilla,over_training", "--starts", "48", "--hold-out", hold_out)
    for law_of in shell.json("compare", table, *laws)["laws"]:
        assert len(law_of["held_out"]["measured"]) == rows


def test_a_prediction_in_billions_is_asked_about(
    capsys: pytest.CaptureFixture[str], table: Path, tmp_path: Path
) -> None:
    shell, out = Shell(capsys), tmp_path / "f.json"
    quick = ("--starts", "48", "--bootstraps", "20", "--hold-out", "none", "--out", out)
    shell("fit", "chinchilla", table, *quick)
    assert "N is 7: in millions or billions?" in shell("predict", out, "N=7", "D=1e9")
    published = ("predict", "--law", "chinchilla", "--published", "hoffmann")
    assert "D is 140: in millions or billions?" in shell(*published, "N=7e9", "D=140")
    assert "billions" not in shell(*published, "N=7e9", "D=1.4e11")
