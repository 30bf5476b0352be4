"""D-CPT fits to both losses: rows that the law can describe, and held-out rows."""

from __future__ import annotations

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import predict
from allometry.laws.frontier import Frontier, described, fit_d_cpt, held_out
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named

GENERAL = {
    **{"E": 1.6, "A": 0.0, "B": 6.0, "C": 0.08},
    **{"alpha": 0.34, "beta": 0.4, "eta": 0.5, "gamma": 0.8, "eps": 0.1},
}
DOMAIN = {**GENERAL, "E": 1.1, "B": 40.0, "eta": 0.2}
SHARES, HORIZONS = (1.0, 0.9, 0.75, 0.5, 0.25), np.geomspace(4e6, 4e7, 8)
RISE = 0.2
"""Rise of the general loss without replay, from the first horizon to the last."""


def rows() -> Observations:
    """Return the law's losses, except the general loss without replay, which rises with D."""
    r, D = (one.ravel() for one in np.meshgrid(SHARES, HORIZONS, indexing="ij"))
    full = np.full(len(r), 1e6)
    law, losses = form_named("d_cpt"), {}
    for which, values, share in (("general", GENERAL, 1 - r), ("domain", DOMAIN, r)):
        losses[which] = predict(values=values, form=law, observations=Observations.of(
            {"N": full, "D": D, "r": share}
        ))  # fmt: skip
    before_end = np.log(HORIZONS[-1] / D) / np.log(HORIZONS[-1] / HORIZONS[0])
    losses["general"] -= np.where(r == 1.0, RISE * before_end, 0.0)
    return Observations({"N": full, "D": D, "r": r, **losses}, tuple(f"{one}" for one in r))


def test_rows_without_replay_are_those_of_the_longest_runs_of_each_size() -> None:
    N, D = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0], [5.0, 9.0, 9.0, 7.0, 4.0, 4.0]
    r = [1.0, 1.0, 0.5, 1.0, 0.5, 0.0]
    one = Observations.of({"N": N, "D": D, "r": r, "general": [3.0] * 6, "domain": [2.0] * 6})
    kept = described(one, "general")
    assert list(zip(kept["N"], kept["D"], kept["r"], strict=True)) == [
        (1.0, 9.0, 1.0), (1.0, 9.0, 0.5), (2.0, 7.0, 1.0), (2.0, 4.0, 0.5), (2.0, 4.0, 0.0),
    ]  # fmt: skip
    assert len(described(one, "domain")) == 6


def test_what_no_replay_forgets_does_not_bend_the_law_at_other_ratios() -> None:
    laws = fit_d_cpt(rows())
    assert laws.r_squared("general") > 0.9999
    assert laws.fits["general"].values["beta"] == pytest.approx(0.4, rel=0.02)
    frontier = laws.at(np.array([0.8, 1.0]), 1e6, HORIZONS[-1])
    for place, share in enumerate((0.2, 0.0)):
        end = Observations.of({"N": [1e6], "D": [HORIZONS[-1]], "r": [share]})
        true = predict(form_named("d_cpt"), GENERAL, end)
        assert frontier.losses["general"][place] == pytest.approx(true[0], rel=2e-3)
    found = {one.what: one for one in held_out(rows())[0]}
    assert set(found) == {"r=0.5", "r=0.75", "r=0.9"}
    for one in found.values():
        for which in ("general", "domain"):
            assert np.abs(one.errors[which]).max() < 0.01
            assert len(one.errors[which]) == len(HORIZONS)
            assert list(one.ends[which]) == [one.errors[which][-1]]


def test_the_critical_share_is_the_largest_within_the_bound_and_not_the_best() -> None:
    """They differ if a little replay also lowers the loss of the new domain."""
    general, domain = np.array([2.0, 2.1, 2.2, 2.5]), np.array([3.0, 2.5, 2.4, 2.45])
    losses = {"general": general, "domain": domain}
    drawn = {"general": np.stack([general] * 2), "domain": np.stack([domain] * 2)}
    one = Frontier(np.array([0.25, 0.5, 0.75, 1.0]), losses, {}, {}, drawn)
    assert (one.best(9.0), one.best(9.0, largest=True)) == (2, 3)
    assert (one.best(2.15), one.best(2.15, largest=True)) == (1, 1)
    assert one.best_interval(9.0) == (0.75, 0.75)
    assert one.best_interval(9.0, largest=True) == (1.0, 1.0)
    with pytest.raises(UserError, match=r"no share that was run keeps the general loss at 1\.9"):
        one.best(1.9, largest=True)
