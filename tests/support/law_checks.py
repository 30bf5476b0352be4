"""Properties of every law: derivatives match predictions, for inputs of any shape."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from allometry.laws.fit.engine import predict
from allometry.laws.fit.problem import Problem
from allometry.laws.forms.base import Form
from allometry.laws.observations import Observations


def check_slopes(form: Form, values: Mapping[str, float], observations: Observations) -> None:
    """Assert that a fit's derivatives equal central differences of predictions,
    for several sets."""
    target = predict(form, values, observations)
    rows = Observations({**observations.columns, form.target.name: target}, observations.groups)
    problem = Problem(form, rows)
    others = {p.name: values[p.name] * 1.01 for p in problem.free}
    x_SP = np.stack([problem.coordinates(values), problem.coordinates(others)])
    residuals_Sn, slopes_SPn = problem.slopes(x_SP)
    assert np.abs(residuals_Sn[0]).max() < 1e-12
    assert np.abs(residuals_Sn[1]).max() > 1e-5
    np.testing.assert_allclose(residuals_Sn, problem.residuals(x_SP), rtol=0, atol=1e-13)
    for index, parameter in enumerate(problem.free):
        step = 1e-5 * max(1.0, abs(x_SP[0, index]))
        moved = [x_SP.copy(), x_SP.copy()]
        moved[0][:, index] += step
        moved[1][:, index] -= step
        difference_Sn = (problem.residuals(moved[0]) - problem.residuals(moved[1])) / (2 * step)
        scale = max(np.abs(difference_Sn).max(), 1e-6)
        error = np.abs(slopes_SPn[:, index] - difference_Sn).max() / scale
        assert error < 1e-5, (form.name, parameter.name, error)


def noisy(
    form: Form, values: Mapping[str, float], rows: Observations, noise: float, seed: int = 0
) -> Observations:
    """Return the rows with the law's target times exp of normal noise with this deviation."""
    random = np.random.default_rng(seed)
    target = predict(form, values, rows) * np.exp(noise * random.standard_normal(len(rows)))
    return Observations({**rows.columns, form.target.name: target}, rows.groups)
