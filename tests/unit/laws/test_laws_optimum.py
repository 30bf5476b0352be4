"""The optimum of a sweep against known parabolas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from allometry.laws.optimum import (
    Sweep,
    drift,
    drift_interval,
    exponent,
    exponent_interval,
    quadratic_optimum,
)

GRID = (-8.0, -7.5, -6.5, -6.0, -5.0)


def bowl(vertex: float, rates: tuple[float, ...] = GRID) -> list[float]:
    return [2.0 + 0.3 * (rate - vertex) ** 2 for rate in rates]


@pytest.mark.parametrize("vertex", [-7.4, -6.7, -6.0, -5.6])
def test_the_vertex_of_a_parabola_is_found_exactly(vertex: float) -> None:
    found = quadratic_optimum(GRID, bowl(vertex))
    assert found.interior
    assert found.log2_lr == pytest.approx(vertex, abs=1e-9)
    assert found.loss == pytest.approx(2.0, abs=1e-9)
    shuffled = quadratic_optimum(GRID[::-1], bowl(vertex)[::-1])
    assert shuffled == found


def test_edges_and_divergence_are_no_optimum() -> None:
    assert "least that was tried" in str(quadratic_optimum(GRID, bowl(-9.0)).problem)
    assert "largest that was tried" in str(quadratic_optimum(GRID, bowl(-3.0)).problem)
    broken = bowl(-6.0)
    broken[4] = math.nan
    assert "neighbour of the best rate diverged" in str(quadratic_optimum(GRID, broken).problem)
    assert "every run diverged" in str(quadratic_optimum(GRID, [math.inf] * 5).problem)


def test_two_equal_losses_have_it_between_them() -> None:
    found = quadratic_optimum((-2.0, -1.0, 0.0, 1.0), (3.0, 1.0, 1.0, 3.0))
    assert found.interior
    assert found.log2_lr == pytest.approx(-0.5)


def sweep(vertices: list[float]) -> Sweep:
    return Sweep(GRID, np.array([bowl(vertex) for vertex in vertices]).T)


def test_drift_and_its_interval() -> None:
    sweeps = {32: sweep([-7.0, -6.8]), 64: sweep([-6.6, -6.4]), 128: sweep([-6.2, -6.0])}
    assert drift(sweeps) == pytest.approx(0.8, abs=1e-9)
    low, high = drift_interval(sweeps)
    # Every resample shifts all sizes alike, because they share seeds.
    assert low == pytest.approx(0.8, abs=1e-9)
    assert high == pytest.approx(0.8, abs=1e-9)
    assert sweeps[32].spread() == pytest.approx(0.2, abs=1e-9)
    noisy = {32: sweep([-7.0, -6.8]), 64: sweep([-6.6, -6.0])}
    low, high = drift_interval(noisy)
    assert low == pytest.approx(0.4, abs=1e-9)
    assert high == pytest.approx(0.8, abs=1e-9)


def test_a_size_without_an_optimum_has_no_drift() -> None:
    sweeps = {32: sweep([-7.0]), 64: sweep([-3.0])}
    assert math.isnan(drift(sweeps))
    assert math.isnan(sweeps[32].spread()), "one seed has no spread"
    assert all(math.isnan(end) for end in drift_interval(sweeps))


def test_the_exponent_of_the_best_rate_and_its_interval() -> None:
    power = {
        size: sweep([-6.0 - 0.32 * (math.log2(size) - 6) + s for s in (0.0, 0.3)])
        for size in (40, 80, 160)
    }
    assert exponent(power) == pytest.approx(-0.32, abs=1e-9)
    assert exponent_interval(power) == pytest.approx((-0.32, -0.32), abs=1e-9)
    # Seeds with different slopes, -0.6 and -0.2: the interval spans both.
    apart = {32: sweep([-6.0, -6.0]), 64: sweep([-6.6, -6.2])}
    assert exponent(apart) == pytest.approx(-0.4, abs=1e-9)
    assert exponent_interval(apart) == pytest.approx((-0.6, -0.2), abs=1e-9)
    assert math.isnan(exponent({32: sweep([-6.0]), 64: sweep([-9.0])})), "an optimum at an edge"
    assert math.isnan(exponent({32: sweep([-6.0, -6.1])})), "one size has no slope"
    assert all(map(math.isnan, exponent_interval({32: sweep([-6.0]), 64: sweep([-6.2])})))


def test_a_vertex_that_no_loss_can_have_is_none() -> None:
    """A run next to the best rate diverged to a finite loss: the vertex would be at -1560."""
    found = quadratic_optimum([-7.0, -6.5, -6.0], [1e4, 8.0, 9.0])
    assert (found.log2_lr, found.loss) == (-6.5, 8.0)
    assert found.problem == "a neighbour of the best rate is no part of a bowl"
    assert quadratic_optimum([-7.0, -6.5, -6.0], [10.0, 8.0, 9.0]).interior
    assert quadratic_optimum([-7.0, -6.5, -6.0], [1.0, -1.0, 1.0]).interior, "not of losses alone"
