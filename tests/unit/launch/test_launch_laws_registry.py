"""The list of laws in commands and in the docs, and predictions without a fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from allometry.launch.laws.commands import Laws
from allometry.launch.laws.compare import law_names
from allometry.launch.laws.list import listed, overview, reads
from allometry.launch.laws.text import certificate_words, narrowed
from allometry.laws.fit.certificate import Certificate
from allometry.laws.forms.base import LOSS_UNIT, Form
from allometry.laws.registry import all_forms, form_named
from shell import Shell

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def test_published_coefficients_predict_without_a_fit(shell: Shell) -> None:
    which = ("--law", "chinchilla", "--published", "besiroglu")
    facts = shell.json("predict", *which, "N=7e9", "D=1.4e11")
    expected = 1.8172 + 482.01 / 7e9**0.3478 + 2085.43 / 1.4e11**0.3658
    (point,) = facts["predictions"]
    assert point["loss"] == pytest.approx(expected, rel=1e-12)
    assert point["low"] is None
    assert "44M to 16B parameters" in facts["warnings"][0]
    best = shell.json("optimum", *which, "--flops", "5.76e23,1e21")["optima"]
    for one, flops in zip(best, (5.76e23, 1e21), strict=True):
        total = 0.3478 + 0.3658
        size = (0.3478 * 482.01 / (0.3658 * 2085.43)) ** (1 / total) * (flops / 6) ** (
            0.3658 / total
        )
        assert one["N"]["value"] == pytest.approx(size, rel=1e-9)
        assert one["D"]["value"] == pytest.approx(flops / 6 / size, rel=1e-9)


def test_a_certificate_in_words() -> None:
    def words(**changes: object) -> str:
        usual = {"gradient_norm": 1e-9, "decrease": 0.0, "starts": 256, "finished": 256}
        usual |= {"agreeing": 40, "spread": 1e-8, "at_bounds": (), "condition": 1e4}
        usual |= {"unidentified": (), "standard_errors": {}, "loose": ()}
        return "; ".join(certificate_words(Certificate(**usual | changes)))  # type: ignore[arg-type]

    sure = words()
    assert sure.startswith("40 of 256 starts agree on it; gradient norm 1.0e-09, condition 1.0e+04")
    assert "a better optimum may exist" not in sure
    assert "the objective is flat" not in sure
    assert "40 of 64 starts agree on it (of 256, those not given up)" in words(finished=64)
    assert "a better optimum may exist: raise --starts" in words(agreeing=1)
    assert "the objective is flat there" in words(spread=0.5)
    assert "at a bound: beta, so" in words(at_bounds=("beta",))


def test_laws_of_columns_are_one_name() -> None:
    given = ["chinchilla, kappa", "mixing_exponential:r/web,r/code"]
    assert law_names(given) == ["chinchilla", "kappa", "mixing_exponential:r/web,r/code"]


def test_the_registry_is_listed(shell: Shell) -> None:
    shown = {line.split()[0] for line in shell("laws").splitlines() if line.strip()}
    assert set(all_forms()) <= shown
    assert {one["name"] for one in shell.json("laws")} == set(all_forms())
    one = shell.json("laws", "chinchilla")
    assert [p["name"] for p in one["parameters"]] == ["E", "A", "B", "alpha", "beta"]
    assert one["published"]["hoffmann"]["A"] == 406.4
    text = shell("laws", "chinchilla")
    for words in ("arXiv 2203.15556", "44M to 16B parameters", "published by besiroglu: E 1.8172"):
        assert words in text
    for name in all_forms():
        assert form_named(name).source in listed(Laws(name=name)).text


def page_line(form: Form) -> str:
    """Return a law's line in the table of docs/laws.md."""
    cells = [f"`{form.name}`", form.target.name, reads(form), f"`{form.equation}`", form.source]
    return "| " + " | ".join(cells) + " |"


def test_the_page_lists_the_registry() -> None:
    page = (ROOT / "docs/laws.md").read_text(encoding="utf-8")
    present = {line for line in page.splitlines() if line.startswith("| `")}
    expected = {page_line(form) for form in all_forms().values()}
    missing, wrong = sorted(expected - present), sorted(present - expected)
    assert not missing, "write these lines into the table of docs/laws.md:\n" + "\n".join(missing)
    assert not wrong, "these lines of docs/laws.md are of no law:\n" + "\n".join(wrong)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_list_of_laws_fits_the_terminal(width: int) -> None:
    lines = overview(list(all_forms().values()), width).splitlines()
    assert len(lines) == len(all_forms()) + 1
    assert max(map(len, lines)) <= width
    assert all(line.startswith(name) for line, name in zip(lines[1:], all_forms(), strict=True))


def test_losses_are_said_in_one_unit(shell: Shell) -> None:
    units = {one.unit for form in all_forms().values() for one in (*form.inputs, form.target)}
    units |= {one.unit for form in all_forms().values() for one in form.parameters}
    assert not [unit for unit in units if "nats" in unit and LOSS_UNIT not in unit]
    assert "a fit to a table has the table's unit" in shell("laws", "chinchilla")
    assert "table's unit" not in shell("laws", "batch_law")


def test_a_table_too_wide_says_what_never_changes_in_a_line() -> None:
    rows = [["N", "a" * 40, "b" * 40, "loss"], ["1", "2", "3", "4"], ["2", "2", "3", "5"]]
    *first, head, one, two = narrowed(rows, 3).splitlines()
    table = [head, one, two]
    assert first == [f"at {'a' * 40} = 2,", f"{'b' * 40} = 3"]
    assert [line.split() for line in table] == [["N", "loss"], ["1", "4"], ["2", "5"]]
    narrow = [[cell[:9] for cell in row] for row in rows]
    assert narrowed(narrow, 3).splitlines()[0].split() == narrow[0]
