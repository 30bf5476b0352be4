"""What a fit would have been on other runs like these: resampled groups, all samples at once."""

# B samples, n rows, P parameters, G groups, S searches

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import Fit
from allometry.laws.fit.plain import plain_numbers
from allometry.laws.fit.problem import Problem
from allometry.laws.fit.solver import Loss, minimize
from allometry.laws.observations import Observations

Array = NDArray[np.float64]

PERTURBED = 2
"""Perturbed starts of a sample, beside the fit's optimum."""
NOISES = 20
"""Residuals drawn for each sample's prediction of one more run."""
EXACT = 1e-6
"""Rows without noise leave intervals narrower than this share, whose edges are rounding."""
BLOCK = 2**23
"""Weights held at once."""


@dataclass(frozen=True)
class Bootstrap:
    """The parameters of fits to resampled groups: ``values_BP`` by sample and name.

    Intervals are percentiles. They hold the uncertainty of the parameters; ``noise`` adds that of
    one more run. ``failed``: samples that no search could fit, left out of ``values_BP``.
    """

    fit: Fit
    values_BP: Array
    names: tuple[str, ...]
    seed: int
    failed: int = 0

    def __len__(self) -> int:
        return len(self.values_BP)

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Return the interval of a parameter."""
        low, high = np.quantile(self.values_BP[:, self.names.index(name)], _tails(level))
        return float(low), float(high)

    def at_edge(self, name: str, level: float = 0.95) -> bool:
        """Whether a fitted parameter's value is at an end of its interval, or outside of it."""
        if name in self.fit.options.fixed:
            return False
        low, high = self.interval(name, level)
        value, rounding = self.fit.values[name], 1e-6 * (high - low)
        if name not in self.fit.certificate.at_bounds and high - low <= EXACT * abs(value):
            return False
        return not low + rounding < value < high - rounding

    def values(self) -> dict[str, Array]:
        """Return each parameter's values [B, 1], as a form takes them."""
        return {name: self.values_BP[:, index, None] for index, name in enumerate(self.names)}

    def predictions(self, observations: Observations) -> Array:
        """Return the target of these rows by each sample's parameters [B, n]."""
        form = self.fit.form
        predicted = form.predict(self.values(), form.prepare(observations))
        return np.array(np.broadcast_to(predicted, (len(self), len(observations))))

    def predict_interval(
        self, observations: Observations, level: float = 0.95, *, noise: bool = False
    ) -> tuple[Array, Array]:
        """Return (low [n], high [n]) of the target.

        ``noise``: of a new measurement: each sample's prediction is moved by a residual of the
        fit, drawn at random and widened by n/(n - P) for the freedom that the fit used up.
        """
        predicted_Bn = self.predictions(observations)
        if noise:
            residual_n = self.fit.residuals()
            freedom = max(len(residual_n) - len(self.names), 1)
            draw = np.random.default_rng(self.seed + 1)
            predicted_Bn = np.repeat(predicted_Bn, NOISES, axis=0)
            moved_Bn = draw.choice(residual_n, predicted_Bn.shape)
            moved_Bn *= np.sqrt(len(residual_n) / freedom)  # predicted less measured
            log = self.fit.form.residual == "log"
            predicted_Bn = predicted_Bn * np.exp(-moved_Bn) if log else predicted_Bn - moved_Bn
        low_n, high_n = np.quantile(predicted_Bn, _tails(level), axis=0)
        return low_n, high_n

    def to_json(self) -> dict[str, Any]:
        """Return plain values, which ``from_json`` reads."""
        return {
            "names": list(self.names),
            "values": [plain_numbers(row) for row in self.values_BP],
            "seed": self.seed,
            "failed": self.failed,
        }

    @classmethod
    def from_json(cls, fit: Fit, data: Mapping[str, Any]) -> Self:
        """Return the bootstrap of ``to_json``."""
        values_BP = np.array(data["values"], np.float64).reshape(-1, len(data["names"]))
        return cls(fit, values_BP, tuple(data["names"]), data["seed"], data["failed"])


def _tails(level: float) -> tuple[float, float]:
    assert 0.0 < level < 1.0, level
    return 0.5 - level / 2, 0.5 + level / 2


def bootstrap(fit: Fit, samples: int = 200, seed: int = 0) -> Bootstrap:
    """Return fits to ``samples`` draws of as many groups, with replacement.

    A drawn group weighs its rows as often as it was drawn. Each sample is searched for from the
    fit's optimum and from two perturbed ones, and the best is kept. Raises UserError if there are
    fewer than two groups, or fewer than two samples are asked for.
    """
    groups, index_n = np.unique(fit.observations.groups, return_inverse=True)
    if len(groups) < 2:
        raise UserError(
            f"all {len(index_n)} observations belong to group {str(groups[0])!r}, and a bootstrap "
            f"resamples groups; give rows of at least two runs or ask for no intervals"
        )
    if samples < 2:
        raise UserError(f"{samples} bootstrap samples say nothing; use at least 2, better 200")
    draw = np.random.default_rng(seed)
    counts_BG = draw.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), samples)
    problem, loss = fit.problem(), fit.options.make_loss()
    center_P = problem.coordinates(fit.values)
    block, refits = max(1, BLOCK // (len(index_n) * (1 + PERTURBED))), []
    for start in range(0, samples, block):
        weights_Bn = counts_BG[start : start + block, index_n].astype(np.float64)
        refits.append(refit(problem, loss, center_P, weights_Bn, PERTURBED, seed + start))
    x_BP = np.concatenate(refits)
    good_B = np.isfinite(x_BP).all(axis=1)
    names = tuple(parameter.name for parameter in fit.form.parameters)
    values, shape = problem.values(x_BP[good_B]), (int(good_B.sum()), 1)
    values_BP = np.concatenate([np.broadcast_to(values[name], shape) for name in names], axis=1)
    return Bootstrap(fit, values_BP, names, seed, int((~good_B).sum()))


def refit(
    problem: Problem, loss: Loss, center_P: Array, weights_Bn: Array, perturbed: int, seed: int
) -> Array:
    """Return the optima [B, P], in search coordinates, for each row of weights; NaN for none.

    Searches start at ``center_P`` and at ``perturbed`` points around it, drawn from the normal
    distribution that squared residuals would give the optimum (at most 1 in a coordinate).
    """
    number = len(weights_Bn)
    draw = np.random.default_rng(seed)
    starts_KP = np.concatenate([center_P[None], around(problem, center_P, perturbed, draw)])
    starts_SP = np.tile(starts_KP, (number, 1))
    weights_Sn = np.repeat(weights_Bn, len(starts_KP), axis=0)
    solved = minimize(problem, starts_SP, loss, weights_Sn)
    objective_BK = solved.objective_S.reshape(number, len(starts_KP))
    x_BKP = solved.x_SP.reshape(number, len(starts_KP), -1)
    x_BP = x_BKP[np.arange(number), np.argmin(objective_BK, axis=1)]
    return np.where(np.isfinite(objective_BK.min(axis=1))[:, None], x_BP, np.nan)


def around(problem: Problem, x_P: Array, number: int, draw: np.random.Generator) -> Array:
    """Return points [number, P] around an optimum, as far as its residuals leave it open."""
    r_Sn, J_SPn = problem.slopes(x_P[None])
    left, singular, _ = np.linalg.svd(J_SPn[0], full_matrices=False)
    freedom = max(r_Sn.shape[1] - len(x_P), 1)
    noise = float(np.sqrt((r_Sn**2).sum() / freedom))
    reach = np.minimum(noise / np.maximum(singular, 1e-300), 1.0)
    steps_KP = (draw.standard_normal((number, len(reach))) * reach) @ left.T
    return np.asarray(np.clip(x_P + np.clip(steps_KP, -1.0, 1.0), problem.low_P, problem.high_P))
