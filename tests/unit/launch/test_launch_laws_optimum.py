"""``allometry optimum``: exponents of the best N and D, from fits and published coefficients."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from shell import Shell


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def fit(shell: Shell, tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = ["N,D,loss"]
    for size in (1e7, 3e7, 1e8, 3e8, 1e9):
        for ratio in (5, 20, 80):
            loss = 1.8 + 480 / size**0.35 + 2000 / (ratio * size) ** 0.37
            lines.append(f"{size},{ratio * size},{loss * (1 + 0.002 * rng.standard_normal())}")
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines))
    asked = ("--starts", 48, "--bootstraps", 40, "--hold-out", "none")
    shell("fit", "chinchilla", path, *asked, "--out", tmp_path / "fit.json")
    return tmp_path / "fit.json"


def test_exponents_have_intervals_that_hold_the_truth(shell: Shell, fit: Path) -> None:
    asked = ("optimum", fit, "--flops", "1e18,1e20")
    first, second = (one["exponents"] for one in shell.json(*asked)["optima"])
    truth = 0.37 / (0.35 + 0.37)
    assert first["N"]["low"] < truth < first["N"]["high"]
    assert first["N"]["value"] == pytest.approx(second["N"]["value"], abs=1e-9)
    assert first["D"]["value"] == pytest.approx(1 - first["N"]["value"])
    assert first["D"]["low"] == pytest.approx(1 - first["N"]["high"])
    (line,) = (line for line in shell(*asked).splitlines() if "grows as" in line)
    number = r"0\.\d+ \(95 % interval 0\.\d+ to 0\.\d+\)"
    assert re.fullmatch(rf"N grows as C\^{number}, D as C\^{number}", line), line


def test_published_coefficients_have_exponents_without_intervals(shell: Shell) -> None:
    """Hoffmann et al., arXiv 2203.15556, table 2: the third approach gives 0.46 and 0.54."""
    law = ("--law", "chinchilla", "--published", "hoffmann_unrounded")
    text = shell("optimum", *law, "--flops", "1e21,1e23")
    assert "N grows as C^0.457, D as C^0.543\n" in text


def test_a_law_without_one_power_has_a_slope_at_each_budget(shell: Shell) -> None:
    law = ("--law", "over_training", "--published", "x")
    assert "no published" in shell.refusal("optimum", *law, "--flops", "1e21")
    law = ("--law", "data_constrained", "--published", "C4", "--with", "U=1e9")
    lines = shell("optimum", *law, "--flops", "1e18,1e21").splitlines()
    slopes = [line for line in lines if "grows as" in line]
    assert [line.split(" FLOPs ")[0] for line in slopes] == ["at 1e+18", "at 1e+21"]


def test_json_has_units_and_conventions_as_the_text_has(shell: Shell, fit: Path) -> None:
    asked = ("optimum", fit, "--flops", "1e18")
    facts, text = shell.json(*asked), shell(*asked)
    assert f"loss in {facts['unit']}" in text
    for name in ("N", "D"):
        assert f"{name}: {facts['conventions'][name]}" in text
    assert "intervals of N and of the powers are of the law's parameters alone" in text
    law = ("--law", "chinchilla", "--published", "hoffmann")
    published = shell("optimum", *law, "--flops", "1e21")
    assert "parameters alone" not in published, "there are no intervals"
