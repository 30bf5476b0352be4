"""The best rate and batch of sweeps, and their laws over sizes and horizons.

Two steps: in each cell (the runs of one N and D) a parabola in octaves of rate and batch is put
through the runs near the best one; then the logs of the optima are linear in ln N and ln D. The
best run alone (no parabola) is noisy: on Step Law's 17 cells its exponents move by 0.11.
"""

# n rows of a cell, K coefficients of a parabola, A axes that vary, S bootstrap samples, G cells

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.observations import Observations

Array = NDArray[np.float64]
AXES = ("lr", "B")
_NAMES = {"lr": "learning rates", "B": "batches"}
_EXPONENTS = {"N": "a", "D": "b"}


@dataclass(frozen=True, slots=True)
class Surface:
    """The optimum of one cell. ``best``: lr and B (a single value that was run, if only one was).

    ``curvature``: rise of the loss, in nats per token, one octave beside the optimum of each axis.
    ``best_SA``: log2 of the optima of bootstrap samples, NaN where a sample has none, at the
    window's edge where it lies beyond. ``rms``:
    residual of the parabola. ``problem`` says why there is no optimum; ``best`` is then the best
    run's.
    """

    best: Mapping[str, float]
    loss: float
    curvature: Mapping[str, float]
    axes: tuple[str, ...]
    rows: int
    rms: float
    best_SA: Array
    problem: str | None = None

    def interval(self, axis: str, level: float = 0.95) -> tuple[float, float]:
        """Return the percentile interval of the best lr or B; NaN where half the samples fail."""
        if axis not in self.axes:
            return float("nan"), float("nan")
        low, high = _interval(self.best_SA[:, self.axes.index(axis)], level)
        return 2.0**low, 2.0**high


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell's name, its N and D, and its surface."""

    name: str
    at: Mapping[str, float]
    surface: Surface


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """value = c N^a D^b. An exponent of an input that the law does not have is 0.

    ``values`` as ``learning_rate_law`` and ``batch_law`` take them; ``samples``: the same of each
    bootstrap; ``octaves``: RMS over cells of log2(optimum / law).
    """

    inputs: tuple[str, ...]
    values: Mapping[str, float]
    samples: Mapping[str, Array]
    octaves: float

    def predict(self, **at: float) -> float:
        """Return the value at N=..., D=...."""
        return float(_power(self.values, self.inputs, at))

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Return the percentile interval of ``c``, ``a`` or ``b``."""
        return _interval(self.samples[name], level)

    def predict_interval(self, level: float = 0.95, **at: float) -> tuple[float, float]:
        """Return the percentile interval of the law's value at N=..., D=...."""
        return _interval(np.asarray(_power(self.samples, self.inputs, at)), level)


@dataclass(frozen=True, slots=True)
class HyperparameterLaw:
    """Laws of the best rate and batch (None: one batch only), and the cells behind them.

    ``left_out`` names the cells without an optimum, and why.
    """

    rate: PowerLaw
    batch: PowerLaw | None
    cells: tuple[Cell, ...]
    left_out: Mapping[str, str]

    def octaves_from(self, law: Callable[[float, float], tuple[float, float]]) -> dict[str, Any]:
        """Return log2(optimum / law(N, D)) of every cell, (rate, batch), by the cell's name."""
        found = {}
        for cell in self.cells:
            rate, batch = law(cell.at["N"], cell.at["D"])
            best = cell.surface.best
            found[cell.name] = (math.log2(best["lr"] / rate), math.log2(best["B"] / batch))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return laws with 95 % intervals, cells and what was left out, for JSON."""
        return {
            "rate": _law_json(self.rate),
            "batch": None if self.batch is None else _law_json(self.batch),
            "cells": [
                {"name": cell.name, **cell.at, **cell.surface.best, "loss": cell.surface.loss}
                for cell in self.cells
            ],
            "left_out": dict(self.left_out),
        }


def fit_surface(
    observations: Observations, *, within: float = 0.01, samples: int = 200, seed: int = 0
) -> Surface:
    """Return the optimum of the runs of one N and D: columns ``lr``, ``B`` and ``loss``.

    Least squares of a full parabola in log2 of the axes that vary, through the runs whose loss is
    at most ``within`` (relative) above the best. A loss that is not finite is a run that diverged,
    so not near. Samples of the bootstrap draw runs of that window.

    Raises:
        UserError: no rate varies, an axis has just two values, or a rate or batch is not positive.
    """
    axes = tuple(name for name in AXES if _varies(observations, name))
    if not axes:
        raise UserError("the sweep has one learning rate and one batch; vary one of them")
    loss_n = observations["loss"]
    finite_n = np.isfinite(loss_n)
    if not finite_n.any():
        raise UserError("every run of the sweep diverged; sweep lower learning rates")
    best_row = int(np.argmin(np.where(finite_n, loss_n, np.inf)))
    near_n = finite_n & (np.where(finite_n, loss_n, np.inf) <= loss_n[best_row] * (1.0 + within))
    x_nA = np.stack([np.log2(observations[name]) for name in axes], axis=1)[near_n]
    y_n = loss_n[near_n]
    start = {name: float(observations[name][best_row]) for name in AXES}
    empty = np.full((samples, len(axes)), np.nan)

    def failed(problem: str) -> Surface:
        rows, loss = len(y_n), float(loss_n[best_row])
        return Surface(start, loss, {}, axes, rows, float("nan"), empty, problem)

    coefficients = 1 + len(axes) + len(axes) * (len(axes) + 1) // 2
    if len(y_n) < coefficients + 1:
        return failed(f"only {len(y_n)} runs are within {within:.2%} of the best")
    center_A = x_nA.mean(axis=0)
    terms_nK = _terms(x_nA - center_A)
    if np.linalg.matrix_rank(terms_nK) < coefficients:
        return failed(f"the runs within {within:.2%} of the best do not span a parabola")
    random = np.random.default_rng(seed)
    weights_Sn = random.multinomial(len(y_n), np.full(len(y_n), 1.0 / len(y_n)), samples)
    every_SK = _least_squares(terms_nK, y_n, np.vstack([np.ones(len(y_n)), weights_Sn]))
    vertex_SA, bowl_S = _vertices(every_SK, len(axes))
    vertex_A = vertex_SA[0]
    if not bowl_S[0]:
        return failed("the losses around the best run are no bowl")
    edges = (x_nA - center_A).min(axis=0), (x_nA - center_A).max(axis=0)
    for axis, name in enumerate(axes):
        if not edges[0][axis] <= vertex_A[axis] <= edges[1][axis]:
            return failed(f"the optimum lies outside of the {_NAMES[name]} that were run")
    fitted_K = every_SK[0]
    best = {
        **start,
        **{name: 2.0 ** float(center_A[i] + vertex_A[i]) for i, name in enumerate(axes)},
    }
    squares = {name: float(fitted_K[1 + len(axes) + i]) for i, name in enumerate(axes)}
    return Surface(
        best=best,
        loss=float(_terms(vertex_A[None])[0] @ fitted_K),
        curvature=squares,
        axes=axes,
        rows=len(y_n),
        rms=float(np.sqrt(np.mean((terms_nK @ fitted_K - y_n) ** 2))),
        best_SA=np.where(bowl_S[1:, None], center_A + np.clip(vertex_SA[1:], *edges), np.nan),
    )


def fit_hyperparameter_law(
    observations: Observations,
    *,
    rate_inputs: Sequence[str] = ("N", "D"),
    batch_inputs: Sequence[str] = ("D",),
    within: float = 0.01,
    samples: int = 1000,
    seed: int = 0,
) -> HyperparameterLaw:
    """Return the laws of the best rate and batch: columns N, D, lr, B and loss, cells by (N, D).

    Optima from ``fit_surface``, then least squares of their logs (Step Law, arXiv 2503.04715, fits
    the same two laws to the best runs). An input that is the same in all cells is left out of
    the law. A sample of the bootstrap draws runs in each cell, and cells; it so counts the noise
    of runs twice and errs to the wide side.

    Raises:
        UserError: fewer cells with an optimum than a law has coefficients, or N and D vary
            together, so that their exponents cannot be told apart.
    """
    cells, left_out = [], {}
    at = {name: observations[name] for name in _EXPONENTS}
    for index, (n, d) in enumerate(sorted(set(zip(at["N"], at["D"], strict=True)))):
        rows = (at["N"] == n) & (at["D"] == d)
        name = f"N={n:.4g} D={d:.4g}"
        try:
            surface = fit_surface(
                observations.take(rows), within=within, samples=samples, seed=seed + index
            )
        except UserError as error:
            raise UserError(f"cell {name}: {error}") from None
        if surface.problem is None:
            cells.append(Cell(name, {"N": float(n), "D": float(d)}, surface))
        else:
            left_out[name] = surface.problem
    random = np.random.default_rng(seed)
    number = max(len(cells), 1)
    weights_SG = random.multinomial(number, np.full(number, 1.0 / number), samples)
    batch = None
    with_batch = [cell for cell in cells if "B" in cell.surface.axes]
    rate = _fit_law("lr", rate_inputs, cells, left_out, weights_SG)
    if with_batch and len(with_batch) == len(cells):
        batch = _fit_law("B", batch_inputs, cells, left_out, weights_SG)
    return HyperparameterLaw(rate, batch, tuple(cells), left_out)


def nearest_excess(
    observations: Observations, law: Callable[[float, float], tuple[float, float]]
) -> dict[str, float]:
    """Return, by cell, how far the run nearest to ``law(N, D)`` is above the cell's best one.

    Relative to the best loss; nearest in log rate and log batch; runs that diverged count as
    infinitely bad.
    """
    found = {}
    sizes, tokens = observations["N"], observations["D"]
    for n, d in sorted(set(zip(sizes, tokens, strict=True))):
        cell = observations.take((sizes == n) & (tokens == d))
        rate, batch = law(float(n), float(d))
        distance = np.log(cell["lr"] / rate) ** 2 + np.log(cell["B"] / batch) ** 2
        loss = np.where(np.isfinite(cell["loss"]), cell["loss"], np.inf)
        found[f"N={n:.4g} D={d:.4g}"] = float(loss[np.argmin(distance)] / loss.min() - 1.0)
    return found


def _varies(observations: Observations, name: str) -> bool:
    values = observations[name]
    if not (np.isfinite(values) & (values > 0.0)).all():
        raise UserError(f"{name} must be positive in every row of a sweep; mend or drop the others")
    number = len(np.unique(values))
    if number == 2:
        raise UserError(f"a parabola needs three {_NAMES[name]} and the sweep has two; add one")
    return number > 2


def _terms(x_nA: Array) -> Array:
    """1, each axis, each square, and the product of two: [n, K]."""
    columns = [np.ones(len(x_nA)), *x_nA.T, *(x_nA**2).T]
    if x_nA.shape[1] == 2:
        columns.append(x_nA[:, 0] * x_nA[:, 1])
    return np.stack(columns, axis=1)


def _least_squares(terms_nK: Array, y_n: Array, weights_Sn: Array) -> Array:
    """Weighted least squares for each row of weights, [S, K]; NaN where the rows do not span."""
    # QR first: normal equations of orthonormal columns lose nothing.
    basis_nK, upper_KK = np.linalg.qr(terms_nK)
    gram_SKK = np.einsum("sn,nk,nl->skl", weights_Sn, basis_nK, basis_nK, optimize=True)
    right_SK = (weights_Sn * y_n) @ basis_nK
    spans_S = np.linalg.cond(gram_SKK) < 1e10
    gram_SKK[~spans_S] = np.eye(gram_SKK.shape[-1])
    solved_SK = np.linalg.solve(gram_SKK, right_SK[..., None])[..., 0]
    solved_SK[~spans_S] = np.nan
    return np.asarray(np.linalg.solve(upper_KK, solved_SK.T).T)


def _vertices(coefficients_SK: Array, axes: int) -> tuple[Array, NDArray[np.bool_]]:
    """Where each parabola is level [S, A], and whether that is a minimum [S]."""
    slope_SA = coefficients_SK[:, 1 : 1 + axes]
    hessian_SAA = np.zeros((len(coefficients_SK), axes, axes))
    for axis in range(axes):
        hessian_SAA[:, axis, axis] = 2.0 * coefficients_SK[:, 1 + axes + axis]
    if axes == 2:
        hessian_SAA[:, 0, 1] = hessian_SAA[:, 1, 0] = coefficients_SK[:, -1]
    known_S = np.isfinite(coefficients_SK).all(axis=1)
    hessian_SAA[~known_S] = -np.eye(axes)
    bowl_S = np.linalg.eigvalsh(hessian_SAA)[:, 0] > 0.0
    hessian_SAA[~bowl_S] = np.eye(axes)
    vertex_SA = -np.linalg.solve(hessian_SAA, slope_SA[..., None])[..., 0]
    return np.where(bowl_S[:, None], vertex_SA, np.nan), bowl_S


def _fit_law(
    axis: str,
    inputs: Sequence[str],
    cells: Sequence[Cell],
    left_out: Mapping[str, str],
    weights_SG: NDArray[np.int64],
) -> PowerLaw:
    varying = tuple(name for name in inputs if len({cell.at[name] for cell in cells}) > 1)
    needed = len(varying) + 1
    if not varying or len(cells) < needed:
        lost = "".join(f"; {name}: {why}" for name, why in left_out.items())
        raise UserError(
            f"a law of the best {_NAMES[axis]} needs at least 2 cells of different "
            f"{' or '.join(inputs)} and one more than exponents, and {len(cells)} have an optimum"
            f"{lost}; run more cells"
        )
    logs_GI = np.array([[math.log2(cell.at[name]) for name in varying] for cell in cells])
    center_I = logs_GI.mean(axis=0)
    terms_GK = np.column_stack([np.ones(len(cells)), logs_GI - center_I])
    if np.linalg.cond(terms_GK / np.linalg.norm(terms_GK, axis=0)) > 1e6:
        raise UserError(
            f"{' and '.join(varying)} vary together in all cells, so that the exponents of the "
            f"best {_NAMES[axis]} cannot be told apart; add cells of another D/N"
        )
    best_G = np.array([math.log2(cell.surface.best[axis]) for cell in cells])
    column = [cell.surface.axes.index(axis) for cell in cells]
    drawn_SG = np.stack(
        [cell.surface.best_SA[:, i] for cell, i in zip(cells, column, strict=True)], axis=1
    )
    fitted_K = np.linalg.lstsq(terms_GK, best_G, rcond=None)[0]
    samples = np.full((len(drawn_SG), needed), np.nan)
    for s, (drawn_G, weight_G) in enumerate(zip(drawn_SG, weights_SG, strict=True)):
        used_G = (weight_G > 0) & np.isfinite(drawn_G)
        root_G = np.sqrt(weight_G[used_G].astype(np.float64))
        if np.linalg.matrix_rank(terms_GK[used_G]) == needed:
            samples[s] = np.linalg.lstsq(
                terms_GK[used_G] * root_G[:, None], drawn_G[used_G] * root_G, rcond=None
            )[0]
    residual_G = best_G - terms_GK @ fitted_K
    return PowerLaw(
        inputs=varying,
        values={name: float(v) for name, v in _values(fitted_K, varying, center_I).items()},
        samples=_values(samples.T, varying, center_I),
        octaves=float(np.sqrt(np.mean(residual_G**2))),
    )


def _values(coefficients: Any, inputs: Sequence[str], center_I: Array) -> dict[str, Any]:
    """c, a and b from the coefficients of the centered regression ([K] or [K, S])."""
    level = coefficients[0]
    for index in range(len(inputs)):
        level = level - coefficients[1 + index] * center_I[index]
    exponents = {name: np.zeros_like(level) for name in _EXPONENTS.values()}
    for index, name in enumerate(inputs):
        exponents[_EXPONENTS[name]] = coefficients[1 + index]
    return {"c": 2.0**level, **exponents}


def _power(values: Mapping[str, Any], inputs: Sequence[str], at: Mapping[str, float]) -> Any:
    log2 = np.log2(values["c"])
    for name in inputs:
        assert name in at, f"the law needs {name}"
        log2 = log2 + values[_EXPONENTS[name]] * math.log2(at[name])
    return 2.0**log2


def _interval(values: Array, level: float) -> tuple[float, float]:
    kept = values[np.isfinite(values)]
    if len(kept) <= len(values) / 2:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def _law_json(law: PowerLaw) -> dict[str, Any]:
    return {
        "inputs": list(law.inputs),
        "values": dict(law.values),
        "intervals": {name: law.interval(name) for name in law.values},
        "octaves": law.octaves,
    }
