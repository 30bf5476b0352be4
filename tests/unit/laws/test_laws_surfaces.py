"""Optima of sweeps against known bowls, and on Step Law's grid."""

from __future__ import annotations

import csv
import json
import math
from typing import Literal

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import FitOptions, fit
from allometry.laws.forms.hyperparameters import HyperparameterSurface
from allometry.laws.hyperparameters import (
    fit_hyperparameter_law,
    held_out_excess,
    nearest_excess,
)
from allometry.laws.observations import Observations
from allometry.laws.surfaces import fit_surface
from allometry.scaling.hyperlaws import step_law
from law_data import law_data

RATES = 2.0 ** np.arange(-13.0, -5.0, 0.5)
BATCHES = 2.0 ** np.arange(15.0, 22.0)


def bowl(
    lr_best: float, batch_best: float, noise: float = 0.0, seed: int = 0, rho: float = -0.4
) -> dict[str, np.ndarray]:
    """Return columns of a full grid over a bowl, in octaves, with minimum loss 2.5."""
    lr, batch = (grid.ravel() for grid in np.meshgrid(RATES, BATCHES))
    u, v = np.log2(lr / lr_best), np.log2(batch / batch_best)
    p, q = 0.006, 0.004
    loss = 2.5 + p * u * u + 2 * rho * math.sqrt(p * q) * u * v + q * v * v
    loss = loss + noise * np.random.default_rng(seed).standard_normal(len(lr))
    return {"lr": lr, "B": batch, "loss": loss}


def law_of_sweeps(size: float, tokens: float) -> tuple[float, float]:
    return 8.0 * size**-0.7 * tokens**0.25, 0.6 * tokens**0.57


def sweeps(cells: list[tuple[float, float]], noise: float = 0.0, seed: int = 0) -> Observations:
    parts = []
    for index, (size, tokens) in enumerate(cells):
        columns = bowl(*law_of_sweeps(size, tokens), noise, seed=1000 * seed + index)
        number = len(columns["lr"])
        parts.append({**columns, "N": np.full(number, size), "D": np.full(number, tokens)})
    return Observations.of({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})


CELLS = [(n, d) for n in (5e7, 2e8, 8e8) for d in (4e9, 1.6e10, 6.4e10)]


def test_the_optimum_of_a_bowl_is_exact() -> None:
    found = fit_surface(Observations.of(bowl(1.7e-3, 3.1e5)))
    assert found.problem is None
    assert found.best == pytest.approx({"lr": 1.7e-3, "B": 3.1e5}, rel=1e-9)
    assert found.loss == pytest.approx(2.5, abs=1e-12)
    assert found.curvature == pytest.approx({"lr": 0.006, "B": 0.004})
    assert found.rms < 1e-12


def test_the_form_fitted_by_the_engine_has_the_same_optimum() -> None:
    # So wide a window weights all runs almost equally; the engine gives the same result.
    rows = Observations.of(bowl(1.7e-3, 3.1e5, noise=2e-3))
    by_engine = fit(HyperparameterSurface(), rows, FitOptions(loss="square")).values
    direct = fit_surface(rows, within=1e6)
    assert direct.rows == len(rows)
    assert by_engine["lr_best"] == pytest.approx(direct.best["lr"], rel=1e-5)
    assert by_engine["B_best"] == pytest.approx(direct.best["B"], rel=1e-5)
    assert by_engine["L_min"] == pytest.approx(direct.loss, rel=1e-8)


def test_noise_does_not_flatten_the_bowl() -> None:
    # Selecting runs by their own losses would prefer lucky ones and lose a third of the curvature.
    found = [fit_surface(Observations.of(bowl(1.7e-3, 3.1e5, 6e-3, seed))) for seed in range(40)]
    curvature = np.mean([surface.curvature["lr"] for surface in found if surface.curvature])
    assert curvature == pytest.approx(0.006, rel=0.1)
    lucky = []
    for seed in range(40):
        rows = Observations.of(bowl(1.7e-3, 3.1e5, 6e-3, seed))
        chosen = rows.take(rows["loss"] <= rows["loss"].min() * 1.01)
        lucky.append(fit_surface(chosen, within=1e6).curvature.get("lr", 0.0))
    assert np.mean(lucky) < 0.0048


def test_a_cubic_does_not_lean_where_a_parabola_does() -> None:
    columns = bowl(1.7e-3, 3.1e5)
    u = np.log2(columns["lr"] / 1.7e-3)
    columns["loss"] = columns["loss"] + 0.0012 * u**3  # steeper towards high rates, like real ones
    rows = Observations.of(columns)
    by_parabola, by_cubic = (fit_surface(rows, order=order).best["lr"] for order in (2, 3))
    assert math.log2(by_parabola / 1.7e-3) < -0.05
    assert by_cubic == pytest.approx(1.7e-3, rel=1e-6)


def test_a_cubic_through_a_bowl_is_the_bowl() -> None:
    found = fit_surface(Observations.of(bowl(1.7e-3, 3.1e5)), order=3)
    assert found.best == pytest.approx({"lr": 1.7e-3, "B": 3.1e5}, rel=1e-8)
    assert found.curvature == pytest.approx({"lr": 0.006, "B": 0.004})
    columns = bowl(1.7e-3, 2.0**18)
    one = Observations.of(columns).take(columns["B"] == 2.0**18)
    assert fit_surface(one, order=3).best["lr"] == pytest.approx(1.7e-3, rel=1e-8)
    few = fit_surface(one.take(np.argsort(one["loss"])[:4]), order=3)
    assert few.problem == "only 4 runs are within 1.50% of the best, of 5 that a cubic needs"


def test_runs_that_diverged_or_are_far_do_not_count() -> None:
    columns = bowl(1.7e-3, 3.1e5)
    worse = columns["lr"] > 6e-3
    columns["loss"][worse] = np.where(np.arange(worse.sum()) % 2, np.nan, 11.0)
    found = fit_surface(Observations.of(columns))
    assert found.best == pytest.approx({"lr": 1.7e-3, "B": 3.1e5}, rel=1e-9)


def test_a_sweep_of_rates_alone_has_a_best_rate_alone() -> None:
    columns = bowl(1.7e-3, 2.0**18)
    rows = Observations.of(columns).take(columns["B"] == 2.0**18)
    found = fit_surface(rows)
    assert found.axes == ("lr",)
    assert found.best == pytest.approx({"lr": 1.7e-3, "B": 2.0**18}, rel=1e-9)
    assert all(math.isnan(edge) for edge in found.interval("B"))


def test_an_optimum_that_was_not_surrounded_is_none() -> None:
    rows = Observations.of(bowl(2.0**-13.5, 2.0**18))
    assert "outside of the learning rates" in str(fit_surface(rows).problem)
    rows = Observations.of(bowl(2.0**-9, 2.0**23))
    assert "outside of the batches" in str(fit_surface(rows, within=0.02).problem)
    rows = Observations.of(bowl(2.0**-9, 2.0**18))
    assert "only 1 run is within 0.00%" in str(fit_surface(rows, within=1e-9).problem)
    columns = bowl(2.0**-9, 2.0**18)
    columns["loss"] = 5.0 - columns["loss"]
    saddle = Observations.of(columns)
    assert fit_surface(saddle, within=10.0).problem == "the losses around the best run are no bowl"


def test_sweeps_that_cannot_be_fitted_are_refused() -> None:
    columns = bowl(1.7e-3, 3.1e5)
    rows = Observations.of(columns)
    two = rows.take((columns["B"] == 2.0**17) | (columns["B"] == 2.0**18))
    with pytest.raises(UserError, match="three batches and the sweep has two"):
        fit_surface(two)
    one = rows.take((columns["B"] == 2.0**17) & (columns["lr"] == 2.0**-9))
    with pytest.raises(UserError, match="one learning rate and one batch"):
        fit_surface(one)
    columns["loss"] = np.full_like(columns["loss"], np.inf)
    with pytest.raises(UserError, match="every run of the sweep diverged"):
        fit_surface(Observations.of(columns))
    with pytest.raises(UserError, match=r"within=0\.0 must be positive"):
        fit_surface(rows, within=0.0)
    columns["lr"][3] = 0.0
    with pytest.raises(UserError, match="lr must be positive"):
        fit_surface(Observations.of(columns))


def test_laws_of_exact_bowls_are_exact() -> None:
    law = fit_hyperparameter_law(sweeps(CELLS), samples=20)
    assert law.batch is not None
    assert law.rate.values == pytest.approx({"c": 8.0, "a": -0.7, "b": 0.25}, rel=1e-6)
    assert law.batch.values == pytest.approx({"c": 0.6, "a": 0.0, "b": 0.57}, rel=1e-6)
    assert law.batch.inputs == ("D",)
    assert max(law.rate.octaves, law.batch.octaves) < 1e-9
    assert law.rate.predict(N=3e9, D=1e11) == pytest.approx(law_of_sweeps(3e9, 1e11)[0], rel=1e-6)
    assert not law.left_out
    assert np.abs(list(law.octaves_from(law_of_sweeps).values())).max() < 1e-9
    doubled = law.octaves_from(lambda n, d: (2.0 * law_of_sweeps(n, d)[0], law_of_sweeps(n, d)[1]))
    np.testing.assert_allclose(list(doubled.values()), [(-1.0, 0.0)] * 9, atol=1e-9)
    assert json.loads(json.dumps(law.to_json()))["rate"]["values"]["a"] == pytest.approx(-0.7)


def test_intervals_cover_what_they_say_under_noise() -> None:
    inside = {"optimum": 0, "exponent": 0, "prediction": 0}
    trials = 40
    for seed in range(trials):
        rows = sweeps(CELLS, noise=3e-3, seed=seed)
        law = fit_hyperparameter_law(rows, samples=80, seed=seed)
        first = law.cells[0]
        low, high = first.surface.interval("lr")
        inside["optimum"] += low <= law_of_sweeps(first.at["N"], first.at["D"])[0] <= high
        low, high = law.rate.interval("a")
        inside["exponent"] += low <= -0.7 <= high
        low, high = law.rate.predict_interval(N=3e9, D=2e11)
        inside["prediction"] += low <= law_of_sweeps(3e9, 2e11)[0] <= high
    # Percentiles of about forty runs: in 100 data sets at three noise levels, 88 to 93 covered
    # single optima, and 92 to 97 the law's. Of 40 trials at 0.88, fewer than 30 has probability
    # 0.01.
    assert inside["optimum"] >= 30
    assert inside["exponent"] >= 33
    assert inside["prediction"] >= 33


def test_intervals_are_not_merely_wide() -> None:
    law = fit_hyperparameter_law(sweeps(CELLS, noise=3e-3), samples=200)
    low, high = law.rate.interval("a")
    assert high - low < 0.2
    quiet = fit_hyperparameter_law(sweeps(CELLS, noise=3e-4), samples=200)
    assert np.ptp(quiet.rate.interval("a")) < 0.3 * (high - low)


def test_inputs_that_do_not_vary_or_vary_together_are_seen() -> None:
    one_size = fit_hyperparameter_law(sweeps([(2e8, d) for d in (4e9, 1e10, 4e10)]), samples=5)
    assert one_size.rate.inputs == ("D",)
    assert one_size.rate.values["a"] == 0.0
    assert one_size.rate.values["b"] == pytest.approx(0.25, rel=1e-6)
    with pytest.raises(UserError, match="N and D vary together in all cells"):
        fit_hyperparameter_law(sweeps([(n, 20 * n) for n in (1e8, 2e8, 4e8, 8e8)]), samples=5)
    with pytest.raises(UserError, match="and 1 have an optimum"):
        fit_hyperparameter_law(sweeps(CELLS[:1]), samples=5)


def test_cells_without_an_optimum_are_left_out_by_name() -> None:
    rows = sweeps(CELLS)
    cell = (rows["N"] == 5e7) & (rows["D"] == 4e9)
    low = rows["lr"] < law_of_sweeps(5e7, 4e9)[0] / 2.0
    law = fit_hyperparameter_law(rows.take(~cell | low), samples=5)
    assert law.left_out == {
        "N=5e+07 D=4e+09": "the optimum lies outside of the learning rates that were run"
    }
    assert len(law.cells) == 8
    assert law.rate.values["a"] == pytest.approx(-0.7, rel=1e-6)


def dense_grid() -> Observations:
    path = law_data("steplaw") / "dense_lr_bs_loss.csv"
    with path.open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    return Observations.of(
        {
            "N": [float(row["N"]) for row in table],
            "D": [float(row["D"]) for row in table],
            "lr": [float(row["lr"]) for row in table],
            "B": [2048.0 * float(row["bs"]) for row in table],
            "loss": [float(row["smooth loss"]) for row in table],
        }
    )


def test_step_law_is_near_the_best_run_of_every_cell() -> None:
    excess = 100.0 * np.array(list(nearest_excess(dense_grid(), step_law).values()))
    assert len(excess) == 17
    assert excess.mean() <= 0.10  # 0.09 % in the paper
    assert excess.mean() == pytest.approx(0.096, abs=0.001)
    assert excess.max() == pytest.approx(0.310, abs=0.001)


def test_other_laws_are_not_as_near() -> None:
    rows = dense_grid()
    for factors in ((4.0, 1.0), (0.25, 1.0), (1.0, 8.0)):
        excess = nearest_excess(
            rows,
            lambda n, d, f=factors: tuple(x * y for x, y in zip(step_law(n, d), f, strict=True)),
        )
        assert 100.0 * np.mean(list(excess.values())) > 0.3


def test_our_own_law_of_the_grid_beside_step_law() -> None:
    law = fit_hyperparameter_law(dense_grid(), samples=300)
    assert law.batch is not None
    assert law.rate is not None
    assert len(law.cells) == 17
    assert not law.left_out
    assert law.rate.values["a"] == pytest.approx(-0.693, abs=0.005)
    assert law.rate.values["b"] == pytest.approx(0.207, abs=0.005)
    assert law.batch.values["b"] == pytest.approx(0.566, abs=0.005)
    for found, name, published in ((law.rate, "a", -0.713), (law.batch, "b", 0.571)):
        low, high = found.interval(name)
        assert low < published < high
    # Parabolas do not confirm the rate's exponent of D: 0.17 to 0.26, not 0.307.
    low, high = law.rate.interval("b")
    assert 0.1 < low < high < 0.307
    octaves = np.array(list(law.octaves_from(step_law).values()))
    assert np.sqrt((octaves**2).mean(axis=0)) == pytest.approx([0.257, 0.225], abs=0.005)
    assert np.abs(octaves).max() < 0.6


# Window and order were chosen knowing these numbers: the test checks the code, not the law.
@pytest.mark.parametrize(("order", "mean", "largest"), [(2, 0.145, 0.310), (3, 0.088, 0.234)])
def test_a_size_that_the_law_has_not_seen_is_met_as_well(
    order: Literal[2, 3], mean: float, largest: float
) -> None:
    excess = list(held_out_excess(dense_grid(), order=order).values())
    assert len(excess) == 17
    assert 100.0 * np.mean(excess) == pytest.approx(mean, abs=0.003)
    assert 100.0 * max(excess) == pytest.approx(largest, abs=0.003)


def test_a_cubic_does_not_bring_back_the_published_exponent_of_tokens() -> None:
    law = fit_hyperparameter_law(dense_grid(), order=3, samples=300)
    assert law.rate is not None
    low, high = law.rate.interval("a")
    assert low < -0.713 < high
    low, high = law.rate.interval("b")
    assert 0.15 < low < high < 0.307
