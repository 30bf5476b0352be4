"""Parameters that the data do not identify are reported; a constant at 0 is identified."""

from __future__ import annotations

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import FitOptions, fit, predict, require_identified
from allometry.laws.forms.dense import Chinchilla
from allometry.laws.observations import Observations
from law_checks import noisy

TRUE = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}


def test_what_the_data_cannot_identify_is_named() -> None:
    n = np.geomspace(1e7, 1e10, 12)
    rows = Observations.of({"N": n, "D": np.full(12, 1e10), "loss": 1.8 + 480 / n**0.35})
    found = fit(Chinchilla(), rows)
    assert found.certificate.unidentified == ("E", "B", "beta")
    assert found.certificate.condition == np.inf
    with pytest.raises(UserError, match="cannot identify E, B, beta of chinchilla"):
        require_identified(found)


def test_a_constant_that_goes_to_0_is_no_reason_to_refuse() -> None:
    n, d = np.meshgrid(np.geomspace(1e6, 1e8, 6), np.geomspace(1e8, 1e10, 6))
    n, d = n.ravel(), d.ravel()
    rows = Observations.of({"N": n, "D": d, "loss": 20 / n**0.2 + 60 / d**0.2 - 0.01})
    found = fit(Chinchilla(), rows)
    assert found.certificate.unidentified == ("E",)
    assert found.vanished == ("E",)
    assert found.unidentified == ()
    held = fit(Chinchilla(), rows, FitOptions(fixed={"E": 0.0}))
    assert held.objective == pytest.approx(found.objective, rel=1e-6)
    assert held.vanished == held.unidentified == ()
    # A coefficient that goes to 0 does not identify its exponent.
    alone = fit(Chinchilla(), Observations.of({"N": n, "D": d, "loss": 20 / n**0.2}))
    assert "beta" in alone.unidentified
    with pytest.raises(UserError, match=r"cannot identify .*beta"):
        require_identified(alone)


def test_what_noise_leaves_open_is_named() -> None:
    """All runs at 20 tokens per parameter: N and D are proportional."""
    n = np.geomspace(1e7, 1e9, 16)
    draw = np.random.default_rng(0)
    clean = predict(Chinchilla(), TRUE, Observations.of({"N": n, "D": 20 * n}))
    loss = clean * np.exp(draw.normal(0, 3e-3, 16))
    found = fit(Chinchilla(), Observations.of({"N": n, "D": 20 * n, "loss": loss}))
    assert set(found.certificate.loose) | set(found.certificate.unidentified)
    with pytest.raises(UserError, match=r"(cannot|hardly) identify"):
        require_identified(found)
    n, d = np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e12, 6))
    rows = Observations.of({"N": n.ravel(), "D": d.ravel()})
    require_identified(fit(Chinchilla(), noisy(Chinchilla(), TRUE, rows, 3e-3)))
