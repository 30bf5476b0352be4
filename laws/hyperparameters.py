"""Laws of the best learning rate and batch size over sizes and horizons, from sweeps.

Two steps: the optimum of each cell (the runs of one N and D) is fitted by ``laws.surfaces``; then
the logs of the optima are regressed linearly on ln N and ln D.
"""

# G cells, I inputs that vary, K = I + 1 coefficients, S bootstrap samples

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from allometry.configs.errors import UserError
from allometry.laws.observations import Observations
from allometry.laws.surfaces import AXIS_NAMES, Array, Surface, fit_surface, percentiles

EXPONENTS = {"N": "a", "D": "b"}
PairLaw = Callable[[float, float], tuple[float, float]]
"""Law from (N, D) to (learning rate, batch size in tokens)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Name of a cell, its N and D, and its surface."""

    name: str
    at: Mapping[str, float]
    surface: Surface


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """Power law value = c N^a D^b; the exponent of an input that the law does not have is 0.

    ``values`` as read by the forms ``learning_rate_law`` and ``batch_law``; ``samples``: the values
    of each bootstrap sample. ``octaves``: RMS over cells of log2(optimum / law); ``misfit``: the
    part of it that the noise of runs does not explain (0 if there are as many coefficients as
    cells: the misfit is then unknown, and intervals only include the noise of runs).
    """

    inputs: tuple[str, ...]
    values: Mapping[str, float]
    samples: Mapping[str, Array]
    octaves: float
    misfit: float

    def predict(self, **at: float) -> float:
        """Return the value at N=..., D=...."""
        return float(self._power(self.values, at))

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Return the percentile interval of ``c``, ``a`` or ``b``."""
        return percentiles(self.samples[name], level)

    def predict_interval(self, level: float = 0.95, **at: float) -> tuple[float, float]:
        """Return the percentile interval of the law's value at N=..., D=...."""
        return percentiles(np.asarray(self._power(self.samples, at)), level)

    def to_json(self) -> dict[str, Any]:
        """Return values and 95 % intervals, for JSON."""
        return {
            "inputs": list(self.inputs),
            "values": dict(self.values),
            "intervals": {name: self.interval(name) for name in self.values},
            "octaves": self.octaves,
            "misfit": self.misfit,
        }

    def _power(self, values: Mapping[str, Any], at: Mapping[str, float]) -> Any:
        log2 = np.log2(values["c"])
        for name in self.inputs:
            assert name in at, f"the law needs {name}"
            log2 = log2 + values[EXPONENTS[name]] * math.log2(at[name])
        return 2.0**log2


@dataclass(frozen=True, slots=True)
class HyperparameterLaw:
    """Laws of the best learning rate and batch size, and the cells to which they are fitted.

    A law is None if its quantity did not vary in every cell. ``left_out``: cells without an
    optimum, with reasons.
    """

    rate: PowerLaw | None
    batch: PowerLaw | None
    cells: tuple[Cell, ...]
    left_out: Mapping[str, str]

    def pair(self, n: float, d: float) -> tuple[float, float]:
        """Return the best learning rate and batch size at N and D; 1 if it did not vary."""
        laws = (self.rate, self.batch)
        rate, batch = (1.0 if law is None else law.predict(N=n, D=d) for law in laws)
        return rate, batch

    def octaves_from(self, law: PairLaw) -> dict[str, tuple[float, float]]:
        """Return log2(optimum / law(N, D)) of learning rate and batch size by the cell's name.

        For a quantity that did not vary, its single value is compared with the law.
        """
        octaves = {}
        for cell in self.cells:
            (rate, batch), best = law(cell.at["N"], cell.at["D"]), cell.surface.best
            octaves[cell.name] = (math.log2(best["lr"] / rate), math.log2(best["B"] / batch))
        return octaves

    def to_json(self) -> dict[str, Any]:
        """Return laws, cells with their 95 % intervals and left-out cells, for JSON."""
        cells = []
        for cell in self.cells:
            surface = cell.surface
            edges = {f"{axis}_interval": surface.interval(axis) for axis in surface.axes}
            cells.append({"name": cell.name, **cell.at, **surface.best, **edges})
        return {
            "rate": None if self.rate is None else self.rate.to_json(),
            "batch": None if self.batch is None else self.batch.to_json(),
            "cells": cells,
            "left_out": dict(self.left_out),
        }


def fit_hyperparameter_law(
    observations: Observations,
    *,
    rate_inputs: Sequence[str] = ("N", "D"),
    batch_inputs: Sequence[str] = ("D",),
    order: Literal[2, 3] = 2,
    within: float = 0.015,
    samples: int = 1000,
    seed: int = 0,
) -> HyperparameterLaw:
    """Return laws of the best learning rate and batch size, by columns N, D, lr, B and loss.

    Cells are the runs of one (N, D).

    Least squares of the logs of the cells' optima (Step Law, arXiv 2503.04715, has the same two
    laws of the best runs); ``order`` and ``within`` are arguments of ``fit_surface``. An input that
    is equal in all cells is left out of a law. A bootstrap sample draws runs in each cell and adds
    noise of the law's misfit to the optimum. Raises UserError: fewer cells have an optimum than a
    law has coefficients; N and D vary together, so that their exponents are not identified; or as
    ``fit_surface``.
    """
    cells, left_out = _cells(observations, order, within, samples, seed)
    laws = {}
    for axis, inputs in (("lr", rate_inputs), ("B", batch_inputs)):
        varied = all(axis in cell.surface.axes for cell in cells)
        laws[axis] = _fit_law(axis, inputs, cells, left_out, seed) if varied else None
    return HyperparameterLaw(laws["lr"], laws["B"], tuple(cells), left_out)


def sweep_optima(
    observations: Observations, *, order: Literal[2, 3] = 2, within: float = 0.015
) -> Observations:
    """Return a row for each cell: its N, D, best ``lr`` and ``B``, and the ``loss`` at the optimum.

    ``learning_rate_law`` and ``batch_law`` are fitted to these rows; each cell is a group. A column
    that did not vary in every cell is left out. ``conventions["left out"]`` lists the cells without
    an optimum, with reasons. Raises UserError: no cell has an optimum; or as ``fit_surface``.
    """
    cells, left_out = _cells(observations, order, within, 0, 0)
    axes = [axis for axis in AXIS_NAMES if all(axis in cell.surface.axes for cell in cells)]
    columns = {name: [cell.at[name] for cell in cells] for name in EXPONENTS}
    columns |= {axis: [cell.surface.best[axis] for cell in cells] for axis in axes}
    columns["loss"] = [cell.surface.loss for cell in cells]
    optima = Observations.of(columns, [cell.name for cell in cells])
    runs = sum(cell.surface.rows for cell in cells)
    how = f"the best of each of {len(cells)} sweeps, by a parabola through {runs} runs near it"
    about = {name: text for name, text in observations.conventions.items() if name in EXPONENTS}
    about |= dict.fromkeys(axes, how)
    about["loss"] = f"at the best of each sweep; {observations.conventions.get('loss', 'loss')}"
    parts = [part for part in (observations.conventions.get("left out"), _listed(left_out)) if part]
    about |= {"left out": "; ".join(parts)} if parts else {}
    return replace(optima, conventions=about)


def _cells(
    observations: Observations, order: Literal[2, 3], within: float, samples: int, seed: int
) -> tuple[list[Cell], dict[str, str]]:
    """Return the sweeps that have an optimum, and reasons for the others."""
    cells, left_out = [], {}
    options: dict[str, Any] = {"order": order, "within": within, "samples": samples}
    for index, (name, at, rows) in enumerate(_sweeps(observations)):
        try:
            surface = fit_surface(rows, seed=seed + index, **options)
        except UserError as error:
            raise UserError(f"cell {name}: {error}") from None
        if surface.problem is None:
            cells.append(Cell(name, at, surface))
        else:
            left_out[name] = surface.problem
    if not cells:
        raise UserError(f"no cell has an optimum: {_listed(left_out)}; run more around the best")
    return cells, left_out


def held_out_excess(
    observations: Observations, *, order: Literal[2, 3] = 2, within: float = 0.015
) -> dict[str, float]:
    """Return ``nearest_excess`` of each cell by the laws of all other sizes.

    A size is left out if fewer than two other sizes exist, or if these have no law.
    """
    excess: dict[str, float] = {}
    sizes = np.unique(observations["N"])
    for size in sizes if len(sizes) > 2 else ():
        held = observations["N"] == size
        others = observations.take(~held)
        try:
            law = fit_hyperparameter_law(others, order=order, within=within, samples=2)
        except UserError:
            continue
        excess |= nearest_excess(observations.take(held), law.pair)
    return excess


def nearest_excess(observations: Observations, law: PairLaw) -> dict[str, float]:
    """Return, by cell, the excess loss of the run nearest to ``law(N, D)`` over the best run.

    Relative to the best loss; nearest in log learning rate and log batch size; infinite for a run
    that diverged.
    """
    excess = {}
    for name, at, cell in _sweeps(observations):
        rate, batch = law(at["N"], at["D"])
        distance = np.log(cell["lr"] / rate) ** 2 + np.log(cell["B"] / batch) ** 2
        loss = np.where(np.isfinite(cell["loss"]), cell["loss"], np.inf)
        excess[name] = float(loss[np.argmin(distance)] / loss.min() - 1.0)
    return excess


def _sweeps(observations: Observations) -> Iterator[tuple[str, dict[str, float], Observations]]:
    """Yield each cell's name, its N and D, and its rows."""
    sizes, tokens = observations["N"], observations["D"]
    for n, d in sorted(set(zip(sizes.tolist(), tokens.tolist(), strict=True))):
        rows = observations.take((sizes == n) & (tokens == d))
        yield f"N={n:.4g} D={d:.4g}", {"N": n, "D": d}, rows


def _listed(left_out: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {why}" for name, why in left_out.items())


def _fit_law(
    axis: str, inputs: Sequence[str], cells: Sequence[Cell], left_out: Mapping[str, str], seed: int
) -> PowerLaw:
    varying = tuple(name for name in inputs if len({cell.at[name] for cell in cells}) > 1)
    needed = len(varying) + 1
    if not varying or len(cells) < needed:
        lost = f" (left out: {_listed(left_out)})" if left_out else ""
        raise UserError(
            f"a law of the best {AXIS_NAMES[axis]} over {' and '.join(inputs)} needs {needed} "
            f"cells that differ in them, at least 2, and {len(cells)} have an optimum{lost}; run "
            f"more"
        )
    logs_GI = np.array([[math.log2(cell.at[name]) for name in varying] for cell in cells])
    center_I = logs_GI.mean(axis=0)
    terms_GK = np.column_stack([np.ones(len(cells)), logs_GI - center_I])
    if np.linalg.cond(terms_GK / np.linalg.norm(terms_GK, axis=0)) > 1e6:
        raise UserError(
            f"{' and '.join(varying)} vary together in all cells, so that the exponents of the "
            f"best {AXIS_NAMES[axis]} cannot be told apart; add cells of another D/N"
        )
    best_G = np.array([math.log2(cell.surface.best[axis]) for cell in cells])
    solve_KG = np.linalg.pinv(terms_GK)
    fitted_K = solve_KG @ best_G
    residual_G = best_G - terms_GK @ fitted_K
    random = np.random.default_rng(seed)
    drawn_SG = np.stack([_optima(cell.surface, axis, random) for cell in cells], axis=1)
    freedom = len(cells) - needed
    unexplained = float(residual_G @ residual_G) / freedom if freedom else 0.0
    misfit = math.sqrt(max(0.0, unexplained - float(drawn_SG.var(axis=0).mean())))
    drawn_SG = drawn_SG + misfit * random.standard_normal(drawn_SG.shape)
    return PowerLaw(
        inputs=varying,
        values={key: float(v) for key, v in _values(fitted_K, varying, center_I).items()},
        samples=_values(solve_KG @ drawn_SG.T, varying, center_I),
        octaves=float(np.sqrt(np.mean(residual_G**2))),
        misfit=misfit,
    )


def _optima(surface: Surface, axis: str, random: np.random.Generator) -> Array:
    """Return log2 of the optima of a cell's samples; samples without one repeat another."""
    drawn_S = surface.best_SA[:, surface.axes.index(axis)]
    known = drawn_S[np.isfinite(drawn_S)]
    return np.where(np.isfinite(drawn_S), drawn_S, random.choice(known, len(drawn_S)))


def _values(coefficients: Array, inputs: Sequence[str], center_I: Array) -> dict[str, Any]:
    """Return c, a and b from the coefficients of the centered regression ([K] or [K, S])."""
    level = coefficients[0] - center_I @ coefficients[1:]
    exponents = {name: np.zeros_like(level) for name in EXPONENTS.values()}
    for index, name in enumerate(inputs):
        exponents[EXPONENTS[name]] = coefficients[1 + index]
    return {"c": 2.0**level, **exponents}
