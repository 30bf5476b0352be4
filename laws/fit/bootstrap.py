"""Bootstrap of a fit: fits to resampled groups, all samples in one batch."""

# B samples, n rows, P parameters, G groups, S searches

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.fit.distance import distance
from allometry.laws.fit.engine import Fit
from allometry.laws.fit.extrapolation import FormError, form_error
from allometry.laws.fit.plain import plain_numbers
from allometry.laws.fit.refit import refit
from allometry.laws.observations import Observations

Array = NDArray[np.float64]

PERTURBED = 2
"""Number of perturbed starts of a sample, in addition to the fit's optimum."""
NOISES = 20
"""Number of residuals drawn for each sample's prediction of one more run."""
EXACT = 1e-6
"""Relative width below which an interval of noise-free rows is rounding error."""
BLOCK = 2**23
"""Maximum number of weights in memory at once."""


@dataclass(frozen=True)
class Spread:
    """Interval (low_n, high_n) of predictions, and the half widths of its parts.

    ``parameters_n``: uncertainty of the parameters. ``form_n``: error of the law's form outside of
    the data. ``noise_n``: scatter of one run (0 if not requested). Half widths are those of logs if
    the law's residuals are logs: shares of the prediction.
    """

    low_n: Array
    high_n: Array
    parameters_n: Array
    form_n: Array
    noise_n: Array


@dataclass(frozen=True)
class Bootstrap:
    """Parameters of fits to resampled groups: ``values_BP`` by sample and name.

    Intervals of parameters are percentiles. Intervals of predictions also include the error of the
    form on held-out rows outside of the data (``form_error``; None if too few rows could be held
    out); ``noise`` adds the scatter of one more run. ``failed``: number of samples that no search
    could fit, left out of ``values_BP``. ``drawn_BG``: mask of the groups (sorted) in each sample;
    not stored.
    """

    fit: Fit
    values_BP: Array
    names: tuple[str, ...]
    seed: int
    failed: int = 0
    form_error: FormError | None = None
    drawn_BG: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.values_BP)

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Return the interval of a parameter."""
        low, high = np.quantile(self.values_BP[:, self.names.index(name)], _tails(level))
        return float(low), float(high)

    def at_edge(self, name: str, level: float = 0.95) -> bool:
        """Return True if a fitted parameter is at an end of its interval, or outside of it."""
        if name in self.fit.options.fixed:
            return False
        low, high = self.interval(name, level)
        value, rounding = self.fit.values[name], 1e-6 * (high - low)
        if name not in self.fit.certificate.at_bounds and high - low <= EXACT * abs(value):
            return False
        return not low + rounding < value < high - rounding

    def values(self) -> dict[str, Array]:
        """Return each parameter's values [B, 1], as input of a form."""
        return {name: self.values_BP[:, index, None] for index, name in enumerate(self.names)}

    def predictions(self, observations: Observations) -> Array:
        """Return the target of these rows by each sample's parameters [B, n]."""
        form = self.fit.form
        predicted = form.predict(self.values(), form.prepare(observations))
        predicted = np.broadcast_to(predicted, (len(self), len(observations)))
        return np.array(form.target.clip(predicted))

    def predict_interval(
        self, observations: Observations, level: float = 0.95, *, noise: bool = False
    ) -> tuple[Array, Array]:
        """Return (low [n], high [n]) of the target, from ``spread``."""
        spread = self.spread(observations, level, noise=noise)
        return spread.low_n, spread.high_n

    def spread(
        self,
        observations: Observations,
        level: float = 0.95,
        *,
        noise: bool = False,
        far_n: Array | None = None,
    ) -> Spread:
        """Return the interval of the target and its parts.

        Percentiles of the samples' predictions, widened in quadrature outside of the data by the
        error of the form. ``noise``: interval of a new measurement: each sample's prediction is
        shifted by a random residual of the fit, scaled by sqrt(n/(n - P)) for the P fitted
        parameters. ``far_n``: distance of the rows from the data, if not given by ``distance``. For
        example, ``bootstrap(fit).spread(rows, 0.95, noise=True).high_n``.
        """
        form, log = self.fit.form, self.fit.form.residual == "log"
        predicted_Bn = self.predictions(observations)
        inner_2n = np.quantile(predicted_Bn, _tails(level), axis=0)
        outer_2n, scatter = inner_2n, 0.0
        if noise:
            residual_n = self.fit.residuals()
            freedom = max(len(residual_n) - len(self.names), 1)
            residual_n = residual_n * np.sqrt(len(residual_n) / freedom)  # predicted minus measured
            scatter = float(np.ptp(np.quantile(residual_n, _tails(level)))) / 2
            draw = np.random.default_rng(self.seed + 1)
            predicted_Bn = np.repeat(predicted_Bn, NOISES, axis=0)
            moved_Bn = draw.choice(residual_n, predicted_Bn.shape)
            predicted_Bn = predicted_Bn * np.exp(-moved_Bn) if log else predicted_Bn - moved_Bn
            outer_2n = np.quantile(predicted_Bn, _tails(level), axis=0)
        center_n = self.fit.predict(observations)
        form_n = self.form_width(observations, level, far_n)
        with np.errstate(all="ignore"):
            on_scale = np.log if log else np.asarray
            parameters_n = np.ptp(on_scale(inner_2n), axis=0) / 2
            apart_2n = np.array([[-1.0], [1.0]]) * (on_scale(outer_2n) - on_scale(center_n))
            apart_2n = np.array([[-1.0], [1.0]]) * np.hypot(np.maximum(apart_2n, 0.0), form_n)
            wide_2n = center_n * np.exp(apart_2n) if log else center_n + apart_2n
        low_n, high_n = form.target.clip(np.where(form_n > 0.0, wide_2n, outer_2n))
        noise_n = np.full(len(observations), scatter)
        return Spread(low_n, high_n, parameters_n, form_n, noise_n)

    def form_width(
        self, observations: Observations, level: float = 0.95, far_n: Array | None = None
    ) -> Array:
        """Return half widths [n] of the form's own error, on its scale; 0 within the data."""
        if self.form_error is None:
            return np.zeros(len(observations))
        if far_n is None:
            far_n = distance(self.fit.form, self.fit.observations, observations)
        return self.form_error.half_width(far_n, level)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for ``from_json``."""
        return {
            "names": list(self.names),
            "values": [plain_numbers(row) for row in self.values_BP],
            "seed": self.seed,
            "failed": self.failed,
            "form_error": None if self.form_error is None else asdict(self.form_error),
        }

    @classmethod
    def from_json(cls, fit: Fit, data: Mapping[str, Any]) -> Self:
        """Return the bootstrap of ``to_json``."""
        values_BP = np.array(data["values"], np.float64).reshape(-1, len(data["names"]))
        kept = data.get("form_error")
        error = None if kept is None else FormError(float(kept["scale"]), int(kept["folds"]))
        return cls(fit, values_BP, tuple(data["names"]), data["seed"], data["failed"], error)


def _tails(level: float) -> tuple[float, float]:
    assert 0.0 < level < 1.0, level
    return 0.5 - level / 2, 0.5 + level / 2


def bootstrap(fit: Fit, samples: int = 200, seed: int = 0) -> Bootstrap:
    """Return fits to ``samples`` draws of as many groups, with replacement.

    The rows of a group are weighted by the number of its draws. Each sample is fitted from the
    fit's optimum and from two perturbed starts, and the best optimum is kept. Raises UserError:
    there are fewer than two groups, or fewer than two samples are requested. For example,
    ``bootstrap(fit, 200).interval("alpha")``.
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
    failed = int((~good_B).sum())
    return Bootstrap(
        fit, values_BP, names, seed, failed, form_error(fit, seed), counts_BG[good_B] > 0
    )
