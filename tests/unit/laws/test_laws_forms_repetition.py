"""The data-constrained law: unit values, its parts, recovered parameters."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from allometry.laws.allocation import best_share
from allometry.laws.fit.engine import Fit, FitOptions, fit, predict
from allometry.laws.forms.repetition import effective, optimal_parameters
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from law_checks import check_slopes, noisy
from law_data import law_data
from shell import Shell

LAW, TIED = form_named("data_constrained"), form_named("data_constrained_tied")
C4 = dict(LAW.published["C4"])


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.mark.parametrize("name", ["data_constrained", "data_constrained_tied"])
def test_unit_values(name: str) -> None:
    """2305.16264: two runs of one budget on 25B unique tokens."""
    law = form_named(name)
    rows = Observations.of({"N": [6.34e9, 8.67e9], "D": [242e9, 178e9], "U": [25e9, 25e9]})
    found = predict(law, law.published["C4"], rows)
    assert found == pytest.approx([2.2256440889984477, 2.2269634075087867], abs=1e-9, rel=0)


def test_repetitions_are_worth_less_and_less() -> None:
    assert effective(100.0, 0.0, 15.0) == 100.0
    assert effective(100.0, 1e-6, 15.0) == pytest.approx(100.0001, rel=1e-9)
    assert effective(100.0, 1e9, 15.0) == pytest.approx(1600.0)
    worth = np.diff(effective(1.0, np.arange(0.0, 50.0), 15.0))
    assert (np.diff(worth) < 0).all()
    assert worth[0] == pytest.approx(15 * (1 - math.exp(-1 / 15)))


def test_what_is_not_repeated_follows_the_plain_law() -> None:
    rows = Observations.of({"N": [1e8, 1e9], "D": [4e9, 20e9], "U": [4e9, 50e9]})
    plain = C4["E"] + C4["A"] / rows["N"] ** C4["alpha"] + C4["B"] / rows["D"] ** C4["beta"]
    assert predict(LAW, C4, rows) == pytest.approx(plain, rel=1e-13)


def test_the_useful_parameters_are_the_optimum_of_the_plain_law() -> None:
    values = {"A": 482.0, "B": 2085.0, "alpha": 0.35, "beta": 0.37}
    tokens = 3e10
    size = optimal_parameters(values, tokens)
    around = size * np.exp(np.linspace(-0.5, 0.5, 1001))
    loss = values["A"] / around ** values["alpha"]
    loss += values["B"] / (size * tokens / around) ** values["beta"]
    assert around[loss.argmin()] == pytest.approx(size, rel=1e-3)
    # More parameters than the tokens support have no effect in the limit.
    rows = Observations.of({"N": [size * 1e5, size * 1e6], "D": [tokens] * 2, "U": [tokens] * 2})
    large = predict(LAW, {**C4, **values}, rows)
    assert large[0] == pytest.approx(large[1], rel=1e-12)
    assert large[0] > C4["E"] + values["B"] / tokens ** values["beta"]


def test_slopes() -> None:
    rows = Observations.of(
        {"N": [1e8, 6e9, 4e9, 1e9], "D": [4e9, 8e9, 24e10, 5e9], "U": [4e9, 2e9, 25e9, 9e9]}
    )
    check_slopes(LAW, {**C4, "beta": 0.31}, rows)
    check_slopes(TIED, TIED.published["C4"], rows)
    unique = {"E": 1.8, "A": 400.0, "B": 900.0, "alpha": 0.35}
    check_slopes(form_named("unique_data_tied"), unique, rows)


def repeated_runs() -> Observations:
    sizes, uniques, epochs = (1e8, 3e8, 1e9, 3e9, 8e9), (1e9, 4e9, 16e9), (1, 3, 10, 40)
    N, U, k = (m.ravel() for m in np.meshgrid(sizes, uniques, epochs))
    return Observations.of({"N": N, "D": U * k, "U": U})


def test_parameters_are_found_again() -> None:
    rows = noisy(TIED, TIED.published["C4"], repeated_runs(), 0.002)
    found = fit(TIED, rows, FitOptions(starts=32))
    assert found.certificate.agreeing >= 4
    assert not found.certificate.at_bounds
    true = TIED.published["C4"]
    assert found.values["alpha"] == pytest.approx(true["alpha"], abs=0.02)
    assert found.values["R_D"] == pytest.approx(true["R_D"], rel=0.1)
    assert found.values["R_N"] == pytest.approx(true["R_N"], rel=0.2)


def in_two_stages(rows: Observations, max_epochs: float = np.inf) -> tuple[Fit, Fit]:
    """Fit as in the paper: first the law of unique data, whose values the second fit keeps."""
    epochs_n = rows["D"] / rows["U"]
    options = FitOptions(starts=32)
    unique = fit(form_named("unique_data_tied"), rows.take(epochs_n <= 1.0), options)
    kept = rows.take(epochs_n <= max_epochs)
    return unique, fit(TIED, kept, replace(options, fixed=unique.values))


def rows_of_two_kinds() -> Observations:
    """The first stage's law has no surplus parameters: its runs have ample unique tokens."""
    N, D = (m.ravel() for m in np.meshgrid((1e8, 3e8, 1e9, 3e9), np.geomspace(1e9, 1e11, 8)))
    ample, repeated = {"N": N, "D": D, "U": np.full(len(N), 1e12)}, repeated_runs()
    repeated = repeated.take(repeated["D"] > repeated["U"])
    columns = {name: np.concatenate([ample[name], repeated[name]]) for name in ample}
    return noisy(TIED, TIED.published["C4"], Observations.of(columns), 0.002)


def test_two_stages_find_them_too() -> None:
    unique, repeated = in_two_stages(rows_of_two_kinds())
    assert len(unique.observations) == 32
    assert unique.values["alpha"] == pytest.approx(C4["alpha"], abs=0.02)
    assert repeated.values["R_D"] == pytest.approx(C4["R_D"], rel=0.15)
    assert repeated.values["R_N"] == pytest.approx(C4["R_N"], rel=0.25)


def test_two_stages_and_the_best_epochs_through_the_commands(shell: Shell, tmp_path: Path) -> None:
    """--fix takes the first stage's file; optimum then returns the number of
    epochs over U tokens."""
    rows, table = rows_of_two_kinds(), tmp_path / "runs.csv"
    lines = [",".join(f"{rows[name][i]}" for name in ("N", "D", "U", "loss")) for i in range(77)]
    table.write_text("\n".join(["N,D,U,loss", *lines]))
    one, two = tmp_path / "unique.json", tmp_path / "repeated.json"
    quick = ("--starts", 32, "--bootstraps", 0, "--hold-out", "none")
    shell("fit", "unique_data_tied", table, *quick, "--where", "D <= U", "--out", one)
    facts = shell.json("fit", "data_constrained_tied", table, *quick, "--fix", one, "--out", two)
    _, repeated = in_two_stages(rows)
    found = {name: part["value"] for name, part in facts["parameters"].items()}
    assert found == pytest.approx(repeated.values, rel=1e-4)
    assert facts["parameters"]["alpha"]["fixed"]
    assert not facts["parameters"]["R_D"]["fixed"]
    again = shell.refusal("fit", "data_constrained_tied", table, "--fix", one, "--fix", "E=1")
    assert "E is fixed already; give each parameter once" in again
    no_such = shell.refusal("fit", "chinchilla", table, "--fix", two)
    assert "chinchilla has no such parameter" in no_such

    asked = ("optimum", two, "--flops", "1e21,1e22", "--with", "U=1e9")
    few, many = shell.json(*asked)["optima"]
    assert few["epochs"] == few["D"]["value"] / 1e9
    assert few["epochs"] < many["epochs"]
    lost = [one["loss"]["value"] - one["unique"]["loss"] for one in (few, many)]
    assert 0.0 < lost[0] < lost[1]
    unlimited = shell.json("optimum", one, "--flops", "1e21")["optima"][0]["loss"]["value"]
    assert few["unique"]["loss"] == pytest.approx(unlimited, rel=1e-6)
    text = shell(*asked)
    assert f"at 1e+21 FLOPs {few['epochs']:.3g} epochs of U = 1e+09 tokens; if none had" in text


def test_the_best_epochs() -> None:
    """2305.16264's example uses 6.34B parameters and 9.7 epochs; the law's optimum is flat."""
    flops = 6 * 6.34e9 * 242e9
    best = best_share(LAW, C4, flops, others={"U": 25e9})
    assert pytest.approx(flops, rel=1e-12) == best.N * best.D * 6
    assert best.loss < 2.2256440889984477
    assert best.loss == pytest.approx(2.2256440889984477, rel=1e-4)
    assert pytest.approx(9.7, abs=1.0) == best.D / 25e9
    for factor in (0.97, 1.03):
        tokens = best.D * factor
        row = Observations.of({"N": [flops / 6 / tokens], "D": [tokens], "U": [25e9]})
        assert predict(LAW, C4, row)[0] > best.loss
    assert best_share(LAW, C4, flops, others={"U": 1e13}).D < 1e13


def scores(predicted: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """Return R squared and the mean absolute relative error."""
    left = ((predicted - measured) ** 2).sum() / ((measured - measured.mean()) ** 2).sum()
    return 1.0 - float(left), float(np.abs(predicted / measured - 1.0).mean())


def test_on_the_printed_runs() -> None:
    """296 runs of 2305.16264's notebook: the published coefficients rank them (R² .788, 9.7 %); an
    uninformed two-stage fit to the 202 runs of up to 44 epochs predicts them."""
    with (law_data("datablations") / "parametric_fit_296.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    rows = Observations.of(
        {name: [float(row[name]) for row in table] for name in ("N", "D", "U", "loss")},
        [row["name"] for row in table],
    )
    few = rows.take(rows["D"] / rows["U"] <= 44)
    assert (len(rows), len(few)) == (296, 202)
    r_squared, error = scores(predict(LAW, C4, few), few["loss"])
    assert r_squared == pytest.approx(0.788, abs=5e-4)
    assert error == pytest.approx(0.0973, abs=5e-5)
    _, repeated = in_two_stages(rows, max_epochs=44)
    assert repeated.certificate.agreeing == 32
    r_squared, error = scores(repeated.predict(few), few["loss"])
    assert r_squared > 0.95
    assert error < 0.034
