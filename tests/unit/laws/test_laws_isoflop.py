"""IsoFLOP parabolas: vertices, trimming, exponents with intervals, and the command."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from allometry.laws.allocation import searched_size
from allometry.laws.fit.engine import predict
from allometry.laws.forms.dense import Chinchilla
from allometry.laws.isoflop import budgets, exponent, isoflop_optima, resampled
from allometry.laws.observations import Observations
from fake_runs import fake_run
from law_data import law_data
from shell import Shell

TRUE = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}

LOPSIDED = {"E": 1.8, "A": 30.0, "B": 1e6, "alpha": 0.2, "beta": 0.6}


def profiles(width: float, shift: float = 0.0, law: dict[str, float] = TRUE) -> Observations:
    """Return exact IsoFLOP rows at three budgets, ``width`` of ln N on each side of the optimum."""
    columns: dict[str, list[float]] = {"N": [], "D": [], "loss": []}
    for flops in (1e19, 1e20, 1e21):
        best = searched_size(Chinchilla(), law, flops / 6, flops)
        for x in np.linspace(-width, width, 7) + shift:
            columns["N"].append(best * np.exp(x))
            columns["D"].append(flops / 6 / columns["N"][-1])
    rows = Observations.of({"N": columns["N"], "D": columns["D"]})
    return Observations.of({**rows.columns, "loss": predict(Chinchilla(), law, rows)})


def test_narrow_parabolas_find_the_optimum() -> None:
    for profile in isoflop_optima(profiles(0.1)):
        exact = searched_size(Chinchilla(), TRUE, profile.flops / 6, profile.flops)
        assert pytest.approx(exact, rel=1e-3) == profile.N
    for name, power in (("N", 0.37 / (0.35 + 0.37)), ("D", 0.35 / (0.35 + 0.37))):
        slope = exponent(isoflop_optima(profiles(0.1)), name)  # type: ignore[arg-type]
        assert slope is not None
        assert slope[0] == pytest.approx(power, abs=1e-3)


def test_wide_parabolas_are_biased_without_any_noise() -> None:
    """The documented caveat, for N and D with different exponents."""
    for profile in isoflop_optima(profiles(2.0, law=LOPSIDED)):
        exact = searched_size(Chinchilla(), LOPSIDED, profile.flops / 6, profile.flops)
        assert abs(profile.N / exact - 1.0) > 0.1
        assert profile.problem is None


def test_parabolas_describe_their_rows() -> None:
    rows = profiles(0.1)
    profile = isoflop_optima(rows)[1]
    assert profile.flops == pytest.approx(1e20)
    assert profile.rows.tolist() == list(range(7, 14))
    assert pytest.approx(1e20 / 6 / profile.N) == profile.D
    np.testing.assert_allclose(profile.losses(rows["N"][7:14]), rows["loss"][7:14], rtol=1e-5)
    assert profile.losses(np.array([profile.N]))[0] == pytest.approx(profile.loss)


def test_parabolas_without_an_inner_optimum_say_so() -> None:
    rising = isoflop_optima(profiles(0.5, 2.0))[0]
    assert rising.problem == "the least value lies outside of the sizes that were run"
    assert pytest.approx(profiles(0.5, 2.0)["N"][0]) == rising.N
    bent = Observations.of({"N": [1e8, 2e8, 4e8], "C": [1e19] * 3, "loss": [3.0, 3.1, 3.0]})
    assert isoflop_optima(bent)[0].problem == "the parabola has no least value"
    assert isoflop_optima(bent.take([0, 1])) == []
    assert exponent([rising]) is None


def test_budgets_are_rows_of_nearly_equal_flops() -> None:
    flops = np.array([1e20, 1.05e19, 1e19, 9.9e19, 1.2e19])
    assert [rows.tolist() for rows in budgets(flops)] == [[1, 2], [4], [0, 3]]
    assert [rows.tolist() for rows in budgets(flops, 0.3)] == [[1, 2, 4], [0, 3]]


def test_trimming_takes_the_bias_of_wide_profiles_away() -> None:
    rows = profiles(2.0, law=LOPSIDED)

    def bias(within: float) -> list[float]:
        return [
            abs(np.log(one.N / searched_size(Chinchilla(), LOPSIDED, one.flops / 6, one.flops)))
            for one in isoflop_optima(rows, within=within)
        ]

    assert max(bias(0.02)) < 0.5 * min(bias(np.inf))
    one = isoflop_optima(rows, within=0.02)[0]
    assert sorted([*one.rows, *one.trimmed]) == list(range(7))
    least = rows["loss"][:7].min()
    assert (rows["loss"][one.rows] <= 1.02 * least).all()
    assert (rows["loss"][one.trimmed] > 1.02 * least).all()
    few = isoflop_optima(rows, within=1e-4)[0]
    assert few.problem == "1 of 3 sizes that a parabola takes; raise --within or drop its outliers"
    assert few.loss == least


def test_tokens_at_a_vertex_are_those_that_runs_near_it_had() -> None:
    """Counted FLOPs differ from 6 N D: small models spend more per parameter here."""
    rows = profiles(0.1)
    counted = 6 * rows["N"] * rows["D"]
    tokens = rows["D"] / (1 + (1e8 / rows["N"]) ** 0.3)
    columns = {"N": rows["N"], "C": counted, "loss": rows["loss"]}
    plain = isoflop_optima(Observations.of(columns))
    for one, other in zip(
        isoflop_optima(Observations.of({**columns, "D": tokens})), plain, strict=True
    ):
        assert one.N == other.N
        assert pytest.approx(other.D / (1 + (1e8 / one.N) ** 0.3), rel=1e-3) == one.D


def test_intervals_hold_the_truth_at_their_rate() -> None:
    """Noise of 0.2 % on narrow profiles: 95 % of 95 % intervals of vertices and exponent."""
    exact = profiles(0.7)
    held = {"N": 0, "power": 0}
    for seed in range(60):
        noise = np.random.default_rng(seed).normal(0.0, 2e-3, len(exact))
        rows = Observations.of({**exact.columns, "loss": exact["loss"] * np.exp(noise)})
        optima = isoflop_optima(rows)
        found = resampled(rows, optima, samples=200, seed=seed)
        assert found is not None
        (power, interval) = (0.37 / 0.72, found.exponents["N"])
        assert interval is not None
        held["power"] += interval[0] <= power <= interval[1]
        best = searched_size(Chinchilla(), TRUE, 1e20 / 6, 1e20)
        assert found.N[1] is not None
        held["N"] += found.N[1][0] <= best <= found.N[1][1]
    assert held["power"] >= 52, held
    assert held["N"] >= 52, held


def test_residuals_of_one_size_move_together() -> None:
    """Three seeds with the same noise are one measurement, not three."""
    exact = profiles(0.7)
    luck = np.random.default_rng(0).normal(0.0, 2e-3, len(exact))
    one = Observations.of({**exact.columns, "loss": exact["loss"] * np.exp(luck)})
    three = Observations.of({name: np.repeat(v, 3) for name, v in one.columns.items()})
    intervals = []
    for rows in (one, three):
        found = resampled(rows, isoflop_optima(rows), samples=200)
        assert found is not None
        intervals.append(found.exponents["N"])
    assert intervals[0] == pytest.approx(intervals[1], rel=1e-6)


def test_no_residuals_no_intervals() -> None:
    rows = profiles(0.1).take([0, 3, 6, 7, 10, 13])
    assert resampled(rows, isoflop_optima(rows)) is None


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = profiles(0.7)
    noise = np.random.default_rng(1).normal(0.0, 1e-3, len(rows))
    lines = ["size,tokens,loss,flop"]
    for i in range(len(rows)):
        size, tokens = rows["N"][i], rows["D"][i]
        lines.append(f"{size},{tokens},{rows['loss'][i] * np.exp(noise[i])},{6 * size * tokens}")
    path = tmp_path / "profiles.csv"
    path.write_text("\n".join([*lines, "1e9,1e8,3.5,6e17"]))
    return path


def test_the_command_prints_budgets_and_exponents(shell: Shell, table: Path) -> None:
    mapped = ("isoflop", table, "--map", "N=size", "--map", "C=flop", "--bootstraps", 200)
    facts = shell.json(*mapped)
    assert [round(one["flops"] / 1e19) for one in facts["budgets"]] == [1, 10, 100]
    power = facts["exponents"]["N"]
    assert power["low"] < 0.37 / 0.72 < power["high"]
    tokens = facts["exponents"]["D"]
    assert tokens["value"] == pytest.approx(1 - power["value"])
    assert "1 rows belong to budgets of fewer than three sizes" in facts["notes"][0]
    assert any("vertices are biased" in note for note in facts["notes"])
    text = shell(*mapped)
    assert "N grows as C^0.5" in text
    assert "C: flop of profiles.csv" in text
    by_tokens = ("isoflop", table, "--map", "N=size", "--map", "D=tokens", "--bootstraps", 0)
    same = shell.json(*by_tokens)
    assert same["exponents"]["N"]["value"] == pytest.approx(power["value"])
    assert same["exponents"]["N"]["low"] is None
    assert same["conventions"]["C"] == "6 N D"
    near = shell.json(*mapped, "--within", 1)
    assert sum(one["trimmed"] for one in near["budgets"]) > 0


def test_the_command_reads_runs(shell: Shell, tmp_path: Path) -> None:
    for width, steps in ((16, 320), (32, 80), (48, 36)):
        fake_run(tmp_path / f"w{width}", f"training.total_steps={steps}", width=width)
    facts = shell.json("isoflop", tmp_path, "--tolerance", 400)
    (budget,) = facts["budgets"]
    assert budget["rows"] == 3
    assert "not 6 N D" in facts["conventions"]["C"]
    assert any("no exponents" in note for note in facts["notes"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--within", "0"), "--within=0 must be a positive number of percent"),
        (("--tolerance", "nan"), "--tolerance=nan must be a positive number of percent"),
        (("--tolerance", "1e-9"), "no three sizes of the 22 rows .* raise --tolerance"),
        (("--curves",), "--curves"),
        (("--flops-per-parameter-token", "0"), "must be a positive number"),
        (("--where", "loss < 0"), "no row is left"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    shell: Shell, table: Path, options: tuple[str, ...], words: str
) -> None:
    mapped = ("isoflop", table, "--map", "N=size", "--map", "D=tokens*(1+1e-6*size/1e9)")
    assert re.search(words, shell.refusal(*mapped, *options))


def test_the_points_behind_chinchilla(shell: Shell) -> None:
    """The paper's second approach gives 0.49 and 0.51 (10th to 90th percentile 0.462 to 0.534)."""
    path = law_data("chinchilla_epoch") / "svg_extracted_data.csv"
    mapped = ("--map", "N=Model Size", "--map", "C=`Training FLOP`", "--where", "loss < 3.44")
    facts = shell.json("isoflop", path, *mapped, "--bootstraps", 300)
    power = facts["exponents"]["N"]
    assert 0.462 < power["value"] < 0.534
    assert power["low"] < power["value"] < power["high"]
