"""Laws of continual pretraining: published numbers, recovered parameters, checked shares."""

from __future__ import annotations

import json

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import FitOptions, fit, predict
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from law_checks import check_slopes, noisy
from law_data import law_data

D_CPT = form_named("d_cpt")
TRUE = {"E": 1.2, "A": 60.0, "B": 400.0, "C": 0.15, "alpha": 0.28, "beta": 0.3}
TRUE |= {"eta": 0.6, "gamma": 0.5, "eps": 0.05}
SHARES = (0.0, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0)


def grid(**extra: tuple[float, ...]) -> Observations:
    axes = {"N": (0.5e9, 1.8e9, 4e9), "D": tuple(np.geomspace(1e9, 26e9, 8)), "r": SHARES, **extra}
    meshed = np.meshgrid(*axes.values(), indexing="ij")
    return Observations.of({name: m.ravel() for name, m in zip(axes, meshed, strict=True)})


def test_d_cpt_is_its_formula() -> None:
    row = Observations.of({"N": [1e9, 1e9], "D": [1e10, 1e10], "r": [0.25, 0.0]})
    size, share = 60 / 1e9**0.28, [0.15 / 0.3**0.5, 0.15 / 0.05**0.5]
    expected = [1.2 + size + 400 * 0.25**0.6 / 1e10**0.3 + share[0], 1.2 + size + share[1]]
    assert predict(D_CPT, TRUE, row) == pytest.approx(expected, rel=1e-13)


def test_slopes() -> None:
    rows = grid()
    check_slopes(D_CPT, TRUE, rows)
    cross = form_named("d_cpt_cross")
    k = {"k1": np.linspace(1.4, 3.0, len(rows)), "k2": np.linspace(0.3, 0.02, len(rows))}
    both = Observations.of({**rows.columns, **k})
    check_slopes(cross, {**TRUE, "F": 0.4, "mu": 0.8, "w": 3.0}, both)
    tokens = Observations.of({"D": np.geomspace(0.2e9, 20e9, 12)})
    power = {"a": -1.3, "s": -0.3, "b": 0.9}
    check_slopes(form_named("cmr_domain"), power, tokens)
    check_slopes(form_named("cmr_critical"), power, tokens.take(tokens["D"] > 2e9))
    far = Observations.of({"D": [0.2e9, 2e30]})
    assert predict(form_named("cmr_critical"), power | {"b": 1.2}, far).tolist() == [0.0, 1.0]
    general = {"a": 0.2, "s": 0.1, "b": -0.2, "a2": -0.01, "gap": 0.4}
    check_slopes(form_named("cmr_general"), general, tokens)
    shares = Observations.of({"r": [0.1, 0.25, 0.5, 1.0]})
    check_slopes(form_named("cmr_domain_share"), {"a": -0.4, "s": 0.2, "b": 1.9}, shares)


def test_d_cpt_is_found_again() -> None:
    """Predictions are certain up to noise; exponents trade off against scales."""
    found = fit(D_CPT, noisy(D_CPT, TRUE, grid(), 0.002), FitOptions(starts=32))
    assert found.certificate.agreeing >= 2
    assert not found.certificate.at_bounds
    assert np.abs(found.predict(grid()) / predict(D_CPT, TRUE, grid()) - 1.0).max() < 0.002
    for name, tolerance in (("alpha", 0.03), ("beta", 0.02), ("eta", 0.05), ("gamma", 0.15)):
        assert found.values[name] == pytest.approx(TRUE[name], abs=tolerance), name
    larger = Observations.of({"N": [13e9] * 9, "D": [50e9] * 9, "r": SHARES})
    assert np.abs(found.predict(larger) / predict(D_CPT, TRUE, larger) - 1.0).max() < 0.01


def test_d_cpt_without_noise_is_found_exactly() -> None:
    found = fit(D_CPT, noisy(D_CPT, TRUE, grid(), 0.0), FitOptions(starts=32))
    for name, value in TRUE.items():
        assert found.values[name] == pytest.approx(value, rel=1e-6), name


def test_the_cross_domain_law_predicts_a_domain_that_it_has_not_seen() -> None:
    law, true = form_named("d_cpt_cross"), {**TRUE, "F": 0.4, "mu": 0.8, "w": 3.0}
    domains = ((2.5, 0.05), (2.1, 0.2), (1.4, 0.1), (3.0, 0.3), (1.8, 0.02))
    parts = []
    for k1, k2 in (*domains, (2.2, 0.12)):
        rows = grid().take(np.arange(0, 216, 3))
        k = {"k1": np.full(len(rows), k1), "k2": np.full(len(rows), k2)}
        parts.append({**rows.columns, **k})
    seen = Observations.of(
        {name: np.concatenate([part[name] for part in parts[:-1]]) for name in parts[0]}
    )
    unseen = Observations.of(parts[-1])
    found = fit(law, noisy(law, true, seen, 0.002), FitOptions(starts=24))
    assert found.certificate.agreeing >= 2
    assert np.abs(found.predict(unseen) / predict(law, true, unseen) - 1.0).max() < 0.003
    # The law without K cannot distinguish domains.
    plain = fit(D_CPT, noisy(law, true, seen, 0.002), FitOptions(starts=16))
    assert np.abs(plain.predict(unseen) / predict(law, true, unseen) - 1.0).max() > 0.01


def test_two_domains_do_not_identify_the_cross_domain_law() -> None:
    law, true = form_named("d_cpt_cross"), {**TRUE, "F": 0.4, "mu": 0.8, "w": 3.0}
    rows = grid()
    halves = np.arange(len(rows)) % 2
    two = Observations.of({**rows.columns, "k1": 1.5 + halves, "k2": 0.1 + 0.1 * halves})
    found = fit(law, noisy(law, true, two, 0.0), FitOptions(starts=8))
    assert set(found.certificate.unidentified) & {"E", "F", "mu", "w"}


@pytest.mark.parametrize(
    ("size", "share"), [("460M", 29.8), ("940M", 34.9), ("1.6B", 41.4), ("3.1B", 47.8)]
)
def test_published_critical_ratios(size: str, share: float) -> None:
    """2407.17467: finance at T = 100, 20B tokens."""
    law = form_named("cmr_critical")
    found = predict(law, law.published[f"finance {size}"], Observations.of({"D": [20e9]}))
    assert 100 * found[0] == pytest.approx(share, abs=0.1)


def test_critical_ratios_are_found_again() -> None:
    law = form_named("cmr_critical")
    for true in law.published.values():
        tokens = Observations.of({"D": np.geomspace(4e9, 20e9, 15)})  # where all are positive
        shares = predict(law, true, tokens)
        shares += 0.001 * np.random.default_rng(0).standard_normal(15)
        found = fit(law, Observations.of({**tokens.columns, "R": shares}), FitOptions(starts=32))
        later = Observations.of({"D": [40e9]})
        assert found.predict(later)[0] == pytest.approx(predict(law, true, later)[0], abs=0.02)


def test_a_rise_that_turns_is_found_again() -> None:
    law = form_named("cmr_general")
    true = {"a": 0.05, "s": 0.3, "a2": -0.004, "gap": 0.5, "b": -0.02}
    tokens = Observations.of({"D": np.geomspace(0.2e9, 40e9, 60)})
    change = predict(law, true, tokens)
    assert change.argmax() not in (0, 59)
    change = change + 2e-4 * np.random.default_rng(0).standard_normal(60)
    rows = Observations.of({**tokens.columns, "dloss": change})
    found = fit(law, rows, FitOptions(starts=64))
    assert np.abs(found.predict(tokens) - predict(law, true, tokens)).max() < 5e-4


@pytest.mark.parametrize("size", ["460M", "940M", "1.6B", "3.1B"])
def test_the_domain_loss_by_share_of_table_2(size: str) -> None:
    """2407.17467, table 2: four shares predict the minimum to .01 % (paper: .06 %)."""
    path = law_data("published_tables") / "published.json"
    table = json.loads(path.read_text(encoding="utf-8"))["cmr_table2_domain_loss"]
    rows = Observations.of({"r": table["R"], "loss": table[size]})
    found = fit(form_named("cmr_domain_share"), rows.take(range(4)), FitOptions(starts=32))
    assert found.certificate.agreeing >= 8
    assert found.predict(rows)[4] == pytest.approx(table[size][4], rel=1e-4)


def test_what_is_no_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"r of row 2 is 1.5, and d_cpt needs a share"):
        D_CPT.prepare(Observations.of({"N": [1e9] * 2, "D": [1e9] * 2, "r": [0.5, 1.5]}))
    with pytest.raises(UserError, match=r"r of row 1 is 0\.0"):
        form_named("cmr_domain_share").prepare(Observations.of({"r": [0.0, 0.5]}))
