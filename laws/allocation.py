"""Compute-optimal allocation: parameters and tokens of the least loss at given FLOPs."""

# n sizes, B bootstrap samples

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.fit.bootstrap import Bootstrap
from allometry.laws.fit.engine import Fit, predict
from allometry.laws.forms.base import Form, Values
from allometry.laws.observations import Observations

Array = NDArray[np.float64]

FLOPS_PER_PARAMETER_TOKEN = 6.0
"""FLOPs C = 6ND of forward and backward passes, without the FLOPs of attention scores."""
SCAN = 257
"""Number of sizes in one scan; each further scan is 64 times finer."""
FEWEST = 100.0
"""Lower end of the search over numbers of parameters and tokens."""
DEPTH = 1e-9
"""Relative excess of losses on both sides of a minimum, above rounding errors."""
NAMES = ("N", "D", "loss", "exponent")
"""Quantities of an optimum that have intervals."""


@dataclass(frozen=True)
class Allocation:
    """Optimal allocation of ``flops``: ``N`` parameters, ``D`` tokens, and their ``loss``.

    ``exponent``: a = d ln N / d ln C at the optimum, so that N grows as C^a and D as C^(1 - a).
    ``intervals``: (low, high) of N, D, loss and exponent at ``level``, from a bootstrap.
    ``warnings``: quantities outside of the fitted range.
    """

    flops: float
    N: float
    D: float
    loss: float
    exponent: float
    flops_per_parameter_token: float
    intervals: Mapping[str, tuple[float, float]] | None
    level: float
    warnings: tuple[str, ...]

    @property
    def tokens_per_parameter(self) -> float:
        """Tokens per parameter, D/N."""
        return self.D / self.N


def compute_optimal(
    fit: Fit,
    flops: float,
    flops_per_parameter_token: float = FLOPS_PER_PARAMETER_TOKEN,
    *,
    bootstrap: Bootstrap | None = None,
    level: float = 0.95,
    others: Mapping[str, float] | None = None,
) -> Allocation:
    """Return N and D with N·D·flops_per_parameter_token = flops and the least predicted loss.

    In closed form for Chinchilla's law (Hoffmann et al., arXiv 2203.15556, equation 4), else by a
    search over ln N. ``others``: values of the form's inputs besides N, D, C (flops) and M (D/N).
    Bootstrap samples without an optimum are left out of the intervals, and a warning gives their
    number. Raises UserError: the form has other inputs, or the minimum is at an end of the searched
    sizes, for the fit or for most samples. For example, ``compute_optimal(fit, 1e21).N``.
    """
    best = best_share(fit.form, fit.values, flops, flops_per_parameter_token, others)
    rows = _rows(fit.form, np.array([best.N]), best.N * best.D, flops, others)
    warnings = fit.warnings_for(rows)
    if bootstrap is None:
        return replace(best, level=level, warnings=tuple(warnings))
    samples = []
    for values_P in bootstrap.values_BP.tolist():
        values = dict(zip(bootstrap.names, values_P, strict=True))
        try:
            one = best_share(fit.form, values, flops, flops_per_parameter_token, others)
        except UserError as error:
            reason = error
            continue
        samples.append([getattr(one, name) for name in NAMES])
    lost = len(bootstrap) - len(samples)
    if 2 * lost > len(bootstrap):
        raise UserError(f"in {lost} of {len(bootstrap)} bootstrap samples {reason}")
    if lost:
        warnings.append(
            f"{lost} of {len(bootstrap)} bootstrap samples have no optimum at {flops:.4g} FLOPs "
            "and are left out of its intervals, which are then too narrow"
        )
    low, high = np.quantile(samples, (0.5 - level / 2, 0.5 + level / 2), axis=0).tolist()
    intervals = dict(zip(NAMES, zip(low, high, strict=True), strict=True))
    if (width := float(bootstrap.form_width(rows, level)[0])) > 0.0:  # outside of the data
        intervals["loss"] = _widened(best.loss, intervals["loss"], width, fit.form)
    return replace(best, intervals=intervals, level=level, warnings=tuple(warnings))


def _widened(
    loss: float, ends: tuple[float, float], width: float, form: Form
) -> tuple[float, float]:
    """Return the interval widened by the error of the form, in quadrature, on the form's scale."""
    log = form.residual == "log"
    low, high = (np.log(end / loss) if log else end - loss for end in ends)
    low, high = -np.hypot(min(low, 0.0), width), np.hypot(max(high, 0.0), width)
    if log:
        return float(loss * np.exp(low)), float(loss * np.exp(high))
    return float(loss + low), float(loss + high)


def best_share(
    form: Form,
    values: Values,
    flops: float,
    flops_per_parameter_token: float = FLOPS_PER_PARAMETER_TOKEN,
    others: Values | None = None,
) -> Allocation:
    """Return the optimum of a law with these values, without intervals or warnings.

    The exponent is computed from the optima at half and at twice the FLOPs, which is exact for a
    law whose optimum is a power of C. Raises UserError: see ``compute_optimal``.
    """
    for name, value in (("flops", flops), ("flops_per_parameter_token", flops_per_parameter_token)):
        if not (np.isfinite(value) and value > 0.0):
            raise UserError(f"{name}={value} must be a positive number")

    def size(flops: float) -> float:
        return optimal_size(form, values, flops / flops_per_parameter_token, flops, others)

    best, product = size(flops), flops / flops_per_parameter_token
    rows = _rows(form, np.array([best]), product, flops, others)
    loss = float(predict(form, values, rows)[0])
    exponent = float(np.log(size(2.0 * flops) / size(0.5 * flops)) / np.log(4.0))
    each = float(flops_per_parameter_token)
    return Allocation(float(flops), best, product / best, loss, exponent, each, None, 0.95, ())


def optimal_size(
    form: Form, values: Values, product: float, flops: float, others: Values | None = None
) -> float:
    """Return the N of the least loss with N·D = product.

    For Chinchilla's law N* = G·(C/6)^(β/(α+β)), G = (αA/βB)^(1/(α+β)).
    """
    if form.name != "chinchilla":
        return searched_size(form, values, product, flops, others)
    alpha, beta = values["alpha"], values["beta"]
    if min(alpha * values["A"], beta * values["B"]) <= 0.0:
        raise UserError(
            f"the law has no compute-optimal size: with alpha={alpha:.4g}, A={values['A']:.4g}, "
            f"beta={beta:.4g}, B={values['B']:.4g} its loss does not fall with both N and D"
        )
    log_g = np.log(alpha * values["A"]) - np.log(beta * values["B"])
    return float(np.exp((log_g + beta * np.log(product)) / (alpha + beta)))


def searched_size(
    form: Form, values: Values, product: float, flops: float, others: Values | None = None
) -> float:
    """Return the N of the least loss with N·D = product, by scans of ln N and a polynomial.

    The first scan covers all sizes; finer scans follow around its least loss, preferring a minimum
    between higher losses: some laws (Farseer's) have a second descent at sizes beyond any training
    run. The result is the root of the derivative of a polynomial through 13 points around the
    minimum, because differences of losses near an optimum are lost in rounding long before their
    slopes are.
    """
    low, high = np.log(FEWEST), np.log(product / FEWEST)
    if low >= high:
        raise UserError(f"flops={flops:.4g} are too few to share between parameters and tokens")

    def losses(log_n: Array) -> Array:
        with np.errstate(all="ignore"):  # a law may overflow far from all runs
            return predict(form, values, _rows(form, np.exp(log_n), product, flops, others))

    left, right = low, high
    while right - left > 1e-2:
        points = np.linspace(left, right, SCAN)
        best = _least_inside(losses(points))
        center, reach = points[best], 2 * (points[1] - points[0])
        left, right = max(low, center - reach), min(high, center + reach)
    center = (left + right) / 2
    if center - low < 0.2 or high - center < 0.2:
        raise UserError(
            f"{form.name} has no compute-optimal size at {flops:.4g} FLOPs: its loss is least at "
            f"N={np.exp(center):.4g}, the end of all sizes that were tried"
        )
    offsets = np.linspace(-0.15, 0.15, 13)
    polynomial = np.polynomial.Polynomial.fit(offsets, losses(center + offsets), 8)
    roots = polynomial.deriv().roots()
    real = roots.real[np.abs(roots.imag) < 1e-9]
    inside = real[np.abs(real) <= 0.05]
    vertex = inside[np.argmin(polynomial(inside))] if len(inside) else 0.0
    return float(np.exp(center + vertex))


def _least_inside(losses: Array) -> int:
    """Return the index of the least loss between higher losses; without one, of the least loss."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    higher = losses * (1.0 + DEPTH)
    before = np.maximum.accumulate(np.where(np.isinf(losses), -np.inf, losses))
    after = np.maximum.accumulate(np.where(np.isinf(losses), -np.inf, losses)[::-1])[::-1]
    inside = np.zeros(len(losses), np.bool_)
    inside[1:-1] = (losses[1:-1] <= losses[:-2]) & (losses[1:-1] <= losses[2:])
    inside &= (before > higher) & (after > higher)
    return int(np.argmin(np.where(inside, losses, np.inf) if inside.any() else losses))


def _rows(
    form: Form, sizes: Array, product: float, flops: float, others: Values | None
) -> Observations:
    known = {
        "N": sizes,
        "D": product / sizes,
        "C": np.full_like(sizes, flops),
        "M": product / sizes**2,
        **{name: np.full_like(sizes, value) for name, value in (others or {}).items()},
    }
    names = [variable.name for variable in form.inputs]
    if not ({"N", "D"} <= set(names) or {"C", "M"} <= set(names)):
        raise UserError(
            f"{form.name} predicts from {', '.join(names)}, not from N and D, so it says nothing "
            f"about their best shares; fit a law of N and D such as chinchilla"
        )
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(
            f"{form.name} also needs {', '.join(missing)}; give a value of each for the optimum"
        )
    return Observations.of({name: known[name] for name in names})
