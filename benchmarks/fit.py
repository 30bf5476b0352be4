"""Measure a multi-start fit and its bootstrap against a plain scipy loop over the starts.

    python benchmarks/fit.py [--data svg_extracted_data.csv] [--scipy-starts 300]
                             [--bootstraps 4000] [--json out.json]

Fits Chinchilla's law from the 4,500 starts of Besiroglu et al. (arXiv 2404.10102) on one thread in
four ways: our default (the linear parameters of each start are solved for, which leaves 25 distinct
starts); ours from the unprojected starts with successive halving; the same with every search run to
its end; and scipy's L-BFGS-B with analytic gradients, one start after another. The scipy loop runs
on a random sample of the starts, and its time is scaled to all of them. The scipy bootstrap is
scaled likewise, with one search from the optimum per sample (ours uses three), and its optima are
compared with ours. ``--data`` is a CSV with columns N, D and loss, or one of the paper's points
("Model Size", "Training FLOP", loss), whose five highest losses are dropped as in the paper.
Without ``--data`` the rows are synthetic: 240 points of the same law with noise.

Seconds are CPU seconds of the process, which other load affects less than wall-clock time (printed
in the next column); quote numbers from an idle machine only. The floor is the time of our
exponentials and logarithms alone: (2 exp + 1 log) for each row and evaluation.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.engine import Fit, FitOptions, fit, predict
from allometry.laws.fit.problem import Problem
from allometry.laws.fit.refit import refit
from allometry.laws.fit.solver import Loss, minimize
from allometry.laws.fit.starts import starts_of
from allometry.laws.forms.dense import Chinchilla
from allometry.laws.observations import Observations

Array = NDArray[np.float64]
DELTA = 1e-3
BOOTSTRAPS = 4000
DROPPED = 5
FIT_GOAL_S, BOOTSTRAP_GOAL_S = 2.0, 60.0


def read(path: Path | None) -> tuple[Observations, str]:
    """Return the observations and a description of their source."""
    if path is None:
        draw = np.random.default_rng(0)
        rows = Observations.of(
            {"N": np.exp(draw.uniform(18, 23.5, 240)), "D": np.exp(draw.uniform(20.5, 26.5, 240))}
        )
        clean = predict(Chinchilla(), Chinchilla.published["besiroglu"], rows)
        loss = clean * np.exp(draw.normal(0.0, 5e-3, 240))
        return Observations.of({**rows.columns, "loss": loss}), "synthetic, 240 rows"
    with path.open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    loss = np.array([float(row["loss"]) for row in table])
    if "Model Size" not in table[0]:
        columns = {name: [float(row[name]) for row in table] for name in ("N", "D", "loss")}
        return Observations.of(columns), f"{path.name}, {len(table)} rows"
    sizes = np.array([float(row["Model Size"]) for row in table])
    flops = np.array([float(row["Training FLOP"]) for row in table])
    rows = Observations.of({"N": sizes, "D": flops / (6 * sizes), "loss": loss})
    kept = np.sort(np.argsort(loss)[:-DROPPED])
    return rows.take(kept), f"{path.name} without its {DROPPED} highest losses, {len(kept)} rows"


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result of a call, its CPU seconds and its wall-clock seconds."""
    wall, own = time.perf_counter(), time.process_time()
    found = run()
    return found, time.process_time() - own, time.perf_counter() - wall


def scipy_objective(rows: Observations, weights: Array) -> Callable[[Array], tuple[float, Array]]:
    """Return a plain function for the objective and its gradient in (ln E, ln A, ln B, α, β)."""
    log_n, log_d, log_loss = np.log(rows["N"]), np.log(rows["D"]), np.log(rows["loss"])

    def objective(x: Array) -> tuple[float, Array]:
        e, a, b, alpha, beta = x
        terms = np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d])
        top = terms.max(axis=0)
        parts = np.exp(terms - top)
        total = parts.sum(axis=0)
        residual = np.log(total) + top - log_loss
        size = np.abs(residual)
        clipped = np.minimum(size, DELTA)
        slope = weights * np.clip(residual, -DELTA, DELTA) * parts / total
        gradient = np.array(
            [
                slope[0].sum(),
                slope[1].sum(),
                slope[2].sum(),
                -(slope[1] * log_n).sum(),
                -(slope[2] * log_d).sum(),
            ]
        )
        return float((weights * clipped * (size - 0.5 * clipped)).sum()), gradient

    return objective


TIGHT = {"ftol": 1e-14, "gtol": 1e-10, "maxiter": 100_000, "maxfun": 100_000}
"""Tolerances for L-BFGS-B; with its defaults it stops before the optimum."""


def scipy_loop(
    rows: Observations, starts: Array, weights: Array, tight: bool = False
) -> tuple[float, Array]:
    """Return the best objective of L-BFGS-B over the starts, and all optima [S, 5].

    ``weights`` [S, n]: weight of each row for each start.
    """
    from scipy.optimize import minimize as scipy_minimize

    found = [
        scipy_minimize(
            scipy_objective(rows, weight),
            start,
            jac=True,
            method="L-BFGS-B",
            options=TIGHT if tight else {},
        )
        for start, weight in zip(starts, weights, strict=True)
    ]
    return min(float(one.fun) for one in found), np.array([one.x for one in found])


def floor_seconds(rows: Observations, evaluations: int) -> float:
    """Return the seconds of two exponentials and one logarithm for each row and evaluation."""
    block = np.random.default_rng(0).uniform(1.0, 3.0, (17, len(rows)))
    out = np.empty_like(block)
    repeats = 300

    def run() -> None:
        for _ in range(repeats):
            np.exp(block, out=out)
            np.exp(block, out=out)
            np.log(block, out=out)

    run()
    return timed(run)[1] / repeats / 17 * evaluations


def measure(path: Path | None, scipy_starts: int, bootstraps: int) -> dict[str, Any]:
    """Return seconds and optimum of each method."""
    rows, data = read(path)
    form = Chinchilla()
    problem = Problem(form, rows)
    starts = starts_of(problem, None, 0)
    fit(form, rows, FitOptions(starts=8))  # run one-time initialization
    ways: list[dict[str, Any]] = []

    def ours(name: str, options: FitOptions) -> Fit:
        found, own, wall = timed(lambda: fit(form, rows, options))
        ways.append({"way": name, "process_s": own, "wall_s": wall, "objective": found.objective})
        return found

    best = ours("ours: starts projected", FitOptions())
    ours("ours: starts as they stand, halving", FitOptions(projection=False))
    ours("ours: every search to its end", FitOptions(projection=False, survivors=None))
    halved = minimize(problem, starts, Loss(DELTA), survivors=64)
    floor = floor_seconds(rows, int(halved.iterations_S.sum()) + len(starts))
    draw = np.random.default_rng(0)
    sample = starts[draw.choice(len(starts), min(scipy_starts, len(starts)), replace=False)]
    scale = len(starts) / len(sample)
    for tight in (True, False):
        ones = np.ones((len(sample), len(rows)))
        (objective, _), own, wall = timed(
            lambda tight=tight, ones=ones: scipy_loop(rows, sample, ones, tight)
        )
        tolerances = "tight tolerances" if tight else "its tolerances"
        ways.append(
            {
                "way": f"scipy, {tolerances} ({len(sample)} starts, scaled)",
                "process_s": own * scale,
                "wall_s": wall * scale,
                "objective": objective,
            }
        )
    return {
        "data": data,
        "starts": len(starts),
        "fits": ways,
        "floor_s": floor,
        "values": best.values,
        "bootstraps": bootstraps,
        "bootstrap": measure_bootstrap(best, bootstraps, len(sample)),
    }


def measure_bootstrap(best: Fit, samples: int, scipy_samples: int) -> list[dict[str, Any]]:
    """Return the bootstrap's seconds, and how far scipy's objectives are above ours."""
    rows = best.observations
    problem = best.problem()
    _, own, wall = timed(lambda: bootstrap(best, samples))
    found: list[dict[str, Any]] = [
        {"way": "ours: three searches a sample", "process_s": own, "wall_s": wall, "excess": 0.0}
    ]
    draw = np.random.default_rng(0)
    even = np.full(len(rows), 1 / len(rows))
    weights = draw.multinomial(len(rows), even, scipy_samples).astype(float)
    center = problem.coordinates(best.values)
    ours = refit(problem, Loss(DELTA), center, weights, 2, 0)
    for tight in (True, False):
        (_, theirs), own, wall = timed(
            lambda tight=tight: scipy_loop(
                rows, np.tile(center, (scipy_samples, 1)), weights, tight
            )
        )
        gaps = []
        for weight, x, y in zip(weights, theirs, ours, strict=True):
            objective = scipy_objective(rows, weight)
            gaps.append(objective(x)[0] / objective(y)[0] - 1.0)
        found.append(
            {
                "way": f"scipy from the optimum, {'tight' if tight else 'its'} tolerances (scaled)",
                "process_s": own * samples / scipy_samples,
                "wall_s": wall * samples / scipy_samples,
                "excess": float(np.median(gaps)),
                "least_excess": float(min(gaps)),
                "largest_excess": float(max(gaps)),
            }
        )
    return found


def main() -> None:
    """Run the measurements, print a table and write ``--json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--scipy-starts", type=int, default=300)
    parser.add_argument("--bootstraps", type=int, default=BOOTSTRAPS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.data, arguments.scipy_starts, arguments.bootstraps)
    reference = found["fits"][-1]["process_s"]
    print(f"{found['data']}; {found['starts']} starts")
    print(f"{'way':46}{'process s':>10}{'wall s':>10}{'objective':>14}{'x scipy':>9}")
    for way in found["fits"]:
        print(
            f"{way['way']:46}{way['process_s']:10.2f}{way['wall_s']:10.2f}"
            f"{way['objective']:14.8f}{reference / way['process_s']:9.1f}"
        )
    print(f"floor of the fit with halving, exponentials and logs alone: {found['floor_s']:.2f} s")
    print(f"\n{found['bootstraps']} bootstraps: median excess of objectives over ours")
    for way in found["bootstrap"]:
        print(f"{way['way']:52}{way['process_s']:10.2f}{way['wall_s']:10.2f}{way['excess']:+12.1e}")
    fit_s, bootstrap_s = found["fits"][1]["process_s"], found["bootstrap"][0]["process_s"]
    for what, seconds, goal in (
        ("all starts as they stand", fit_s, FIT_GOAL_S),
        (f"{found['bootstraps']} bootstraps", bootstrap_s, BOOTSTRAP_GOAL_S),
    ):
        met = "met" if seconds < goal else "NOT MET"
        print(f"goal for {what}, below {goal:g} process seconds: {met}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
