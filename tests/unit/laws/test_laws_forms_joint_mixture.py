"""Laws of N, D and all shares: by hand, beyond the measured sizes, and the best mixture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import FitOptions, fit, predict
from allometry.laws.fit.store import save_fit
from allometry.laws.mixing import optimal_mixture
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from law_checks import noisy
from shell import Shell

DOMAINS = ("web", "code", "books")
OVER = ",".join(DOMAINS)
SHARED = {
    "E": 1.2, "alpha": 0.34, "beta": 0.33, "C_web": 2.0, "C_code": 1.0, "C_books": 0.5,
    "g_web": 0.5, "g_code": 0.8, "g_books": 0.3,
}  # fmt: skip
ADDITIVE = {**SHARED, "A": 400.0, "B": 1500.0}
JOINT = {
    **SHARED, "mu": 0.8, "nu": 1.2,
    "A_web": 0.5, "A_code": 1.2, "A_books": 0.3, "B_web": 0.9, "B_code": 0.4, "B_books": 1.3,
}  # fmt: skip
LAWS = {"mixing_additive": ADDITIVE, "mixing_joint": JOINT}


class Exact:
    """Law with its true values."""

    def __init__(self, name: str) -> None:
        self.form, self.values = form_named(f"{name}:{OVER}"), LAWS[name]

    def predict(self, observations: Observations) -> np.ndarray:
        return predict(self.form, self.values, observations)


def runs() -> Observations:
    """Return 14 mixtures at three sizes and three horizons."""
    drawn = np.random.default_rng(0).dirichlet(np.ones(3), 11)
    shares = np.vstack([drawn, np.eye(3) * 0.7 + 0.1]).tolist()
    scales = [(n, d) for n in (4e7, 1.6e8, 6e8) for d in (1e9, 8e9, 6e10)]
    rows = [(*scale, *mixture) for scale in scales for mixture in shares]
    return Observations.of(dict(zip(("N", "D", *DOMAINS), zip(*rows, strict=True), strict=True)))


def test_by_hand() -> None:
    at = {"N": [1e9], "D": [2e10], "web": [0.5], "code": [0.5], "books": [0.0]}
    mixture = 1 / (2 * 0.5**0.5 + 1 * 0.5**0.8)
    expected = 1.2 + mixture + 400 / 1e9**0.34 + 1500 / 2e10**0.33
    found = predict(form_named(f"mixing_additive:{OVER}"), ADDITIVE, Observations.of(at))
    assert found[0] == pytest.approx(expected, rel=1e-14)
    joint = form_named(f"mixing_joint:{OVER}")
    paper = joint.restated(JOINT)
    size = (0.5 * paper["A_web"] + 0.5 * paper["A_code"]) ** 0.8 / 1e9**0.34
    data = (0.5 * paper["B_web"] + 0.5 * paper["B_code"]) ** 1.2 / 2e10**0.33
    found = predict(joint, JOINT, Observations.of(at))
    assert found[0] == pytest.approx(1.2 + mixture + size + data, rel=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_a_larger_model_and_its_best_mixture_are_predicted(name: str) -> None:
    """From up to 600M and 60B tokens, with noise of 0.1 %, to 7B and 140B."""
    true = Exact(name)
    found = fit(true.form, noisy(true.form, true.values, runs(), 1e-3), FitOptions(starts=64))
    assert found.certificate.agreeing >= 2
    assert not found.certificate.unidentified
    shares = np.random.default_rng(5).dirichlet(np.ones(3), 40)
    at = {"N": 7e9, "D": 1.4e11}
    columns = {name: np.full(40, value) for name, value in at.items()}
    large = Observations.of({**columns, **dict(zip(DOMAINS, shares.T, strict=True))})
    assert np.abs(found.predict(large) / true.predict(large) - 1).max() < 0.01
    best, exact = (optimal_mixture({"all": law}, DOMAINS, at=at) for law in (found, true))
    row = Observations.of({name: [value] for name, value in {**at, **best.shares}.items()})
    assert true.predict(row)[0] < exact.loss * 1.002


def test_the_best_mixture_moves_with_the_budget_in_the_joint_law_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell, best = Shell(capsys), {}
    whole = [
        f"--{end}={name}={share}" for name in DOMAINS for end, share in (("least", 0), ("most", 1))
    ]
    for name in LAWS:
        true = Exact(name)
        rows = Observations.of({**runs().columns, "loss": true.predict(runs())})
        path = tmp_path / f"{name}.json"
        save_fit(path, fit(true.form, rows, FitOptions(starts=64)))
        for size, tokens in ((4e7, 1e9), (7e9, 1.4e11)):
            at = ("--with", f"N={size}", "--with", f"D={tokens}")
            facts = shell.json("mix", "best", path, *at, *whole)
            best[name, size] = [facts["shares"][domain]["share"] for domain in DOMAINS]
    assert "also read N, D; give --with N=VALUE" in shell.refusal("mix", "best", path)
    moved = {name: np.ptp([best[name, 4e7], best[name, 7e9]], axis=0).max() for name in LAWS}
    assert moved["mixing_additive"] < 0.01
    assert moved["mixing_joint"] > 0.05


def test_shares_that_do_not_sum_to_one_are_refused() -> None:
    at = {"N": [1e9], "D": [2e10], "web": [0.5], "code": [0.2], "books": [0.0]}
    with pytest.raises(UserError, match=r"sum to 0\.7, and mixing_joint:web,code,books needs"):
        predict(form_named(f"mixing_joint:{OVER}"), JOINT, Observations.of(at))
    with pytest.raises(UserError, match="needs at least 2 different columns"):
        form_named("mixing_additive:web")
